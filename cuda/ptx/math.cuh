// SPDX-License-Identifier: Apache-2.0
// Functions that the special function units approximate, and one of integers. One function, one
// instruction (sm_90: max_3, max_3_upper).
#pragma once

namespace fastkern::ptx {

/// 2^x within 2 ulp; denormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x within 1 ulp; denormals, given or as the result, are 0.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Within 2^-23 of the root.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Of three numbers the upper 16 bits of the largest, rounded towards 0, as its upper half; the
/// lower half is anything. Numbers that are none are left out.
__device__ __forceinline__ float max_3_upper(float a, float b, float c) {
  float most;
  asm("{\n.reg .b32 most, b, c;\n"
      "mov.b32 most, %1;\nmov.b32 b, %2;\nmov.b32 c, %3;\n"
      "max.bf16x2 most, most, b;\nmax.bf16x2 most, most, c;\n"
      "mov.b32 %0, most;\n}"
      : "=f"(most)
      : "f"(a), "f"(b), "f"(c));
  return most;
}

/// The largest of three.
__device__ __forceinline__ int max_3(int a, int b, int c) { return __vimax3_s32(a, b, c); }

}  // namespace fastkern::ptx
