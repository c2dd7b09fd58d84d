// SPDX-License-Identifier: Apache-2.0
// cpu::norm and cpu::norm_bwd with every feature, shape, layout, number of threads and type of
// output, against plain double loops and against each other.
#include <limits>
#include <optional>

#include "norm_cpu_support.h"
#include "threads.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class NormCpu : public testing::TestWithParam<Mix> {
 protected:
  Mix mix() const { return GetParam(); }
};

std::string mix_name(const testing::TestParamInfo<Mix>& mix) {
  constexpr const char* kSteps[] = {"_alone", "_up", "_down"};
  return std::string(name_of(mix.param.of(0))) + kSteps[mix.param.step];
}

INSTANTIATE_TEST_SUITE_P(Mixes, NormCpu,
                         testing::Values(Mix{0, 0}, Mix{1, 0}, Mix{2, 0}, Mix{0, 1}, Mix{1, 1},
                                         Mix{2, 1}, Mix{0, 2}, Mix{1, 2}, Mix{2, 2}),
                         mix_name);

TEST_P(NormCpu, EveryCombinationOfFeatures) {
  for (const Features& f : all_features()) {
    SCOPED_TRACE(f.text());
    Problem p(f, mix(), 6, 45);
    expect_forward(p);
    expect_backward(p);
    if (HasFailure()) return;
  }
}

TEST_P(NormCpu, ShapesOfAllSorts) {
  const std::pair<std::int64_t, std::int64_t> shapes[] = {
      {1, 1},    {3, 5},    {6, 31},    {4, 32},     {5, 33},    {130, 7},
      {64, 257}, {2, 1000}, {200, 512}, {33, 2'049}, {1, 70'000}};
  for (const auto& [m, n] : shapes) {
    for (const Features& f : some_features()) {
      if (f.heads && m % kHeads != 0) continue;
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + " " + f.text());
      Problem p(f, mix(), m, n);
      expect_forward(p);
      expect_backward(p);
      if (HasFailure()) return;
    }
  }
}

TEST_P(NormCpu, AnyStridesGiveTheSameBits) {
  constexpr std::int64_t m = 6, n = 45;
  const std::vector<Layout> layouts = row_layouts(m, n);
  for (const Features& f : some_features()) {
    Problem expected(f, mix(), m, n);
    cpu::norm(expected.fwd());
    cpu::norm_bwd(expected.bwd());
    for (std::size_t shift = 0; shift < layouts.size(); ++shift) {
      Problem found(f, mix(), m, n, layouts, shift);
      cpu::norm(found.fwd());
      cpu::norm_bwd(found.bwd());
      for (std::size_t i = 0; i < found.outputs().size(); ++i) {
        if (!found.outputs()[i]->given()) continue;
        EXPECT_TRUE(found.outputs()[i]->gaps_intact());
        EXPECT_TRUE(found.outputs()[i]->same_bits(*expected.outputs()[i]))
            << f.text() << ", shift " << shift << ", output " << i;
      }
    }
  }
}

TEST_P(NormCpu, EachGradientAloneHasTheSameBits) {
  const Features f = some_features().back();
  Problem all(f, mix(), 37, 65), alone(f, mix(), 37, 65);
  cpu::norm_bwd(all.bwd());
  TensorRef NormBwd::* const gradients[] = {&NormBwd::dx,    &NormBwd::dbranch,  &NormBwd::dweight,
                                            &NormBwd::dbias, &NormBwd::dweight2, &NormBwd::dbias2};
  for (TensorRef NormBwd::* const wanted : gradients) {
    NormBwd args = alone.bwd();
    for (TensorRef NormBwd::* const other : gradients) {
      if (other != wanted) args.*other = {};
    }
    cpu::norm_bwd(args);
  }
  for (std::size_t i = 3; i < all.outputs().size(); ++i) {
    EXPECT_TRUE(alone.outputs()[i]->same_bits(*all.outputs()[i])) << "output " << i;
  }
}

