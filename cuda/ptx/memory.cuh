// SPDX-License-Identifier: Apache-2.0
// Global-memory accesses with cache hints. One function, one instruction.
#pragma once

#include <cstdint>

namespace fastkern::ptx {

/// 16 bytes through the read-only path that leave L1 to data with reuse. For memory no thread of the kernel writes.
__device__ __forceinline__ uint4 ld_global_nc_no_allocate(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// 16 bytes through the read-only path, kept in L1. Volatile: a second load is meant, instead of registers.
__device__ __forceinline__ uint4 ld_global_nc(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ void st_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace fastkern::ptx
