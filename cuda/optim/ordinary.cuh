// SPDX-License-Identifier: Apache-2.0
// Roots and quotients of numbers of ordinary size: the bits of __fsqrt_rn and __fdiv_rn, by the
// steps that those take where they need not branch, but without asking, for each number, whether
// it is so. Whoever calls has asked for many at once.
#pragma once

#include "fastkern/optim_formula.h"
#include "ptx/math.cuh"
#include "ptx/root.cuh"

namespace fastkern::cuda::ordinary {

/// Of 0, or of a number from 2^-100 on.
__device__ __forceinline__ float root(float x) {
  const float y = ptx::rsqrt_approx(optim::add(x, 0x1p-126f));  // 0: not infinity, which times 0
  const float near = optim::mul(x, y), half = optim::mul(y, 0.5f);
  return optim::fma(optim::fma(-near, near, x), half, near);
}

/// 1 / b within 1 ulp; b from 2^-126 to 2^126.
__device__ __forceinline__ float near_reciprocal(float b) {
  const float y = ptx::rcp_approx(b);
  return optim::fma(y, optim::fma(-b, y, 1.0f), y);
}

/// a / b; a is 0 or at least 2^-100, b and the quotient are from 2^-125 to 2^126. The remainder is
/// taken with its sign turned, so that -0 stays one.
__device__ __forceinline__ float quotient(float a, float b) {
  const float y = near_reciprocal(b);
  const float near = optim::mul(a, y);
  return optim::fma(optim::fma(b, near, -a), -y, near);
}

/// 1 / b; b as above.
__device__ __forceinline__ float reciprocal(float b) {
  const float y = near_reciprocal(b);
  return optim::fma(y, optim::fma(-b, y, 1.0f), y);
}

/// What was seen of states of Adam or LAMB: averages of gradients and of their squares.
struct Seen {
  std::uint32_t least = ~0u, largest[2] = {};

  __device__ __forceinline__ void add(const float (&s)[2]) {
    add<0>(s[0]);
    add<1>(s[1]);
  }
  /// What is 0, or from 2^-96 to 2^40, of squares 2^29. A negative square is beyond the limit.
  __device__ __forceinline__ bool ordinary() const {
    return least >= kLeast - 1u && largest[0] < ((127u + 40) << 23) &&
           largest[1] < ((127u + 29) << 23);
  }
  static constexpr std::uint32_t kLeast = (127u - 96) << 23;

 private:
  template <int k>
  __device__ __forceinline__ void add(float v) {
    const std::uint32_t bits = __float_as_uint(v) & (k == 0 ? 0x7fffffffu : ~0u);
    least = min(least, bits - 1u);  // 0 becomes the largest
    largest[k] = max(largest[k], bits);
  }
};
/// Whether such states make roots and quotients that are ordinary.
__device__ __forceinline__ bool numbers(float eps, float unbias2, float unbias1) {
  return eps >= 0x1p-66f && eps <= 0x1p21f && unbias2 >= 1.0f && unbias2 <= 128.0f &&
         unbias1 >= 1.0f && unbias1 <= 1024.0f;
}

}  // namespace fastkern::cuda::ordinary