TEST_P(NormCpu, TheNormOfTheStreamHasTheBitsOfTheNormOfH) {
  for (const Features& f : some_features()) {
    if (!f.stream) continue;
    Problem p(f, mix(), 12, 77);
    cpu::norm(p.fwd());
    Tensor y(p.y.dtype(), {12, 77}), y2 = y;
    NormFwd args = plain(f.kind, p.stream(), y);
    args.weight = p.weight.ref(), args.bias = p.bias.ref(), args.weight_offset = f.weight_offset;
    cpu::norm(args);
    EXPECT_TRUE(y.same_bits(p.y)) << f.text();
    if (!f.second) continue;
    args.weight = p.weight2.ref(), args.bias = p.bias2.ref(), args.y = y2.ref();
    cpu::norm(args);
    EXPECT_TRUE(y2.same_bits(p.y2)) << f.text();
  }
}

TEST_P(NormCpu, EachHeadHasTheBitsOfACallOfItsOwn) {
  constexpr std::int64_t m = 14, n = 40;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Problem p({.kind = kind, .weight = true, .bias = true, .heads = true}, mix(), m, n);
    cpu::norm(p.fwd());
    cpu::norm_bwd(p.bwd());
    const auto of_head = [&](const Tensor& t, std::int64_t head) {
      Tensor out(t.dtype(), {t.numel() / n / kHeads, n});
      for (std::int64_t e = 0; e < out.numel(); ++e) {
        out.set(e, t.get((e / n * kHeads + head) * n + e % n));
      }
      return out;
    };
    for (std::int64_t head = 0; head < kHeads; ++head) {
      Problem alone({.kind = kind, .weight = true, .bias = true}, mix(), m / kHeads, n);
      alone.x = of_head(p.x, head), alone.dy = of_head(p.dy, head);
      alone.weight.copy_from(of_head(p.weight, head)), alone.bias.copy_from(of_head(p.bias, head));
      cpu::norm(alone.fwd());
      cpu::norm_bwd(alone.bwd());
      EXPECT_TRUE(alone.y.same_bits(of_head(p.y, head)));
      EXPECT_TRUE(alone.dx.same_bits(of_head(p.dx, head)));
      EXPECT_TRUE(alone.dweight.same_bits(of_head(p.dweight, head)));
      EXPECT_TRUE(alone.dbias.same_bits(of_head(p.dbias, head)));
    }
  }
}

TEST_P(NormCpu, NoRowsOrNoColumns) {
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{0, 5}, {4, 0}, {0, 0}}) {
    for (const Features& f : some_features()) {
      Problem p(f, mix(), m, n);
      cpu::norm(p.fwd());
      cpu::norm_bwd(p.bwd());
      for (const Tensor* t : p.outputs()) EXPECT_TRUE(t->gaps_intact());
      for (const Tensor* t : {&p.dweight, &p.dbias, &p.dweight2, &p.dbias2}) {
        for (const double v : t->values()) EXPECT_EQ(v, 0.0);
      }
    }
  }
}

TEST_P(NormCpu, ThreadsDoNotChangeTheResult) {
  constexpr std::int64_t m = 302, n = 640;
  for (const Features& f : some_features()) {
    Problem expected(f, mix(), m, n);
    cpu::norm(expected.fwd());
    cpu::norm_bwd(expected.bwd());
    set_parallel_for(split);
    for (const int count : {1, 3, 7, 1000}) {
      pieces = count;
      calls = 0;
      Problem found(f, mix(), m, n);
      cpu::norm(found.fwd());
      cpu::norm_bwd(found.bwd());
      EXPECT_GE(calls, 2);
      for (std::size_t i = 0; i < found.outputs().size(); ++i) {
        if (!found.outputs()[i]->given()) continue;
        EXPECT_TRUE(found.outputs()[i]->same_bits(*expected.outputs()[i]))
            << f.text() << ", " << count << " pieces, output " << i;
      }
    }
    set_parallel_for(nullptr);
  }
}

TEST_P(NormCpu, DroppedElementsAreZeroWhateverTheyWere) {
  for (const std::int64_t n : {45, 64, 130}) {
    Features f{.stream = true, .dropout = true};
    Problem p(f, mix(), 5, n);
    for (std::int64_t e = 0; e < p.x.numel(); ++e) {
      const double v = e % 2 == 0 ? std::nan("") : std::numeric_limits<double>::infinity();
      if (keep(f, e) == 0.0) p.x.set(e, v);
    }
    expect_forward(p);
    for (std::int64_t e = 0; e < p.x.numel(); ++e) {
      if (keep(f, e) == 0.0) {
        ASSERT_EQ(p.h.get(e), 0.0) << e;
      }
    }
  }
}

