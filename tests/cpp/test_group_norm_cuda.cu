// SPDX-License-Identifier: Apache-2.0
// cuda::group_norm and cuda::group_norm_bwd against cpu:: and plain double loops, in guarded
// memory, in both layouts and around every change of plan.
#include <array>

#include "group_norm_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using test::blank_outputs;
using test::contains;
using test::cuda_ok;
using test::dense_layout;
using test::DeviceTensor;
using test::error_of;
using test::GroupOutputs;
using test::GroupProblem;
using test::image_layout_of;
using test::kAffines;
using test::Layout;
using test::make_group_problem;
using test::Sizes;
using test::Tensor;

struct How {
  bool channels_last = false;
  std::int64_t x_offset = 0, dy_offset = 0, out_offset = 0;  // elements
  std::int64_t affine_offset = 0;                            // of weight, bias and their gradients
  bool saved_stats = true;
  // y, stats, dx, dweight, dbias
  std::array<bool, 5> want = {true, true, true, true, true};
  Stream stream = {};
};

/// Exactly as many bytes as asked for, NaN before the call, guarded.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes)
      : memory_(Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)})), bytes_(bytes) {
    EXPECT_EQ(bytes % 4, 0u);
  }
  void* data() const { return memory_.ref().data; }
  std::size_t size() const { return bytes_; }
  void expect_guards() const { EXPECT_TRUE(memory_.download().gaps_intact()) << "workspace"; }

 private:
  DeviceTensor memory_;
  std::size_t bytes_;
};

Tensor shifted(const Tensor& t, std::int64_t offset) {
  if (!t.given()) return t;
  return Tensor(t.dtype(), dense_layout({t.numel()}, offset)).copy_from(t);
}

GroupOutputs run(const GroupProblem& p, const How& how) {
  const auto layout = [&](std::int64_t offset) {
    return image_layout_of(p.sizes, how.channels_last, offset);
  };
  GroupOutputs out = blank_outputs(p, layout(how.out_offset));
  out.dweight = shifted(out.dweight, how.affine_offset);
  out.dbias = shifted(out.dbias, how.affine_offset);
  const DeviceTensor x(in_layout(p.x, layout(how.x_offset)));
  const DeviceTensor dy(in_layout(p.dy, layout(how.dy_offset)));
  const DeviceTensor weight(shifted(p.weight, how.affine_offset));
  const DeviceTensor bias(shifted(p.bias, how.affine_offset));
  const DeviceTensor y(out.y), stats(out.stats), dx(out.dx), dweight(out.dweight), dbias(out.dbias);
  const auto wanted = [&](int index, const DeviceTensor& t) {
    return how.want[index] ? t.ref() : TensorRef{};
  };

  GroupNormFwd fwd{.x = x.ref(),
                   .weight = weight.ref(),
                   .bias = bias.ref(),
                   .y = wanted(0, y),
                   .stats = how.want[1] || how.saved_stats ? stats.ref() : TensorRef{},
                   .num_groups = p.groups,
                   .eps = p.eps,
                   .activation = p.activation};
  const Workspace fwd_workspace(cuda::group_norm_workspace(fwd, 0));
  fwd.workspace = fwd_workspace.data(), fwd.workspace_size = fwd_workspace.size();
  cuda::group_norm(fwd, how.stream);

  GroupNormBwd bwd{.dy = dy.ref(),
                   .x = x.ref(),
                   .weight = weight.ref(),
                   .bias = bias.ref(),
                   .stats = how.saved_stats ? stats.ref() : TensorRef{},
                   .dx = wanted(2, dx),
                   .dweight = wanted(3, dweight),
                   .dbias = wanted(4, dbias),
                   .num_groups = p.groups,
                   .eps = p.eps,
                   .activation = p.activation};
  const Workspace bwd_workspace(cuda::group_norm_bwd_workspace(bwd, 0));
  bwd.workspace = bwd_workspace.data(), bwd.workspace_size = bwd_workspace.size();
  cuda::group_norm_bwd(bwd, how.stream);
  cuda_ok(cudaDeviceSynchronize());

  out = {y.download(), stats.download(), dx.download(), dweight.download(), dbias.download()};
  expect_guards(out);
  fwd_workspace.expect_guards();
  bwd_workspace.expect_guards();
  return out;
}

