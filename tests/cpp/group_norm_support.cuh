// SPDX-License-Identifier: Apache-2.0
// What the tests of group normalisation on CUDA share: a forward and a backward in guarded memory,
// a workspace of exactly the size asked for, and shapes that reach every plan.
#pragma once

#include <array>
#include <utility>

#include "group_norm_support.h"
#include "support.cuh"

namespace fastkern::test {

/// Some of every plan: held by part of a block, a block, a cluster; in chunks; backward held or
/// not.
inline const std::pair<Sizes, std::int64_t> kEveryPlan[] = {
    {{3, 6, 5, 8}, 3},     {{2, 40, 16, 16}, 4},   {{2, 4, 64, 64}, 2},
    {{1, 8, 128, 128}, 2}, {{1, 2, 256, 520}, 1},  {{1, 1, 600, 512}, 1},
    {{2, 35, 7, 7}, 7},    {{1, 320, 40, 40}, 32}, {{1, 2056, 12, 12}, 1},
};

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

inline Tensor shifted(const Tensor& t, std::int64_t offset) {
  if (!t.given()) return t;
  return Tensor(t.dtype(), dense_layout({t.numel()}, offset)).copy_from(t);
}

inline GroupOutputs run(const GroupProblem& p, const How& how) {
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
inline GroupOutputs expect_matches(const GroupProblem& p, bool channels_last) {
  SCOPED_TRACE(p.text() + (channels_last ? ", channels-last" : ", channels-first"));
  How how;
  how.channels_last = channels_last;
  const GroupOutputs found = run(p, how);
  const ExpectedGroupNorm expected = group_norm_reference(p);
  expect_group_norm(found, expected);
  SCOPED_TRACE("cpu");
  expect_group_norm(group_norm_on_cpu(p, image_layout_of(p.sizes, channels_last)), expected);
  return found;
}

inline std::int64_t vector_of(DType dtype) { return 16 / size_of(dtype); }

class GroupNormCuda : public CudaTest {
 protected:
  /// Another mix of weight, bias and activation for each problem.
  GroupProblem next(const Sizes& sizes, std::int64_t groups, DType dtype) {
    const int turn = turn_++;
    return make_group_problem(sizes, groups, dtype, kAffines[turn % 4], kAffines[turn / 4 % 4],
                              kActivations[(turn + turn / 4) % 2]);
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

}  // namespace fastkern::test
