// SPDX-License-Identifier: Apache-2.0
// The cross entropy on CUDA: which kernels a call takes, and the sums over its rows.
//
//   work     of the sums: a block of 1024 threads adds up 8,192 rows, thread t every 1024th from
//            row t on; then over warps and the block. Where there are more rows a last block adds
//            up the blocks' sums, in the same way
//   sync     launches follow one another with Launch::overlap
//   cost     of the sums: 8 to 24 bytes a row
#include "loss/loss_rows.cuh"

namespace fastkern::cuda {
namespace loss_detail {
namespace {

constexpr int kThreads = 1024;

struct SumsParams {
  Targets targets;
  std::int64_t rows;
  bool soft, mean, totals_given;
  const float *row_loss, *row_zloss;
  float *totals, *loss, *zloss;
  float4* partial;
};

__device__ __forceinline__ float4 over_block(float4 v) {
  __shared__ float4 sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto over_warp = [](float4 v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      v.x += __shfl_xor_sync(0xffffffffu, v.x, offset);
      v.y += __shfl_xor_sync(0xffffffffu, v.y, offset);
      v.z += __shfl_xor_sync(0xffffffffu, v.z, offset);
      v.w += __shfl_xor_sync(0xffffffffu, v.w, offset);
    }
    return v;
  };
  v = over_warp(v);
  if (lane == 0) sums[warp] = v;
  __syncthreads();
  return over_warp(sums[lane]);
}

/// (Σ weights, Σ rows that count, Σ loss, Σ zloss) become what the call returns.
__device__ __forceinline__ void finish_sums(const SumsParams& p, const float4& sum) {
  float weights = 1.0f, count = 1.0f;
  if (p.totals_given) {
    weights = p.totals[0], count = p.totals[1];
  } else {
    if (p.mean) weights = sum.x, count = sum.y;
    p.totals[0] = weights, p.totals[1] = count;
  }
  if (!p.loss) return;
  const float zloss = p.mean ? __fdiv_rn(sum.w, count) : sum.w;
  *p.zloss = zloss;
  *p.loss = (p.mean ? __fdiv_rn(sum.z, weights) : sum.z) + zloss;
}

__global__ void __launch_bounds__(kThreads) loss_sums_kernel(const SumsParams p) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kLossSumRows + threadIdx.x;
  float4 sum{};
#pragma unroll
  for (int i = 0; i < kLossSumRows / kThreads; ++i) {
    const std::int64_t row = first + i * kThreads;
    if (row >= p.rows) continue;
    if (p.mean && !p.totals_given) {
      const int target = p.targets[row];
      if (target != Targets::kIgnored) {
        sum.x += p.soft ? 1.0f : p.targets.weight_of(target);
        sum.y += 1.0f;
      }
    }
    if (p.loss) {
      sum.z += p.row_loss[row];
      sum.w += p.row_zloss[row];
    }
  }
  sum = over_block(sum);
  if (threadIdx.x > 0) return;
  if (p.partial) {
    p.partial[blockIdx.x] = sum;
  } else {
    finish_sums(p, sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    loss_sums_last_kernel(const SumsParams p, std::int64_t blocks) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  float4 sum{};
  for (std::int64_t i = threadIdx.x; i < blocks; i += kThreads) sum = tile::add(sum, p.partial[i]);
  sum = over_block(sum);
  if (threadIdx.x == 0) finish_sums(p, sum);
}

}  // namespace
}  // namespace loss_detail

using namespace loss_detail;

void loss_sums(const LossSums& args, Stream stream) {
  SumsParams p{};
  p.targets = {args.target.data, args.target.narrow, args.ignore_index,
               static_cast<int>(args.classes), tile::column_view(args.weight, args.classes)};
  p.soft = !args.target.data, p.mean = args.reduction == Reduction::mean;
  p.rows = args.rows, p.totals_given = args.totals_given;
  p.row_loss = args.row_loss, p.row_zloss = args.row_zloss;
  p.totals = args.totals, p.loss = args.loss, p.zloss = args.zloss;
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(args.rows, kLossSumRows), 1);
  if (blocks > 1) p.partial = static_cast<float4*>(args.workspace);
  launch(loss_sums_kernel, {.op = args.op, .grid = blocks, .block = kThreads, .overlap = true},
         stream, p);
  if (blocks > 1) {
    launch(loss_sums_last_kernel, {.op = args.op, .grid = 1, .block = kThreads, .overlap = true},
           stream, p, blocks);
  }
}

void cross_entropy(const CrossEntropyFwd& args, Stream stream) {
  const Rows rows = rows_of(args.logits, args.op, "logits");
  const bool reduced = args.reduction != Reduction::none;
  LossSums sums{.op = args.op,
                .target = args.target,
                .weight = args.weight,
                .rows = rows.count,
                .classes = rows.length,
                .ignore_index = args.ignore_index,
                .reduction = args.reduction,
                .totals = args.state + kLossState * rows.count,
                .workspace = args.workspace};
  if (args.grad.given() && !args.totals) {
    loss_sums(sums, stream);
    sums.totals_given = true;
  }
  if (rows.count > 0) {
    const bool clusters = has_clusters(stream.device, args.op);
    const std::int64_t limit =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device, args.op);
    const Plan plan = cross_entropy_grad_plan(rows.length, args.logits.dtype, clusters, limit);
    if (args.grad.given() && plan.resident) {
      launch_grad(args, plan, stream);
    } else {
      launch_fwd(args, stream);
      if (args.grad.given()) {
        CrossEntropyBwd backward{args};
        backward.state = args.state;
        backward.totals = args.totals;
        backward.dloss = args.dloss, backward.dloss_is_one = args.dloss == nullptr;
        backward.dlogits = args.grad;
        cross_entropy_bwd(backward, stream);
      }
    }
  }
  if (!reduced && rows.count == 0) loss_sums(sums, stream);  // totals that nobody divides by
  if (!reduced || !args.loss || args.totals) return;
  sums.row_loss = args.row_loss, sums.row_zloss = args.row_zloss;
  sums.loss = args.loss, sums.zloss = args.zloss;
  loss_sums(sums, stream);
}

}  // namespace fastkern::cuda
