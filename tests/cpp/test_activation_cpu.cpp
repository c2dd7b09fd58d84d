// SPDX-License-Identifier: Apache-2.0
// cpu::gated, cpu::bias_act, cpu::dropout, cpu::bias_dropout_add and their gradients against plain
// double loops.
#include "activation_support.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

constexpr auto kRef = [](Tensor& tensor) { return tensor.ref(); };

void gated_on_cpu(const GatedProblem& p, GatedTensors& t) {
  cpu::gated(gated_fwd(p, kRef, t));
  cpu::gated_bwd(gated_bwd(p, kRef, t));
}

void bias_on_cpu(const BiasProblem& p, BiasTensors& t) {
  const Dropout dropout{std::max(p.p, 0.0), &kTestSeed, &kTestOffset};
  if (p.drops()) {
    cpu::bias_dropout_add({.x = t.x.ref(),
                           .bias = t.bias.ref(),
                           .residual = t.residual.ref(),
                           .y = t.y.ref(),
                           .dropout = dropout});
    cpu::bias_dropout_add_bwd(
        {.dy = t.dy.ref(), .dx = t.dx.ref(), .dbias = t.dbias.ref(), .dropout = dropout});
  } else {
    cpu::bias_act({.kind = p.kind, .x = t.x.ref(), .bias = t.bias.ref(), .y = t.y.ref()});
    cpu::bias_act_bwd({.kind = p.kind,
                       .dy = t.dy.ref(),
                       .x = t.x.ref(),
                       .bias = t.bias.ref(),
                       .dx = t.dx.ref(),
                       .dbias = t.dbias.ref()});
  }
}

const std::pair<std::int64_t, std::int64_t> kSizes[] = {{1, 1},   {3, 2},    {5, 33},   {2, 257},
                                                        {65, 31}, {2, 2047}, {2, 2049}, {1, 5000}};

TEST(ActivationCpu, GatedMatches) {
  for (const auto& [rows, n] : kSizes) {
    for (const GatedProblem& p : gated_problems(rows, n)) {
      GatedTensors t(p);
      gated_on_cpu(p, t);
      expect_gated(p, t);
      if (HasFailure()) return;
    }
  }
}

TEST(ActivationCpu, BiasMatches) {
  for (const auto& [rows, n] : kSizes) {
    for (const BiasProblem& p : bias_problems(rows, n)) {
      BiasTensors t(p);
      bias_on_cpu(p, t);
      expect_bias(p, t);
      if (HasFailure()) return;
    }
  }
}

TEST(ActivationCpu, StridesAndOffsetsChangeNoBit) {
  for (const GatedProblem& p : gated_problems(4, 1001)) {
    GatedTensors dense(p), strided(p, 3, 5);
    gated_on_cpu(p, dense);
    gated_on_cpu(p, strided);
    SCOPED_TRACE(p.text());
    EXPECT_TRUE(strided.y.same_bits(dense.y));
    EXPECT_TRUE(strided.da.same_bits(dense.da));
    EXPECT_TRUE(strided.y.gaps_intact() && strided.da.gaps_intact());
  }
  for (const BiasProblem& p : bias_problems(4, 1001)) {
    BiasTensors dense(p), strided(p, 3, 5);
    bias_on_cpu(p, dense);
    bias_on_cpu(p, strided);
    SCOPED_TRACE(p.text());
    EXPECT_TRUE(strided.y.same_bits(dense.y));
    EXPECT_TRUE(strided.dx.same_bits(dense.dx));
    EXPECT_TRUE(strided.dbias.same_bits(dense.dbias));
  }
}

TEST(ActivationCpu, DropoutKeepsWhatPhiloxSays) {
  for (const std::int64_t n : {1, 3, 2047, 2049, 10007}) {
    Tensor x(DType::f32, Sizes{1, n}), y(DType::f32, Sizes{1, n});
    for (std::int64_t i = 0; i < n; ++i) x.set(i, 2.0);
    cpu::dropout({.x = x.ref(), .y = y.ref(), .dropout = {0.25, &kTestSeed, &kTestOffset}});
    for (std::int64_t i = 0; i < n; ++i) {
      const bool kept = dropout_keeps(kTestSeed, kTestOffset, i, dropout_threshold(0.25));
      ASSERT_EQ(y.get(i), kept ? 2.0 * dropout_scale(0.25) : 0.0) << n << ' ' << i;
    }
    EXPECT_TRUE(y.gaps_intact());
  }
}

TEST(ActivationCpu, QuantisedSaturates) {
  float scale = 0.01f;
  for (const DType quant : {DType::f8e4m3, DType::i8}) {
    const GatedProblem p{.dtype = DType::bf16, .rows = 3, .n = 129};
    GatedTensors t(p);
    t.a.set(5, 3e4), t.b.set(5, -3e4);
    Tensor q(quant, Sizes{3, 129});
    GatedFwd args = gated_fwd(p, kRef, t);
    args.y = q.ref(), args.scale = dense(&scale, DType::f32, 1);
    cpu::gated(args);
    EXPECT_EQ(q.get(5), quant == DType::i8 ? -127.0 : -448.0);
    for (std::int64_t i = 0; i < 3 * 129; ++i) {
      const double y = activation(p.kind, t.a.get(i), p.numbers) * t.b.get(i) / scale;
      const double most = quant == DType::i8 ? 127.0 : 448.0, held = std::clamp(y, -most, most);
      const double half = quant == DType::i8 ? 0.5 : std::max(std::abs(held) / 16, 0x1p-10);
      EXPECT_LE(std::abs(q.get(i) - held), half * 1.001) << i;
    }
    EXPECT_TRUE(q.gaps_intact());
  }
}

TEST(ActivationCpu, PlansCoverEveryColumnAndRow) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (std::int64_t n = 1; n < 100'000; n += 1 + n / 7) {
      for (std::int64_t m = 1; m < 1'000'000; m += 1 + m / 2) {
        const ColumnPlan plan = column_plan(m, n, dtype, 4, true);
        EXPECT_GE(plan.strips * plan.columns, n);
        EXPECT_GE(plan.slices * plan.rows, m);
        EXPECT_LT((plan.slices - 1) * plan.rows, m);
        EXPECT_EQ(plan.lanes * plan.groups, kColumnThreads);
        EXPECT_LE(plan.slices, std::max<std::int64_t>(512, 2 * 3072 / plan.strips + 1));
      }
    }
  }
}

TEST(ActivationCpu, RefusesWhatItCannotRead) {
  float values[24] = {};
  BiasAct args{
      .x = dense(values, DType::f32, 2, 3, 4), .bias = {}, .y = dense(values, DType::f32, 2, 3, 4)};
  args.x.strides = {12, 1, 3};
  EXPECT_TRUE(contains(error_of([&] { cpu::bias_act(args); }),
                       "fastkern::bias_act: x must have at least one dimension, a dense last one"));
}

}  // namespace
}  // namespace fastkern
