// SPDX-License-Identifier: Apache-2.0
// Activations and their slopes, one source for the CPU and the GPU. M has exp(v) and reciprocal(v),
// and says whether a result is to have the last digits of an f32 (kPrecise) or is rounded to 16
// bits.
//
//   silu          z s(z)                         s(z) = 1 / (1 + exp(-z))
//   quick_gelu    z s(1.702 z)
//   gelu_tanh     z s(2 k (z + 0.044715 z^3))    k = sqrt(2 / pi): the same as with a tanh
//   gelu          z P(z)                         P(z) = (1 + erf(z / sqrt(2))) / 2
//   relu          max(z, 0)
//   sigmoid       s(z)
//   clamped_silu  c s(alpha c), c = min(z, limit)
//
// P(-|z|) = exp(-z^2 / 2) t(a0 + a1 t + ...), t = 1 / (1 + a |z|): the smooth rest of P after its
// exponential, fitted on [0, 14] for the least relative error: 4.7e-6 with six terms, 9.4e-8 with
// eight. So small results keep their digits, where 1 + erf has lost them. Precise ones take
// 1/2 + z r(z^2) within [-1, 1], to 4e-8.
#pragma once

#include "fastkern/activation.h"

#if defined(__CUDACC__)
#define FASTKERN_FORMULA __device__ __forceinline__
#else
#define FASTKERN_FORMULA [[gnu::always_inline]] inline
#endif

