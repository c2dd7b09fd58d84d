// SPDX-License-Identifier: Apache-2.0
// cpu::rms_norm and cpu::rms_norm_bwd against plain double loops.
#include <limits>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>

#include "fastkern/norm.h"
#include "support.h"

namespace fastkern {
namespace {

using test::dense_layout;
using test::Layout;
using test::Tensor;

constexpr double kEps = 1e-2;  // large enough that a missing one shows

const std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {1, 1},   {3, 5},    {6, 31},   {4, 32},     {5, 33},
    {130, 7}, {64, 257}, {2, 1000}, {200, 1024}, {1, 70'000}};

/// Every dtype of x with every dtype of weight, and without one.
using Mix = std::tuple<DType, std::optional<DType>>;

class RmsNormCpu : public testing::TestWithParam<Mix> {
 protected:
  DType dtype() const { return std::get<0>(GetParam()); }
  Tensor make_weight(std::int64_t n, std::int64_t stride = 1) const {
    const std::optional<DType> dtype = std::get<1>(GetParam());
    return dtype ? Tensor(*dtype, Layout{"weight", {n}, {stride}}).fill(7, 1.0) : Tensor();
  }
  Tensor make(const Layout& layout, unsigned seed) const {
    return Tensor(dtype(), layout).fill(seed);
  }
};

std::string mix_name(const testing::TestParamInfo<Mix>& mix) {
  const auto [dtype, weight] = mix.param;
  return std::string(name_of(dtype)) + "_" + (weight ? name_of(*weight) : "none");
}

INSTANTIATE_TEST_SUITE_P(Mixes, RmsNormCpu,
                         testing::Combine(testing::ValuesIn(test::kDTypes),
                                          testing::Values(std::nullopt, DType::f32, DType::f16,
                                                          DType::bf16)),
                         mix_name);

TEST_P(RmsNormCpu, ForwardMatches) {
  for (const auto& [m, n] : kShapes) {
    Tensor x = make(dense_layout({m, n}), 1), weight = make_weight(n), y(dtype(), {m, n});
    cpu::rms_norm({x.ref(), weight.ref(), y.ref(), kEps});
    EXPECT_TRUE(close(y, test::rms_norm_reference(x.values(), weight.values(), n, kEps)))
        << m << " x " << n;
    EXPECT_TRUE(y.gaps_intact());
  }
}

TEST_P(RmsNormCpu, BackwardMatches) {
  for (const auto& [m, n] : kShapes) {
    Tensor x = make(dense_layout({m, n}), 1), dy = make(dense_layout({m, n}), 2),
           weight = make_weight(n);
    const test::ExpectedGrads expected =
        test::rms_norm_bwd_reference(dy.values(), x.values(), weight.values(), n, kEps);
    Tensor dx(dtype(), {m, n}), dweight = weight.given() ? Tensor(weight.dtype(), {n}) : Tensor();
    cpu::rms_norm_bwd({.dy = dy.ref(),
                       .x = x.ref(),
                       .weight = weight.ref(),
                       .dx = dx.ref(),
                       .dweight = dweight.ref(),
                       .eps = kEps});
    EXPECT_TRUE(close(dx, expected.dx)) << m << " x " << n;
    EXPECT_TRUE(dx.gaps_intact());
    if (!weight.given()) continue;
    EXPECT_TRUE(close(dweight, expected.dweight)) << m << " x " << n;
    EXPECT_TRUE(dweight.gaps_intact());
  }
}

TEST_P(RmsNormCpu, AnyStridesGiveTheSameBits) {
  constexpr std::int64_t m = 6, n = 45;
  const Tensor x = make(dense_layout({m, n}), 1), dy = make(dense_layout({m, n}), 2),
               weight = make_weight(n);
  const auto run = [&](const Layout& of_x, const Layout& of_dy, const Layout& of_out,
                       std::int64_t weight_stride) {
    Tensor xs = Tensor(dtype(), of_x).copy_from(x), dys = Tensor(dtype(), of_dy).copy_from(dy);
    Tensor ws = make_weight(n, weight_stride), y(dtype(), of_out), dx(dtype(), of_out);
    Tensor dweight = weight.given() ? Tensor(weight.dtype(), {n}) : Tensor();
    cpu::rms_norm({xs.ref(), ws.ref(), y.ref(), kEps});
    cpu::rms_norm_bwd({.dy = dys.ref(),
                       .x = xs.ref(),
                       .weight = ws.ref(),
                       .dx = dx.ref(),
                       .dweight = dweight.ref(),
                       .eps = kEps});
    EXPECT_TRUE(y.gaps_intact()) << of_out.name;
    EXPECT_TRUE(dx.gaps_intact()) << of_out.name;
    return std::array{y, dx, dweight};
  };
  const std::vector<Layout> layouts = test::row_layouts(m, n);
  const auto layout = [&](std::size_t i) { return layouts[i % layouts.size()]; };
  const auto expected = run(layouts[0], layouts[0], layouts[0], 1);
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    for (const std::size_t shift : {0, 1, 3}) {
      const auto found =
          run(layout(i), layout(i + 2 * shift), layout(i + shift), shift == 1 ? 3 : 1);
      for (int output = 0; output < 3; ++output) {
        EXPECT_TRUE(found[output].same_bits(expected[output]))
            << "x " << layout(i).name << ", shift " << shift << ", output " << output;
      }
    }
  }
}

TEST_P(RmsNormCpu, EachGradientAloneHasTheSameBits) {
  constexpr std::int64_t m = 37, n = 65;
  Tensor x = make(dense_layout({m, n}), 1), dy = make(dense_layout({m, n}), 2),
         weight = make_weight(n);
  if (!weight.given()) return;  // one gradient only
  RmsNormBwd args{
      .dy = dy.ref(), .x = x.ref(), .weight = weight.ref(), .dx = {}, .dweight = {}, .eps = kEps};
  Tensor dx(dtype(), {m, n}), dweight(weight.dtype(), {n}), dx_alone = dx, dweight_alone = dweight;
  args.dx = dx.ref(), args.dweight = dweight.ref();
  cpu::rms_norm_bwd(args);
  args.dx = dx_alone.ref(), args.dweight = {};
  cpu::rms_norm_bwd(args);
  args.dx = {}, args.dweight = dweight_alone.ref();
  cpu::rms_norm_bwd(args);
  EXPECT_TRUE(dx_alone.same_bits(dx));
  EXPECT_TRUE(dweight_alone.same_bits(dweight));
}

TEST_P(RmsNormCpu, NoRowsOrNoColumns) {
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{0, 5}, {3, 0}, {0, 0}}) {
    Tensor x(dtype(), {m, n}), dy(dtype(), {m, n}), y(dtype(), {m, n}), dx(dtype(), {m, n});
    Tensor weight = make_weight(n),
           dweight = weight.given() ? Tensor(weight.dtype(), {n}) : Tensor();
    cpu::rms_norm({x.ref(), weight.ref(), y.ref(), kEps});
    cpu::rms_norm_bwd({.dy = dy.ref(),
                       .x = x.ref(),
                       .weight = weight.ref(),
                       .dx = dx.ref(),
                       .dweight = dweight.ref(),
                       .eps = kEps});
    EXPECT_TRUE(y.gaps_intact());
    EXPECT_TRUE(dx.gaps_intact());
    for (const double v : dweight.values()) EXPECT_EQ(v, 0.0);
  }
}

