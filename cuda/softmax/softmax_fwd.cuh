// SPDX-License-Identifier: Apache-2.0
// Forward of the softmax family over the last dimension, for rows that stay on the multiprocessor.
// softmax.h says what is computed.
//
//   work     softmax_registers_kernel: a row belongs to a team of threads of one block; pack i of
//            thread t is columns (i * threads + t) * vector and the vector - 1 after it.
//            softmax_shared_kernel: to a block, or to a cluster of blocks that have equal parts of
//            it (softmax_plan).
//   memory   the row waits in registers, or in shared memory where cp.async brings it, between its
//            sum and its result
//   sync     each warp takes its exponentials around its own largest value; then one exchange of
//            the warps' (max, sum) gives both of the row: a barrier, and in a cluster st.async of
//            the block's to every block and one wait. None where a team lies within a warp.
//   cost     x is read and y written once. For each element, of bf16: unpack, max, x - m,
//            * log2 e, ex2, add, * 1 / s, half a conversion: 7.5 instructions, where a copy at
//            4.2 TB/s leaves room for 28; with rows in shared memory 11, ex2 twice.
#pragma once

#include "softmax/softmax_terms.cuh"

namespace fastkern::cuda::softmax_detail {

/// Plain calls: rows at one stride, in packs, no mask; kKind at compile time. The others ask.
template <class T, int kPacks, SoftmaxKind kKind, bool kPlain>
__global__ void __launch_bounds__(256) softmax_registers_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ Terms shared[8];
  const SoftmaxKind kind = kPlain ? kKind : p.kind;
  const bool several = p.threads <= 64;  // rows a block
  const int index = several ? threadIdx.x & (p.threads - 1) : threadIdx.x;
  const std::int64_t row =
      several ? static_cast<std::int64_t>(blockIdx.x) * (128 / p.threads) + threadIdx.x / p.threads
              : blockIdx.x;
  const int n = row < p.rows ? static_cast<int>(p.n) : 0;
  const auto column_of = [&](int i) { return (i * p.threads + index) * kV; };
  ptx::grid_wait();
  ptx::grid_launch_next();

  const Row<T, kPlain> values(p, row, n);
  Pack<T> x[kPacks];
  p.x.template load<kPlain>(values.x, column_of, values.seen, x);
  float z[kPacks][kV], max = -infinity();
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    values.values(x[i], column_of(i), z[i]);
#pragma unroll
    for (int j = 0; j < kV; ++j) max = fmaxf(max, z[i][j]);
  }
  Terms terms{lanes<Max>(max, p.threads < 32 ? p.threads : 32), 0.0f};
  const float own = terms.max, shift = shift_of(own);
  float e[kPacks][kV];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      e[i][j] = exp_for<T>(__fsub_rn(z[i][j], shift));
      terms.sum += e[i][j];
    }
  }
  terms.sum = lanes<tile::Sum>(terms.sum, p.threads < 32 ? p.threads : 32);
  if (p.threads > 32) {
    const int warp = threadIdx.x / 32, warps = p.threads / 32;
    if (threadIdx.x % 32 == 0) shared[warp] = terms;
    __syncthreads();
    terms = few_merged<8>(shared + (several ? warp & -warps : 0), warps);
  }
  const RowTerms r = row_terms(kind, terms, !kPlain && p.masked);
  if (kind == SoftmaxKind::logsumexp) {
    if (index == 0 && row < p.rows) tile::store_as(p.lse, p.lse_type, row, r.shift + r.rest);
    return;
  }
  const float factor = __fmul_rn(factor_of(own, terms.max), r.rest);  // of softmax
  Pack<T> y[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j)
      v[j] = kind == SoftmaxKind::softmax ? __fmul_rn(e[i][j], factor)
                                          : __fsub_rn(__fsub_rn(z[i][j], r.shift), r.rest);
    y[i] = p.y.pack(v);
  }
  char* const gY = n > 0 ? p.y.template row<kPlain>(row) : nullptr;
  p.y.template store<kPlain>(gY, column_of, n, y);
}

/// Shared memory before the rows: a barrier, terms of up to 16 warps, and of up to 16 blocks.
inline constexpr int kTermsBytes = 128 + 16 * 8 + 16 * 8;

/// (max, sum) of the row, from those of this thread's warp. `cluster_wait` is still to come where
/// blocks share the row.
__device__ __forceinline__ Terms exchanged(Terms mine, void* memory, int blocks, int rank) {
  std::uint64_t* const barrier = static_cast<std::uint64_t*>(memory);
  Terms* const of_warps = reinterpret_cast<Terms*>(static_cast<char*>(memory) + 128);
  Terms* const of_blocks = of_warps + 16;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) of_warps[warp] = mine;
  __syncthreads();
  const Terms all = few_merged<16>(of_warps, warps);
  if (blocks == 1) return all;
  ptx::cluster_wait();
  if (warp == 0 && lane < blocks) {
    Terms* const to = of_blocks + rank;
    ptx::st_async(&to->max, __float_as_uint(all.max), barrier, lane);
    ptx::st_async(&to->sum, __float_as_uint(all.sum), barrier, lane);
  }
  while (!ptx::mbarrier_try_wait(barrier, 0)) {
  }
  return few_merged<16>(of_blocks, blocks);
}

