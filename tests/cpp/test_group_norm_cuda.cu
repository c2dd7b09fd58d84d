// SPDX-License-Identifier: Apache-2.0
// cuda::group_norm and cuda::group_norm_bwd against cpu:: and plain double loops, in guarded
// memory, in both layouts and around every change of plan.
#include <array>
#include <limits>

#include "group_norm_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

TEST_F(GroupNormCuda, F32MatchesAroundSizes) { expect_matches_around_sizes(DType::f32); }
TEST_F(GroupNormCuda, F16MatchesAroundSizes) { expect_matches_around_sizes(DType::f16); }
TEST_F(GroupNormCuda, Bf16MatchesAroundSizes) { expect_matches_around_sizes(DType::bf16); }

/// Shapes in use, odd ones, and those on both sides of each size at which another plan takes slabs
/// of channels, in both layouts.
const std::pair<Sizes, std::int64_t> kImages[] = {
    {{3, 10}, 5},          {{70, 96}, 32},         {{5, 4096}, 1},         {{2, 6, 1, 1}, 2},
    {{3, 4, 5}, 2},        {{2, 35, 7, 7}, 7},     {{2, 35, 7, 7}, 1},     {{2, 35, 7, 7}, 35},
    {{2, 40, 8, 8}, 4},    {{1, 320, 16, 16}, 32}, {{2, 64, 9, 11}, 32},   {{2, 15, 2, 3, 5}, 5},
    {{2, 40, 6, 5, 9}, 4}, {{1, 320, 32, 32}, 32}, {{2, 512, 16, 16}, 32}, {{1, 640, 24, 24}, 32},
    {{1, 64, 64, 64}, 4},  {{1, 64, 96, 97}, 32},  {{1, 32, 160, 161}, 8}, {{2, 16, 256, 128}, 2},
    {{1, 2056, 5, 5}, 1},  {{1, 2056, 12, 13}, 8}, {{1, 5000, 3, 3}, 5},   {{1, 3, 300, 301}, 3},
    {{1, 3, 300, 301}, 1}, {{9, 2, 33}, 1},        {{200, 24, 2}, 3},
};

TEST_F(GroupNormCuda, ImagesMatchChannelsFirst) {
  for (const DType dtype : kDTypes) {
    for (const auto& [sizes, groups] : kImages) {
      expect_matches(next(sizes, groups, dtype), false);
      if (HasFailure()) return;
    }
  }
}

TEST_F(GroupNormCuda, ImagesMatchChannelsLast) {
  for (const DType dtype : kDTypes) {
    for (const auto& [sizes, groups] : kImages) {
      if (sizes.size() > 2) expect_matches(next(sizes, groups, dtype), true);
      if (HasFailure()) return;
    }
  }
}

