// SPDX-License-Identifier: Apache-2.0
// Thread block clusters and programmatic dependent launch (sm_90). One function, one instruction;
// before sm_90 a block is its own cluster and a launch waits for the one before it.
#pragma once

#include <cstdint>

namespace fastkern::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;
#else
inline constexpr bool kHasClusters = false;
#endif

/// This block's number within its cluster.
__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank = 0;
  if constexpr (kHasClusters) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of the cluster: what they wrote before arriving is visible to who waited.
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kHasClusters) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  if constexpr (kHasClusters) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Waits until the launches before this one are complete and their writes visible; before any
/// access to memory, in a kernel launched with Launch::overlap.
__device__ __forceinline__ void grid_wait() {
  if constexpr (kHasClusters) asm volatile("griddepcontrol.wait;" ::: "memory");
}
/// Lets the next launch, if it has Launch::overlap, begin once all blocks have said so.
__device__ __forceinline__ void grid_launch_next() {
  if constexpr (kHasClusters) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace fastkern::ptx