template <class T, SoftmaxKind kKind, bool kPlain>
__global__ void __launch_bounds__(512) softmax_shared_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>;
  extern __shared__ __align__(128) uint4 memory[];
  uint4* const sRow = memory + kTermsBytes / 16;
  const SoftmaxKind kind = kPlain ? kKind : p.kind;
  const int rank = p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const std::int64_t row = blockIdx.x / p.blocks;
  const int n = static_cast<int>(p.n), threads = blockDim.x;
  if (p.blocks > 1) {
    if (threadIdx.x == 0) {
      std::uint64_t* const barrier = reinterpret_cast<std::uint64_t*>(memory);
      ptx::mbarrier_init(barrier, 1);
      ptx::mbarrier_init_fence();
      ptx::mbarrier_expect(barrier, p.blocks * 8);
    }
    ptx::cluster_arrive();
  }
  ptx::grid_wait();
  ptx::grid_launch_next();

  const Row<T, kPlain> values(p, row, n);
  const int vectors = (n + kV - 1) / kV, part = (vectors + p.blocks - 1) / p.blocks;
  const int first = rank * part, count = min(part, vectors - first);
  // f(place, column) for the packs of this thread, which nobody else touches.
  constexpr int kAtOnce = kPlain ? 4 : 1;
  const auto each = [&](const auto& f) {
#pragma unroll kAtOnce
    for (int i = threadIdx.x; i < count; i += threads) f(sRow + i, (first + i) * kV);
  };
  each([&](uint4* place, int column) { fetch<kPlain>(p.x, place, values.x, column, values.seen); });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();

  float max = -infinity();
  each([&](const uint4* place, int column) {
    float z[kV];
    values.template values<kPlain>({ptx::ld_shared(place)}, column, z);
#pragma unroll
    for (int j = 0; j < kV; ++j) max = fmaxf(max, z[j]);
  });
  Terms terms{lanes<Max>(max, 32), 0.0f};
  const float shift = shift_of(terms.max);
  each([&](const uint4* place, int column) {
    float z[kV];
    values.template values<kPlain>({ptx::ld_shared(place)}, column, z);
#pragma unroll
    for (int j = 0; j < kV; ++j) terms.sum += exp_for<T>(__fsub_rn(z[j], shift));
  });
  terms.sum = lanes<tile::Sum>(terms.sum, 32);
  terms = exchanged(terms, memory, p.blocks, rank);

  const RowTerms r = row_terms(kind, terms, !kPlain && p.masked);
  if (kind == SoftmaxKind::logsumexp) {
    if (threadIdx.x == 0 && rank == 0) tile::store_as(p.lse, p.lse_type, row, r.shift + r.rest);
    return;
  }
  char* const gY = p.y.template row<kPlain>(row);
  each([&](const uint4* place, int column) {
    float z[kV];
    values.template values<kPlain>({ptx::ld_shared(place)}, column, z);
#pragma unroll
    for (int j = 0; j < kV; ++j) z[j] = result_of<T>(kind, z[j], r);
    put<kPlain>(p.y, gY, column, n, z);
  });
}

template <class T>
void launch_fwd(const SoftmaxFwd& args, const Plan& plan, Stream stream) {
  const Forward<T> p = forward_params<T>(args, plan);
  const bool rows_whole = p.lse ? p.x.plain() : p.x.plain() && p.y.plain();
  const bool plain = !std::is_same_v<T, Mixed> && rows_whole && !p.masked;
  const bool in_registers = plan.shared_bytes == 0;
  const Launch shape{
      .op = args.op,
      .grid = in_registers ? ceil_div(p.rows, plan.rows_per_block) : p.rows * plan.blocks_per_row,
      .block = plan.threads_per_block,
      .shared = in_registers ? 0 : kTermsBytes + static_cast<std::size_t>(plan.shared_bytes),
      .cluster = plan.blocks_per_row,
      .overlap = true};
  const int packs = plan.elements_per_thread / kVector<T>;
  const auto run = [&]<SoftmaxKind kKind, bool kPlain>() {
    if (!in_registers) return launch(&softmax_shared_kernel<T, kKind, kPlain>, shape, stream, p);
    dispatch_ceil<2, 4>(packs, [&]<int kPacks>() {
      launch(&softmax_registers_kernel<T, kPacks, kKind, kPlain>, shape, stream, p);
    });
  };
  if constexpr (!std::is_same_v<T, Mixed>) {
    if (plain) {
      return dispatch_kind(
          args.kind, [&](auto kind) { run.template operator()<decltype(kind)::value, true>(); });
    }
  }
  run.template operator()<SoftmaxKind::softmax, false>();
}

}  // namespace fastkern::cuda::softmax_detail
