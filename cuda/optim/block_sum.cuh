// SPDX-License-Identifier: Apache-2.0
// Sums and maxima over a block, in an order that is always the same.
#pragma once

#include <cstdint>

#include "fastkern/optim_formula.h"

namespace fastkern::cuda {

/// Of a block of kThreads; the result is thread 0's. `shared` has a place for each warp.
template <int kThreads, class T, class F>
__device__ __forceinline__ T block_fold(T v, T* shared, const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v = f(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) v = f(v, shared[i]);
  }
  __syncthreads();
  return v;
}

}  // namespace fastkern::cuda
