// SPDX-License-Identifier: Apache-2.0
// Attention, backward: the gradients of bias and sinks, sums of ds over what they are broadcast to.
//
//   work     bias: a block has 64 queries and 64 keys of an entry and a head of the bias; it goes
//            through the entries and heads that share them and, where the bias is the same for all
//            queries, through these. sinks: a block has a head
//   memory   scores transposed, as in attention_bwd.cuh; the sums stay in registers
//   sync     two barriers for each product
#pragma once

#include "attention/attention_bwd_blocks.cuh"

namespace fastkern::cuda::attention_detail {

struct BiasGradient {
  char* data;
  DType dtype;
  int batch, heads, queries;  // its own sizes, 1 where it is broadcast
};

__device__ __forceinline__ void store_float(char* data, DType dtype, std::int64_t i, float v) {
  switch (dtype) {
    case DType::f16:
      reinterpret_cast<__half*>(data)[i] = __float2half_rn(v);
      return;
    case DType::bf16:
      reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
      return;
    default:
      reinterpret_cast<float*>(data)[i] = v;
  }
}

/// For a warp: the sums of 16 keys from j0 on and of the queries from i0 on, keys x queries; of one
/// head of one entry of the gradient, which may have one row for all queries.
template <int kTiles>
__device__ __forceinline__ void store_bias_gradient(const Forward& f, const BiasGradient& to, int b,
                                                    int h, int i0, int j0,
                                                    const float (&sums)[kTiles][4]) {
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const std::int64_t head = (static_cast<std::int64_t>(b) * to.heads + h) * to.queries;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = j0 + quad + half * 8;
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float v = sums[c][half * 2 + e];
        total += v;
        const int i = i0 + c * 8 + pair * 2 + e;
        if (to.queries > 1 && i < f.queries && j < f.keys)
          store_float(to.data, to.dtype, (head + i) * f.keys + j, v);
      }
    }
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (to.queries == 1 && pair == 0 && j < f.keys)
      store_float(to.data, to.dtype, head * f.keys + j, total);
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(128)
    attention_bwd_bias_kernel(const __grid_constant__ Backward p,
                              const __grid_constant__ BiasGradient to) {
  constexpr int kTile = 64, kThreads = 128, kTiles = kTile / 8;
  using S = Swizzled<kD>;
  extern __shared__ __align__(128) uint4 memory[];
  char* const sK = reinterpret_cast<char*>(memory);
  char* const sV = sK + kTile * kD * 2;
  char* const sQ = sV + kTile * kD * 2;
  char* const sDout = sQ + kTile * kD * 2;
  const Forward& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const int key_blocks = (f.keys + kTile - 1) / kTile;
  const int query_blocks = to.queries == 1 ? 1 : (f.queries + kTile - 1) / kTile;
  int rest = static_cast<int>(blockIdx.x);
  const int n = rest % key_blocks;
  rest /= key_blocks;
  const int m0 = rest % query_blocks;
  rest /= query_blocks;
  const int own_h = rest % to.heads, own_b = rest / to.heads;
  ptx::grid_wait();
  ptx::grid_launch_next();

  float sums[kTiles][4];
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[c][e] = 0.0f;
  }
  const int b_end = to.batch == 1 ? f.batch : own_b + 1;
  const int h_end = to.heads == 1 ? f.heads : own_h + 1;
  const int m_end = to.queries == 1 ? (f.queries + kTile - 1) / kTile : m0 + 1;
  Job job{};
  for (job.b = to.batch == 1 ? 0 : own_b; job.b < b_end; ++job.b) {
    const AttentionSequence<int> at = attention_sequence(f.lengths, job.b, f.queries, f.keys);
    job.sight = attention_sight(f.mask, at, job.b);
    const int j0 = n * kTile, j1 = min(j0 + kTile, at.keys);
    if (j0 >= j1) continue;
    for (job.h = to.heads == 1 ? 0 : own_h; job.h < h_end; ++job.h) {
      const int g = job.h / f.group;
      for (int m = m0; m < m_end; ++m) {
        const int i0 = m * kTile, i1 = min(i0 + kTile, at.queries);
        if (i0 >= i1 || job.sight.none(i0, i1, j0, j1)) continue;
        if (!listed_block(f, job.h, i0, i1, j0, j1)) continue;
        __syncthreads();
        fetch<kTile, kD, kThreads>(sK, f.k.at(job.b, j0, g), f.k.row, j1 - j0, f.d, f.vectors);
        fetch<kTile, kD, kThreads>(sV, f.v.at(job.b, j0, g), f.v.row, j1 - j0, f.dv, f.vectors);
        fetch<kTile, kD, kThreads>(sQ, f.q.at(job.b, i0, job.h), f.q.row, i1 - i0, f.d, f.vectors);
        fetch<kTile, kD, kThreads>(sDout, p.dout.at(job.b, i0, job.h), p.dout.row, i1 - i0, f.dv,
                                   f.vectors);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        float rS[kTiles][4], rDp[kTiles][4];
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) rS[c][e] = rDp[c][e] = 0.0f;
        }
        const int a_at = S::at(warp * 16 + (lane & 15), lane >> 4);
        const int b_at = S::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
#pragma unroll
        for (int kk = 0; kk < kD / 16; ++kk) {
          std::uint32_t rA[4], rV[4];
          ptx::ldmatrix_4(rA, S::right(ptx::shared_address(sK) + a_at, kk));
          ptx::ldmatrix_4(rV, S::right(ptx::shared_address(sV) + a_at, kk));
#pragma unroll
          for (int c = 0; c < kTiles; c += 2) {
            std::uint32_t rB[4];
            ptx::ldmatrix_4(rB, S::right(ptx::shared_address(sQ) + b_at, kk) + c * (8 * kD * 2));
            ptx::mma_16x8x16(rS[c], rA, rB[0], rB[1], T{});
            ptx::mma_16x8x16(rS[c + 1], rA, rB[2], rB[3], T{});
            ptx::ldmatrix_4(rB, S::right(ptx::shared_address(sDout) + b_at, kk) + c * (8 * kD * 2));
            ptx::mma_16x8x16(rDp[c], rV, rB[0], rB[1], T{});
            ptx::mma_16x8x16(rDp[c + 1], rV, rB[2], rB[3], T{});
          }
        }
        const float slope =
            f.slopes.at(static_cast<std::int64_t>(job.b) * f.slopes_batch + job.h, 0.0f);
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = i0 + c * 8 + pair * 2 + e % 2, j = j0 + warp * 16 + quad + e / 2 * 8;
            if (i >= i1 || j >= j1) continue;
            const float s = score_of(f, job, job.h, slope, i, j, rS[c][e]);
            if (s == -INFINITY) continue;
            const std::int64_t row =
                (static_cast<std::int64_t>(job.b) * f.heads + job.h) * f.queries + i;
            float dp = rDp[c][e];
            if (f.dropout.threshold > 0) dp *= dropout_factor(f, job.b, job.h, i, j);
            const float2 of_row = p.rows[row];
            sums[c][e] += ptx::exp2_approx(s - of_row.x) * (dp - of_row.y);
          }
        }
      }
    }
  }

  store_bias_gradient(f, to, own_b, own_h, m0 * kTile, n * kTile + warp * 16, sums);
}

}  // namespace fastkern::cuda::attention_detail