namespace fastkern::formula {

/// s and 1 - s, both to the last digits.
struct Sigmoid {
  float s, rest;
};

template <class M>
FASTKERN_FORMULA float sigmoid(float z) {
  return M::reciprocal(1.0f + M::exp(-z));
}

/// NaN stays NaN.
template <class M>
FASTKERN_FORMULA Sigmoid sigmoid_and_rest(float z) {
  const float e = M::exp(-z), s = M::reciprocal(1.0f + e);
  return {s, z < -87.0f ? 1.0f : e * s};  // which may be inf * 0
}

/// P, and exp(-z^2 / 2) / sqrt(2 pi), its slope.
struct Normal {
  float below, density;
};

template <class M>
FASTKERN_FORMULA Normal normal(float z) {
  const float size = z < 0.0f ? -z : z, square = z * z;
  const float e = M::exp(-0.5f * square);
  float tail, p;
  if constexpr (M::kPrecise) {
    const float t = M::reciprocal(1.0f + 0.3050000071525574f * size);
    p = 0.03670124709606171f;
    p = p * t - 0.1529971957206726f;
    p = p * t + 0.18573281168937683f;
    p = p * t - 0.03799210861325264f;
    p = p * t + 0.12103012204170227f;
    p = p * t + 0.10341819375753403f;
    p = p * t + 0.12246726453304291f;
    p = p * t + 0.12163970619440079f;
    tail = p * t * e;
  } else {
    const float t = M::reciprocal(1.0f + 0.3100000023841858f * size);
    p = -0.07392935454845428f;
    p = p * t + 0.18045097589492798f;
    p = p * t + 0.015744023025035858f;
    p = p * t + 0.1334301233291626f;
    p = p * t + 0.12044119834899902f;
    p = p * t + 0.12386070936918259f;
    tail = p * t * e;
  }
  float below = z < 0.0f ? tail : 1.0f - tail;
  if constexpr (M::kPrecise) {
    float r = -7.662608368264046e-06f;
    r = r * square + 0.0001135074780904688f;
    r = r * square - 0.0011863484978675842f;
    r = r * square + 0.009973330423235893f;
    r = r * square - 0.06649035960435867f;
    r = r * square + 0.39894228f;
    below = size < 1.0f ? 0.5f + z * r : below;
  }
  return {below, 0.39894228f * e};
}

/// What is multiplied with -1 in the exponent of the sigmoid, and its slope.
struct Inner {
  float z, slope;
};

template <ActivationKind kKind>
FASTKERN_FORMULA Inner inner_of(float z, float alpha) {
  constexpr float k = 1.5957691216f, kCube = 0.0713548163f;  // 2 k, 2 k 0.044715
  if constexpr (kKind == ActivationKind::gelu_tanh) {
    const float square = z * z;
    return {z * (k + kCube * square), k + 3.0f * kCube * square};
  } else if constexpr (kKind == ActivationKind::quick_gelu) {
    return {1.702f * z, 1.702f};
  } else if constexpr (kKind == ActivationKind::clamped_silu) {
    return {alpha * z, alpha};
  } else {
    return {z, 1.0f};
  }
}

/// NaN stays NaN.
FASTKERN_FORMULA float at_most(float v, float limit) { return v > limit ? limit : v; }

template <ActivationKind kKind, class M>
FASTKERN_FORMULA float value(float z, const ActivationNumbers& numbers) {
  if constexpr (kKind == ActivationKind::relu) {
    return z <= 0.0f ? 0.0f : z;
  } else if constexpr (kKind == ActivationKind::sigmoid) {
    return sigmoid<M>(z);
  } else if constexpr (kKind == ActivationKind::gelu) {
    return z * normal<M>(z).below;
  } else {
    if constexpr (kKind == ActivationKind::clamped_silu) z = at_most(z, numbers.limit);
    return z * sigmoid<M>(inner_of<kKind>(z, numbers.alpha).z);
  }
}

/// Whether a gradient goes through: not where relu or a clamp cuts, be it NaN. As in torch, NaN
/// itself passes relu, and no clamp.
template <ActivationKind kKind>
FASTKERN_FORMULA bool passes(float z, const ActivationNumbers& numbers) {
  if constexpr (kKind == ActivationKind::relu) return !(z <= 0.0f);
  if constexpr (kKind == ActivationKind::clamped_silu) return z <= numbers.limit;
  return true;
}

/// The slope is that of what passes.
struct ValueAndSlope {
  float value, slope;
};

template <ActivationKind kKind, class M>
FASTKERN_FORMULA ValueAndSlope value_and_slope(float z, const ActivationNumbers& numbers) {
  if constexpr (kKind == ActivationKind::relu) {
    return {z <= 0.0f ? 0.0f : z, 1.0f};
  } else if constexpr (kKind == ActivationKind::sigmoid) {
    const Sigmoid found = sigmoid_and_rest<M>(z);
    return {found.s, found.s * found.rest};
  } else if constexpr (kKind == ActivationKind::gelu) {
    const Normal found = normal<M>(z);
    return {z * found.below, z * found.density + found.below};
  } else {
    float c = z;
    if constexpr (kKind == ActivationKind::clamped_silu) c = at_most(z, numbers.limit);
    const Inner inner = inner_of<kKind>(c, numbers.alpha);
    const Sigmoid found = sigmoid_and_rest<M>(inner.z);
    // In this order: large c and slopes meet a 0 before they overflow.
    return {c * found.s, c * (found.s * found.rest) * inner.slope + found.s};
  }
}

/// The gradient by z for one of dy by the result.
template <ActivationKind kKind, class M>
FASTKERN_FORMULA float gradient(float dy, float z) {
  const float dz = dy * value_and_slope<kKind, M>(z, {}).slope;
  return passes<kKind>(z, {}) ? dz : 0.0f;
}

/// activation(gate) * up; of clamped_silu: * (clamp(up, -limit, limit) + up_offset).
template <ActivationKind kKind, class M>
FASTKERN_FORMULA float gated(float gate, float up, const ActivationNumbers& numbers) {
  if constexpr (kKind == ActivationKind::clamped_silu) {
    up = at_most(up < -numbers.limit ? -numbers.limit : up, numbers.limit) + numbers.up_offset;
  }
  return value<kKind, M>(gate, numbers) * up;
}

struct GatedSlopes {
  float gate, up;
};

/// Gradients for a gradient dy of the result.
template <ActivationKind kKind, class M>
FASTKERN_FORMULA GatedSlopes gated_slopes(float dy, float gate, float up,
                                          const ActivationNumbers& numbers) {
  const ValueAndSlope found = value_and_slope<kKind, M>(gate, numbers);
  float dup = dy * found.value;
  if constexpr (kKind == ActivationKind::clamped_silu) {
    dup = up >= -numbers.limit && up <= numbers.limit ? dup : 0.0f;
    up = at_most(up < -numbers.limit ? -numbers.limit : up, numbers.limit) + numbers.up_offset;
  }
  return {passes<kKind>(gate, numbers) ? dy * up * found.slope : 0.0f, dup};
}

/// f.template operator()<kKind>() with a kind of gated activations.
template <class F>
FASTKERN_FORMULA void with_gate(ActivationKind kind, F&& f) {
  switch (kind) {
    case ActivationKind::silu:
      return f.template operator()<ActivationKind::silu>();
    case ActivationKind::gelu:
      return f.template operator()<ActivationKind::gelu>();
    case ActivationKind::gelu_tanh:
      return f.template operator()<ActivationKind::gelu_tanh>();
    case ActivationKind::relu:
      return f.template operator()<ActivationKind::relu>();
    case ActivationKind::sigmoid:
      return f.template operator()<ActivationKind::sigmoid>();
    default:
      return f.template operator()<ActivationKind::clamped_silu>();
  }
}

/// The same with a kind of bias_act.
template <class F>
FASTKERN_FORMULA void with_activation(ActivationKind kind, F&& f) {
  switch (kind) {
    case ActivationKind::silu:
      return f.template operator()<ActivationKind::silu>();
    case ActivationKind::gelu:
      return f.template operator()<ActivationKind::gelu>();
    case ActivationKind::gelu_tanh:
      return f.template operator()<ActivationKind::gelu_tanh>();
    case ActivationKind::relu:
      return f.template operator()<ActivationKind::relu>();
    default:
      return f.template operator()<ActivationKind::quick_gelu>();
  }
}

}  // namespace fastkern::formula