/// Against the truth; the CPU, too, which may not be farther away.
GroupOutputs expect_matches(const GroupProblem& p, bool channels_last) {
  SCOPED_TRACE(p.text() + (channels_last ? ", channels-last" : ", channels-first"));
  How how;
  how.channels_last = channels_last;
  const GroupOutputs found = run(p, how);
  const test::ExpectedGroupNorm expected = group_norm_reference(p);
  expect_group_norm(found, expected);
  SCOPED_TRACE("cpu");
  expect_group_norm(group_norm_on_cpu(p, image_layout_of(p.sizes, channels_last)), expected);
  return found;
}

std::int64_t vector_of(DType dtype) { return 16 / size_of(dtype); }

class GroupNormCuda : public test::CudaTest {
 protected:
  /// Another mix of weight, bias and activation for each problem.
  GroupProblem next(const Sizes& sizes, std::int64_t groups, DType dtype) {
    const int turn = turn_++;
    return make_group_problem(sizes, groups, dtype, kAffines[turn % 4], kAffines[turn / 4 % 4],
                              test::kActivations[(turn + turn / 4) % 2]);
  }

  /// Groups of one channel and of two, whole packs and not, on both sides of each size at which
  /// more threads, packs, blocks or kernels take a group.
  void expect_matches_around_sizes(DType dtype) {
    const std::int64_t v = vector_of(dtype);
    for (const std::int64_t vectors : {1, 2, 8, 64, 128, 129, 1024, 1025, 2048, 2049, 4096, 4097,
                                       8192, 8193, 16384, 16385, 32768, 32769}) {
      const std::int64_t size = vectors * v;
      expect_matches(next({2, 2, size}, 2, dtype), false);
      expect_matches(next({1, 4, size / 2}, 2, dtype), false);
      expect_matches(next({2, 1, size - 1}, 1, dtype), false);
      if (testing::Test::HasFailure()) return;
    }
  }

 private:
  int turn_ = 0;
};

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
  for (const DType dtype : test::kDTypes) {
    for (const auto& [sizes, groups] : kImages) {
      expect_matches(next(sizes, groups, dtype), false);
      if (HasFailure()) return;
    }
  }
}

