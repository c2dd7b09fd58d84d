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

/// 16 bytes, or the first 8 of them, or none if `bytes` is 0, of memory that the kernel also
/// writes; what is not read is undefined.
__device__ __forceinline__ uint4 ld_global_part(const void* p, int bytes) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred all, half;\nsetp.eq.s32 all, %5, 16;\nsetp.eq.s32 half, %5, 8;\n"
      "@all ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "@half ld.global.v2.u32 {%0, %1}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(bytes)
      : "memory");
  return v;
}

/// 16, 8, 4, 2 and 1 bytes that this thread may write afterwards. Volatile: they are asked for in
/// the order of the source.
__device__ __forceinline__ uint4 ld_global(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 ld_global_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ std::uint32_t ld_global_4(const void* p) {
  std::uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ std::uint32_t ld_global_2(const void* p) {
  std::uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ std::uint32_t ld_global_1(const void* p) {
  std::uint32_t v;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(p));
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

__device__ __forceinline__ void st_global_4(void* p, std::uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void st_global_2(void* p, std::uint32_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(static_cast<std::uint16_t>(v)) : "memory");
}
__device__ __forceinline__ void st_global_1(void* p, std::uint32_t v) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

/// 16 bytes through L2 alone: what other multiprocessors write, or read.
__device__ __forceinline__ float4 ld_global_cg(const float4* p) { return __ldcg(p); }
__device__ __forceinline__ void st_global_cg(float4* p, float4 v) { __stcg(p, v); }
__device__ __forceinline__ float ld_global_cg(const float* p) { return __ldcg(p); }

/// p += v, in L2.
__device__ __forceinline__ void red_add_global(float4* p, float4 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  atomicAdd(&p->x, v.x);
  atomicAdd(&p->y, v.y);
  atomicAdd(&p->z, v.z);
  atomicAdd(&p->w, v.w);
#endif
}

/// *p, which becomes one more.
__device__ __forceinline__ int draw_number(int* p) { return atomicAdd(p, 1); }

/// *p, which becomes `by` more.
__device__ __forceinline__ int draw_number(int* p, int by) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(by)
               : "memory");
  return before;
}
/// *p, which becomes one more, after what this thread has read and written before.
__device__ __forceinline__ int draw_number_ordered(int* p) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

/// *p as it is, or was a little before.
__device__ __forceinline__ int ld_global_relaxed(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

/// What was written before a value that this thread, or one before a barrier, has read.
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Adds one to *p, after what was written before.
__device__ __forceinline__ void pass_on(int* p) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p) : "memory");
}

}  // namespace fastkern::ptx
