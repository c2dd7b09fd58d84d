// SPDX-License-Identifier: Apache-2.0
// Cross entropy, forward with the gradient by the logits, which may be written over them: what
// cross_entropy_fwd_kernel and cross_entropy_bwd_kernel do, with one read of the logits.
//
//   work     a row of up to 104 KiB belongs to a block of up to 512 threads (in the general form
//            256), a longer one to a cluster of 2 to 16 blocks with up to 72 KiB each
//            (cross_entropy_grad_plan). The blocks have parts of as many packs one after the
//            other; pack i of thread t is the (i * threads + t)-th of its part
//   memory   the row waits in shared memory from its arrival (cp.async, all at once) to its
//            gradient; a thread reads what it has itself brought. Two or three blocks share a
//            multiprocessor and come and go: while one waits for its row, others write theirs
//   sums     as in cross_entropy_fwd_kernel, then over the blocks; another order, so lse may differ
//            from that kernel's in the last bits
//   sync     one barrier; in a cluster one more (nobody sends before every mbarrier is ready) and
//            one exchange: warp 0 of each block sends its sums to all blocks (st.async), which
//            report to the mbarrier that all threads of a block wait for, once
//   cost     reads the logits once, writes the gradient once
//
// A cluster that does not fit on the device is not launched at all: the plan is the caller's.
#include <algorithm>

#include "loss/loss_rows.cuh"

namespace fastkern::cuda {
namespace loss_detail {
namespace {

// The general form has half of the threads, with twice the registers.
template <bool kPlain>
inline constexpr int kMostThreads = kPlain ? 512 : 256;

template <class T, bool kPlain>
__global__ void __launch_bounds__(kMostThreads<kPlain>, 3)
    cross_entropy_grad_kernel(const __grid_constant__ Loss<T> p) {
  constexpr int kV = kVector<T>;
  extern __shared__ __align__(128) uint4 memory[];
  const int rank = p.blocks == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const std::int64_t row = blockIdx.x / p.blocks;
  const int threads = blockDim.x, n = p.classes;
  const int part = (n + kV - 1) / kV, share = (part + p.blocks - 1) / p.blocks;  // packs
  const int begin = min(rank * share * kV, n), end = min(begin + share * kV, n);
  uint4* const sRow = memory + tile::kLogSumBytes / 16 + threadIdx.x;
  // f(first column of a pack, its place) for all packs of the thread.
  const auto each = [&](const auto& f) {
    uint4* place = sRow;
#pragma unroll(kPlain ? 2 : 1)
    for (int at = begin + static_cast<int>(threadIdx.x) * kV; at < end;
         at += threads * kV, place += threads)
      f(at, place);
  };
  ptx::grid_wait();
  ptx::grid_launch_next();
  const char* const gX = p.logits.row(row);
  each([&](int at, uint4* place) {
    p.logits.template load_async<1>(place, 0, gX, Apart{at, 0}, n);
  });
  ptx::cp_async_commit();
  char* const gG = p.grad.row(row);
  const bool first = rank == 0 && threadIdx.x == 0;
  const int target = p.targets[row];
  if (target == Targets::kIgnored) {
    ptx::cp_async_wait<0>();
    if (first) finish_ignored(p, row);
    const Pack<T> zeros[1] = {};
    each([&](int at, const uint4*) { p.grad.store(gG, Apart{at, 0}, n, zeros); });
    return;
  }
  tile::LogSumExchange<kLossSums<T, kPlain>> exchange(memory, p.blocks, rank);
  const float pivot = pivot_of<T, kPlain>(p, gX);
  Sums<T, kPlain> sums;
  ptx::cp_async_wait<0>();
  T logit{};  // of the target, for the thread that has it
  const int own_pack = (target - begin) / kV;
  const bool own = target >= begin && target < end && own_pack % threads == threadIdx.x;
  if (own) {
    logit = reinterpret_cast<const T*>(memory + tile::kLogSumBytes / 16)[target - begin];
    add_target<T, kPlain>(p, logit, sums);
  }
  const auto add_up = [&]<bool kEnd>() {
    each([&](int at, const uint4* place) {
      add_pack<T, kPlain, kEnd>(p, {ptx::ld_shared(place)}, row, at, n, pivot, sums);
    });
  };
  if (n % kV == 0) {
    add_up.template operator()<false>();
  } else {
    add_up.template operator()<true>();
  }
  exchange.reduce(sums, p.unit);
  const RowState state = finish_row<T, kPlain>(p, row, target, pivot, sums, first);
  const RowGradient g = row_gradient<T, kPlain>(p, row, target, state);
  each([&](int at, const uint4* place) {
    const Pack<T> packs[1] = {gradient_of<T, kPlain>(p, {ptx::ld_shared(place)}, row, at, n, g)};
    p.grad.store(gG, Apart{at, 0}, n, packs);
  });
  if (own) store_target<T, kPlain>(p, logit, row, target, g, gG);
}

}  // namespace

void launch_grad(const CrossEntropyFwd& args, const Plan& plan, Stream stream) {
  dispatch(args.logits.dtype, [&]<class T>() {
    Loss<T> p = forward_params<T>(args);
    p.blocks = plan.blocks_per_row;
    dispatch_bool(is_plain(args), [&]<bool kPlain>() {
      launch(cross_entropy_grad_kernel<T, kPlain>,
             {.op = args.op,
              .grid = p.rows * p.blocks,
              .block = std::min(plan.threads_per_block, kMostThreads<kPlain>),
              .shared = static_cast<std::size_t>(plan.shared_bytes),
              .cluster = p.blocks,
              .overlap = true},
             stream, p);
    });
  });
}

}  // namespace loss_detail
}  // namespace fastkern::cuda
