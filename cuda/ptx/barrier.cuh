// SPDX-License-Identifier: Apache-2.0
// Barriers of a part of a block.
#pragma once

namespace fastkern::ptx {

/// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, whole warps: their earlier
/// reads and writes of shared memory come before their later ones.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Counts as one of those threads, whole warps, and does not wait for the others: for them its
/// earlier writes come before.
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fastkern::ptx
