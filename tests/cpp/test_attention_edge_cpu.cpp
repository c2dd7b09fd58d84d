// SPDX-License-Identifier: Apache-2.0
// cpu::attention and cpu::attention_bwd: strides, memory that is not theirs, queries that see
// nothing, sizes of 0, errors.
#include <functional>
#include <limits>

#include "attention_cases.h"
#include "attention_reference.h"

namespace fastkern {
namespace {

using test::AttentionCase;
using test::AttentionOutputs;
using test::AttentionProblem;
using test::contains;
using test::error_of;
using test::make_attention;
using test::OnHost;
using test::part_of;
using test::permuted;
using test::Sizes;
using test::sizes_of;
using test::Tensor;

const double kNan = std::numeric_limits<double>::quiet_NaN();

class AttentionEdge : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { set_parallel_for(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Types, AttentionEdge, testing::ValuesIn(test::kDTypes),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

/// What a view of other strides gives is what a dense tensor gives, bit by bit.
TEST_P(AttentionEdge, Strides) {
  const AttentionProblem dense = make_attention(test::busy_case(), GetParam());
  const AttentionOutputs expected = attention_on_cpu(dense);
  const std::vector<int> orders[] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {1, 0, 2, 3}, {2, 1, 0, 3}};
  for (const std::vector<int>& order : orders) {
    for (const std::int64_t padding : {0, 3, 16}) {
      AttentionProblem p = dense;
      for (Tensor* t : p.operands()) *t = permuted(*t, order, padding, padding % 2);
      expect_same(attention_on_cpu(p), expected);
    }
  }
  AttentionProblem fused = dense;  // heads of q, k and v side by side
  const std::int64_t width = 1000;
  fused.q = among_nans(fused.q, {"", sizes_of(fused.q), {70 * width, width, 24, 1}, 8});
  fused.k = among_nans(fused.k, {"", sizes_of(fused.k), {150 * width, width, 24, 1}, 104});
  fused.v = among_nans(fused.v, {"", sizes_of(fused.v), {150 * width, width, 40, 1}, 152});
  expect_same(attention_on_cpu(fused), expected);
}

/// Keys and values that all entries or all heads share.
TEST_P(AttentionEdge, ExpandedKeys) {
  for (const bool entries : {false, true}) {
    AttentionProblem p = make_attention(test::busy_case(), GetParam());
    for (Tensor* t : {&p.k, &p.v}) {
      const std::int64_t width = sizes_of(*t).back();
      *t = among_nans(
          *t, {"expanded",
               sizes_of(*t),
               {entries ? 0 : 150 * width, width * (entries ? 2 : 1), entries ? width : 0, 1}});
    }
    AttentionProblem copied = p;
    for (Tensor* t : {&copied.k, &copied.v}) *t = part_of(*t, sizes_of(*t), 0);
    expect_same(attention_on_cpu(p), attention_on_cpu(copied));
  }
}

TEST_P(AttentionEdge, StridesOfPackedTensors) {
  const AttentionProblem dense = make_attention(test::packed_case(), GetParam());
  const AttentionOutputs expected = attention_on_cpu(dense);
  for (const std::vector<int>& order : {std::vector{0, 1, 2}, {1, 0, 2}}) {
    AttentionProblem p = dense;
    for (Tensor* t : p.operands()) *t = permuted(*t, order, 5);
    expect_same(attention_on_cpu(p), expected);
  }
}

/// dout comes as autograd makes it: of a sum, one number; of a transposition, heads innermost.
TEST_P(AttentionEdge, StridesOfDout) {
  const AttentionProblem dense = make_attention(test::busy_case(), GetParam());
  const AttentionOutputs expected = attention_on_cpu(dense);
  for (const std::vector<int>& order :
       {std::vector{0, 1, 3, 2}, {3, 2, 1, 0}, {2, 0, 3, 1}, {1, 2, 3, 0}}) {
    AttentionProblem p = dense;
    p.dout = permuted(p.dout, order);
    expect_same(attention_on_cpu(p), expected);
  }
  const Sizes sizes = sizes_of(dense.dout);
  for (const Sizes& strides : {Sizes{0, 0, 0, 0}, {0, 0, 0, 1}, {0, 40, 0, 1}, {0, 1, 0, 0}}) {
    AttentionProblem p = dense;
    p.dout = among_nans(p.dout, {"expanded", sizes, strides, 3});
    AttentionProblem copied = p;
    copied.dout = Tensor(GetParam(), sizes).copy_from(p.dout);
    expect_same(attention_on_cpu(p), attention_on_cpu(copied));
  }
}

TEST_P(AttentionEdge, StridesOfBiasAndBlocks) {
  AttentionCase c = test::busy_case();
  c.queries = 200, c.block_size = 64, c.block_heads = true;
  for (const DType bias : {DType::f32, DType::bf16, DType::i8}) {
    c.bias = bias;
    const AttentionProblem dense = make_attention(c, GetParam());
    const AttentionOutputs expected = attention_on_cpu(dense);
    for (const std::vector<int>& order : {std::vector{0, 1, 2, 3}, {0, 1, 3, 2}, {3, 1, 2, 0}}) {
      AttentionProblem p = dense;
      p.bias = permuted(p.bias, order, 1, 1);
      p.blocks = permuted(p.blocks, {2, 0, 1}, 2, 1);
      expect_same(attention_on_cpu(p), expected);
    }
    // Expanded, not of size 1: the gradient has all elements.
    AttentionProblem p = dense, copied = dense;
    p.bias = among_nans(p.bias, {"expanded", sizes_of(p.bias), {0, 150, 0, 1}});
    copied.bias = Tensor(bias, sizes_of(p.bias)).copy_from(p.bias);
    expect_same(attention_on_cpu(p), attention_on_cpu(copied));
  }
}

/// Rows of all heads, counted through all entries.
void poison_rows(Tensor& t, std::int64_t first, std::int64_t last) {
  const Sizes sizes = sizes_of(t);
  const std::int64_t row = sizes[sizes.size() - 2] * sizes.back();
  for (std::int64_t i = first * row; i < last * row; ++i) t.set(i, kNan);
}

/// NaN in what no sequence has changes nothing; what belongs to no sequence has its fixed results.
TEST_P(AttentionEdge, UnusedRowsAreNotRead) {
  AttentionCase c = test::busy_case();
  c.used_q = {66, 3}, c.used_k = {129, 20};
  AttentionProblem p = make_attention(c, GetParam());
  const AttentionOutputs expected = attention_on_cpu(p);
  expect_attention(expected, attention_reference(p));
  for (std::int64_t b = 0; b < 2; ++b) {
    for (Tensor* t : {&p.k, &p.v}) poison_rows(*t, b * 150 + c.used_k[b], (b + 1) * 150);
    for (Tensor* t : {&p.q, &p.dout}) poison_rows(*t, b * 70 + c.used_q[b], (b + 1) * 70);
    for (std::int64_t e = 0; e < 4 * 70 * 150; ++e) {
      if (e / 150 % 70 >= c.used_q[b] || e % 150 >= c.used_k[b]) p.bias.set(b * 42'000 + e, kNan);
    }
    for (std::int64_t e = 0; e < 4 * 70; ++e) {
      if (e % 70 >= c.used_q[b]) p.dlse.set(b * 280 + e, kNan);
    }
  }
  expect_same(attention_on_cpu(p), expected);
}

TEST_P(AttentionEdge, RowsBetweenSequencesAreNotRead) {
  AttentionProblem p = make_attention(test::packed_case(), GetParam());
  const AttentionOutputs expected = attention_on_cpu(p);
  expect_attention(expected, attention_reference(p));
  for (Tensor* t : {&p.k, &p.v}) {
    poison_rows(*t, 90, 100);
    poison_rows(*t, 250, 260);
  }
  for (Tensor* t : {&p.q, &p.dout}) {
    poison_rows(*t, 0, 3);
    poison_rows(*t, 149, 150);
  }
  expect_same(attention_on_cpu(p), expected);
  for (std::int64_t e = 0; e < 3 * 4 * 40; ++e) EXPECT_EQ(expected.out.get(e), 0.0);
  for (const std::int64_t i : {0, 2, 149}) EXPECT_EQ(expected.lse.get(i), -INFINITY);
}

TEST_P(AttentionEdge, QueriesThatSeeNothing) {
  AttentionCase c{.name = "nothing", .queries = 150, .keys = 70, .right = 0};
  for (const bool sinks : {false, true}) {
    if (sinks) c.sinks = DType::f32;
    const AttentionProblem p = make_attention(c, GetParam());
    const AttentionOutputs found = attention_on_cpu(p);
    expect_attention(found, attention_reference(p));
    for (std::int64_t i = 0; i < 80; ++i) {
      for (std::int64_t e = 0; e < 4 * 40; ++e) ASSERT_EQ(found.out.get(i * 160 + e), 0.0);
      for (std::int64_t e = 0; e < 4 * 24; ++e) ASSERT_EQ(found.dq.get(i * 96 + e), 0.0);
      ASSERT_EQ(found.lse.get(i), sinks ? p.sinks.get(0) : -INFINITY);
    }
  }
  // All of them: a mask of zeros.
  AttentionProblem none = make_attention({.name = "none", .bias = DType::i8}, GetParam());
  for (std::int64_t i = 0; i < none.bias.numel(); ++i) none.bias.set(i, 0);
  const AttentionOutputs found = attention_on_cpu(none);
  for (const double lse : found.lse.values()) EXPECT_EQ(lse, -INFINITY);
  for (const Tensor* t : {&found.out, &found.dq, &found.dk, &found.dv}) {
    for (const double value : t->values()) ASSERT_EQ(value, 0.0);
  }
}

/// A bias of -inf is a mask.
TEST_P(AttentionEdge, BiasOfMinusInfinityIsAMask) {
  AttentionProblem mask = make_attention({.name = "mask", .bias = DType::i8}, GetParam());
  for (std::int64_t j = 0; j < 150; ++j) mask.bias.set(j, 0);  // a query that sees nothing
  AttentionProblem bias = make_attention({.name = "bias", .bias = DType::f32}, GetParam());
  for (std::int64_t i = 0; i < bias.bias.numel(); ++i) {
    bias.bias.set(i, mask.bias.get(i) == 0.0 ? -INFINITY : 0.0);
  }
  expect_same(attention_on_cpu(bias), attention_on_cpu(mask), {"out", "lse", "dq", "dk", "dv"});
}

TEST_P(AttentionEdge, Empty) {
  const AttentionCase cases[] = {
      {.name = "no keys", .keys = 0, .bias = DType::f32},
      {.name = "no keys, sinks", .keys = 0, .sinks = DType::f32},
      {.name = "no queries", .queries = 0},
      {.name = "no queries of many heads", .heads = 40, .kv_heads = 20, .queries = 0},
      {.name = "no queries, bias", .queries = 0, .bias = DType::f32, .sinks = DType::f32},
      {.name = "no queries, bias for all", .queries = 0, .bias = DType::f32, .bias_dims = ""},
      {.name = "no entries", .batch = 0, .sinks = DType::f32},
      {.name = "no entries, bias for all", .batch = 0, .bias = DType::f32, .bias_dims = ""},
      {.name = "no heads", .heads = 0},
      {.name = "no heads at all", .heads = 0, .kv_heads = 0},
      {.name = "packed, no entries", .batch = 0, .start_q = {0}, .start_k = {0}},
      {.name = "packed, no queries", .queries = 0, .start_q = {0, 0, 0}, .start_k = {0, 5, 150}},
      {.name = "packed, no keys", .keys = 0, .start_q = {0, 5, 70}, .start_k = {0, 0, 0}},
      {.name = "packed, empty entries",
       .batch = 4,
       .start_q = {0, 0, 40, 40, 70},
       .start_k = {0, 30, 30, 30, 150}},
  };
  for (const AttentionCase& c : cases) {
    SCOPED_TRACE(c.name);
    const AttentionProblem p = make_attention(c, GetParam());
    const AttentionOutputs found = attention_on_cpu(p);
    expect_attention(found, attention_reference(p));
    expect_guards(found);
  }
}

/// Nonsense in the lengths: no result is promised, but nothing is written or read outside.
TEST_P(AttentionEdge, NonsenseLengths) {
  set_parallel_for([](std::int64_t count, std::int64_t, ParallelBody body, void* context) {
    body(context, 0, count);  // sequences may overlap
  });
  for (const bool used : {false, true}) {
    AttentionCase c = test::packed_case();
    c.start_q = {100, -50, 5000, 20}, c.start_k = {INT32_MAX, INT32_MIN, 700, 300};
    c.used_q.clear(), c.used_k.clear();
    if (used) c.used_q = {-9, 5, INT32_MAX}, c.used_k = {INT32_MAX, INT32_MIN, 3};
    c.prefix = {INT32_MIN, INT32_MAX, -1};
    AttentionProblem p = make_attention(c, GetParam());
    for (Tensor* t : p.operands()) *t = among_nans(*t, test::dense_layout(sizes_of(*t)));
    const AttentionOutputs found = attention_on_cpu(p);
    expect_guards(found);
    for (const Tensor* t : {&found.out, &found.dq, &found.dk, &found.dv}) {
      for (const double value : t->values()) ASSERT_TRUE(std::isfinite(value));
    }
  }
}

/// A NaN in a key reaches the queries that see it, and no others.
TEST_P(AttentionEdge, NanIsNotHidden) {
  AttentionProblem p =
      make_attention({.name = "nan", .batch = 1, .queries = 150, .right = 0}, GetParam());
  const AttentionOutputs clean = attention_on_cpu(p);
  p.k.set((100 * 2 + 1) * 24 + 5, kNan);  // key 100 of the second head, which heads 2 and 3 read
  const AttentionOutputs found = attention_on_cpu(p);
  for (std::int64_t i = 0; i < 150; ++i) {
    for (std::int64_t h = 0; h < 4; ++h) {
      const std::int64_t e = (i * 4 + h) * 40;
      if (h >= 2 && i >= 100) {
        EXPECT_TRUE(std::isnan(found.out.get(e))) << i << " " << h;
        EXPECT_TRUE(std::isnan(found.lse.get(h * 150 + i))) << i << " " << h;
      } else {
        EXPECT_EQ(found.out.get(e), clean.out.get(e)) << i << " " << h;
      }
    }
  }
}

std::string message_of(AttentionProblem p, const std::function<void(AttentionFwd&)>& change) {
  AttentionOutputs out = blank_attention(p);
  AttentionFwd args = attention_fwd(p, out, OnHost{});
  change(args);
  return error_of([&] { cpu::attention(args); });
}

TEST(AttentionErrors, NameOpAndArgument) {
  const AttentionProblem p = make_attention({.name = "errors"}, DType::f32);
  const AttentionProblem packed = make_attention(test::packed_case(), DType::f32);
  AttentionProblem biased =
      make_attention({.name = "bias", .bias = DType::f32, .block_size = 64}, DType::f32);
  const std::string op = "fastkern::flash_attn: ";
  const auto expect = [&](const AttentionProblem& of, const char* message,
                          const std::function<void(AttentionFwd&)>& change) {
    const std::string found = message_of(of, change);
    EXPECT_TRUE(contains(found, op + message)) << found;
  };
  expect(p, "q must have 3 or 4", [](AttentionFwd& a) { a.q.ndim = 2; });
  expect(p, "q must have 3 or 4", [](AttentionFwd& a) { a.q.ndim = 5; });
  expect(p, "k must have 4 dimensions", [](AttentionFwd& a) { a.k.ndim = 3; });
  expect(p, "k must have 4 dimensions", [](AttentionFwd& a) { a.k.ndim = 1; });
  expect(p, "v must have 4 dimensions", [](AttentionFwd& a) { a.v.ndim = 2; });
  expect(p, "v must have 2 heads, got 3", [](AttentionFwd& a) { a.v.sizes[2] = 3; });
  expect(p, "q must have a multiple of 2 heads, got 3", [](AttentionFwd& a) { a.q.sizes[2] = 3; });
  expect(p, "q must have a multiple of 0 heads",
         [](AttentionFwd& a) { a.k.sizes[2] = a.v.sizes[2] = 0; });
  expect(p, "k must have head dimension 24, got 23", [](AttentionFwd& a) { a.k.sizes[3] = 23; });
  expect(p, "start_q and start_k must be given if and only if",
         [&](AttentionFwd& a) { a.lengths.start_q = a.lengths.start_k = packed.c.start_q.data(); });
  expect(packed, "start_q and start_k must", [](AttentionFwd& a) { a.lengths.start_q = nullptr; });
  expect(packed, "start_q and start_k must", [](AttentionFwd& a) { a.lengths.start_k = nullptr; });
  expect(packed, "bias and blocks must not", [&](AttentionFwd& a) { a.bias = biased.bias.ref(); });
  for (const std::int64_t size : {0, -64, 32, 96}) {
    expect(biased, "block_size must be a multiple of 64, got ",
           [&](AttentionFwd& a) { a.mask.block_size = size; });
  }
  EXPECT_TRUE(contains(message_of(p,
                                  [](AttentionFwd& a) {
                                    a.op = "other::op";
                                    a.q.ndim = 2;
                                  }),
                       "other::op: q must"));
  AttentionProblem again = p;
  AttentionOutputs out = blank_attention(p);
  AttentionBwd bwd = attention_bwd(again, out, OnHost{});
  bwd.fwd.v.sizes[2] = 4;
  EXPECT_TRUE(contains(error_of([&] { cpu::attention_bwd(bwd); }), op + "v must have 2 heads"));
}

}  // namespace
}  // namespace fastkern
