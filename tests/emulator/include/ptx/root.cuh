// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/root.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline float rsqrt_approx(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}

}  // namespace fastkern::ptx
