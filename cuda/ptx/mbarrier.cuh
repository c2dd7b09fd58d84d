// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory that count bytes, and stores that report to them (sm_90). One function,
// one instruction.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  if constexpr (kHasClusters) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
  }
}
/// Makes initialised barriers visible to the cluster, before a cluster barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
  if constexpr (kHasClusters) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  if constexpr (kHasClusters) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
  }
}

/// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void mbarrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  if constexpr (kHasClusters) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
  }
}

/// Whether the phase of this parity is complete; may wait a little before it says no.
__device__ __forceinline__ bool mbarrier_try_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done = 1;
  if constexpr (kHasClusters) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
  return done;
}

/// Waits for the phase of this parity, of a barrier at which threads of this block arrive and the
/// copy engine. What threads of other blocks of the cluster wrote needs mbarrier_try_wait, each of
/// which empties the L1 cache.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  if constexpr (kHasClusters) {
    std::uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } while (!done);
  }
}

/// The same for threads that have nothing else to do: they look again when the phase is over, or
/// ten milliseconds later, and take no instructions from others until then.
__device__ __forceinline__ void mbarrier_sleep(std::uint64_t* barrier, std::uint32_t parity) {
  if constexpr (kHasClusters) {
    std::uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2, 10000000;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } while (!done);
  }
}

/// Writes a word of another block's shared memory and reports its four bytes to that block's
/// barrier; both at the places they have in one's own.
__device__ __forceinline__ void st_async(void* shared, std::uint32_t value, std::uint64_t* barrier,
                                         std::uint32_t rank) {
  if constexpr (kHasClusters) {
    asm volatile(
        "{\n.reg .u32 to, bar;\n"
        "mapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 bar, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [bar];\n}" ::"r"(
            shared_address(shared)),
        "r"(value), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
  }
}

}  // namespace fastkern::ptx
