// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/math.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float sqrt_approx(float x) { return std::sqrt(x); }
inline float upper_half(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); }
inline float max_3_upper(float a, float b, float c) {
  return __uint_as_float(
      __float_as_uint(std::fmax(std::fmax(upper_half(a), upper_half(b)), upper_half(c))) | 0x1234);
}
inline int max_3(int a, int b, int c) { return std::max(std::max(a, b), c); }

}  // namespace fastkern::ptx
