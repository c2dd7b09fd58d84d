// SPDX-License-Identifier: Apache-2.0
// The launcher: what it lets through, what it refuses, and what a failed launch leaves behind.
#include "support.cuh"

namespace fastkern {
namespace {

using test::contains;
using test::DeviceArray;
using test::error_of;

constexpr const char* kOp = "fastkern::test_op";

__global__ void add_kernel(int* out, int value) {
  out[static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] += value;
}

__global__ void sum_shared_kernel(const int* in, int n, int* out) {
  extern __shared__ int sValues[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) sValues[n - 1 - i] = in[i];
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += (i % 7 + 1) * sValues[i];
  *out = sum;
}

class Launcher : public test::CudaTest {};

TEST_F(Launcher, RunsEveryThreadOnce) {
  const DeviceArray<int> out(3 * 64);
  cuda::launch(add_kernel, {kOp, 3, 64}, Stream{}, out.data(), 5);
  EXPECT_EQ(out.download(), std::vector<int>(3 * 64, 5));
}

TEST_F(Launcher, EmptyGridIsLeftAlone) {
  const DeviceArray<int> out(64);
  cuda::launch(add_kernel, {kOp, 0, 64}, Stream{}, out.data(), 5);
  cuda::launch(add_kernel, {kOp, 0, 0}, Stream{nullptr, 99}, nullptr, 5);  // nothing is looked at
  EXPECT_EQ(out.download(), std::vector<int>(64, 0));
}

TEST_F(Launcher, GridBeyondWhatCudaTakesIsRefused) {
  for (const std::int64_t grid : {std::int64_t{1} << 31, std::int64_t{1} << 40, std::int64_t{-1}}) {
    const std::string message =
        error_of([&] { cuda::launch(add_kernel, {kOp, grid, 64}, Stream{}, nullptr, 5); });
    EXPECT_TRUE(contains(message, kOp)) << message;
    EXPECT_TRUE(contains(message, std::to_string(grid))) << message;
  }
}

TEST_F(Launcher, FailedLaunchNamesTheOpAndDoesNotStick) {
  const DeviceArray<int> out(64);
  const std::string message =
      error_of([&] { cuda::launch(add_kernel, {kOp, 1, 4096}, Stream{}, out.data(), 5); });
  EXPECT_TRUE(contains(message, kOp)) << message;
  EXPECT_TRUE(contains(message, "kernel launch failed: cudaError")) << message;
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  cuda::launch(add_kernel, {kOp, 1, 64}, Stream{}, out.data(), 7);
  EXPECT_EQ(out.download(), std::vector<int>(64, 7));
}

TEST_F(Launcher, SharedMemoryAbove48KilobytesWorks) {
  for (const int kilobytes : {48, 49, 64, 96}) {
    const int n = kilobytes * 256;
    std::vector<int> values(n);
    int expected = 0;
    for (int i = 0; i < n; ++i) values[i] = i % 101 - 50;
    for (int i = 0; i < n; ++i) expected += (i % 7 + 1) * values[n - 1 - i];
    const DeviceArray<int> in(values), out(1);
    cuda::launch(sum_shared_kernel, {kOp, 1, 256, n * sizeof(int)}, Stream{}, in.data(), n,
                 out.data());
    EXPECT_EQ(out.download()[0], expected) << kilobytes;
  }
}

TEST_F(Launcher, SharedMemoryBeyondTheDeviceIsRefused) {
  const DeviceArray<int> in(1), out(1);
  const auto call = [&] {
    cuda::launch(sum_shared_kernel, {kOp, 1, 32, 1 << 20}, Stream{}, in.data(), 1, out.data());
  };
  const std::string message = error_of(call);
  EXPECT_TRUE(contains(message, kOp)) << message;
  EXPECT_TRUE(contains(message, "shared-memory limit")) << message;
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  cuda::launch(sum_shared_kernel, {kOp, 1, 32, 1024}, Stream{}, in.data(), 1, out.data());
}

TEST_F(Launcher, UnknownDeviceIsRefusedAndTheCurrentOneKept) {
  const DeviceArray<int> out(64);
  const std::string message =
      error_of([&] { cuda::launch(add_kernel, {kOp, 1, 64}, Stream{nullptr, 99}, out.data(), 5); });
  EXPECT_TRUE(contains(message, kOp)) << message;
  int device = -1;
  test::cuda_ok(cudaGetDevice(&device));
  EXPECT_EQ(device, 0);
  cuda::launch(add_kernel, {kOp, 1, 64}, Stream{}, out.data(), 5);
  EXPECT_EQ(out.download(), std::vector<int>(64, 5));
}

TEST_F(Launcher, GuardSelectsTheDeviceForItsScope) {
  if (cuda::device_count() < 2) GTEST_SKIP() << "one device only";
  int device = -1;
  {
    const cuda::DeviceGuard guard(1, kOp);
    test::cuda_ok(cudaGetDevice(&device));
    EXPECT_EQ(device, 1);
    const cuda::DeviceGuard same(1, kOp);
  }
  test::cuda_ok(cudaGetDevice(&device));
  EXPECT_EQ(device, 0);

  test::cuda_ok(cudaSetDevice(1));
  const DeviceArray<int> out(64);  // on device 1
  test::cuda_ok(cudaSetDevice(0));
  cuda::launch(add_kernel, {kOp, 1, 64}, Stream{nullptr, 1}, out.data(), 5);
  test::cuda_ok(cudaGetDevice(&device));
  EXPECT_EQ(device, 0);
  EXPECT_EQ(out.download(), std::vector<int>(64, 5));
}

TEST_F(Launcher, UsesTheStreamItIsGiven) {
  const test::SideStream side;
  const DeviceArray<int> out(64);
  cuda::launch(add_kernel, {kOp, 1, 64}, Stream{}, out.data(),
               0);  // loads the kernel: no matter for a capture
  cudaGraph_t graph = nullptr;
  test::cuda_ok(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
  cuda::launch(add_kernel, {kOp, 1, 64}, side.stream(), out.data(), 5);
  test::cuda_ok(cudaStreamEndCapture(side, &graph));
  std::size_t nodes = 0;
  test::cuda_ok(cudaGraphGetNodes(graph, nullptr, &nodes));
  EXPECT_EQ(nodes, 1u);
  EXPECT_EQ(out.download(), std::vector<int>(64, 0));  // recorded, not run
  cudaGraphExec_t replay = nullptr;
  test::cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < 2; ++i) test::cuda_ok(cudaGraphLaunch(replay, side));
  test::cuda_ok(cudaStreamSynchronize(side));
  EXPECT_EQ(out.download(), std::vector<int>(64, 10));
  test::cuda_ok(cudaGraphExecDestroy(replay));
  test::cuda_ok(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace fastkern
