// SPDX-License-Identifier: Apache-2.0
// What softmax and its relatives do with one row on the CPU: the largest value, the sum of
// exponentials.
#pragma once

#include <cmath>
#include <limits>

#include "exponential.h"
#include "rowwise.h"

namespace fastkern::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// exp(v) for v not above 0 but for a rounding; below -87.7, where the power of two has run out of
/// exponent, 0.
FASTKERN_INLINE float exp_below(float v) { return exp_within(v < -88.0f ? -88.0f : v); }

/// The largest value, NaN left out; -inf of nothing.
template <class In>
FASTKERN_INLINE float row_max(const In* in, std::int64_t n) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInfinity;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float v = to_float(in[i + l]);
      lanes[l] = v > lanes[l] ? v : lanes[l];
    }
  }
  for (int l = 0; i < n; ++i, ++l) {
    const float v = to_float(in[i]);
    lanes[l] = v > lanes[l] ? v : lanes[l];
  }
  float max = -kInfinity;
  for (int l = 0; l < kLanes; ++l) max = lanes[l] > max ? lanes[l] : max;
  return max;
}

/// What exponents are taken around: the largest value or, where that is infinite, 0, so that inf -
/// inf does not come up in the sum.
FASTKERN_INLINE float shift_of(float max) {
  return max == kInfinity || max == -kInfinity ? 0.0f : max;
}

/// shift + log(sum), rounded once.
inline float plus_log(float shift, float sum) {
  return static_cast<float>(shift + std::log(static_cast<double>(sum)));
}

/// Columns whose exponentials are made and summed up at a time, in the nearest cache.
constexpr std::int64_t kSumStretch = 4096;

/// sum(exp(in - shift)); the exponentials stay in `e`, of the whole row with kKeep, else of a
/// stretch.
template <bool kKeep, class In>
FASTKERN_INLINE float exp_sum(const In* in, std::int64_t n, float shift, float* e) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < n; begin += kSumStretch) {
    const std::int64_t count = std::min(n - begin, kSumStretch);
    const In* const from = in + begin;
    float* const to = kKeep ? e + begin : e;
    columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
      to[c] = exp_below(to_float(from[c]) - shift);
    });
    const auto [sum] = lane_sums<1>(
        count, [=](std::int64_t c) __attribute__((always_inline)) { return std::array{to[c]}; });
    total += sum;
  }
  return static_cast<float>(total);
}

}  // namespace fastkern::cpu
