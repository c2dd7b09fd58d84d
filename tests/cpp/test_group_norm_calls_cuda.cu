// SPDX-License-Identifier: Apache-2.0
// How cuda::group_norm and cuda::group_norm_bwd behave as calls: on streams, behind each other, in
// graphs, with more than 2^31 elements, and where they refuse.
#include <memory>

#include "group_norm_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

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
      const SideStream side;
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
      const SideStream side;
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
                         .eps = kGroupEps,
                         .activation = Activation::silu};
        const DeviceArray<char> workspace(cuda::group_norm_bwd_workspace(bwd, 0));
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
                         .eps = kGroupEps,
                         .activation = Activation::silu};
        const DeviceArray<char> workspace(cuda::group_norm_workspace(fwd, 0));
        fwd.workspace = workspace.data();
        fwd.workspace_size = cuda::group_norm_workspace(fwd, 0);
        cuda::group_norm(fwd, {});
        cuda_ok(cudaDeviceSynchronize());
      };
      const Tensor random = Tensor(DType::bf16, {1 << 16}).fill(3, 0.5);
      const auto allocate = [](std::int64_t bytes) {
        void* p = nullptr;
        cuda_ok(cudaMalloc(&p, bytes), "cudaMalloc");
        return std::unique_ptr<void, FreeDevice>(p);
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
