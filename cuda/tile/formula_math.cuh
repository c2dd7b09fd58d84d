// SPDX-License-Identifier: Apache-2.0
// What formulas of activations (fastkern/activation_formula.h) compute with. Included by its place:
// kernels that users compile have it too.
#pragma once

#include "../ptx/math.cuh"

namespace fastkern::tile {

/// Exponentials of f32, or of the special function unit, whose error 16 bits do not show.
template <bool kPrecise_>
struct FormulaMath {
  static constexpr bool kPrecise = kPrecise_;
  static __device__ __forceinline__ float exp(float v) {
    if constexpr (kPrecise) return expf(v);
    return ptx::exp2_approx(v * 1.44269504f);
  }
  static __device__ __forceinline__ float reciprocal(float v) { return ptx::rcp_approx(v); }
};

}  // namespace fastkern::tile
