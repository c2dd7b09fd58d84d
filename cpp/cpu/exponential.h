// SPDX-License-Identifier: Apache-2.0
// exp and its relatives in f32, for loops that are to become vectors: no calls, no branches.
#pragma once

#include <bit>
#include <cstdint>

#include "fastkern/scalar.h"

namespace fastkern::cpu {

/// exp in f32 to an ulp or two, without a call: 2^n * exp(v - n ln 2), n = round(v / ln 2); for v
/// from -88, where 2^n has become 0, to 88.
FASTKERN_INLINE float exp_within(float v) {
  constexpr float kOnes = 0x1.8p23f;  // the last bit of a sum with it is worth 1
  const float shifted = v * 1.44269504f + kOnes, n = shifted - kOnes;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  return (p * r * r + r + 1.0f) * std::bit_cast<float>(power);
}

/// The same for any v, which never becomes 0.
FASTKERN_INLINE float exp_of(float v) {
  v = v > 88.0f ? 88.0f : v;
  return exp_within(v < -87.0f ? -87.0f : v);
}

FASTKERN_INLINE float sigmoid(float z) { return 1.0f / (1.0f + exp_of(-z)); }

/// exp(v), and 0 below -87, where exp_of stops falling.
FASTKERN_INLINE float exp_to_zero(float v) { return v < -87.0f ? 0.0f : exp_of(v); }

/// tanh to two ulps: a polynomial around 0, where 1 - 2 / (exp(2 v) + 1) cancels.
FASTKERN_INLINE float tanh_of(float v) {
  const float a = v < 0.0f ? -v : v, z = v * v;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * v + v;
  const float large = 1.0f - 2.0f / (exp_of(2.0f * a) + 1.0f);
  return a < 0.625f ? small : v < 0.0f ? -large : large;
}

}  // namespace fastkern::cpu