TEST_F(GroupNormCuda, ImagesMatchChannelsLast) {
  for (const DType dtype : test::kDTypes) {
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
  for (const DType dtype : test::kDTypes) {
    for (const auto weight : kAffines) {
      for (const auto bias : kAffines) {
        for (const Activation activation : test::kActivations) {
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

/// Some of every plan: held by part of a block, a block, a cluster; in chunks; backward held or
/// not.
const std::pair<Sizes, std::int64_t> kEveryPlan[] = {
    {{3, 6, 5, 8}, 3},     {{2, 40, 16, 16}, 4},   {{2, 4, 64, 64}, 2},
    {{1, 8, 128, 128}, 2}, {{1, 2, 256, 520}, 1},  {{1, 1, 600, 512}, 1},
    {{2, 35, 7, 7}, 7},    {{1, 320, 40, 40}, 32}, {{1, 2056, 12, 12}, 1},
};

TEST_F(GroupNormCuda, AlignmentChangesNoBit) {
  for (const DType dtype : test::kDTypes) {
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
        const test::ExpectedGroupNorm expected = group_norm_reference(problem);
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

#ifndef FASTKERN_EMULATED

__global__ void wait_kernel(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

/// Forward and backward on device memory that stays: for calls on a stream and captured ones.
struct Static {
  GroupProblem problem;
  DeviceTensor x, dy, weight, bias, y, stats, dx, dweight, dbias;
  std::unique_ptr<Workspace> fwd_workspace, bwd_workspace;
  GroupNormFwd fwd;
  GroupNormBwd bwd;

  Static(const GroupProblem& p, const GroupOutputs& blank, const Layout& layout)
      : problem(p),
        x(in_layout(Tensor(p.x.dtype(), p.sizes), layout)),
        dy(in_layout(Tensor(p.x.dtype(), p.sizes), layout)),
        weight(p.weight),
        bias(p.bias),
        y(blank.y),
        stats(blank.stats),
        dx(blank.dx),
        dweight(blank.dweight),
        dbias(blank.dbias) {
    fwd = {.x = x.ref(),
           .weight = weight.ref(),
           .bias = bias.ref(),
           .y = y.ref(),
           .stats = stats.ref(),
           .num_groups = p.groups,
           .eps = p.eps,
           .activation = p.activation};
    fwd_workspace = std::make_unique<Workspace>(cuda::group_norm_workspace(fwd, 0));
    fwd.workspace = fwd_workspace->data(), fwd.workspace_size = fwd_workspace->size();
    bwd = {.dy = dy.ref(),
           .x = x.ref(),
           .weight = weight.ref(),
           .bias = bias.ref(),
           .stats = stats.ref(),
           .dx = dx.ref(),
           .dweight = dweight.ref(),
           .dbias = dbias.ref(),
           .num_groups = p.groups,
           .eps = p.eps,
           .activation = p.activation};
    bwd_workspace = std::make_unique<Workspace>(cuda::group_norm_bwd_workspace(bwd, 0));
    bwd.workspace = bwd_workspace->data(), bwd.workspace_size = bwd_workspace->size();
  }
  void call(Stream stream) const {
    cuda::group_norm(fwd, stream);
    cuda::group_norm_bwd(bwd, stream);
  }
  GroupOutputs download() const {
    return {y.download(), stats.download(), dx.download(), dweight.download(), dbias.download()};
  }
};

/// The inputs arrive late on a side stream: a call on any other stream, or a kernel that begins
/// before the one it waits for, would read what was there before.
TEST_F(GroupNormCuda, WorkIsOrderedOnTheGivenStream) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const Layout layout = image_layout_of(sizes, channels_last);
      const GroupProblem problem = next(sizes, groups, DType::bf16);
      How how;
      how.channels_last = channels_last;
      const GroupOutputs expected = run(problem, how);
      const DeviceTensor late_x(in_layout(problem.x, layout)),
          late_dy(in_layout(problem.dy, layout));
      const test::SideStream side;
      for (const Stream stream : {side.stream(), Stream{}}) {
        Static late(problem, blank_outputs(problem, layout), layout);
        const auto handle = static_cast<cudaStream_t>(stream.handle);
        cuda_ok(cudaDeviceSynchronize());
        wait_kernel<<<1, 1, 0, handle>>>(20'000'000);
        late.x.copy_on(handle, late_x);
        late.dy.copy_on(handle, late_dy);
        late.call(stream);
        cuda_ok(cudaStreamSynchronize(handle));
        SCOPED_TRACE(problem.text());
        expect_same(late.download(), expected);
      }
    }
  }
}

/// Many calls behind each other, each on the results of the one before: no kernel may overtake.
TEST_F(GroupNormCuda, CallsInARowDoNotOvertakeEachOther) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const Layout layout = image_layout_of(sizes, channels_last);
      const GroupProblem problem = next(sizes, groups, DType::bf16);
      const auto chain = [&](bool wait) {
        Static a(problem, blank_outputs(problem, layout), layout);
        const DeviceTensor x(in_layout(problem.x, layout)), dy(in_layout(problem.dy, layout));
        a.x.copy_on(nullptr, x);
        a.dy.copy_on(nullptr, dy);
        for (int i = 0; i < 6; ++i) {
          a.call({});
          if (wait) cuda_ok(cudaDeviceSynchronize());
          a.x.copy_on(nullptr, a.y);
          a.dy.copy_on(nullptr, a.dx);
        }
        cuda_ok(cudaDeviceSynchronize());
        return a.download();
      };
      SCOPED_TRACE(problem.text());
      const GroupOutputs expected = chain(true);
      expect_same(chain(false), expected);
    }
  }
}

TEST_F(GroupNormCuda, CapturedCallsReplay) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const Layout layout = image_layout_of(sizes, channels_last);
      const GroupProblem problem = next(sizes, groups, DType::bf16);
      How how;
      how.channels_last = channels_last;
      const GroupOutputs expected = run(problem, how);
      Static captured(problem, blank_outputs(problem, layout), layout);
      const DeviceTensor x(in_layout(problem.x, layout)), dy(in_layout(problem.dy, layout));
      const test::SideStream side;
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t replay = nullptr;
      cuda_ok(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
      captured.call(side.stream());
      cuda_ok(cudaStreamEndCapture(side, &graph));
      cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
      captured.x.copy_on(side, x);
      captured.dy.copy_on(side, dy);
      for (int i = 0; i < 3; ++i) {
        captured.y.upload();
        captured.dx.upload();
        cuda_ok(cudaDeviceSynchronize());
        cuda_ok(cudaGraphLaunch(replay, side));
        cuda_ok(cudaStreamSynchronize(side));
        SCOPED_TRACE(problem.text());
        expect_same(captured.download(), expected);
      }
      cuda_ok(cudaGraphExecDestroy(replay));
      cuda_ok(cudaGraphDestroy(graph));
    }
  }
}

/// More than 2^31 elements: samples of zeros but for two, the last one and one across the border,
/// which must come out as they do alone.
TEST_F(GroupNormCuda, MoreThan31BitsOfElements) {
  constexpr std::int64_t kChannels = 32, kGroups = 4;
  for (const auto& [batch, positions] :
       {std::pair<std::int64_t, std::int64_t>{260, 263'168}, {4, 17'000'000}}) {
    for (const bool channels_last : {false, true}) {
      const std::int64_t sample = kChannels * positions, count = batch * sample;
      std::size_t free = 0, total = 0;
      cuda_ok(cudaMemGetInfo(&free, &total));
      if (free < static_cast<std::size_t>(10 * count)) GTEST_SKIP() << "too little memory";
      SCOPED_TRACE(std::to_string(count) + " elements");
      const auto ref = [&](void* data, std::int64_t samples) {
        TensorRef t = dense(data, DType::bf16, samples, kChannels, positions);
        if (channels_last) t.strides = {sample, 1, kChannels};
        return t;
      };
      const auto backward_of = [&](void* dy, void* x, void* dx, void* dweight,
                                   std::int64_t samples) {
        GroupNormBwd bwd{.dy = ref(dy, samples),
                         .x = ref(x, samples),
                         .weight = {},
                         .bias = {},
                         .stats = {},
                         .dx = ref(dx, samples),
                         .dweight = dense(dweight, DType::f32, kChannels),
                         .dbias = {},
                         .num_groups = kGroups,
                         .eps = test::kGroupEps,
                         .activation = Activation::silu};
        const test::DeviceArray<char> workspace(cuda::group_norm_bwd_workspace(bwd, 0));
        bwd.workspace = workspace.data();
        bwd.workspace_size = cuda::group_norm_bwd_workspace(bwd, 0);
        cuda::group_norm_bwd(bwd, {});
        cuda_ok(cudaDeviceSynchronize());
      };
      const auto forward_of = [&](void* x, void* y, std::int64_t samples) {
        GroupNormFwd fwd{.x = ref(x, samples),
                         .weight = {},
                         .bias = {},
                         .y = ref(y, samples),
                         .stats = {},
                         .num_groups = kGroups,
                         .eps = test::kGroupEps,
                         .activation = Activation::silu};
        const test::DeviceArray<char> workspace(cuda::group_norm_workspace(fwd, 0));
        fwd.workspace = workspace.data();
        fwd.workspace_size = cuda::group_norm_workspace(fwd, 0);
        cuda::group_norm(fwd, {});
        cuda_ok(cudaDeviceSynchronize());
      };
      const Tensor random = Tensor(DType::bf16, {1 << 16}).fill(3, 0.5);
      const auto allocate = [](std::int64_t bytes) {
        void* p = nullptr;
        cuda_ok(cudaMalloc(&p, bytes), "cudaMalloc");
        return std::unique_ptr<void, test::FreeDevice>(p);
      };
      const auto big_x = allocate(2 * count), big_y = allocate(2 * count);
      const auto one_x = allocate(2 * sample), one_y = allocate(2 * sample);
      const auto dweight = allocate(4 * kChannels);
      cuda_ok(cudaMemset(big_x.get(), 0, 2 * count));
      {
        std::vector<unsigned char> tile(2 << 16);
        for (std::int64_t i = 0; i < 1 << 16; ++i) {
          const bf16 value = from_float<bf16>(static_cast<float>(random.get(i)));
          std::memcpy(&tile[2 * i], &value, 2);
        }
        for (std::int64_t at = 0; at < 2 * sample; at += static_cast<std::int64_t>(tile.size())) {
          const std::int64_t part = std::min<std::int64_t>(tile.size(), 2 * sample - at);
          cuda_ok(cudaMemcpy(static_cast<char*>(one_x.get()) + at, tile.data(), part,
                             cudaMemcpyHostToDevice));
        }
      }
      const auto expect_equal = [&](std::int64_t index) {
        std::vector<unsigned char> a(2 * sample), b(2 * sample);
        cuda_ok(cudaMemcpy(a.data(), one_y.get(), 2 * sample, cudaMemcpyDeviceToHost));
        cuda_ok(cudaMemcpy(b.data(), static_cast<char*>(big_y.get()) + 2 * index * sample,
                           2 * sample, cudaMemcpyDeviceToHost));
        EXPECT_TRUE(a == b) << "sample " << index;
      };
      const std::int64_t border = (std::int64_t{1} << 31) / sample;
      for (const std::int64_t index : {border, batch - 1}) {
        cuda_ok(cudaMemcpy(static_cast<char*>(big_x.get()) + 2 * index * sample, one_x.get(),
                           2 * sample, cudaMemcpyDeviceToDevice));
      }
      forward_of(one_x.get(), one_y.get(), 1);
      forward_of(big_x.get(), big_y.get(), batch);
      for (const std::int64_t index : {border, batch - 1}) expect_equal(index);
      backward_of(one_x.get(), one_x.get(), one_y.get(), dweight.get(), 1);
      backward_of(big_x.get(), big_x.get(), big_y.get(), dweight.get(), batch);
      for (const std::int64_t index : {border, batch - 1}) expect_equal(index);
    }
  }
}

#endif

TEST_F(GroupNormCuda, TooSmallAWorkspaceIsRefused) {
  for (const auto& [sizes, groups] : kEveryPlan) {
    for (const bool channels_last : {false, true}) {
      const GroupProblem problem = make_group_problem(sizes, groups, DType::bf16, DType::bf16,
                                                      std::nullopt, Activation::none);
      const Layout layout = image_layout_of(sizes, channels_last);
      const GroupOutputs blank = blank_outputs(problem, layout);
      const DeviceTensor x(in_layout(problem.x, layout)), y(blank.y), dweight(blank.dweight);
      GroupNormFwd fwd{.x = x.ref(), .weight = {}, .bias = {}, .y = y.ref(), .stats = {}};
      fwd.num_groups = groups;
      GroupNormBwd bwd{.dy = x.ref(),
                       .x = x.ref(),
                       .weight = {},
                       .bias = {},
                       .stats = {},
                       .dx = y.ref(),
                       .dweight = dweight.ref(),
                       .dbias = {}};
      bwd.num_groups = groups;
      const std::size_t fwd_needed = cuda::group_norm_workspace(fwd, 0);
      const std::size_t bwd_needed = cuda::group_norm_bwd_workspace(bwd, 0);
      ASSERT_GT(bwd_needed, 0u);
      const Workspace workspace(std::max(fwd_needed, bwd_needed));
      fwd.workspace = bwd.workspace = workspace.data();
      const auto expect_refused = [&](const std::string& op, std::size_t needed, const auto& call) {
        const std::string message = error_of(call);
        EXPECT_TRUE(contains(message, "fastkern::" + op + ": workspace must")) << message;
        EXPECT_TRUE(contains(message, std::to_string(needed))) << message;
        EXPECT_TRUE(contains(message, std::to_string(needed - 1))) << message;
      };
      if (fwd_needed > 0) {
        fwd.workspace_size = fwd_needed - 1;
        expect_refused("group_norm", fwd_needed, [&] { cuda::group_norm(fwd, {}); });
      }
      bwd.workspace_size = bwd_needed - 1;
      expect_refused("group_norm_bwd", bwd_needed, [&] { cuda::group_norm_bwd(bwd, {}); });
      cuda_ok(cudaDeviceSynchronize());
      EXPECT_TRUE(y.download().same_bits(blank.y));
      EXPECT_TRUE(dweight.download().same_bits(blank.dweight));
    }
  }
}

/// Calls that are refused before they touch memory, so that none needs to exist.
TEST_F(GroupNormCuda, RefusedCallsNameTheOpAndTheNextOneWorks) {
  void* const nowhere = reinterpret_cast<void*>(std::uintptr_t{4096});
  const auto message_for = [](const TensorRef& x, const TensorRef& y, std::int64_t groups) {
    return error_of([&] {
      GroupNormFwd fwd{.x = x, .weight = {}, .bias = {}, .y = y, .stats = {}};
      fwd.num_groups = groups;
      fwd.workspace_size = ~std::size_t{0};
      cuda::group_norm(fwd, {});
    });
  };
  const TensorRef x = dense(nowhere, DType::bf16, 2, 6, 4);
  TensorRef strided = x;
  strided.strides = {48, 8, 2};
  const std::string op = "fastkern::group_norm: ";
  EXPECT_TRUE(contains(message_for(x, x, 4), op + "num_groups must"));
  EXPECT_TRUE(contains(message_for(strided, x, 2), op + "x must be row-major"));
  EXPECT_TRUE(contains(message_for(x, dense(nowhere, DType::f32, 2, 6, 4), 2), op + "y must have"));
  const std::int64_t many = std::int64_t{1} << 32;
  const TensorRef huge = dense(nowhere, DType::bf16, many, 2, 4);
  EXPECT_TRUE(contains(message_for(huge, huge, 2), op + "x must have less than 2^31"));
  expect_matches(next({2, 6, 4, 4}, 3, DType::bf16), false);
}

}  // namespace
}  // namespace fastkern
