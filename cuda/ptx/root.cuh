// SPDX-License-Identifier: Apache-2.0
// Roots that the special function units approximate. One function, one instruction.
#pragma once

namespace fastkern::ptx {

/// 1 / root of x within 2 ulp; of a denormal number infinity.
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastkern::ptx
