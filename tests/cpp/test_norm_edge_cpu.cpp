// SPDX-License-Identifier: Apache-2.0
// cpu::norm and cpu::norm_bwd where numbers are hard (far from zero, huge, NaN, no eps), and calls
// that they refuse.
#include <limits>

#include "norm_cpu_support.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

TEST(NormCpuEdge, EpsIsInsideTheRoot) {
  Tensor x(DType::f32, {1, 4}), y(DType::f32, {1, 4});
  for (int i = 0; i < 4; ++i) x.set(i, 1.0);
  cpu::norm(plain(NormKind::rms, x, y, 3.0));
  for (int i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(static_cast<float>(y.get(i)), 0.5f);
}

TEST(NormCpuEdge, ConstantRowsGiveTheBias) {
  for (const DType dtype : kDTypes) {
    Tensor x(dtype, {2, 1000}), bias = Tensor(DType::f32, {1000}).fill(1), y(DType::f32, {2, 1000});
    for (int i = 0; i < 2000; ++i) x.set(i, i < 1000 ? 0.0 : 12345.678);
    NormFwd args = plain(NormKind::layer, x, y, 1e-12);
    args.bias = bias.ref();
    cpu::norm(args);
    for (int i = 0; i < 2000; ++i) ASSERT_EQ(y.get(i), bias.get(i % 1000)) << i;
  }
}

// One ulp of the mean is a thousandth of the deviation here.
TEST(NormCpuEdge, LayerNormOfRowsFarFromZero) {
  for (const std::int64_t n : {100, 4096, 100'000}) {
    Problem p({.kind = NormKind::layer, .weight = true}, {0, 0}, 2, n);
    p.x.fill(3, 1e4);
    cpu::norm(p.fwd());
    const std::vector<double> expected = norm_reference(p, p.x.values(), p.weight, p.bias).value;
    for (std::int64_t e = 0; e < 2 * n; ++e) {
      ASSERT_NEAR(p.y.get(e), expected[e], 1e-6 * (1 + std::abs(expected[e])));
    }
    const std::vector<double> dx = grads_reference(p).dx.value;
    cpu::norm_bwd(p.bwd());
    for (std::int64_t e = 0; e < 2 * n; ++e) {
      ASSERT_NEAR(p.dx.get(e), dx[e], 2e-6 * (1 + std::abs(dx[e])));
    }
  }
}

// Statistics start from the mean of the first columns, which says nothing about the row here.
TEST(NormCpuEdge, LayerNormOfRowsThatBeginUnlikeTheRest) {
  constexpr std::int64_t n = 3000;
  for (const int odd_columns : {1, 16, 32, 33, 500}) {
    for (const double step : {0.5, 3.0, 1e2, 1e4, 1e6}) {
      Problem p({.kind = NormKind::layer, .weight = true}, {0, 0}, 2, n);
      for (std::int64_t c = 0; c < odd_columns; ++c) {
        p.x.set(c, p.x.get(c) + step);
        p.x.set(n + c, p.x.get(n + c) - step);
      }
      SCOPED_TRACE(std::to_string(odd_columns) + " columns off by " + std::to_string(step));
      expect_forward(p);
      expect_backward(p);
    }
  }
}

TEST(NormCpuEdge, NanAndInfinityStayInTheirRows) {
  constexpr std::int64_t m = 5, n = 70;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Tensor x = Tensor(DType::bf16, {m, n}).fill(1), clean(DType::bf16, {m, n}), y = clean;
    NormFwd args = plain(kind, x, clean);
    cpu::norm(args);
    x.set(1 * n + 3, std::nan(""));
    x.set(3 * n + 69, std::numeric_limits<double>::infinity());
    args.y = y.ref();
    cpu::norm(args);
    for (std::int64_t i = 0; i < m * n; ++i) {
      const std::int64_t row = i / n;
      if (row == 1 || i == 3 * n + 69 || (row == 3 && kind == NormKind::layer)) {
        EXPECT_TRUE(std::isnan(y.get(i))) << i;
      } else {
        EXPECT_EQ(y.get(i), row == 3 ? 0.0 : clean.get(i)) << i;
      }
    }
  }
}

TEST(NormCpuEdge, ZeroRowsWithoutEpsAreNanAndStayAlone) {
  constexpr std::int64_t m = 130, n = 70, zero = 77;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Problem p({.kind = kind, .weight = true}, {0, 0}, m, n);
    for (std::int64_t c = 0; c < n; ++c) p.x.set(zero * n + c, 0.0);
    NormFwd fwd = p.fwd();
    NormBwd bwd = p.bwd();
    fwd.eps = bwd.eps = 0.0;
    cpu::norm(fwd);
    cpu::norm_bwd(bwd);
    for (std::int64_t e = 0; e < m * n; ++e) {
      ASSERT_EQ(std::isnan(p.y.get(e)), e / n == zero) << e;
      ASSERT_EQ(std::isnan(p.dx.get(e)), e / n == zero) << e;
    }
    for (const double v : p.dweight.values()) ASSERT_TRUE(std::isnan(v));
  }
}

TEST(NormCpuEdge, LargeF16SumsDoNotOverflow) {
  constexpr std::int64_t n = 4096;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Tensor x(DType::f16, {1, n}), y(DType::f16, {1, n});
    for (std::int64_t i = 0; i < n; ++i) x.set(i, i % 2 ? 60000.0 : -60000.0);
    cpu::norm(plain(kind, x, y));
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(y.get(i), i % 2 ? 1.0 : -1.0);
  }
}

TEST(NormCpuEdge, RefusedStridesNameTheOpAndTheArgument) {
  const Features f = some_features().back();
  Tensor bad(DType::f32, {"", {4, 8}, {1, 4}});
  const std::pair<const char*, TensorRef NormFwd::*> forward[] = {{"x", &NormFwd::x},
                                                                  {"y", &NormFwd::y},
                                                                  {"residual", &NormFwd::residual},
                                                                  {"h", &NormFwd::h},
                                                                  {"y2", &NormFwd::y2}};
  for (const auto& [name, member] : forward) {
    Problem p(f, {0, 0}, 4, 8);
    NormFwd args = p.fwd();
    args.op = "fastkern::some_norm";
    args.*member = bad.ref();
    EXPECT_TRUE(contains(error_of([&] { cpu::norm(args); }),
                         std::string("fastkern::some_norm: ") + name + " must"));
  }
  const std::pair<const char*, TensorRef NormBwd::*> backward[] = {
      {"dy", &NormBwd::dy}, {"x", &NormBwd::x},     {"dx", &NormBwd::dx},
      {"dh", &NormBwd::dh}, {"dy2", &NormBwd::dy2}, {"dbranch", &NormBwd::dbranch}};
  for (const auto& [name, member] : backward) {
    Problem p(f, {0, 0}, 4, 8);
    NormBwd args = p.bwd();
    args.op = "fastkern::some_norm_bwd";
    args.*member = bad.ref();
    EXPECT_TRUE(contains(error_of([&] { cpu::norm_bwd(args); }),
                         std::string("fastkern::some_norm_bwd: ") + name + " must"));
  }
}

TEST(NormCpuEdge, EveryHeadHasTheSameNumberOfRows) {
  Problem p({.weight = true, .heads = true}, {0, 0}, 3, 8);
  EXPECT_TRUE(contains(error_of([&] { cpu::norm_bwd(p.bwd()); }), "heads"));
}

}  // namespace
}  // namespace fastkern
