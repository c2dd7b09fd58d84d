// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name, for kernels that g++ compiles as C++. Types are CUDA's
// own; what the kernels use of the language and of the runtime is here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(...)
#define __grid_constant__
// No __shared__: tools/run_emulator.sh rewrites such declarations.

using std::max;
using std::min;

#define threadIdx (emulator::running->thread)
#define blockIdx (emulator::running->block)
inline dim3& blockDim = emulator::block_size;
inline dim3& gridDim = emulator::grid_size;

inline void __syncthreads() { emulator::block_barrier(); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_barrier(mask); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::shuffle(mask, bits, lane & 31);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ offset);
}

/// The lower word of high:low, moved down by `shift` bits.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  shift &= 31;
  return shift == 0 ? low : low >> shift | high << (32 - shift);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int offset) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < offset ? lane : lane - offset);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= __shfl_sync(mask, static_cast<unsigned>(value), lane) << lane;
  }
  return votes;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(mask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
/// Byte i of the result is the byte of b:a that digit i of `selector` names, 0 to 7.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline int __ffs(int v) { return __builtin_ffs(v); }

// Without -ffast-math and contraction, plain arithmetic rounds each operation to nearest.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
// The device's are approximations.
inline float __fdividef(float a, float b) { return a / b; }
#define __expf expf  // glibc has a function of that name
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

inline int __float2int_rn(float v) {
  if (std::isnan(v)) return 0;
  if (v >= 2147483648.0f) return 2147483647;
  if (v < -2147483648.0f) return -2147483647 - 1;
  return static_cast<int>(std::nearbyint(v));
}
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }
