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

/// The same if `inside`, zeros otherwise.
__device__ __forceinline__ uint4 ld_global_nc_if(const void* p, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@inside ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(inside)));
  return v;
}
__device__ __forceinline__ uint2 ld_global_nc_8_if(const void* p, bool inside) {
  uint2 v;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\n"
      "@inside ld.global.nc.v2.u32 {%0, %1}, [%2];\n}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(p), "r"(static_cast<int>(inside)));
  return v;
}

/// 16 bytes of shared memory. Volatile: where the source reads twice, it is read twice instead of
/// kept in registers.
__device__ __forceinline__ uint4 ld_shared(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return v;
}

__device__ __forceinline__ void st_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void st_global_8(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

}  // namespace fastkern::ptx