int pieces = 1;
int calls = 0;

/// `pieces` unequal parts, on threads of their own.
void split(std::int64_t count, std::int64_t, ParallelBody body, void* context) {
  ++calls;
  const int parts = static_cast<int>(std::min<std::int64_t>(pieces, count));
  const auto cut = [&](std::int64_t i) {
    return i == parts ? count : count * i * i / (parts * parts);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < parts; ++i)
    threads.emplace_back([&, i] { body(context, cut(i), cut(i + 1)); });
  for (std::thread& thread : threads) thread.join();
}

TEST_P(RmsNormCpu, ThreadsDoNotChangeTheResult) {
  constexpr std::int64_t m = 301, n = 640;
  Tensor x = make(dense_layout({m, n}), 1), dy = make(dense_layout({m, n}), 2),
         weight = make_weight(n);
  const auto run = [&] {
    Tensor y(dtype(), {m, n}), dx(dtype(), {m, n});
    Tensor dweight = weight.given() ? Tensor(weight.dtype(), {n}) : Tensor();
    cpu::rms_norm({x.ref(), weight.ref(), y.ref(), kEps});
    cpu::rms_norm_bwd({.dy = dy.ref(),
                       .x = x.ref(),
                       .weight = weight.ref(),
                       .dx = dx.ref(),
                       .dweight = dweight.ref(),
                       .eps = kEps});
    return std::array{y, dx, dweight};
  };
  const auto expected = run();
  set_parallel_for(split);
  for (const int count : {1, 2, 3, 7, 1000}) {
    pieces = count;
    calls = 0;
    const auto found = run();
    EXPECT_GE(calls, 2);
    for (int i = 0; i < 3; ++i)
      EXPECT_TRUE(found[i].same_bits(expected[i])) << count << " pieces, output " << i;
  }
  set_parallel_for(nullptr);
}

