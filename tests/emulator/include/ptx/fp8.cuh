// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/fp8.cuh.
#pragma once

#include <cuda_runtime.h>

#include "fastkern/scalar.h"

namespace fastkern::ptx {

struct E4m3 {};

inline std::uint32_t pack_4(float a, float b, float c, float d, E4m3) {
  std::uint32_t packed = 0;
  int shift = 0;
  for (const float v : {a, b, c, d}) {
    packed |= static_cast<std::uint32_t>(from_float<f8e4m3>(v).bits) << shift;
    shift += 8;
  }
  return packed;
}

}  // namespace fastkern::ptx
