// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (sm_80). One function, one instruction.
#pragma once

#include <cstdint>

namespace fastkern::ptx {

/// 16 bytes past L1; the first `bytes` (0 or 16) are read, the rest of the destination becomes 0.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

/// 8 bytes; the first `bytes` (0 or 8) are read, the rest becomes 0.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, int bytes) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kPending of this thread's groups are under way; what has arrived is visible
/// to this thread.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fastkern::ptx