TEST(RmsNormCpuEdge, EpsIsInsideTheRoot) {
  Tensor x(DType::f32, {1, 4}), y(DType::f32, {1, 4});
  for (int i = 0; i < 4; ++i) x.set(i, 1.0);
  cpu::rms_norm({x.ref(), {}, y.ref(), 3.0});
  for (int i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(static_cast<float>(y.get(i)), 0.5f);
}

TEST(RmsNormCpuEdge, ZerosStayZeros) {
  Tensor x(DType::f16, {2, 40}), y(DType::f16, {2, 40});
  for (int i = 0; i < 80; ++i) x.set(i, 0.0);
  cpu::rms_norm({x.ref(), {}, y.ref(), kEps});
  for (const double v : y.values()) EXPECT_EQ(v, 0.0);
}

TEST(RmsNormCpuEdge, NanAndInfinityStayInTheirRows) {
  constexpr std::int64_t m = 5, n = 70;
  Tensor x = Tensor(DType::bf16, {m, n}).fill(1), clean(DType::bf16, {m, n}), y = clean;
  cpu::rms_norm({x.ref(), {}, clean.ref(), kEps});
  x.set(1 * n + 3, std::nan(""));
  x.set(3 * n + 69, std::numeric_limits<double>::infinity());
  cpu::rms_norm({x.ref(), {}, y.ref(), kEps});
  for (std::int64_t i = 0; i < m * n; ++i) {
    const std::int64_t row = i / n;
    if (row == 1 || i == 3 * n + 69) {
      EXPECT_TRUE(std::isnan(y.get(i))) << i;
    } else {
      EXPECT_EQ(y.get(i), row == 3 ? 0.0 : clean.get(i)) << i;
    }
  }
}

TEST(RmsNormCpuEdge, LargeF16SumsDoNotOverflow) {
  constexpr std::int64_t n = 4096;
  Tensor x(DType::f16, {1, n}), y(DType::f16, {1, n});
  for (std::int64_t i = 0; i < n; ++i) x.set(i, i % 2 ? 60000.0 : -60000.0);
  cpu::rms_norm({x.ref(), {}, y.ref(), kEps});
  for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(y.get(i), i % 2 ? 1.0 : -1.0);
}

TEST(RmsNormCpuEdge, RefusedStridesNameTheArgument) {
  Tensor x(DType::f32, {"", {4, 8}, {1, 4}}), y(DType::f32, {4, 8});
  const auto message_for = [](RmsNormFwd args) {
    return test::error_of([&] { cpu::rms_norm(args); });
  };
  EXPECT_TRUE(
      test::contains(message_for({x.ref(), {}, y.ref(), kEps}), "fastkern::rms_norm: x must"));
  EXPECT_TRUE(
      test::contains(message_for({y.ref(), {}, x.ref(), kEps}), "fastkern::rms_norm: y must"));
  RmsNormBwd args{.dy = x.ref(), .x = y.ref(), .weight = {}, .dx = {}, .dweight = {}};
  EXPECT_TRUE(test::contains(test::error_of([&] { cpu::rms_norm_bwd(args); }),
                             "fastkern::rms_norm_bwd: dy must"));
}

}  // namespace
}  // namespace fastkern
