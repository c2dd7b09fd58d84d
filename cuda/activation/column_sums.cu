// SPDX-License-Identifier: Apache-2.0
// The second stage of sums over rows: what the slices of columns.cuh come to.
//
//   work     a block has 32 columns. Warp w takes the slices w, w + 32, ..., in turn; then one warp
//            adds up what the warps have
//   sync     one barrier
//   cost     reads the sums of the slices once, as a rule from the L2 cache
#include "activation/columns.cuh"

namespace fastkern::cuda {
namespace activation_detail {
namespace {

constexpr int kWarps = 32;

__global__ void __launch_bounds__(32 * kWarps)
    column_sums_kernel(const float* sums, void* out, DType dtype, std::int64_t slices,
                       std::int64_t n) {
  __shared__ float sTotals[kWarps * 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * 32 + lane;
  ptx::grid_wait();
  ptx::grid_launch_next();
  float total = 0.0f;
  if (column < n) {
#pragma unroll 4
    for (std::int64_t slice = warp; slice < slices; slice += kWarps)
      total += sums[slice * n + column];
  }
  sTotals[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || column >= n) return;
  total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += sTotals[w * 32 + lane];
  tile::store_as(out, dtype, column, total);
}

}  // namespace

void launch_column_sums(const float* sums, const TensorRef& dbias, std::int64_t slices,
                        const char* op, Stream stream) {
  const std::int64_t n = dbias.sizes[0];
  const Launch shape{.op = op, .grid = ceil_div(n, 32), .block = 32 * kWarps, .overlap = true};
  launch(column_sums_kernel, shape, stream, sums, dbias.data, dbias.dtype, slices, n);
}

}  // namespace activation_detail

std::size_t column_sums_workspace(const TensorRef& dy, const TensorRef& dbias) {
  using namespace activation_detail;  // NOLINT: all of it is about this
  const std::int64_t n = dy.ndim > 0 ? dy.sizes[dy.ndim - 1] : 0;
  if (!dbias.given() || dy.numel() == 0) return 0;
  // Whatever the type of the operands: dx may have another one.
  std::int64_t most = 0;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const ColumnOp op : {ColumnOp::bias_act_bwd, ColumnOp::bias_dropout_add_bwd})
      most = std::max(most, column_plan(dy.numel() / n, n, dtype, at_once(op), true).slices);
  }
  return static_cast<std::size_t>(most * n) * sizeof(float);
}

}  // namespace fastkern::cuda
