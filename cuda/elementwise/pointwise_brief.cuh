// SPDX-License-Identifier: Apache-2.0
// Formulas of f32 for results of 16 bits, for the functions whose formulas in f32 take longer than
// memory: what they leave out is less than 2^-19 of the result, or of the smallest f16, and does
// not outlast the rounding by more than a unit of the last place.
//
//   sqrt      of the special function unit. Of a bf16 it is the same after rounding: a root that is
//             not exact stays 2^-18 away from what lies between two bf16
//   sigmoid   1 / (1 + 2^(-x log2 e))
//   gelu      x P(x), as activation_formula.h has P where results are of 16 bits
//   sin, cos  the nearest multiple of pi / 2 subtracted in three parts, then two polynomials. Large
//             arguments take f32's function: rarely, so it is called, and not repeated in the code
#pragma once

#include "../ptx/math.cuh"
#include "fastkern/activation_formula.h"
#include "pointwise_words.cuh"

namespace fastkern::pointwise_detail {

/// Functions that are not done before memory is, in f32 with one pack a thread.
template <class F>
inline constexpr bool kLaborious =
    std::is_same_v<F, functor::sqrt> || std::is_same_v<F, functor::sigmoid> ||
    std::is_same_v<F, functor::silu> || std::is_same_v<F, functor::gelu> ||
    std::is_same_v<F, functor::gelu_tanh> || std::is_same_v<F, functor::tanh>;

/// The special function unit's, for activation_formula.h.
struct BriefMath {
  static constexpr bool kPrecise = false;
  static __device__ __forceinline__ float exp(float v) {
    return ptx::exp2_approx(v * 1.44269504f);
  }
  static __device__ __forceinline__ float reciprocal(float v) { return ptx::rcp_approx_subnormal(v); }
};

constexpr float kTurnsMost = 65536.0f;

/// sin(v), or cos(v), for |v| up to kTurnsMost.
template <bool kCos>
__device__ __forceinline__ float turn_of(float v) {
  constexpr float kOnes = 12582912.0f;  // 1.5 * 2^23
  const float shifted = fmaf(v, 0.636619747f, kOnes), n = shifted - kOnes;
  float r = fmaf(n, -0x1.921fb4p+0f, v);
  r = fmaf(n, -0x1.4442dp-24f, r);
  r = fmaf(n, -0x1.84698ap-48f, r);
  const float z = r * r;
  float s = fmaf(z, -1.95152959e-4f, 8.33216087e-3f);
  s = fmaf(s, z, -1.66666546e-1f);
  s = fmaf(s * z, r, r);
  float c = fmaf(z, 2.44331571e-5f, -1.38873162e-3f);
  c = fmaf(c, z, 4.16666455e-2f);
  c = fmaf(c, z, -0.5f);
  c = fmaf(c, z, 1.0f);
  const std::uint32_t quarter = __float_as_uint(shifted) + (kCos ? 1u : 0u);
  const float value = quarter & 1u ? c : s;
  return __uint_as_float(__float_as_uint(value) ^ (quarter & 2u) << 30);
}
template <bool kCos>
__device__ __noinline__ float turn_of_any(float v) {
  return kCos ? cosf(v) : sinf(v);
}

template <class F>
struct Brief;
template <>
struct Brief<functor::sqrt> {
  static __device__ __forceinline__ float apply(float v) { return ptx::sqrt_approx(v); }
};
template <>
struct Brief<functor::sigmoid> {
  static __device__ __forceinline__ float apply(float v) { return formula::sigmoid<BriefMath>(v); }
};
template <>
struct Brief<functor::silu> {
  static __device__ __forceinline__ float apply(float v) {
    return formula::value<ActivationKind::silu, BriefMath>(v, {});
  }
};
template <>
struct Brief<functor::gelu> {
  static __device__ __forceinline__ float apply(float v) {
    return formula::value<ActivationKind::gelu, BriefMath>(v, {});
  }
};
template <>
struct Brief<functor::gelu_tanh> {
  static __device__ __forceinline__ float apply(float v) {
    return formula::value<ActivationKind::gelu_tanh, BriefMath>(v, {});
  }
};
template <bool kCos>
struct BriefTurn {
  static constexpr float kMost = kTurnsMost;
  static __device__ __forceinline__ float apply(float v) { return turn_of<kCos>(v); }
  static __device__ __forceinline__ float apply_beyond(float v) { return turn_of_any<kCos>(v); }
};
template <>
struct Brief<functor::sin> : BriefTurn<false> {};
template <>
struct Brief<functor::cos> : BriefTurn<true> {};

/// Whether F has one, for results of type S.
template <class F, class S>
inline constexpr bool kHasBrief = [] {
  if constexpr (requires { sizeof(Brief<F>); }) {
    // A root of an f16 may lie too near to the middle of two.
    return sizeof(S) == 2 &&
           !(std::is_same_v<F, functor::sqrt> && !std::is_same_v<S, __nv_bfloat16>);
  } else {
    return false;
  }
}();

/// a[n] = F(a[n]).
template <class F, int V>
__device__ __forceinline__ void apply_brief(Words<float, V>& a) {
  if constexpr (requires { Brief<F>::kMost; }) {
    float most = 0.0f;
#pragma unroll
    for (int n = 0; n < V; ++n) most = fmaxf(most, fabsf(element<float>(a, n)));
    if (!(most <= Brief<F>::kMost)) {
#pragma unroll
      for (int n = 0; n < V; ++n) put(a, n, Brief<F>::apply_beyond(element<float>(a, n)));
      return;
    }
  }
#pragma unroll
  for (int n = 0; n < V; ++n) put(a, n, Brief<F>::apply(element<float>(a, n)));
}

}  // namespace fastkern::pointwise_detail
