// SPDX-License-Identifier: Apache-2.0
// cpu::group_norm and cpu::group_norm_bwd against plain double loops, in both layouts.
#include <limits>
#include <tuple>

#include "group_norm_support.h"
#include "threads.h"

namespace fastkern {
namespace {

using test::calls;
using test::pieces;
using test::split;

using test::contains;
using test::dense_layout;
using test::error_of;
using test::GroupOutputs;
using test::GroupProblem;
using test::image_layout_of;
using test::Sizes;
using test::Tensor;

struct Case {
  Sizes sizes;
  std::int64_t groups;
};

const Case kCases[] = {
    {{1, 1}, 1},         {{3, 10}, 5},           {{2, 6, 1}, 2},       {{2, 6, 7}, 3},
    {{1, 4, 3, 5}, 4},   {{2, 35, 7, 7}, 7},     {{3, 64, 9, 11}, 32}, {{2, 15, 2, 3, 5}, 5},
    {{1, 3, 64, 65}, 1}, {{1, 320, 16, 16}, 32}, {{5, 2, 1, 1}, 2},    {{1, 2, 200, 211}, 1},
    {{1, 40'000}, 4},    {{40, 8, 4, 4}, 2},
};

using Mix = std::tuple<DType, int, Activation, bool>;

class GroupNormCpu : public testing::TestWithParam<Mix> {
 protected:
  GroupProblem make(const Case& c) const {
    const auto [dtype, affine, activation, channels_last] = GetParam();
    // Weight and bias of different types, and one of them alone.
    return test::make_group_problem(c.sizes, c.groups, dtype, test::kAffines[affine],
                                    test::kAffines[(affine + 2) % 4], activation);
  }
  test::Layout layout(const Sizes& sizes) const {
    return image_layout_of(sizes, std::get<3>(GetParam()) && sizes.size() > 2);
  }
};

std::string mix_name(const testing::TestParamInfo<Mix>& mix) {
  const auto [dtype, affine, activation, channels_last] = mix.param;
  return std::string(name_of(dtype)) + "_" + std::to_string(affine) +
         (activation == Activation::silu ? "_silu" : "_none") +
         (channels_last ? "_last" : "_first");
}

INSTANTIATE_TEST_SUITE_P(Mixes, GroupNormCpu,
                         testing::Combine(testing::ValuesIn(test::kDTypes), testing::Range(0, 4),
                                          testing::ValuesIn(test::kActivations), testing::Bool()),
                         mix_name);

TEST_P(GroupNormCpu, Matches) {
  for (const Case& c : kCases) {
    const GroupProblem problem = make(c);
    SCOPED_TRACE(problem.text());
    const GroupOutputs found = group_norm_on_cpu(problem, layout(c.sizes));
    expect_group_norm(found, group_norm_reference(problem));
    expect_guards(found);
    if (HasFailure()) return;
  }
}

TEST_P(GroupNormCpu, WithoutSavedStatisticsTheSameBits) {
  for (const Case& c : {kCases[5], kCases[11]}) {
    const GroupProblem problem = make(c);
    const GroupOutputs saved = group_norm_on_cpu(problem, layout(c.sizes), true);
    expect_same(group_norm_on_cpu(problem, layout(c.sizes), false), saved);
  }
}

TEST_P(GroupNormCpu, EachOutputAloneHasTheSameBits) {
  const Case& c = kCases[6];
  const GroupProblem problem = make(c);
  const GroupOutputs all = group_norm_on_cpu(problem, layout(c.sizes));
  Tensor x = in_layout(problem.x, layout(c.sizes)), dy = in_layout(problem.dy, layout(c.sizes));
  Tensor weight = problem.weight, bias = problem.bias;
  for (int output = 0; output < 5; ++output) {
    GroupOutputs one = blank_outputs(problem, layout(c.sizes));
    const auto want = [&](int index, Tensor& t) { return index == output ? t.ref() : TensorRef{}; };
    GroupNormFwd fwd{.x = x.ref(),
                     .weight = weight.ref(),
                     .bias = bias.ref(),
                     .y = want(0, one.y),
                     .stats = want(1, one.stats),
                     .num_groups = problem.groups,
                     .eps = problem.eps,
                     .activation = problem.activation};
    GroupNormBwd bwd{.dy = dy.ref(),
                     .x = x.ref(),
                     .weight = weight.ref(),
                     .bias = bias.ref(),
                     .stats = {},
                     .dx = want(2, one.dx),
                     .dweight = want(3, one.dweight),
                     .dbias = want(4, one.dbias),
                     .num_groups = problem.groups,
                     .eps = problem.eps,
                     .activation = problem.activation};
    cpu::group_norm(fwd);
    cpu::group_norm_bwd(bwd);
    const Tensor* const found[] = {&one.y, &one.stats, &one.dx, &one.dweight, &one.dbias};
    const Tensor* const expected[] = {&all.y, &all.stats, &all.dx, &all.dweight, &all.dbias};
    EXPECT_TRUE(found[output]->same_bits(*expected[output])) << "output " << output;
  }
}

TEST_P(GroupNormCpu, ThreadsDoNotChangeTheResult) {
  for (const Case& c : {Case{{3, 20, 45, 47}, 5}, Case{{9, 70, 8, 8}, 7}}) {
    const GroupProblem problem = make(c);
    const GroupOutputs expected = group_norm_on_cpu(problem, layout(c.sizes));
    set_parallel_for(split);
    for (const int count : {1, 2, 3, 7, 100}) {
      pieces = count;
      calls = 0;
      expect_same(group_norm_on_cpu(problem, layout(c.sizes)), expected);
      EXPECT_GE(calls, 2) << problem.text();
    }
    set_parallel_for(nullptr);
  }
}

/// A sample's result is the same alone as among others, also where several share a round.
TEST_P(GroupNormCpu, SamplesDoNotSeeTheirBatch) {
  const Sizes sizes{5, 12, 61, 67};
  const GroupProblem all = make({sizes, 3});
  const GroupOutputs expected = group_norm_on_cpu(all, layout(sizes));
  const std::int64_t size = all.x.numel() / sizes[0];
  for (const std::int64_t sample : {0, 3}) {
    GroupProblem one = make({{1, 12, 61, 67}, 3});
    for (std::int64_t i = 0; i < size; ++i) {
      one.x.set(i, all.x.get(sample * size + i));
      one.dy.set(i, all.dy.get(sample * size + i));
    }
    const GroupOutputs found = group_norm_on_cpu(one, layout(one.sizes));
    for (std::int64_t i = 0; i < size; ++i) {
      ASSERT_EQ(found.y.get(i), expected.y.get(sample * size + i)) << i;
      ASSERT_EQ(found.dx.get(i), expected.dx.get(sample * size + i)) << i;
    }
  }
}

TEST_P(GroupNormCpu, Empty) {
  for (const Case& c :
       {Case{{0, 6, 4, 4}, 3}, Case{{2, 0, 4}, 3}, Case{{2, 6, 0, 4}, 3}, Case{{0, 4}, 1}}) {
    const GroupProblem problem = make(c);
    const GroupOutputs found = group_norm_on_cpu(problem, dense_layout(c.sizes));
    for (const double v : found.dweight.values()) EXPECT_EQ(v, 0.0);
    for (const double v : found.dbias.values()) EXPECT_EQ(v, 0.0);
    expect_guards(found);
  }
}

/// mean 1e4, deviation 1: a sum of squares in f32 would leave nothing of the variance.
TEST_P(GroupNormCpu, FarFromZero) {
  const auto [dtype, affine, activation, channels_last] = GetParam();
  if (dtype == DType::bf16) return;  // its steps at 1e4 are 64
  const Sizes sizes{2, 6, 61, 67};
  const GroupProblem problem = test::make_group_problem(sizes, 2, dtype, test::kAffines[affine],
                                                        std::nullopt, activation, 1e4);
  const GroupOutputs found = group_norm_on_cpu(problem, layout(sizes));
  const test::ExpectedGroupNorm expected = group_norm_reference(problem);
  for (std::size_t i = 0; i < expected.rstd.value.size(); ++i) {
    EXPECT_NEAR(found.stats.get(2 * i), expected.mean.value[i], 1e-3);
    EXPECT_NEAR(found.stats.get(2 * i + 1), expected.rstd.value[i], 1e-5 * expected.rstd.value[i]);
  }
  EXPECT_TRUE(close(found.y, expected.y));
}

TEST(GroupNormCpuEdge, OneElementGroupsAreTheBias) {
  GroupProblem problem =
      test::make_group_problem({3, 4}, 4, DType::f32, DType::f32, DType::f32, Activation::none);
  const GroupOutputs found = group_norm_on_cpu(problem, dense_layout({3, 4}));
  for (int i = 0; i < 12; ++i) EXPECT_EQ(found.y.get(i), problem.bias.get(i % 4));
}

TEST(GroupNormCpuEdge, NanAndInfinityStayInTheirGroups) {
  for (const bool channels_last : {false, true}) {
    GroupProblem problem = test::make_group_problem({2, 6, 5, 5}, 3, DType::bf16, DType::f32,
                                                    std::nullopt, Activation::silu);
    const test::Layout layout = image_layout_of(problem.sizes, channels_last);
    const GroupOutputs clean = group_norm_on_cpu(problem, layout);
    problem.x.set(60, std::nan(""));                              // sample 0, group 1
    problem.x.set(150, std::numeric_limits<double>::infinity());  // sample 1, group 0
    const GroupOutputs found = group_norm_on_cpu(problem, layout);
    for (std::int64_t i = 0; i < 300; ++i) {
      if (i / 50 == 1 || i / 50 == 3) {
        EXPECT_TRUE(std::isnan(found.y.get(i))) << i;
      } else {
        EXPECT_EQ(found.y.get(i), clean.y.get(i)) << i;
        EXPECT_EQ(found.dx.get(i), clean.dx.get(i)) << i;
      }
    }
  }
}

TEST(GroupNormCpuEdge, SiluOfLargeValuesIsFinite) {
  GroupProblem problem = test::make_group_problem({1, 2, 64}, 1, DType::f32, DType::f32,
                                                  std::nullopt, Activation::silu);
  problem.weight.set(0, 1e4);
  problem.weight.set(1, -1e4);
  const GroupOutputs found = group_norm_on_cpu(problem, dense_layout(problem.sizes));
  expect_group_norm(found, group_norm_reference(problem));
}

TEST(GroupNormCpuEdge, RefusedCallsNameTheArgument) {
  Tensor x(DType::f32, {2, 6, 4}), y = x, short_y(DType::f32, {2, 6, 3});
  Tensor strided(DType::f32, {"", {2, 6, 4}, {48, 8, 2}}), flat(DType::f32, {6});
  const auto message_for = [](TensorRef of_x, TensorRef of_y, std::int64_t groups) {
    return error_of([&] {
      cpu::group_norm(
          {.x = of_x, .weight = {}, .bias = {}, .y = of_y, .stats = {}, .num_groups = groups});
    });
  };
  const std::string op = "fastkern::group_norm: ";
  EXPECT_TRUE(contains(message_for(x.ref(), y.ref(), 4), op + "num_groups must"));
  EXPECT_TRUE(contains(message_for(x.ref(), y.ref(), 0), op + "num_groups must"));
  EXPECT_TRUE(contains(message_for(x.ref(), y.ref(), -2), op + "num_groups must"));
  EXPECT_TRUE(contains(message_for(flat.ref(), y.ref(), 1), op + "x must have at least two"));
  EXPECT_TRUE(contains(message_for(strided.ref(), y.ref(), 2), op + "x must be row-major"));
  EXPECT_TRUE(contains(message_for(x.ref(), short_y.ref(), 2), op + "y must have"));
}

TEST(ImageLayout, IsFoundFromStrides) {
  const auto of = [](const Sizes& sizes, const Sizes& strides) {
    return image_layout(Tensor(DType::f32, {"", sizes, strides}).ref());
  };
  EXPECT_EQ(of({2, 3, 4, 5}, {60, 20, 5, 1}), ImageLayout::channels_first);
  EXPECT_EQ(of({2, 3, 4, 5}, {60, 1, 15, 3}), ImageLayout::channels_last);
  EXPECT_EQ(of({2, 3, 4, 5}, {60, 1, 3, 12}), ImageLayout::other);
  EXPECT_EQ(of({2, 3, 4, 5}, {120, 1, 15, 3}), ImageLayout::other);
  EXPECT_EQ(of({1, 3, 4, 5}, {999, 1, 15, 3}), ImageLayout::channels_last);
  EXPECT_EQ(of({2, 3, 1, 1}, {3, 1, 3, 3}), ImageLayout::channels_first);
  EXPECT_EQ(of({2, 1, 4, 5}, {20, 1, 5, 1}), ImageLayout::channels_first);
  EXPECT_EQ(of({2, 3, 4}, {12, 1, 3}), ImageLayout::channels_last);
  EXPECT_EQ(of({2, 3, 2, 2, 5}, {60, 1, 30, 15, 3}), ImageLayout::channels_last);
  EXPECT_EQ(of({2, 3}, {1, 2}), ImageLayout::other);
  EXPECT_EQ(of({2, 0, 7}, {5, 5, 5}), ImageLayout::channels_first);
}

}  // namespace
}  // namespace fastkern
