// SPDX-License-Identifier: Apache-2.0
// Cross entropy, forward: the loss, lse and zloss of each row, and what backward needs of it.
//
//   work     a warp, or a block of up to 256 threads, owns a row (cross_entropy_plan). Pack i of
//            thread t is columns (i * threads + t) * vector and the vector - 1 after it
//   memory   the row goes through registers, four packs of 16 bytes a thread at a time; five
//            blocks of 256 threads, or more of fewer, share a multiprocessor: 80 KiB under way
//   sums     a running maximum and sum for each thread, rescaled once a pack; then over the warp,
//            then over the block's warps. The order depends on V and the type alone
//   sync     one barrier of a block, none of a warp
//   cost     reads the logits once; 12 to 24 bytes a row besides
#include "loss/loss_rows.cuh"

namespace fastkern::cuda {
namespace loss_detail {
namespace {

constexpr int kPacks = 4;  // of a thread, at a time

template <class T, bool kPlain>
__global__ void __launch_bounds__(256, kPlain ? 5 : 4)
    cross_entropy_fwd_kernel(const __grid_constant__ Loss<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ float4 memory[tile::kLogSumBytes / 16];
  const bool warps = p.threads == 32;  // a row is a warp's
  const std::int64_t row =
      warps ? static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32
            : static_cast<std::int64_t>(blockIdx.x);
  const int index = warps ? threadIdx.x % 32 : threadIdx.x, n = p.classes;
  const int apart = p.threads * kV;
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (!p.reduced && row == 0 && index == 0) {  // totals that nobody divides by
    float* const totals = p.state + kLossState * p.rows;
    totals[0] = totals[1] = 1.0f;
  }
  if (row >= p.rows) return;
  const char* const gX = p.logits.row(row);
  Apart columns{index * kV, apart};
  Pack<T> packs[kPacks];
  p.logits.load(gX, columns, n, packs);  // before it is known whether the row counts
  const int target = p.targets[row];
  if (target == Targets::kIgnored) {
    if (index == 0) finish_ignored(p, row);
    return;
  }
  const float pivot = pivot_of<T, kPlain>(p, gX);
  Sums<T, kPlain> sums;
  if (index == 0 && target >= 0)
    add_target<T, kPlain>(p, reinterpret_cast<const T*>(gX)[target], sums);
  while (columns(kPacks - 1) + kV <= n) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      add_pack<T, kPlain, false>(p, packs[i], row, columns(i), n, pivot, sums);
    columns.first += kPacks * apart;
    p.logits.load(gX, columns, n, packs);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (columns(i) < n) add_pack<T, kPlain, true>(p, packs[i], row, columns(i), n, pivot, sums);
  }
  if (warps) {
    sums.reduce(p.unit);
  } else {
    tile::LogSumExchange<kLossSums<T, kPlain>>(memory, 1, 0).reduce(sums, p.unit);
  }
  if (index == 0) finish_row<T, kPlain>(p, row, target, pivot, sums, true);
}

}  // namespace

void launch_fwd(const CrossEntropyFwd& args, Stream stream) {
  dispatch(args.logits.dtype, [&]<class T>() {
    Loss<T> p = forward_params<T>(args);
    const Plan plan = cross_entropy_plan(p.classes, args.logits.dtype);
    p.threads = plan.threads_per_row;
    dispatch_bool(is_plain(args), [&]<bool kPlain>() {
      launch(cross_entropy_fwd_kernel<T, kPlain>,
             {.op = args.op,
              .grid = ceil_div(p.rows, plan.rows_per_block),
              .block = plan.threads_per_block,
              .overlap = true},
             stream, p);
    });
  });
}

}  // namespace loss_detail
}  // namespace fastkern::cuda
