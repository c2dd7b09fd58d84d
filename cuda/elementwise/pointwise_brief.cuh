// SPDX-License-Identifier: Apache-2.0
// Formulas of f32 for results of 16 bits, for the functions whose formulas in f32 take longer than
// memory: what they leave out is less than 2^-19 of the result, or of the smallest f16, and does
// not outlast the rounding by more than a unit of the last place. The type of the result decides:
// whatever the layout, an element has the same bits.
//
//   sqrt      of the special function unit. Of a bf16 it is the same after rounding: a root that is
//             not exact stays 2^-18 away from what lies between two bf16
//   sigmoid   2^-32 / (2^-32 + 2^(-x log2 e - 32)): no denormal but the result
//   tanh      1 - 2 / (e^(2 x) + 1), a polynomial near 0
//   gelu      x P(x), as activation_formula.h has P where results are of 16 bits
//   sin, cos  the nearest multiple of pi subtracted in two parts, then one polynomial. Large
//             arguments take f32's function, in a loop: it is long
#pragma once

#include "../ptx/math.cuh"
#include "../tile/formula_math.cuh"
#include "fastkern/activation_formula.h"
#include "pointwise_words.cuh"

namespace fastkern::pointwise_detail {

/// Functions that are not done before memory is, in f32 with one pack a thread.
template <class F>
inline constexpr bool kLaborious =
    std::is_same_v<F, functor::sqrt> || std::is_same_v<F, functor::sigmoid> ||
    std::is_same_v<F, functor::silu> || std::is_same_v<F, functor::gelu> ||
    std::is_same_v<F, functor::gelu_tanh> || std::is_same_v<F, functor::tanh>;

/// Those that are done in time as a Brief.
template <class F>
inline constexpr bool kQuickAsBrief =
    std::is_same_v<F, functor::sqrt> || std::is_same_v<F, functor::sigmoid> ||
    std::is_same_v<F, functor::silu>;

/// v times the sigmoid of z.
__device__ __forceinline__ float times_sigmoid(float v, float z) {
  const float e = ptx::exp2_approx(fmaf(z, -1.44269504f, -32.0f));
  return v * 0x1p-32f * ptx::rcp_approx(e + 0x1p-32f);
}

template <class F>
struct Brief;
template <>
struct Brief<functor::sqrt> {
  static __device__ __forceinline__ float apply(float v) { return ptx::sqrt_approx(v); }
};
template <>
struct Brief<functor::sigmoid> {
  static __device__ __forceinline__ float apply(float v) { return times_sigmoid(1.0f, v); }
};
template <>
struct Brief<functor::silu> {
  static __device__ __forceinline__ float apply(float v) { return times_sigmoid(v, v); }
};
template <>
struct Brief<functor::gelu> {
  static __device__ __forceinline__ float apply(float v) {
    return formula::value<ActivationKind::gelu, tile::FormulaMath<false>>(v, {});
  }
};
template <>
struct Brief<functor::gelu_tanh> {
  static __device__ __forceinline__ float apply(float v) {
    return times_sigmoid(v, formula::inner_of<ActivationKind::gelu_tanh>(v, 1.0f).z);
  }
};
template <>
struct Brief<functor::tanh> {
  static __device__ __forceinline__ float apply(float v) {
    const float far = fmaf(-2.0f, ptx::rcp_approx(ptx::exp2_approx(v * 2.88539008f) + 1.0f), 1.0f);
    const float z = v * v;
    const float near =
        fmaf(v * z, fmaf(fmaf(z, -4.9904419e-02f, 1.33097002e-01f), z, -3.33329393e-01f), v);
    return fabsf(v) < 0.3f ? near : far;
  }
};
template <bool kCos>
struct BriefTurn {
  static constexpr float kMost = 65536.0f;
  static __device__ __forceinline__ float apply(float v) {
    constexpr float kOnes = 12582912.0f;  // 1.5 * 2^23: bit 0 of a sum is that of a whole number
    constexpr float kInverse = 0.318309886f;
    // The half turns to subtract; a cosine is a sine half of one on.
    const float shifted = kCos ? fmaf(v, kInverse, 0.5f) + kOnes : fmaf(v, kInverse, kOnes);
    const float n = kCos ? shifted - kOnes - 0.5f : shifted - kOnes;
    // Both parts are less than pi, and r is a factor: a zero keeps its sign.
    const float r = fmaf(n, -0x1.4442d2p-23f, fmaf(n, -0x1.921fb4p+1f, v)), z = r * r;
    const float p = fmaf(fmaf(z, -1.8540999e-4f, 8.3142403e-3f), z, -0.16665851f);
    const float turned = r * fmaf(z, p, 1.0f);
    return __uint_as_float(__float_as_uint(turned) ^ __float_as_uint(shifted) << 31);
  }
  static __device__ __forceinline__ float apply_beyond(float v) { return kCos ? cosf(v) : sinf(v); }
};
template <>
struct Brief<functor::sin> : BriefTurn<false> {};
template <>
struct Brief<functor::cos> : BriefTurn<true> {};

template <class F>
inline constexpr bool kHasSomeBrief = requires { sizeof(Brief<F>); };

/// Whether results of `type` are those of Brief<F>; of an f16, a root may lie too near to the
/// middle of two.
template <class F>
__host__ __device__ constexpr bool is_brief(DType type) {
  if constexpr (!kHasSomeBrief<F>) return false;
  return type == DType::bf16 || (type == DType::f16 && !std::is_same_v<F, functor::sqrt>);
}
template <class F, class S>
inline constexpr bool kHasBrief = is_brief<F>(std::is_same_v<S, __half>          ? DType::f16
                                              : std::is_same_v<S, __nv_bfloat16> ? DType::bf16
                                                                                 : DType::f32);

/// values[n] = Brief<F>(values[n]), whatever is beside it.
template <class F, int N>
__device__ __forceinline__ void apply_brief(float (&values)[N]) {
  if constexpr (requires { Brief<F>::kMost; }) {
    // Sums of squares cost less than comparisons, which half as many units make.
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) squares = fmaf(values[n], values[n], squares);
    if (!(squares <= Brief<F>::kMost * Brief<F>::kMost)) {
      float each[N];
#pragma unroll
      for (int n = 0; n < N; ++n) each[n] = values[n];
#pragma unroll 1
      for (int n = 0; n < N; ++n) {
        const float v = each[n];
        each[n] = fabsf(v) > Brief<F>::kMost ? Brief<F>::apply_beyond(v) : Brief<F>::apply(v);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) values[n] = each[n];
      return;
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = Brief<F>::apply(values[n]);
}
/// The same for the N elements of a pack.
template <class F, int N, class W>
__device__ __forceinline__ void apply_brief(W& words) {
  float values[N];
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = element<float>(words, n);
  apply_brief<F>(values);
#pragma unroll
  for (int n = 0; n < N; ++n) put(words, n, values[n]);
}

}  // namespace fastkern::pointwise_detail
