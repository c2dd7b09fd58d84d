// SPDX-License-Identifier: Apache-2.0
// 16-bit floating point on the host: storage types and branch-light conversions that compilers
// vectorise.
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

/// dispatch(dtype, [&]<class T>() { ... }) over the host storage types.
template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::bf16:
      return f.template operator()<bf16>();
  }
}

}  // namespace fastkern
