// SPDX-License-Identifier: Apache-2.0
// cuda::softmax and cuda::softmax_bwd against plain double loops, in guarded memory and around
// every change of plan.
#include "softmax_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class SoftmaxCuda : public CudaTest {};

/// Forward and backward on the device; the results come back in `t`. Workspaces have exactly the
/// size asked for.
void softmax_on_gpu(const SoftmaxProblem& p, SoftmaxTensors& t, Stream stream = {}) {
  const DeviceTensor x(t.x), mask(t.mask), y(t.y), dy(t.dy), dx(t.dx);
  const auto ref = [&](const Tensor& host) {
    if (&host == &t.x) return x.ref();
    if (&host == &t.mask) return mask.ref();
    if (&host == &t.y) return y.ref();
    return &host == &t.dy ? dy.ref() : dx.ref();
  };
  SoftmaxFwd fwd = softmax_fwd(p, ref, t);
  SoftmaxBwd bwd = softmax_bwd(p, ref, t);
  const auto numbers = [](std::size_t bytes) {
    return Sizes{static_cast<std::int64_t>(std::max<std::size_t>(bytes / 4, 1))};
  };
  fwd.workspace_size = cuda::softmax_workspace(fwd, stream.device);
  bwd.workspace_size = cuda::softmax_bwd_workspace(bwd, stream.device);
  const DeviceTensor of_fwd(Tensor(DType::f32, numbers(fwd.workspace_size)));
  const DeviceTensor of_bwd(Tensor(DType::f32, numbers(bwd.workspace_size)));
  fwd.workspace = of_fwd.ref().data, bwd.workspace = of_bwd.ref().data;
  cuda::softmax(fwd, stream);
  cuda::softmax_bwd(bwd, stream);
  cuda_ok(cudaDeviceSynchronize());
  for (const DeviceTensor* workspace : {&of_fwd, &of_bwd})
    EXPECT_TRUE(workspace->download().gaps_intact()) << "workspace";
  t.y = y.download(), t.dx = dx.download();
}

void expect_matches(std::int64_t rows, std::int64_t n) {
  for (const SoftmaxProblem& p : softmax_problems(rows, n)) {
    SoftmaxTensors dense(p);
    softmax_on_gpu(p, dense);
    expect_softmax(p, dense);
    // One element off and a gap: the other kernels, the same bits.
    SoftmaxTensors strided(p, 1, 3);
    softmax_on_gpu(p, strided);
    SCOPED_TRACE(p.text());
    EXPECT_TRUE(strided.y.same_bits(dense.y));
    EXPECT_TRUE(strided.dx.same_bits(dense.dx));
    EXPECT_TRUE(strided.y.gaps_intact() && strided.dx.gaps_intact());
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(SoftmaxCuda, SmallRows) {
  for (const std::int64_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 77, 127, 129}) {
    expect_matches(77, n);
    if (HasFailure()) return;
  }
}

TEST_F(SoftmaxCuda, RowsOfABlock) {
  for (const std::int64_t n : {255, 256, 257, 511, 513, 1000, 1023, 1024, 1025, 2047, 2049, 4088,
                               4096, 4097, 8191, 8192}) {
    expect_matches(5, n);
    if (HasFailure()) return;
  }
}

TEST_F(SoftmaxCuda, RowsInSharedMemory) {
  for (const std::int64_t n :
       {8193, 8200, 12288, 12289, 16384, 16385, 24576, 32000, 32768, 49152}) {
    expect_matches(3, n);
    if (HasFailure()) return;
  }
}

TEST_F(SoftmaxCuda, RowsOfAClusterAndInSegments) {
  for (const std::int64_t n : {49153, 50257, 65536, 65537, 102400, 128256, 151936, 262144, 262145,
                               393216, 393217, 786432, 786433, 1000003}) {
    expect_matches(2, n);
    if (HasFailure()) return;
  }
}

TEST_F(SoftmaxCuda, ManyRows) {
  for (const auto& [rows, n] :
       {std::pair<std::int64_t, std::int64_t>{8192, 3}, {65537, 2}, {1031, 129}, {289, 8200}}) {
    SoftmaxProblem p{.dtype = DType::bf16, .out = DType::bf16, .rows = rows, .n = n};
    SoftmaxTensors t(p);
    softmax_on_gpu(p, t);
    expect_softmax(p, t);
  }
}

TEST_F(SoftmaxCuda, RowsAloneHaveTheSameBits) {
  for (const std::int64_t n : {17, 1000, 8192, 20000, 102400, 1000003}) {
    SoftmaxProblem p{.dtype = DType::bf16, .out = DType::bf16, .rows = 5, .n = n};
    SoftmaxTensors all(p);
    softmax_on_gpu(p, all);
    p.rows = 1;
    SoftmaxTensors one(p);
    for (std::int64_t i = 0; i < n; ++i) one.x.set(i, all.x.get(3 * n + i));
    for (std::int64_t i = 0; i < n; ++i) one.dy.set(i, all.dy.get(3 * n + i));
    softmax_on_gpu(p, one);
    for (std::int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(one.y.get(i), all.y.get(3 * n + i)) << n << ' ' << i;
      ASSERT_EQ(one.dx.get(i), all.dx.get(3 * n + i)) << n << ' ' << i;
    }
  }
}

TEST_F(SoftmaxCuda, RepeatsOnASideStream) {
  const SideStream side;
  for (const std::int64_t n : {1000, 8192, 32768, 102400, 262144, 1000003}) {
    const SoftmaxProblem p{.dtype = DType::bf16, .out = DType::bf16, .rows = 3, .n = n};
    SoftmaxTensors first(p);
    softmax_on_gpu(p, first);
    for (int i = 0; i < 20; ++i) {
      SoftmaxTensors again(p);
      softmax_on_gpu(p, again, side.stream());
      ASSERT_TRUE(again.y.same_bits(first.y)) << n;
      ASSERT_TRUE(again.dx.same_bits(first.dx)) << n;
    }
  }
}

TEST_F(SoftmaxCuda, RefusesAWorkspaceTooSmall) {
  SoftmaxFwd args{.x = dense(nullptr, DType::f32, 2, 1 << 21),
                  .y = dense(nullptr, DType::f32, 2, 1 << 21),
                  .mask = {}};
  EXPECT_GT(cuda::softmax_workspace(args, 0), 0u);
  EXPECT_TRUE(contains(error_of([&] { cuda::softmax(args, {}); }), "workspace must be at least"));
}

}  // namespace
}  // namespace fastkern