TEST_P(NormCpu, DropoutOfEverythingLeavesTheResidual) {
  Problem p({.stream = true, .residual = true, .dropout = true}, mix(), 4, 33);
  NormFwd args = p.fwd();
  args.dropout.p = 1.0;
  cpu::norm(args);
  Tensor rounded(p.h.dtype(), {4, 33});
  EXPECT_TRUE(p.h.same_bits(rounded.copy_from(p.residual)));
}

/// Quantised outputs lie in plain bytes: `Tensor` holds numbers that are computed with.
struct Quantised {
  std::vector<std::uint8_t> codes;
  std::vector<float> scale;
};

Quantised quantise(Problem& p, DType dtype, std::optional<float> static_scale = std::nullopt) {
  Quantised q{std::vector<std::uint8_t>(p.m * p.n, 0x55), std::vector<float>(p.m, -1.0f)};
  if (static_scale) q.scale = {*static_scale};
  NormFwd args = p.fwd();
  args.y = dense(q.codes.data(), dtype, p.m, p.n);
  args.scale = dense(q.scale.data(), DType::f32, q.scale.size());
  args.static_scale = static_scale.has_value();
  cpu::norm(args);
  return q;
}

std::uint8_t code_of(DType dtype, float v) {
  return dtype == DType::f8e4m3 ? from_float<f8e4m3>(v).bits
                                : static_cast<std::uint8_t>(from_float<i8>(v));
}

TEST_P(NormCpu, QuantisedOutputIsTheF32OutputRoundedOnce) {
  for (const DType dtype : {DType::f8e4m3, DType::i8}) {
    const float largest = dtype == DType::f8e4m3 ? 448.0f : 127.0f;
    for (Features f : some_features()) {
      if (f.second) f.second = f.in_place = false;
      Problem p(f, mix(), 8, 173);
      p.y = Tensor(DType::f32, {p.m, p.n});
      cpu::norm(p.fwd());
      const std::vector<double> y = p.y.values();
      const Quantised dynamic = quantise(p, dtype), fixed = quantise(p, dtype, 0.013f);
      EXPECT_EQ(fixed.scale[0], 0.013f);
      for (std::int64_t r = 0; r < p.m; ++r) {
        float max = 0.0f;
        for (std::int64_t c = 0; c < p.n; ++c) {
          max = std::max(max, std::abs(static_cast<float>(y[r * p.n + c])));
        }
        ASSERT_EQ(dynamic.scale[r], max / largest) << f.text();
        for (std::int64_t e = r * p.n; e < (r + 1) * p.n; ++e) {
          const float v = static_cast<float>(y[e]);
          ASSERT_EQ(dynamic.codes[e], code_of(dtype, v * (largest / max))) << f.text() << e;
          ASSERT_EQ(fixed.codes[e], code_of(dtype, v * (1.0f / 0.013f))) << f.text() << e;
        }
      }
    }
  }
}

TEST_P(NormCpu, QuantisedZeroNanAndTinyRows) {
  Problem p({}, mix(), 4, 50);
  for (std::int64_t c = 0; c < p.n; ++c) p.x.set(c, 0.0), p.x.set(2 * p.n + c, 0.0);
  p.x.set(1 * p.n + 7, std::nan(""));
  p.x.set(2 * p.n + 7, 0x1p-24);
  for (const DType dtype : {DType::f8e4m3, DType::i8}) {
    const Quantised q = quantise(p, dtype);
    EXPECT_EQ(q.scale[0], 0.0f);
    EXPECT_TRUE(std::isnan(q.scale[1]));
    EXPECT_GT(q.scale[2], 0.0f);
    EXPECT_TRUE(std::isfinite(q.scale[3]));
    const std::uint8_t top = dtype == DType::f8e4m3 ? 0x7e : 127;
    for (std::int64_t c = 0; c < p.n; ++c) {
      EXPECT_EQ(q.codes[c], 0);
      EXPECT_EQ(q.codes[p.n + c] & 0x7f, dtype == DType::f8e4m3 ? 0x7f : 0);
      EXPECT_EQ(q.codes[2 * p.n + c], c == 7 ? top : 0);
    }
  }
}

TEST(NormCpuEdge, OneScaleDoesNotServeTwoOutputs) {
  Problem p({.second = true}, {0, 0}, 2, 8);
  EXPECT_TRUE(contains(error_of([&] { quantise(p, DType::i8); }), "y2"));
}

}  // namespace
}  // namespace fastkern
