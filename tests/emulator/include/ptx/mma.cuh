// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/mma.cuh. The lanes of a warp show each other their operands and meet.
#pragma once

#include <cuda_runtime.h>

#include "ptx/math.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

inline void st_shared_4(SharedAddress to, std::uint32_t v) {
  emulator::check_aligned(reinterpret_cast<const void*>(to), 4);
  std::memcpy(reinterpret_cast<void*>(to), &v, 4);
}

namespace mma_detail {

inline const void* shown[1024];  // by each thread of the block, from one meeting to the next

inline const void* const* show(const void* mine) {
  shown[threadIdx.x] = mine;
  emulator::warp_barrier(~0u);
  return shown + threadIdx.x / 32 * 32;
}

inline void leave() { emulator::warp_barrier(~0u); }

inline std::uint16_t element(const void* row, int i) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(row) + 2 * i, sizeof bits);
  return bits;
}

template <bool kTransposed>
inline void ldmatrix(std::uint32_t (&r)[4], SharedAddress from) {
  emulator::check_aligned(reinterpret_cast<const void*>(from), 16);
  const void* const* const rows = show(reinterpret_cast<const void*>(from));
  const int lane = threadIdx.x % 32, one = lane / 4, two = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    const void* const* const matrix = rows + 8 * m;
    const std::uint16_t low = kTransposed ? element(matrix[two], one) : element(matrix[one], two);
    const std::uint16_t high =
        kTransposed ? element(matrix[two + 1], one) : element(matrix[one], two + 1);
    r[m] = low | static_cast<std::uint32_t>(high) << 16;
  }
  leave();
}

inline float number(std::uint16_t bits, __half) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}
inline float number(std::uint16_t bits, __nv_bfloat16) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}

}  // namespace mma_detail

inline void ldmatrix_4(std::uint32_t (&r)[4], SharedAddress from) {
  mma_detail::ldmatrix<false>(r, from);
}
inline void ldmatrix_4_transposed(std::uint32_t (&r)[4], SharedAddress from) {
  mma_detail::ldmatrix<true>(r, from);
}

inline void stmatrix_4(SharedAddress to, const std::uint32_t (&r)[4]) {
  emulator::check_aligned(reinterpret_cast<const void*>(to), 16);
  const void* const* const rows = mma_detail::show(reinterpret_cast<const void*>(to));
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    char* const row = static_cast<char*>(const_cast<void*>(rows[8 * m + lane / 4]));
    std::memcpy(row + lane % 4 * 4, &r[m], 4);
  }
  mma_detail::leave();
}

template <class T>
inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                        std::uint32_t b1, T type) {
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const void* const* const lanes = mma_detail::show(mine);
  const int lane = threadIdx.x % 32;
  const auto value = [&](int of, int reg, int half) {
    return mma_detail::number(mma_detail::element(lanes[of], 2 * reg + half), type);
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      d[e] += value(row * 4 + k % 8 / 2, e / 2 + k / 8 * 2, k % 2) *
              value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
  mma_detail::leave();
}

inline void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                            std::uint32_t b1) {
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const void* const* const lanes = mma_detail::show(mine);
  const int lane = threadIdx.x % 32;
  const auto value = [&](int of, int reg) {
    const std::uint32_t bits = static_cast<const std::uint32_t*>(lanes[of])[reg] & 0xffffe000u;
    return __builtin_bit_cast(float, bits);
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 8; ++k) {
      d[e] += value(row * 4 + k % 4, e / 2 + k / 4 * 2) * value(column * 4 + k % 4, 4 + k / 4);
    }
  }
  mma_detail::leave();
}

template <class T>
inline std::uint32_t pack_2(float low, float high, T) {
  const T pair[2] = {T(low), T(high)};
  std::uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}

}  // namespace fastkern::ptx
