// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/memory.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline uint4 ld_global_nc_if(const void* p, bool inside) {
  uint4 v{};
  if (!inside) return v;
  emulator::check_load(p, 16);
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 ld_global_nc(const void* p) { return ld_global_nc_if(p, true); }

inline uint2 ld_global_nc_8_if(const void* p, bool inside) {
  uint2 v{};
  if (!inside) return v;
  emulator::check_load(p, 8);
  std::memcpy(&v, p, 8);
  return v;
}

template <class T>
inline T plain_load(const void* p) {
  emulator::check_load(p, sizeof(T));
  emulator::may_switch();
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint4 ld_global(const void* p) { return plain_load<uint4>(p); }
inline uint2 ld_global_8(const void* p) { return plain_load<uint2>(p); }
inline std::uint32_t ld_global_4(const void* p) { return plain_load<std::uint32_t>(p); }
inline std::uint32_t ld_global_2(const void* p) { return plain_load<std::uint16_t>(p); }
inline std::uint32_t ld_global_1(const void* p) { return plain_load<std::uint8_t>(p); }

inline uint4 ld_global_part(const void* p, int bytes) {
  uint4 v{0xdeadbeefu, 0xdeadbeefu, 0xdeadbeefu, 0xdeadbeefu};
  if (bytes == 0) return v;
  emulator::check_load(p, bytes);
  std::memcpy(&v, p, bytes);
  return v;
}

inline uint4 ld_shared(const void* p) {
  emulator::check_aligned(p, 16);
  emulator::may_switch();
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}

inline void st_global(void* p, uint4 v) {
  emulator::check_store(p, 16);
  emulator::may_switch();
  std::memcpy(p, &v, 16);
}

inline void st_global_8(void* p, uint2 v) {
  emulator::check_store(p, 8);
  std::memcpy(p, &v, 8);
}

template <class T>
inline void plain_store(void* p, T v) {
  emulator::check_store(p, sizeof v);
  std::memcpy(p, &v, sizeof v);
}
inline void st_global_4(void* p, std::uint32_t v) { plain_store(p, v); }
inline void st_global_2(void* p, std::uint32_t v) { plain_store(p, static_cast<std::uint16_t>(v)); }
inline void st_global_1(void* p, std::uint32_t v) { plain_store(p, static_cast<std::uint8_t>(v)); }

#define __threadfence() static_cast<void>(0)
inline float4 ld_global_cg(const float4* p) {
  emulator::check_load(p, 16);
  return *p;
}
inline float ld_global_cg(const float* p) { return *p; }
inline void st_global_cg(float4* p, float4 v) {
  emulator::check_store(p, 16);
  *p = v;
}
inline void red_add_global(float4* p, float4 v) {
  emulator::check_store(p, 16);
  p->x += v.x, p->y += v.y, p->z += v.z, p->w += v.w;
}

inline int draw_number(int* p) { return (*p)++; }
inline int draw_number(int* p, int by) {
  const int before = *p;
  *p += by;
  return before;
}
inline int draw_number_ordered(int* p) { return (*p)++; }

/// Blocks run one after the other: what a thread waits for has happened, or others of its block
/// will see to it.
inline int ld_global_relaxed(const int* p) {
  static const int* last = nullptr;
  static int value = 0;
  if (p == last && *p == value) emulator::await_number();
  last = p, value = *p;
  return value;
}
inline void fence_acquire() {}
inline void pass_on(int* p) {
  ++*p;
  emulator::number_changed();
}

}  // namespace fastkern::ptx
