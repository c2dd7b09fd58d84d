// SPDX-License-Identifier: Apache-2.0
// Cross entropy, backward: the gradient by the logits, from the logits and what forward left of
// each row. Also the second half of forward with gradient, for rows that do not stay on chip.
//
//   work     256 threads, four packs of 16 bytes each: a part of a row, or several short rows
//   memory   registers; the packs are asked for before the row's numbers, which lie in the caches
//   sync     none
//   cost     reads the logits once, writes the gradient once; rows that do not count are not read
#include "loss/loss_rows.cuh"

namespace fastkern::cuda {
namespace loss_detail {
namespace {

constexpr int kThreads = 256, kPacks = 4;

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 5 : 3)
    cross_entropy_bwd_kernel(const __grid_constant__ Loss<T> p) {
  constexpr int kV = kVector<T>;
  const int n = p.classes, rows = kThreads / p.threads;  // of a block
  // p.blocks: parts of a row, 1 where a block has several rows.
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x / p.blocks) * rows + threadIdx.x / p.threads;
  const int part = blockIdx.x % p.blocks, index = threadIdx.x % p.threads;
  const Apart columns{(part * kPacks * p.threads + index) * kV, p.threads * kV};
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (row >= p.rows) return;
  char* const gG = p.grad.row(row);
  const int target = p.targets[row];
  Pack<T> packs[kPacks];
  if (target == Targets::kIgnored) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs[i] = {};
    p.grad.store(gG, columns, n, packs);
    return;
  }
  const char* const gX = p.logits.row(row);
  p.logits.load(gX, columns, n, packs);
  // The target's pack, counted from the first one of this part of the row.
  const int pack = target < 0 ? -1 : target / kV - part * kPacks * p.threads;
  const bool own = pack >= 0 && pack < kPacks * p.threads && pack % p.threads == index;
  T logit{};
  if (own) logit = reinterpret_cast<const T*>(gX)[target];  // before it may be written over
  const float* const state = p.state + kLossState * row;
  const RowGradient g = row_gradient<T, kPlain>(p, row, target, {state[0], state[1], state[2]});
#pragma unroll
  for (int i = 0; i < kPacks; ++i)
    packs[i] = gradient_of<T, kPlain>(p, packs[i], row, columns(i), n, g);
  p.grad.store(gG, columns, n, packs);
  if (own) store_target<T, kPlain>(p, logit, row, target, g, gG);
}

/// x *= *factor, unless that is 1: then it has not been read.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_unless_one_kernel(T* x, std::int64_t size, bool whole, const float* factor) {
  constexpr int kV = kVector<T>;
  ptx::grid_wait();
  ptx::grid_launch_next();
  const float by = *factor;
  if (by == 1.0f) return;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kV;
  for (std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kV;
       at < size; at += step) {
    if (whole && at + kV <= size) {
      float v[kV];
      tile::unpack(Pack<T>{*reinterpret_cast<const uint4*>(x + at)}, v);
#pragma unroll
      for (int j = 0; j < kV; ++j) v[j] *= by;
      ptx::st_global(x + at, tile::pack_of<T>(v).bits);
    } else {
      for (int j = 0; j < kV && at + j < size; ++j)
        x[at + j] = tile::from_float<T>(tile::to_float(x[at + j]) * by);
    }
  }
}

}  // namespace
}  // namespace loss_detail

using namespace loss_detail;

void cross_entropy_bwd(const CrossEntropyBwd& args, Stream stream) {
  dispatch(args.logits.dtype, [&]<class T>() {
    Loss<T> p = loss_params<T>(args);
    p.grad = tile::row_view<T>(args.dlogits, args.op, "dlogits");
    p.state = const_cast<float*>(args.state);  // which this kernel only reads
    p.dloss = args.dloss, p.dlse = args.dlse, p.dzloss = args.dzloss;
    p.dloss_is_one = args.dloss_is_one;
    p.totals = args.totals ? args.totals : args.state + kLossState * p.rows;
    const std::int64_t packs = ceil_div(p.classes, kVector<T>);
    p.threads = static_cast<int>(std::min<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(ceil_div(packs, kPacks))), kThreads));
    p.blocks = static_cast<int>(ceil_div(packs, kPacks * p.threads));
    dispatch_bool(is_plain(args), [&]<bool kPlain>() {
      launch(cross_entropy_bwd_kernel<T, kPlain>,
             {.op = args.op,
              .grid = ceil_div(p.rows, kThreads / p.threads) * p.blocks,
              .block = kThreads,
              .overlap = true},
             stream, p);
    });
  });
}

void scale_unless_one(const TensorRef& x, const float* factor, Stream stream) {
  const char* const op = "fastkern::scale_unless_one_";
  const std::int64_t size = x.numel();
  dispatch(x.dtype, [&]<class T>() {
    constexpr std::int64_t kMost = 132 * 8 * 4;  // blocks: a few for each place there may be
    launch(scale_unless_one_kernel<T>,
           {.op = op,
            .grid = std::min(ceil_div(size, kThreads * kVector<T>), kMost),
            .block = kThreads,
            .overlap = true},
           stream, static_cast<T*>(x.data), size,
           reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0, factor);
  });
}

}  // namespace fastkern::cuda
