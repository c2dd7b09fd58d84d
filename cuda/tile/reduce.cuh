// SPDX-License-Identifier: Apache-2.0
// Sums over the threads that share a row, in an order fixed by the thread count alone.
#pragma once

namespace fastkern::tile {

inline constexpr int kWarp = 32;

/// Sum over groups of kWidth lanes of a warp; a butterfly, so every lane gets the same bits.
template <int kWidth>
__device__ __forceinline__ float lane_sum(float v) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

/// Shared memory for row_sum: none within a warp.
template <int kBlock, int kThreads, int kValues>
struct RowSumScratch {
  static constexpr int kSize = kThreads > kWarp ? kBlock / kWarp * kValues : 1;
  float partial[2][kSize];  // two phases: a row's sums may be read while the next row's are written
};

/// Sums each of `values` over the kThreads threads (a power of two) of the calling thread's row.
/// All threads of the block call it, `phase` alternating 0, 1, 0, ... : one barrier a call, none if
/// a row lies within a warp.
template <int kBlock, int kThreads, int kValues>
__device__ __forceinline__ void row_sum(float (&values)[kValues],
                                        RowSumScratch<kBlock, kThreads, kValues>& scratch,
                                        int phase) {
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    values[i] = lane_sum<(kThreads < kWarp ? kThreads : kWarp)>(values[i]);
  if constexpr (kThreads > kWarp) {
    constexpr int kRowWarps = kThreads / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* partial = scratch.partial[phase];
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) partial[warp * kValues + i] = values[i];
    }
    __syncthreads();
    const int first = warp / kRowWarps * kRowWarps;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = lane_sum<kRowWarps>(partial[(first + lane % kRowWarps) * kValues + i]);
    }
  }
}

}  // namespace fastkern::tile
