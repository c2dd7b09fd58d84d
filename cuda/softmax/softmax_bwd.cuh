// SPDX-License-Identifier: Apache-2.0
// Backward of softmax and log_softmax over the last dimension, for rows that stay on the
// multiprocessor. softmax.h has the formulas.
//
//   work     as in softmax_fwd.cuh
//   memory   y and dy wait in registers or in shared memory between the sum over the row and dx
//   sync     one exchange of a sum: a barrier, in a cluster of blocks st.async and one wait; none
//            where a team lies within a warp
//   cost     y and dy are read and dx is written once. For each element, of bf16: unpack 2, fma,
//            unpack 2 again, subtract, multiply twice, half a conversion: 8.5 instructions, where
//            a copy at 4.2 TB/s leaves room for 42.
#pragma once

#include "softmax/softmax_terms.cuh"

namespace fastkern::cuda::softmax_detail {

using Sent = tile::Exchange<tile::Sum, 1>;

template <class T, int kPacks, SoftmaxKind kKind, bool kPlain>
__global__ void __launch_bounds__(256) softmax_bwd_registers_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ uint4 memory[Sent::bytes(256, 1) / 16];
  const SoftmaxKind kind = kPlain ? kKind : p.kind;
  Sent exchange({p.threads, 1, 0}, memory);
  const bool several = p.threads <= 64;  // rows a block
  const int index = several ? threadIdx.x & (p.threads - 1) : threadIdx.x;
  const std::int64_t row =
      several ? static_cast<std::int64_t>(blockIdx.x) * (128 / p.threads) + threadIdx.x / p.threads
              : blockIdx.x;
  const int n = row < p.rows ? static_cast<int>(p.n) : 0;
  const auto column_of = [&](int i) { return (i * p.threads + index) * kV; };
  ptx::grid_wait();
  ptx::grid_launch_next();

  // Columns that are not there, or hidden, read as 0: y = 0 makes their share and their gradient 0.
  const int seen = kPlain ? n : static_cast<int>(seen_columns(p, row, n));
  Pack<T> y[kPacks], dy[kPacks];
  p.y.template load<kPlain>(n > 0 ? p.y.template row<kPlain>(row) : nullptr, column_of, seen, y);
  p.dy.template load<kPlain>(n > 0 ? p.dy.template row<kPlain>(row) : nullptr, column_of, seen, dy);
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float a[kV], b[kV];
    p.y.unpack(y[i], a);
    p.dy.unpack(dy[i], b);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[0] = added_term(kind, a[j], b[j], sum[0]);
    tile::keep_packed(y[i]);
    tile::keep_packed(dy[i]);
  }
  exchange.send(sum);
  exchange.receive(sum);
  Pack<T> dx[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float a[kV], b[kV];
    p.y.unpack(y[i], a);
    p.dy.unpack(dy[i], b);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      a[j] = gradient_of<T>(kind, a[j], b[j], sum[0], p.scale);
      if constexpr (!kPlain) a[j] = column_of(i) + j < seen ? a[j] : 0.0f;
    }
    dx[i] = p.dx.pack(a);
  }
  p.dx.template store<kPlain>(n > 0 ? p.dx.template row<kPlain>(row) : nullptr, column_of, n, dx);
}

template <class T, SoftmaxKind kKind, bool kPlain>
__global__ void __launch_bounds__(512) softmax_bwd_shared_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>;
  extern __shared__ __align__(128) uint4 memory[];
  const SoftmaxKind kind = kPlain ? kKind : p.kind;
  const int rank = p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int n = static_cast<int>(p.n), threads = blockDim.x;
  Sent exchange({threads, p.blocks, rank}, memory);
  if (p.blocks > 1) ptx::cluster_arrive();
  const std::int64_t row = blockIdx.x / p.blocks;
  const int vectors = (n + kV - 1) / kV, part = (vectors + p.blocks - 1) / p.blocks;
  const int first = rank * part, count = min(part, vectors - first);
  uint4* const sY = memory + Sent::bytes(512, 16) / 16;
  uint4* const sDy = sY + part;
  ptx::grid_wait();
  ptx::grid_launch_next();

  const int seen = kPlain ? n : static_cast<int>(seen_columns(p, row, n));
  const char* const gY = p.y.template row<kPlain>(row);
  const char* const gDy = p.dy.template row<kPlain>(row);
  // f(i, column) for the packs of this thread, which nobody else touches.
  constexpr int kAtOnce = kPlain ? 4 : 1;
  const auto each = [&](const auto& f) {
#pragma unroll kAtOnce
    for (int i = threadIdx.x; i < count; i += threads) f(i, (first + i) * kV);
  };
  each([&](int i, int column) {
    fetch<kPlain>(p.y, sY + i, gY, column, seen);
    fetch<kPlain>(p.dy, sDy + i, gDy, column, seen);
  });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  float sum[1] = {0.0f};
  each([&](int i, int) {
    float a[kV], b[kV];
    p.y.unpack({ptx::ld_shared(sY + i)}, a);
    p.dy.unpack({ptx::ld_shared(sDy + i)}, b);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[0] = added_term(kind, a[j], b[j], sum[0]);
  });
  if (p.blocks > 1) ptx::cluster_wait();
  exchange.send(sum);
  exchange.receive(sum);
  char* const gDx = p.dx.template row<kPlain>(row);
  each([&](int i, int column) {
    float a[kV], b[kV];
    p.y.unpack({ptx::ld_shared(sY + i)}, a);
    p.dy.unpack({ptx::ld_shared(sDy + i)}, b);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      a[j] = gradient_of<T>(kind, a[j], b[j], sum[0], p.scale);
      if constexpr (!kPlain) a[j] = column + j < seen ? a[j] : 0.0f;
    }
    put<kPlain>(p.dx, gDx, column, n, a);
  });
}

template <class T>
void launch_bwd(const SoftmaxBwd& args, const Plan& plan, Stream stream) {
  const Backward<T> p = backward_params<T>(args, plan);
  const bool plain = p.y.plain() && p.dy.plain() && p.dx.plain() && !p.causal;
  const bool in_registers = plan.shared_bytes == 0;
  const Launch shape{
      .op = args.op,
      .grid = in_registers ? ceil_div(p.rows, plan.rows_per_block) : p.rows * plan.blocks_per_row,
      .block = plan.threads_per_block,
      .shared =
          in_registers ? 0 : Sent::bytes(512, 16) + static_cast<std::size_t>(plan.shared_bytes),
      .cluster = plan.blocks_per_row,
      .overlap = true};
  const int packs = plan.elements_per_thread / kVector<T>;
  const auto run = [&]<SoftmaxKind kKind, bool kPlain>() {
    if (!in_registers)
      return launch(&softmax_bwd_shared_kernel<T, kKind, kPlain>, shape, stream, p);
    dispatch_ceil<2, 4>(packs, [&]<int kPacks>() {
      launch(&softmax_bwd_registers_kernel<T, kPacks, kKind, kPlain>, shape, stream, p);
    });
  };
  if constexpr (!std::is_same_v<T, Mixed>) {
    if (plain) {
      return args.kind == SoftmaxKind::softmax
                 ? run.template operator()<SoftmaxKind::softmax, true>()
                 : run.template operator()<SoftmaxKind::log_softmax, true>();
    }
  }
  run.template operator()<SoftmaxKind::softmax, false>();
}

}  // namespace fastkern::cuda::softmax_detail
