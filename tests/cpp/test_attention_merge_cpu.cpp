// SPDX-License-Identifier: Apache-2.0
// cpu::merge_attention and cpu::attention_dropout_mask.
#include "attention_reference.h"

namespace fastkern {
namespace {

using test::AttentionCase;
using test::AttentionOutputs;
using test::AttentionProblem;
using test::contains;
using test::error_of;
using test::make_attention;
using test::part_of;
using test::permuted;
using test::Sizes;
using test::sizes_of;
using test::Tensor;

const double kNan = std::nan("");

class MergeCpu : public testing::TestWithParam<DType> {};

INSTANTIATE_TEST_SUITE_P(Types, MergeCpu, testing::ValuesIn(test::kDTypes),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

TEST(AttentionDropoutMask, IsThatOfPhilox) {
  const std::int64_t seed = 77;
  for (const std::int64_t columns : {1, 3, 4, 5, 130}) {
    for (const std::int64_t offset : {std::int64_t{0}, std::int64_t{-3}, INT64_MAX}) {
      Tensor mask(DType::i8, Sizes{2, 3, 70, columns});
      cpu::attention_dropout_mask(mask.ref(), {0.3, &seed, offset == 0 ? nullptr : &offset}, "op");
      for (std::int64_t e = 0; e < mask.numel(); ++e) {
        const std::uint64_t j = e % columns, i = e / columns % 70, head = e / columns / 70;
        const PhiloxWords words = philox(seed, offset + (head << 32), (i << 30) + j / 4);
        ASSERT_EQ(mask.get(e), words.word[j % 4] < dropout_threshold(0.3) ? 0.0 : 1.0) << e;
      }
      EXPECT_TRUE(mask.gaps_intact());
    }
  }
  Tensor flat(DType::i8, Sizes{5, 5});
  EXPECT_TRUE(contains(
      error_of([&] { cpu::attention_dropout_mask(flat.ref(), {0.3, &seed, nullptr}, "op"); }),
      "op: mask must have 4 dimensions, got 2"));
}

TEST(AttentionDropoutMask, SharesAndExtremes) {
  const std::int64_t seed = 5;
  const auto share = [&](double p) {
    Tensor mask(DType::i8, Sizes{1, 2, 100, 500});
    cpu::attention_dropout_mask(mask.ref(), {p, &seed, nullptr}, "op");
    double sum = 0.0;
    for (const double keep : mask.values()) sum += keep;
    return sum / 100'000.0;
  };
  EXPECT_EQ(share(0.0), 1.0);
  EXPECT_NEAR(share(0.25), 0.75, 0.01);
  EXPECT_NEAR(share(0.99), 0.01, 0.003);
}

struct MergeProblem {
  Tensor outs, lses;
  Sizes sizes;  // K, B, S, H, Dv
};

MergeProblem make_merge(const Sizes& sizes, DType dtype) {
  MergeProblem m{Tensor(dtype, sizes).fill(1),
                 Tensor(DType::f32, {sizes[0], sizes[1], sizes[3], sizes[2]}).fill(2, 3.0), sizes};
  for (std::int64_t i = 0; i < m.lses.numel(); ++i) {  // some saw nothing; every 7th in no part
    const std::int64_t place = i % (m.lses.numel() / sizes[0]);
    if (i % 3 == 1 || place % 7 == 5) m.lses.set(i, -INFINITY);
    if (i % 5 == 2) m.lses.set(i, m.lses.get(i) * 40.0);
  }
  return m;
}

void expect_merge(const MergeProblem& m) {
  const std::int64_t parts = m.sizes[0], batch = m.sizes[1], queries = m.sizes[2],
                     heads = m.sizes[3], width = m.sizes[4];
  Tensor out(m.outs.dtype(), Sizes{batch, queries, heads, width});
  Tensor lse(DType::f32, Sizes{batch, heads, queries});
  Tensor outs = m.outs, lses = m.lses;
  cpu::merge_attention(
      {.outs = outs.ref(), .lses = lses.ref(), .out = out.ref(), .lse = lse.ref()});
  test::Bounded expected_out(out), expected_lse(lse);
  for (std::int64_t r = 0; r < batch * queries * heads; ++r) {
    const std::int64_t h = r % heads, i = r / heads % queries, b = r / heads / queries;
    const std::int64_t at = (b * heads + h) * queries + i, stride = batch * heads * queries;
    double top = -INFINITY, sum = 0.0;
    for (std::int64_t k = 0; k < parts; ++k) top = std::max(top, m.lses.get(k * stride + at));
    for (std::int64_t k = 0; k < parts && top > -INFINITY; ++k) {
      sum += std::exp(m.lses.get(k * stride + at) - top);
    }
    const double total = sum > 0.0 ? top + std::log(sum) : -INFINITY;
    expected_lse.value[at] = total, expected_lse.noise[at] = 1.0 + std::abs(total);
    for (std::int64_t k = 0; k < parts; ++k) {
      const double of_part = m.lses.get(k * stride + at);
      if (of_part == -INFINITY) continue;
      const double weight = std::exp(of_part - total);
      for (std::int64_t c = 0; c < width; ++c) {
        const double term = weight * m.outs.get((k * batch * queries * heads + r) * width + c);
        expected_out.value[r * width + c] += term;
        expected_out.noise[r * width + c] += std::abs(term) * (1.0 + std::abs(of_part));
      }
    }
  }
  EXPECT_TRUE(close(out, expected_out)) << "out";
  EXPECT_TRUE(close(lse, expected_lse)) << "lse";
  EXPECT_TRUE(out.gaps_intact() && lse.gaps_intact());
}

void expect_merge_gradients(const MergeProblem& m, bool with_dlse) {
  const std::int64_t parts = m.sizes[0], batch = m.sizes[1], queries = m.sizes[2],
                     heads = m.sizes[3], width = m.sizes[4];
  const DType dtype = m.outs.dtype();
  Tensor outs = m.outs, lses = m.lses, douts(dtype, m.sizes), dlses(DType::f32, sizes_of(m.lses));
  Tensor dout = Tensor(dtype, Sizes{batch, queries, heads, width}).fill(3);
  Tensor dlse = Tensor(DType::f32, Sizes{batch, heads, queries}).fill(4);
  cpu::merge_attention_bwd({.dout = dout.ref(),
                            .dlse = with_dlse ? dlse.ref() : TensorRef{},
                            .outs = outs.ref(),
                            .lses = lses.ref(),
                            .douts = douts.ref(),
                            .dlses = dlses.ref()});
  test::Bounded expected_douts(douts), expected_dlses(dlses);
  const std::int64_t rows = batch * queries * heads;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t h = r % heads, i = r / heads % queries, b = r / heads / queries;
    const std::int64_t at = (b * heads + h) * queries + i, stride = batch * heads * queries;
    double top = -INFINITY, sum = 0.0, mean = 0.0, size = 0.0;
    for (std::int64_t k = 0; k < parts; ++k) top = std::max(top, m.lses.get(k * stride + at));
    if (top == -INFINITY) continue;  // no gradients
    std::vector<double> weight(parts), product(parts);
    for (std::int64_t k = 0; k < parts; ++k) {
      sum += weight[k] = std::exp(m.lses.get(k * stride + at) - top);
    }
    for (std::int64_t k = 0; k < parts; ++k) {
      weight[k] /= sum;
      for (std::int64_t c = 0; c < width; ++c) {
        const double g = dout.get(r * width + c), o = m.outs.get((k * rows + r) * width + c);
        const double noise = 1.0 + std::abs(m.lses.get(k * stride + at));
        if (weight[k] > 0.0) product[k] += g * o;
        size += weight[k] > 0.0 ? std::abs(g * o) * noise : 0.0;
        expected_douts.value[(k * rows + r) * width + c] = weight[k] * g;
        expected_douts.noise[(k * rows + r) * width + c] =
            weight[k] > 0.0 ? std::abs(weight[k] * g) * noise : 0.0;
      }
      mean += weight[k] * product[k];
    }
    const double of_lse = with_dlse ? dlse.get(at) : 0.0;
    for (std::int64_t k = 0; k < parts; ++k) {
      expected_dlses.value[k * stride + at] = weight[k] * (product[k] - mean + of_lse);
      expected_dlses.noise[k * stride + at] = weight[k] * (size + std::abs(of_lse)) + 1e-6;
    }
  }
  EXPECT_TRUE(close(douts, expected_douts)) << "douts";
  EXPECT_TRUE(close(dlses, expected_dlses, {.noise = 3e-6})) << "dlses";
  EXPECT_TRUE(douts.gaps_intact() && dlses.gaps_intact());
}

TEST_P(MergeCpu, Gradients) {
  const Sizes shapes[] = {{1, 2, 3, 4, 5}, {2, 1, 33, 2, 64}, {5, 2, 9, 3, 17}, {3, 2, 7, 1, 1}};
  for (const Sizes& sizes : shapes) {
    expect_merge_gradients(make_merge(sizes, GetParam()), true);
    expect_merge_gradients(make_merge(sizes, GetParam()), false);
  }
}

TEST_P(MergeCpu, Matches) {
  for (const Sizes& sizes : {Sizes{1, 2, 5, 3, 40},
                             {2, 1, 1, 1, 1},
                             {3, 2, 17, 4, 33},
                             {8, 1, 70, 2, 128},
                             {0, 1, 3, 2, 8},
                             {2, 0, 3, 2, 8}}) {
    SCOPED_TRACE(testing::PrintToString(sizes));
    expect_merge(make_merge(sizes, GetParam()));
  }
}

TEST_P(MergeCpu, OfStridedParts) {
  MergeProblem m = make_merge({3, 2, 17, 4, 33}, GetParam());
  m.outs = permuted(m.outs, {1, 3, 0, 2, 4}, 7, 1);
  m.lses = permuted(m.lses, {3, 0, 2, 1}, 2, 1);
  expect_merge(m);
}

/// What a part is that saw nothing does not matter, and one part alone is itself.
TEST_P(MergeCpu, LeavesOutPartsThatSawNothing) {
  MergeProblem m = make_merge({3, 2, 17, 4, 33}, GetParam());
  const std::int64_t rows = 2 * 17 * 4;
  for (std::int64_t at = 0; at < 3 * rows; ++at) {
    const std::int64_t r = at % rows, h = r / 17 % 4, i = r % 17, b = r / 68;
    if (m.lses.get(at) != -INFINITY) continue;
    const std::int64_t row = at / rows * rows + (b * 17 + i) * 4 + h;
    for (std::int64_t c = 0; c < 33; ++c) m.outs.set(row * 33 + c, kNan);
  }
  expect_merge(m);

  MergeProblem one = make_merge({1, 2, 17, 4, 33}, GetParam());
  for (std::int64_t i = 0; i < one.lses.numel(); ++i) one.lses.set(i, 0.1 * i - 5.0);
  Tensor out(GetParam(), Sizes{2, 17, 4, 33}), lse(DType::f32, Sizes{2, 4, 17});
  cpu::merge_attention(
      {.outs = one.outs.ref(), .lses = one.lses.ref(), .out = out.ref(), .lse = lse.ref()});
  EXPECT_TRUE(out.same_bits(part_of(one.outs, sizes_of(out), 0)));
  EXPECT_TRUE(lse.same_bits(part_of(one.lses, sizes_of(lse), 0)));
}

/// Parts of the keys, merged, are all of them.
TEST(MergeCpuEdge, PartsAreTheWhole) {
  const AttentionCase c{.name = "whole", .batch = 1, .keys = 150};
  const AttentionProblem whole = make_attention(c, DType::f32);
  Tensor outs(DType::f32, Sizes{3, 1, 70, 4, 40}), lses(DType::f32, Sizes{3, 1, 4, 70});
  const std::int64_t cuts[] = {0, 20, 20, 150};  // the second has no keys
  for (int k = 0; k < 3; ++k) {
    AttentionCase of_part = c;
    of_part.keys = cuts[k + 1] - cuts[k];
    AttentionProblem p = make_attention(of_part, DType::f32);
    p.k = part_of(whole.k, sizes_of(p.k), cuts[k] * 2 * 24);
    p.v = part_of(whole.v, sizes_of(p.v), cuts[k] * 2 * 40);
    const AttentionOutputs found = attention_on_cpu(p);
    for (std::int64_t i = 0; i < found.out.numel(); ++i) {
      outs.set(k * found.out.numel() + i, found.out.get(i));
    }
    for (std::int64_t i = 0; i < 280; ++i) lses.set(k * 280 + i, found.lse.get(i));
  }
  AttentionOutputs merged = blank_attention(whole);
  cpu::merge_attention(
      {.outs = outs.ref(), .lses = lses.ref(), .out = merged.out.ref(), .lse = merged.lse.ref()});
  expect_forward(merged, attention_reference(whole));
}

TEST(MergeCpuEdge, ErrorsNameOpAndArgument) {
  MergeProblem m = make_merge({1, 2, 5, 3, 40}, DType::f32);
  MergeFwd args{.outs = m.outs.ref(), .lses = m.lses.ref(), .out = {}, .lse = {}};
  args.outs.ndim = 4;
  const std::string op = "fastkern::merge_attention: ";
  EXPECT_TRUE(contains(error_of([&] { cpu::merge_attention(args); }), op + "outs must have 5"));
  args.outs.ndim = 5, args.lses.ndim = 5;
  EXPECT_TRUE(contains(error_of([&] { cpu::merge_attention(args); }), op + "lses must have 4"));
}

}  // namespace
}  // namespace fastkern
