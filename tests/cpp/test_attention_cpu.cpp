// SPDX-License-Identifier: Apache-2.0
// cpu::attention and cpu::attention_bwd against plain double loops, and what results must not
// depend on. Memory, sizes of 0 and errors: test_attention_edge_cpu.cpp.

#include "attention_cases.h"
#include "attention_reference.h"
#include "threads.h"

namespace fastkern {
namespace {

using test::pieces;
using test::split;

using test::AttentionCase;
using test::AttentionOutputs;
using test::AttentionProblem;
using test::make_attention;
using test::OnHost;
using test::part_of;
using test::sizes_of;
using test::Tensor;

void expect_matches(const AttentionProblem& p) {
  SCOPED_TRACE(p.text());
  const AttentionOutputs found = attention_on_cpu(p);
  expect_attention(found, attention_reference(p));
  expect_guards(found);
}

class AttentionCpu : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { set_parallel_for(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Types, AttentionCpu, testing::ValuesIn(test::kDTypes),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

TEST_P(AttentionCpu, Options) {
  for (const AttentionCase& c : test::attention_cases()) {
    expect_matches(make_attention(c, GetParam()));
  }
}

/// Around the tiles of a product and the blocks of a sequence, each with each.
TEST_P(AttentionCpu, Sizes) {
  const std::int64_t sizes[] = {1, 15, 16, 17, 63, 64, 65, 127, 129};
  int turn = 0;
  for (const std::int64_t queries : sizes) {
    for (const std::int64_t keys : sizes) {
      AttentionCase c{.name = "sizes",
                      .batch = 1,
                      .heads = 2,
                      .kv_heads = 1,
                      .queries = queries,
                      .keys = keys,
                      .d = 16,
                      .dv = 17};
      expect_matches(make_attention(c, GetParam()));
      c.right = 0;
      expect_matches(make_attention(c, GetParam()));
      c.left = queries / 2, c.right = 16, c.top_left = ++turn % 2 == 0;
      c.bias = test::kDTypes[turn % 3], c.dropout = 0.1, c.softcap = 2.0;
      expect_matches(make_attention(c, GetParam()));
    }
  }
}

TEST_P(AttentionCpu, HeadDimensions) {
  const std::int64_t dims[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 96, 128, 192, 256, 512};
  for (const std::int64_t d : dims) {
    AttentionCase c{.name = "dimensions", .batch = 1, .heads = 2, .queries = 67, .keys = 70};
    c.d = c.dv = d;
    expect_matches(make_attention(c, GetParam()));
    c.dv = 40, c.right = 0;
    expect_matches(make_attention(c, GetParam()));
    c.d = 24, c.dv = d;
    expect_matches(make_attention(c, GetParam()));
  }
}

/// More keys than a unit of work of the backward takes, with few and with many pairs of heads.
TEST_P(AttentionCpu, LongSequences) {
  for (const std::int64_t batch : {1, 20}) {
    expect_matches(make_attention({.name = "long",
                                   .batch = batch,
                                   .heads = batch == 1 ? 2 : 4,
                                   .kv_heads = batch == 1 ? 1 : 2,
                                   .queries = batch == 1 ? 900 : 70,
                                   .keys = batch == 1 ? 700 : 130,
                                   .d = 16,
                                   .dv = 8,
                                   .right = 0},
                                  GetParam()));
  }
}

TEST_P(AttentionCpu, LargeScores) {
  // lse near +-200, probabilities that round to 0 and 1.
  for (const double bias : {-200.0, 200.0}) {
    AttentionProblem p =
        make_attention({.name = "large", .scale = 6.0, .right = 0, .bias = DType::f32}, GetParam());
    p.bias.fill(6, bias);
    expect_matches(p);
  }
  expect_matches(make_attention({.name = "steep", .scale = 6.0, .softcap = 30.0}, GetParam()));
}

TEST_P(AttentionCpu, ThreadsDoNotChangeTheResult) {
  AttentionCase few = test::busy_case(), many = test::busy_case();
  few.batch = 1, few.heads = 2, few.kv_heads = 1, few.queries = 500, few.prefix = {9};
  many.heads = 24, many.kv_heads = 12, many.bias_dims = "";
  for (const AttentionCase& c : {few, many, test::packed_case()}) {
    const AttentionProblem p = make_attention(c, GetParam());
    set_parallel_for(nullptr);
    const AttentionOutputs expected = attention_on_cpu(p);
    set_parallel_for(split);
    for (const int count : {1, 3, 100}) {
      pieces = count;
      SCOPED_TRACE(p.text() + ", pieces " + std::to_string(count));
      expect_same(attention_on_cpu(p), expected);
    }
  }
}

/// An entry gives the same alone as among others, packed or not.
TEST_P(AttentionCpu, EntriesDoNotSeeTheirBatch) {
  const AttentionCase c{.name = "batch", .batch = 3, .left = 100, .right = 0};
  const AttentionProblem all = make_attention(c, GetParam());
  const AttentionOutputs expected = attention_on_cpu(all);
  AttentionCase lengths = c;
  lengths.queries = 210, lengths.keys = 450;
  lengths.start_q = {0, 70, 140, 210}, lengths.start_k = {0, 150, 300, 450};
  AttentionProblem packed = make_attention(lengths, GetParam());
  packed.q.copy_from(all.q), packed.k.copy_from(all.k), packed.v.copy_from(all.v);
  packed.dout.copy_from(all.dout);
  const AttentionOutputs of_packed = attention_on_cpu(packed);
  for (std::int64_t i = 0; i < of_packed.out.numel(); ++i) {
    ASSERT_EQ(of_packed.out.get(i), expected.out.get(i)) << i;
  }
  for (std::int64_t b = 0; b < 3; ++b) {
    AttentionCase alone = c;
    alone.batch = 1;
    AttentionProblem p = make_attention(alone, GetParam());
    const auto take = [&](Tensor& to, const Tensor& from) {
      to = part_of(from, sizes_of(to), b * to.numel());
    };
    take(p.q, all.q), take(p.k, all.k), take(p.v, all.v);
    take(p.dout, all.dout), take(p.dlse, all.dlse);
    const AttentionOutputs found = attention_on_cpu(p);
    for (const auto& [one, of] : {std::pair{&found.out, &expected.out},
                                  {&found.lse, &expected.lse},
                                  {&found.dq, &expected.dq}}) {
      EXPECT_TRUE(one->same_bits(part_of(*of, sizes_of(*one), b * one->numel())));
    }
    expect_attention(found, attention_reference(p));  // dk and dv may be cut in other places
  }
}

/// A query's result does not depend on how many come after it.
TEST_P(AttentionCpu, QueriesDoNotSeeEachOther) {
  const AttentionCase c{.name = "rows", .batch = 1, .queries = 100, .right = 9, .top_left = true};
  const AttentionProblem all = make_attention(c, GetParam());
  const AttentionOutputs expected = attention_on_cpu(all);
  for (const std::int64_t queries : {1, 2, 3, 8, 15, 16, 17, 63, 64, 65, 99}) {
    AttentionCase less = c;
    less.queries = queries;
    AttentionProblem p = make_attention(less, GetParam());
    p.q = part_of(all.q, sizes_of(p.q), 0), p.dout = part_of(all.dout, sizes_of(p.dout), 0);
    for (std::int64_t e = 0; e < 4 * queries; ++e) {
      p.dlse.set(e, all.dlse.get(e / queries * 100 + e % queries));
    }
    const AttentionOutputs found = attention_on_cpu(p);
    EXPECT_TRUE(found.out.same_bits(part_of(expected.out, sizes_of(p.dout), 0))) << queries;
    EXPECT_TRUE(found.dq.same_bits(part_of(expected.dq, sizes_of(p.q), 0))) << queries;
  }
}

TEST_P(AttentionCpu, RepeatedCallsGiveTheSame) {
  const AttentionProblem p = make_attention(test::busy_case(), GetParam());
  const AttentionOutputs expected = attention_on_cpu(p);
  for (int i = 0; i < 5; ++i) expect_same(attention_on_cpu(p), expected);
}

/// Each gradient alone is what it is among all.
TEST_P(AttentionCpu, WhatIsNotAskedForIsNotComputed) {
  AttentionProblem p = make_attention(test::busy_case(), GetParam());
  AttentionOutputs all = attention_on_cpu(p);
  for (const std::string wanted : {"dq", "dk", "dv", "dbias", "dsinks"}) {
    AttentionOutputs one = blank_attention(p);
    one.out = all.out, one.lse = all.lse;
    for (const auto& [name, t] : one.named()) {
      if (name[0] == 'd' && name != wanted) *t = Tensor();
    }
    cpu::attention_bwd(attention_bwd(p, one, OnHost{}));
    expect_same(one, all, {wanted});
    expect_guards(one);
  }
}

}  // namespace
}  // namespace fastkern
