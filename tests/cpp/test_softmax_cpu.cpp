// SPDX-License-Identifier: Apache-2.0
// cpu::softmax and cpu::softmax_bwd against plain double loops.
#include "softmax_support.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

TEST(SoftmaxCpu, Matches) {
  for (const auto& [rows, n] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                                {3, 2},
                                {2, 31},
                                {5, 33},
                                {3, 77},
                                {2, 511},
                                {3, 1000},
                                {2, 4095},
                                {2, 4097},
                                {1, 9001},
                                {1, 32000}}) {
    for (const SoftmaxProblem& p : softmax_problems(rows, n)) {
      SoftmaxTensors t(p);
      softmax_on_cpu(p, t);
      expect_softmax(p, t);
      if (HasFailure()) return;
    }
  }
}

TEST(SoftmaxCpu, StridesAndOffsetsChangeNoBit) {
  for (const SoftmaxProblem& p : softmax_problems(4, 1001)) {
    SoftmaxTensors dense(p), strided(p, 3, 5);
    softmax_on_cpu(p, dense);
    softmax_on_cpu(p, strided);
    SCOPED_TRACE(p.text());
    EXPECT_TRUE(strided.y.same_bits(dense.y));
    EXPECT_TRUE(strided.dx.same_bits(dense.dx));
    EXPECT_TRUE(strided.y.gaps_intact() && strided.dx.gaps_intact());
  }
}

TEST(SoftmaxCpu, MoreQueriesThanKeys) {
  const SoftmaxProblem p{.rows = 9, .n = 5, .queries = 9, .masked = true};
  SoftmaxTensors t(p);
  softmax_on_cpu(p, t);
  expect_softmax(p, t);
  for (std::int64_t i = 0; i < 4 * 5; ++i) EXPECT_EQ(t.y.get(i), 0.0) << i;
}

TEST(SoftmaxCpu, InfinitiesAsInTorch) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto results = [](SoftmaxKind kind, std::vector<double> x, bool masked = false) {
    const SoftmaxProblem p{
        .kind = kind, .rows = 1, .n = static_cast<std::int64_t>(x.size()), .masked = masked};
    SoftmaxTensors t(p);
    for (std::size_t i = 0; i < x.size(); ++i) t.x.set(i, x[i]);
    softmax_on_cpu(p, t);
    return t.y.values();
  };
  for (const double y : results(SoftmaxKind::softmax, {-kInfinity, -kInfinity}))
    EXPECT_TRUE(std::isnan(y));
  for (const double y : results(SoftmaxKind::softmax, {kInfinity, 1.0})) EXPECT_TRUE(std::isnan(y));
  for (const double y : results(SoftmaxKind::softmax, {-kInfinity, -kInfinity}, true))
    EXPECT_EQ(y, 0.0);
  EXPECT_EQ(results(SoftmaxKind::softmax, {-kInfinity, 3.0})[1], 1.0);
  EXPECT_EQ(results(SoftmaxKind::logsumexp, {-kInfinity, -kInfinity})[0], -kInfinity);
  EXPECT_EQ(results(SoftmaxKind::logsumexp, {kInfinity, -kInfinity, 1.0})[0], kInfinity);
  EXPECT_TRUE(std::isnan(results(SoftmaxKind::logsumexp, {kInfinity, std::nan("")})[0]));
  for (const double y : results(SoftmaxKind::log_softmax, {kInfinity, 1.0}))
    EXPECT_TRUE(std::isnan(y));
}

TEST(SoftmaxCpu, MaskRowsOfUpToThreeStrides) {
  float values[8] = {};
  TensorRef mask = dense(values, DType::f32, 2, 3, 4, 5, 7);
  MaskRows rows;
  mask.strides = {35, 0, 0, 7, 1};  // (B, 1, 1, S, T) seen as (B, H, K, S, T)
  ASSERT_TRUE(as_mask_rows(mask, rows));
  EXPECT_EQ(rows.start((1 * 12 + 7) * 5 + 3), 35 + 21);
  mask.strides = {0, 0, 0, 0, 1};
  ASSERT_TRUE(as_mask_rows(mask, rows));
  EXPECT_EQ(rows.start(119), 0);
  mask.strides = {500, 0, 100, 7, 1};
  EXPECT_FALSE(as_mask_rows(mask, rows));
}

TEST(SoftmaxCpu, PlansCoverEveryLength) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int operands : {1, 2}) {
      for (std::int64_t n = 1; n < 2'000'000; n += 1 + n / 50) {
        const Plan plan = cuda::softmax_plan(n, dtype, operands);
        if (!plan.resident) continue;
        const std::int64_t vector = 16 / size_of(dtype), vectors = (n + vector - 1) / vector;
        if (plan.shared_bytes == 0) {
          EXPECT_GE(plan.elements_per_thread * plan.threads_per_row, n);
          EXPECT_LE(plan.threads_per_block, 256);
        } else {
          EXPECT_GE(plan.shared_bytes * plan.blocks_per_row, 16 * operands * vectors);
          EXPECT_LE(plan.shared_bytes, 96 * 1024);
        }
      }
    }
  }
}

TEST(SoftmaxCpu, RefusesWhatItCannotRead) {
  float values[24] = {};
  SoftmaxFwd args{
      .x = dense(values, DType::f32, 2, 3, 4), .y = dense(values, DType::f32, 2, 3, 4), .mask = {}};
  args.x.strides = {12, 1, 3};
  EXPECT_TRUE(contains(error_of([&] { cpu::softmax(args); }),
                       "fastkern::softmax: x must have at least one dimension, a dense last one"));
}

}  // namespace
}  // namespace fastkern
