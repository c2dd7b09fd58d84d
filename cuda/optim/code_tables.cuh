// SPDX-License-Identifier: Apache-2.0
// States of 8 bits in and out of float32, by tables in shared memory (optim_code.h has the
// numbers).
#pragma once

#include "fastkern/optim_code.h"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {

inline constexpr int kCodeBlock = static_cast<int>(kOptimCodeBlock);
inline constexpr int kOptimWarps = kOptimThreads / 32;

/// f.operator()<k>() for each state.
template <int kStates, class F>
__device__ __forceinline__ void for_states(const F& f) {
  f.template operator()<0>();
  if constexpr (kStates > 1) f.template operator()<1>();
}

/// Of state 0, with a sign, and of averages of squares, state 1.
struct CodeTables {
  template <int k>
  using Code = optim::BlockCode<k == 0>;
  struct alignas(8) Entry {
    float slope, offset;
  };
  // Of code c, state k and a lane: lanes that want different numbers want them of different banks,
  // and one byte of a word, moved to the second, is the way to a row.
  float number[256][2][32];
  Entry line[2][128];  // of exponents of magnitudes up to 1

  /// Each thread of the block.
  template <int kStates>
  __device__ __forceinline__ void fill() {
    static_assert(kOptimThreads == 256 && sizeof number[0] == 256);
    const int i = static_cast<int>(threadIdx.x);
    for_states<kStates>([&]<int k>() {
      const float v = Code<k>::decode(static_cast<std::uint32_t>(i));
      const float4 four = {v, v, v, v};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        reinterpret_cast<float4*>(number[i][k])[(i ^ j) % 8] = four;  // of other banks than others'
      }
      if (i < 128) line[k][i] = line_of_exponent<k>(i);
    });
  }

  static __device__ __forceinline__ std::uint32_t copy_of(int lane) {
    return static_cast<std::uint32_t>(lane) * 4;
  }
  /// The number of byte `j` of a word of codes; `copy`: copy_of(the lane).
  template <int k>
  __device__ __forceinline__ float decode(std::uint32_t codes, int j, std::uint32_t copy) const {
    const std::uint32_t at = __byte_perm(codes, copy, 0x5504u | static_cast<unsigned>(j) << 4);
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(number[0][k]) + at);
  }

  /// Codes of four values of which none is NaN; `inverse`: of the largest magnitude. A square that
  /// is not 0 must not be so small that its quotient is denormal.
  template <int k>
  __device__ __forceinline__ std::uint32_t encode(const float (&x)[4], float inverse) const {
    std::uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float magnitude = optim::mul(fabsf(x[j]), inverse);
      const Entry l = line[k][__float_as_uint(magnitude) >> 23];
      code[j] = __float_as_uint(optim::add(optim::fma(magnitude, l.slope, l.offset), 0x1.8p23f));
    }
    const std::uint32_t codes = bytes(code[0], code[1], code[2], code[3], 0);
    if constexpr (k != 0) return codes;
    return codes | (bytes(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                          __float_as_uint(x[3]), 3) &
                    0x80808080u);
  }

 private:
  /// Byte `i` of each.
  static __device__ __forceinline__ std::uint32_t bytes(std::uint32_t a, std::uint32_t b,
                                                        std::uint32_t c, std::uint32_t d, int i) {
    const unsigned two = static_cast<unsigned>(0x40 + 0x11 * i);
    return __byte_perm(__byte_perm(a, b, two), __byte_perm(c, d, two), 0x5410);
  }

  /// A square has code 0 where it is 0, and at least 1 elsewhere: below the second range, 1.
  template <int k>
  static __device__ __forceinline__ Entry line_of_exponent(int exponent) {
    if (k != 0 && exponent < 127 - Code<k>::kShift * Code<k>::kTop)
      return {0.0f, exponent == 0 ? 0.0f : 1.0f};
    const auto l = Code<k>::line(Code<k>::line_of(static_cast<std::uint32_t>(exponent) << 23));
    return {l.slope, l.offset};
  }
};

}  // namespace fastkern::cuda
