// SPDX-License-Identifier: Apache-2.0
// The copy engine of a multiprocessor: boxes of tensors between global and shared memory (sm_90).
// One function, one instruction. Maps are made on the host: tensor_map.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

/// How long lines are to stay in L2.
enum class Keep : std::uint64_t {
  normal = 0x1000000000000000,
  shortly = 0x12f0000000000000,
  long_ = 0x14f0000000000000,
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  if constexpr (kHasClusters) asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// The box at these coordinates, innermost first; what lies outside the tensor becomes 0. Reports
/// the bytes of the whole box to the barrier.
__device__ __forceinline__ void tma_load(SharedAddress to, const CUtensorMap* map, int c0, int c1,
                                         int c2, int c3, std::uint64_t* barrier,
                                         Keep keep = Keep::normal) {
  if constexpr (kHasClusters) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier)),
        "l"(static_cast<std::uint64_t>(keep))
        : "memory");
  }
}
__device__ __forceinline__ void tma_load(SharedAddress to, const CUtensorMap* map, int c0, int c1,
                                         int c2, std::uint64_t* barrier, Keep keep = Keep::normal) {
  if constexpr (kHasClusters) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier)),
        "l"(static_cast<std::uint64_t>(keep))
        : "memory");
  }
}

/// The box into L2 alone.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int c0, int c1, int c2,
                                             int c3) {
  if constexpr (kHasClusters) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
  }
}

/// To the tensor; what lies outside is not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                          SharedAddress from) {
  if constexpr (kHasClusters) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
            map),
        "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(from)
        : "memory");
  }
}

/// Of floats in global memory, to which those in shared memory are added, in L2. Both 16-byte
/// aligned, `bytes` a multiple of 16.
__device__ __forceinline__ void bulk_add(float* to, SharedAddress from, int bytes) {
  if constexpr (kHasClusters) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
  }
}

/// The same, stored instead of added.
__device__ __forceinline__ void bulk_store(void* to, SharedAddress from, int bytes) {
  if constexpr (kHasClusters) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
  }
}
/// From global memory, reported to the barrier.
__device__ __forceinline__ void bulk_load(SharedAddress to, const void* from, int bytes,
                                          std::uint64_t* barrier) {
  if constexpr (kHasClusters) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
  }
}

/// Bytes of global memory into L2 alone; 16-byte aligned, `bytes` a multiple of 16.
__device__ __forceinline__ void bulk_prefetch(const void* from, int bytes) {
  if constexpr (kHasClusters) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
  }
}

/// This thread's stores and additions since the last: a group.
__device__ __forceinline__ void bulk_commit() {
  if constexpr (kHasClusters) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until all but kPending of this thread's groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  if constexpr (kHasClusters) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
  }
}
/// Waits until all but kPending of them have written.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  if constexpr (kHasClusters) {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
  }
}

/// This thread's ordinary accesses of shared memory come before what the copy engine and the tensor
/// cores do afterwards.
__device__ __forceinline__ void fence_async() {
  if constexpr (kHasClusters) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// This thread's accesses of global memory, ordinary ones and the copy engine's, in their order.
__device__ __forceinline__ void fence_async_global() {
  if constexpr (kHasClusters) asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace fastkern::ptx
