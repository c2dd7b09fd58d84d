// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper: what a thread does to its scores and results on their way.
#pragma once

#include "attention/attention_scores.cuh"
#include "ptx/math.cuh"

namespace fastkern::cuda::attention_detail {

/// The same value, from here on: what follows from it is not computed before. Kept, it takes
/// registers that the products need.
template <class Int>
__device__ __forceinline__ Int anew(Int value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// As a type: that many keys.
template <int kCount>
struct Keys {};

/// Of sixteen tiles of 8 keys a thread has two neighbours each; a bit for each of these 32, from
/// the lowest: whether it comes before key `to` of the thread's first one.
__device__ __forceinline__ std::uint32_t pairs_below(int to) {
  const int cut = max(0, min(to, 128)), count = cut / 8 * 2 + min(cut % 8, 2);
  return count == 32 ? ~0u : (1u << count) - 1;
}

/// As a type: whether it is a warpgroup's first block of keys.
template <bool kFirst>
struct First {};

/// Powers of two by which scores may exceed what they are measured against, before results so far
/// are measured anew (Zadouri et al., FlashAttention-4).
inline constexpr float kMostGrowth = 8.0f;

/// Whatever number is less than this and has the upper 16 bits of another, that one is less than x.
/// Some 2^-7 of x less than x.
__device__ __forceinline__ float upper_below(float x) {
  const int bits = __float_as_int(x);
  return __int_as_float((bits & static_cast<int>(0xffff0000u)) + (bits < 0 ? 0x20000 : -0x10000));
}

/// What stands between products and the softmax but masks: soft cap and ALiBi. All in units of what
/// the products are.
struct ScoreChange {
  float cap, from_cap;  // from products to parts of the cap, and back; cap 0: none
  float slope;

  __device__ __forceinline__ ScoreChange(const Forward& p, int b, int h)
      : cap(p.softcap > 0.0f ? p.scale / p.softcap : 0.0f),
        from_cap(p.softcap / p.scale),
        slope(p.slopes.at(static_cast<std::int64_t>(b) * p.slopes_batch + h, 0.0f) / p.scale) {}

  /// tanh within some 2^-23 of 1, and of itself where it is small.
  static __device__ __forceinline__ float tanh(float x) {
    const float square = x * x;
    const float small =
        fmaf(square, fmaf(square, fmaf(square, -17.0f / 315, 2.0f / 15), -1.0f / 3), 1.0f);
    const float large =
        fmaf(-2.0f, ptx::rcp_approx(1.0f + ptx::exp2_approx(x * (2 * kLog2e))), 1.0f);
    return fabsf(x) < 0.2f ? x * small : large;
  }
  /// Of tiles of 8 keys, of a query `distance` from the first.
  template <int kScores>
  __device__ __forceinline__ void apply(float* s, int half, int distance) const {
    if (cap > 0.0f) {
#pragma unroll
      for (int c = 0; c < kScores; c += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          s[c + half * 2 + e] = tanh(s[c + half * 2 + e] * cap) * from_cap;
      }
    }
    const float from = static_cast<float>(distance);
#pragma unroll
    for (int c = 0; c < kScores; c += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[c + half * 2 + e] = fmaf(-slope, fabsf(from - (c * 2 + e)), s[c + half * 2 + e]);
      }
    }
  }
};

/// Of four numbers of each of the four threads with the same lane / 4, thread i gets the i-th of
/// each, in their order.
__device__ __forceinline__ uint4 transposed_4(const std::uint32_t (&words)[4], int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  std::uint32_t low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = __shfl_xor_sync(~0u, upper ? words[i] : words[i + 2], 2);
    low[i] = upper ? other : words[i];
    high[i] = upper ? words[i + 2] : other;
  }
  const std::uint32_t l = __shfl_xor_sync(~0u, odd ? low[0] : low[1], 1);
  const std::uint32_t h = __shfl_xor_sync(~0u, odd ? high[0] : high[1], 1);
  return odd ? uint4{l, low[1], h, high[1]} : uint4{low[0], l, high[0], h};
}

}  // namespace fastkern::cuda::attention_detail