/// A cluster of 1, 2, 4 and 8 blocks and no cluster: positions on both sides of what they hold, for
/// slabs of one pack, of 128 bytes and of a number of packs that does not divide a block.
TEST_F(GroupNormCuda, ChannelsLastMatchesAroundPositions) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::int64_t v = vector_of(dtype);
    for (const std::int64_t packs : {1, 3, 8}) {
      const std::int64_t rows = 256 / packs;
      for (const std::int64_t held : {2, 12, 24, 48, 96}) {
        for (const std::int64_t more : {-1, 0, 1}) {
          expect_matches(next({1, packs * v, held * rows + more}, packs, dtype), true);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(GroupNormCuda, EveryMixOfTypesMatches) {
  for (const DType dtype : kDTypes) {
    for (const auto weight : kAffines) {
      for (const auto bias : kAffines) {
        for (const Activation activation : kActivations) {
          for (const bool channels_last : {false, true}) {
            expect_matches(make_group_problem({2, 24, 16, 16}, 3, dtype, weight, bias, activation),
                           channels_last);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

/// More than 256 chunks: each holds several tiles.
TEST_F(GroupNormCuda, ChunksOfSeveralTilesMatch) {
  const std::int64_t tile = 4096 * vector_of(DType::bf16);
  expect_matches(next({1, 2, 129 * tile + 8}, 1, DType::bf16), false);
  expect_matches(next({1, 3, 90 * tile + 3}, 1, DType::bf16), false);
}

TEST_F(GroupNormCuda, AlignmentChangesNoBit) {
  for (const DType dtype : kDTypes) {
    for (const auto& [sizes, groups] : kEveryPlan) {
      for (const bool channels_last : {false, true}) {
        const GroupProblem problem = next(sizes, groups, dtype);
        SCOPED_TRACE(problem.text() + (channels_last ? ", channels-last" : ""));
        How how;
        how.channels_last = channels_last;
        const GroupOutputs expected = run(problem, how);
        for (const std::array<std::int64_t, 4> offsets : {std::array<std::int64_t, 4>{1, 0, 0, 0},
                                                          {0, 1, 0, 1},
                                                          {0, 0, 3, 2},
                                                          {8, 16, 8, 4},
                                                          {5, 7, 1, 3}}) {
          How shifted = how;
          shifted.x_offset = offsets[0], shifted.dy_offset = offsets[1];
          shifted.out_offset = offsets[2], shifted.affine_offset = offsets[3];
          expect_same(run(problem, shifted), expected);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(GroupNormCuda, EachOutputAloneHasTheSameBits) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const GroupProblem problem =
          make_group_problem(sizes, groups, DType::bf16, DType::f32, DType::bf16, Activation::silu);
      SCOPED_TRACE(problem.text() + (channels_last ? ", channels-last" : ""));
      How how;
      how.channels_last = channels_last;
      const GroupOutputs all = run(problem, how);
      how.saved_stats = false;
      expect_same(run(problem, how), all);
      for (int output = 0; output < 5; ++output) {
        how.want = {};
        how.want[output] = true;
        const GroupOutputs one = run(problem, how);
        const Tensor* const found[] = {&one.y, &one.stats, &one.dx, &one.dweight, &one.dbias};
        const Tensor* const expected[] = {&all.y, &all.stats, &all.dx, &all.dweight, &all.dbias};
        EXPECT_TRUE(found[output]->same_bits(*expected[output])) << "output " << output;
      }
      if (HasFailure()) return;
    }
  }
}

TEST_F(GroupNormCuda, RepeatsHaveTheSameBits) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const GroupProblem problem = next(sizes, groups, DType::bf16);
      How how;
      how.channels_last = channels_last;
      const GroupOutputs first = run(problem, how);
      for (int repeat = 0; repeat < 4; ++repeat) expect_same(run(problem, how), first);
    }
  }
}

/// A sample's results are the same alone as among others.
TEST_F(GroupNormCuda, SamplesDoNotSeeTheirBatch) {
  for (const auto& [one_sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      Sizes sizes = one_sizes;
      sizes[0] = 5;
      const GroupProblem all = next(sizes, groups, DType::bf16);
      How how;
      how.channels_last = channels_last;
      const GroupOutputs expected = run(all, how);
      for (const std::int64_t sample : {0, 3, 4}) {
        GroupProblem one = all;
        one.sizes[0] = 1;
        one.x = Tensor(DType::bf16, one.sizes), one.dy = one.x;
        const std::int64_t size = one.x.numel();
        for (std::int64_t i = 0; i < size; ++i) {
          one.x.set(i, all.x.get(sample * size + i));
          one.dy.set(i, all.dy.get(sample * size + i));
        }
        const GroupOutputs found = run(one, how);
        for (std::int64_t i = 0; i < size; ++i) {
          ASSERT_EQ(found.y.get(i), expected.y.get(sample * size + i)) << all.text() << " " << i;
          ASSERT_EQ(found.dx.get(i), expected.dx.get(sample * size + i)) << all.text() << " " << i;
        }
        for (std::int64_t i = 0; i < 2 * groups; ++i)
          ASSERT_EQ(found.stats.get(i), expected.stats.get(sample * 2 * groups + i));
      }
    }
  }
}

TEST_F(GroupNormCuda, Empty) {
  for (const auto& [sizes, groups] :
       {std::pair<Sizes, std::int64_t>{{0, 6, 4, 4}, 3}, {{2, 0, 4}, 3}, {{2, 6, 0, 4}, 3}}) {
    const GroupOutputs found = run(next(sizes, groups, DType::bf16), {});
    for (const double v : found.dweight.values()) EXPECT_EQ(v, 0.0);
    for (const double v : found.dbias.values()) EXPECT_EQ(v, 0.0);
  }
}

/// mean 1e4, deviation 1: a difference of squares in f32 would leave nothing of the variance. A
/// mean in f32 is good to 5e-4 here, and so are distances between the means of parts.
TEST_F(GroupNormCuda, FarFromZero) {
  for (const DType dtype : {DType::f32, DType::f16}) {
    for (const auto& [sizes, groups] : kEveryPlan) {
      for (const bool channels_last : {false, true}) {
        const GroupProblem problem = make_group_problem(sizes, groups, dtype, DType::f32,
                                                        std::nullopt, Activation::none, 1e4);
        SCOPED_TRACE(problem.text() + (channels_last ? ", channels-last" : ""));
        How how;
        how.channels_last = channels_last;
        const GroupOutputs found = run(problem, how);
        const ExpectedGroupNorm expected = group_norm_reference(problem);
        for (std::size_t i = 0; i < expected.rstd.value.size(); ++i) {
          EXPECT_NEAR(found.stats.get(2 * i), expected.mean.value[i], 2e-3);
          EXPECT_NEAR(found.stats.get(2 * i + 1), expected.rstd.value[i],
                      1e-4 * expected.rstd.value[i]);
        }
        EXPECT_TRUE(close(found.y, expected.y));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(GroupNormCuda, NanAndInfinityStayInTheirGroups) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      Sizes two = sizes;
      two[0] = 2;
      GroupProblem problem =
          make_group_problem(two, groups, DType::bf16, DType::f32, std::nullopt, Activation::silu);
      SCOPED_TRACE(problem.text() + (channels_last ? ", channels-last" : ""));
      How how;
      how.channels_last = channels_last;
      const GroupOutputs clean = run(problem, how);
      const std::int64_t size = problem.x.numel() / (2 * groups);
      problem.x.set(size - 1, std::nan(""));
      problem.x.set(groups * size + size / 2, std::numeric_limits<double>::infinity());
      const GroupOutputs found = run(problem, how);
      for (std::int64_t i = 0; i < problem.x.numel(); ++i) {
        if (i / size == 0 || i / size == groups) {
          ASSERT_TRUE(std::isnan(found.y.get(i))) << i;
          ASSERT_TRUE(std::isnan(found.dx.get(i))) << i;
        } else {
          ASSERT_EQ(found.y.get(i), clean.y.get(i)) << i;
          ASSERT_EQ(found.dx.get(i), clean.dx.get(i)) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastkern
