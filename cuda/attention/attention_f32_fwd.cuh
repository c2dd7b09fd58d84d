// SPDX-License-Identifier: Apache-2.0
// Attention of f32, forward.
//
//   work     a block has 128 queries of one head, kColumns columns of the results, and goes through
//            the keys they see, 64 at a time. Where values have more columns, other blocks compute
//            the same scores for those
//   memory   three slices (attention_f32.cuh), scores and results in registers
//   cost     12 * S * T * D flops where all is seen
#pragma once

#include "attention/attention_f32.cuh"

namespace fastkern::cuda::attention_detail {

inline constexpr int kF32Keys = 64;

template <int kColumns>
__global__ void __launch_bounds__(kF32Threads, 1)
    attention_f32_fwd_kernel(const __grid_constant__ Forward p, bool extras) {
  constexpr int kM = kF32Rows, kN = kF32Keys;
  constexpr int kKeyTiles = kN / 8, kColumnTiles = kColumns / 8;
  extern __shared__ __align__(128) uint4 memory[];
  __shared__ Job shared_job[1];
  Job& job = shared_job[0];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const int parts = (p.dv + kColumns - 1) / kColumns;
  const int id = static_cast<int>(blockIdx.x) / parts;
  const int column = static_cast<int>(blockIdx.x) % parts * kColumns;

  ptx::grid_wait();
  ptx::grid_launch_next();
  if (warp == 0) {
    const Job found = job_of<kM>(p, id);
    if (lane == 0) job = found;
  }
  __syncthreads();
  if (job.b < 0) return;
  const int end = job.end<kN>();
  // The first block of keys from n on that has to be computed.
  const auto next = [&](int n) {
    while (n < end &&
           (job.sight.none(job.i0, job.i1, n * kN, n * kN + kN) || !listed(p, job, n * kN))) {
      ++n;
    }
    return n;
  };
  int n = next(job.begin<kN>());

  // Of a block of keys: those with the queries, then the values.
  const int columns = min(kColumns, p.dv - column);
  const int of_keys = (p.d + kSlice - 1) / kSlice;
  const int of_all = of_keys + (columns + kSlice - 1) / kSlice;
  int ahead = n, slice = 0;
  const auto fetch_next = [&](char* stage) {
    if (ahead >= end) return;
    const int j0 = ahead * kN;
    const auto key_there = [&](int row) { return j0 + row < job.sight.keys; };
    if (slice < of_keys) {
      fetch_slice<kM>(stage, p.q.at(job.b, job.first_q + job.i0, job.h), p.q.row, slice * kSlice,
                      p.d, p.vectors, [&](int row) { return job.i0 + row < job.i1; });
      fetch_slice<kN>(stage + kM * kSliceRow, job.k + j0 * p.k.row, p.k.row, slice * kSlice, p.d,
                      p.vectors, key_there);
    } else {
      fetch_slice<kN>(stage, job.v + j0 * p.v.row, p.v.row, column + (slice - of_keys) * kSlice,
                      p.dv, p.vectors, key_there);
    }
    if (++slice == of_all) slice = 0, ahead = next(ahead + 1);
  };
  Slices<(kM + kN) * kSliceRow, decltype(fetch_next)> slices{reinterpret_cast<char*>(memory),
                                                             fetch_next};
  slices.begin();

  const float sink = p.sinks.at(job.h, -INFINITY);
  const int warp_row = warp * 16;
  float rO[kColumnTiles][4] = {};
  // In powers of two; a sink is a key of its own, counted by one thread.
  float top[2] = {sink * kLog2e, sink * kLog2e};
  float sum[2];
  sum[0] = sum[1] = sink == -INFINITY || pair > 0 ? 0.0f : 1.0f;

  for (; n < end; n = next(n + 1)) {
    const int j0 = n * kN;
    float rS[kKeyTiles][4] = {};
    for (int s = 0; s < of_keys; ++s) {
      const char* const stage = slices.next();
      multiply_rows(rS, stage + warp_row * kSliceRow, stage + kM * kSliceRow);
    }
    const bool all = job.sight.all(job.i0, job.i1, j0, j0 + kN);
    float alpha[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = job.i0 + warp_row + quad + half * 8;
      if (extras) {
        finish_scores(p, job, min(i, job.i1 - 1), j0 + pair * 2, half, rS);
      } else {
        const int from = all ? 0 : job.sight.low(i) - j0 - pair * 2;
        const int to = all ? kN : job.sight.high(i) - j0 - pair * 2;
#pragma unroll
        for (int c = 0; c < kKeyTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = rS[c][half * 2 + e];
            s = c * 8 + e < from || c * 8 + e >= to ? -INFINITY : s * p.scale_log2;
          }
        }
      }
      float most = top[half];
#pragma unroll
      for (int c = 0; c < kKeyTiles; ++c) {
        most = fmaxf(most, fmaxf(rS[c][half * 2], rS[c][half * 2 + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float base = most == -INFINITY ? 0.0f : most;
      alpha[half] = ptx::exp2_approx(top[half] - base);
      top[half] = most;
      float more = 0.0f;
#pragma unroll
      for (int c = 0; c < kKeyTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = rS[c][half * 2 + e];
          s = ptx::exp2_approx(s - base);
          more += s;
        }
      }
      sum[half] = fmaf(sum[half], alpha[half], more);
      if (p.dropout.threshold > 0) {
#pragma unroll
        for (int c = 0; c < kKeyTiles; ++c) drop(p, job, i, j0 + c * 8 + pair * 2, half, rS[c]);
      }
    }
    for (int at = 0; at < columns; at += kSlice) {
      const char* const stage = slices.next();
#pragma unroll
      for (int c = 0; c < kColumns; c += kSlice) {
        if (at == c) multiply_columns(rO, c / 8, alpha, rS, stage);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int row = warp_row + quad + half * 8;
    if (row >= job.stored) continue;
    const bool nothing = total == 0.0f || job.i0 + row >= job.i1;  // seen, or to be computed
    const float inverse = nothing ? 0.0f : 1.0f / total;
    float* const out =
        reinterpret_cast<float*>(p.out.at(job.b, job.first_q + job.i0 + row, job.h)) + column;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = c * 8 + pair * 2 + e;
        if (at < columns) out[at] = nothing ? 0.0f : rO[c][half * 2 + e] * inverse;
      }
    }
    if (pair == 0 && column == 0) {
      p.lse[job.lse_at + row] = nothing ? -INFINITY : fmaf(top[half], kLn2, logf(total));
    }
  }
}

}  // namespace fastkern::cuda::attention_detail
