// SPDX-License-Identifier: Apache-2.0
// Numbers of 8 bits, float8_e4m3fn. One function, one instruction or two.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"

namespace fastkern::ptx {

/// Says that elements are of this type.
struct E4m3 {};

/// Four f32 rounded to one register, to nearest even, a in its lowest byte; what is above 448 is
/// 448, NaN stays NaN (sm_89).
__device__ __forceinline__ std::uint32_t pack_4(float a, float b, float c, float d, E4m3) {
  std::uint32_t packed = 0;
  if constexpr (kHasClusters) {
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(packed)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  }
  return packed;
}

}  // namespace fastkern::ptx
