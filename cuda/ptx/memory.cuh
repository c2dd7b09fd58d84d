// SPDX-License-Identifier: Apache-2.0
// Global-memory accesses. One function, one instruction.
#pragma once

#include <cstdint>

namespace fastkern::ptx {

/// 16 bytes through the read-only path, for memory no thread of the kernel writes. Volatile: where
/// the source loads twice, the second load is meant, instead of registers.
__device__ __forceinline__ uint4 ld_global_nc(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void st_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

}  // namespace fastkern::ptx
