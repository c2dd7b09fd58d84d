// SPDX-License-Identifier: Apache-2.0
// Narrow numbers on the host: storage types and branch-light conversions that compilers vectorise.
#pragma once

#include <bit>
#include <cstdint>

#include "fastkern/core.h"

/// Hot-loop helpers must be inlined into their caller to be compiled for the caller's instruction
/// set.
#define FASTKERN_INLINE [[gnu::always_inline]] inline

namespace fastkern {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};
/// Sign, 4 exponent and 3 fraction bits; no infinity, and 0x7f | sign is NaN. The largest is 448.
struct f8e4m3 {
  std::uint8_t bits;
};
using i8 = std::int8_t;

FASTKERN_INLINE float to_float(float v) { return v; }

FASTKERN_INLINE float to_float(bf16 v) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16);
}

FASTKERN_INLINE float to_float(f16 v) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  // Reading the f16 exponent as an f32 one is off by a factor of 2^112, subnormals included.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t finite = std::bit_cast<std::uint32_t>(scaled);
  const std::uint32_t special = magnitude | 0x7f800000u;
  return std::bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

FASTKERN_INLINE float to_float(f8e4m3 v) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7fu) << 20;
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x80u) << 24;
  // As for f16: the exponent read as an f32 one is off by a factor of 2^120.
  const std::uint32_t finite =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p120f);
  return std::bit_cast<float>(sign | (magnitude == 0x07f00000u ? 0x7fc00000u : finite));
}

FASTKERN_INLINE float to_float(i8 v) { return static_cast<float>(v); }

/// Rounds to nearest, ties to even. Beyond the largest: infinity for f16 and bf16, the largest
/// (448, 127) with its sign for f8e4m3 and i8. NaN stays NaN; as i8 it is 0.
template <class T>
T from_float(float v);

template <>
FASTKERN_INLINE float from_float<float>(float v) {
  return v;
}

template <>
FASTKERN_INLINE bf16 from_float<bf16>(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (u >> 16) | 0x0040u;
  return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
FASTKERN_INLINE f16 from_float<f16>(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t a = u & 0x7fffffffu;
  const std::uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last bit of the sum at 2^-24, the f16 subnormal step: the FPU does the
  // rounding.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + 0.5f) -
                                  std::bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t magnitude = a >= 0x47800000u ? special : a < 0x38800000u ? subnormal : normal;
  return {static_cast<std::uint16_t>(sign | magnitude)};
}

template <>
FASTKERN_INLINE f8e4m3 from_float<f8e4m3>(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t sign = (u >> 24) & 0x80u;
  const std::uint32_t a = u & 0x7fffffffu;
  const std::uint32_t finite = a < 0x43e00000u ? a : 0x43e00000u;  // 448
  const std::uint32_t normal = (finite - (120u << 23) + 0x7ffffu + ((finite >> 20) & 1u)) >> 20;
  // 2^14 puts the last bit of the sum at 2^-9, the subnormal step.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(finite) + 0x1p14f) -
      std::bit_cast<std::uint32_t>(0x1p14f);
  const std::uint32_t rounded = finite < 0x3c800000u ? subnormal : normal;
  return {static_cast<std::uint8_t>(sign | (a > 0x7f800000u ? 0x7fu : rounded))};
}

template <>
FASTKERN_INLINE i8 from_float<i8>(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  const std::uint32_t a = u & 0x7fffffffu;
  const std::uint32_t finite = a > 0x7f800000u ? 0u : a < 0x42fe0000u ? a : 0x42fe0000u;  // 127
  // The last bit of the sum is worth 1.
  const std::uint32_t magnitude =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(finite) + 0x1p23f) -
      std::bit_cast<std::uint32_t>(0x1p23f);
  const std::uint32_t sign = u >> 31;
  return static_cast<i8>((magnitude ^ (0u - sign)) + sign);
}

/// dispatch(dtype, [&]<class T>() { ... }) over the storage types that are computed with.
template <class F>
FASTKERN_INLINE void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::bf16:
      return f.template operator()<bf16>();
    default:
      fail("fastkern: no arithmetic on ", name_of(dtype));
  }
}

/// The same over all of them.
template <class F>
FASTKERN_INLINE void dispatch_stored(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f8e4m3:
      return f.template operator()<f8e4m3>();
    case DType::i8:
      return f.template operator()<i8>();
    default:
      return dispatch(dtype, f);
  }
}

}  // namespace fastkern
