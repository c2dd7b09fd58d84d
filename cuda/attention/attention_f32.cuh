// SPDX-License-Identifier: Apache-2.0
// Products of f32 matrices on tensor cores of a warp (sm_80 and later), for attention.
//
//   work     x = big + small, each with the 11 bits that a tensor core reads: a b is big big + big
//            small + small big within 2^-21 of |a| |b|. Sums of a slice come from tensor cores,
//            which cut what does not fit; they are added up outside, rounded
//   memory   operands go through shared memory in slices of 32 columns, so that any head dimension
//            takes the same amount, in a ring of three
//   sync     one barrier a slice
#pragma once

#include "attention/attention_fwd.cuh"

namespace fastkern::cuda::attention_detail {

inline constexpr int kF32Threads = 256, kF32Rows = 128;    // of the matrix that stays: 16 a warp
inline constexpr int kSlice = 32, kSliceRow = kSlice * 4;  // columns, and bytes of a row of them
using Slice = Swizzled<kSlice * 2>;

/// Columns from `column` on of kRows rows; rows that are not there() and columns from `width` on
/// become 0.
template <int kRows, class There>
__device__ __forceinline__ void fetch_slice(char* shared, const char* global, std::int64_t stride,
                                            int column, int width, bool vectors,
                                            const There& there) {
  constexpr int kDown = kF32Threads / Slice::kChunks;
  static_assert(kRows % kDown == 0);
  int thread = threadIdx.x;  // computed each time, as in fetch()
  asm volatile("" : "+r"(thread));
  const int chunk = thread % Slice::kChunks, first = thread / Slice::kChunks;
  const int c = column + chunk * 4;
#pragma unroll
  for (int row = first; row < kRows; row += kDown) {
    char* const to = shared + Slice::at(row, chunk);
    const char* const from = global + row * stride + c * 4;
    const bool inside = c < width && there(row);
    if (vectors) {
      ptx::cp_async_16(to, from, inside ? 16 : 0);
    } else {
      float v[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (inside && c + e < width) v[e] = reinterpret_cast<const float*>(from)[e];
      }
      *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
    }
  }
}

/// Slices in the order of their use; fetch(stage) begins to fetch the one after those it fetched
/// before, if there is another.
template <int kBytes, class Fetch>
struct Slices {
  char* const memory;
  const Fetch& fetch;
  int at = 0;

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      fetch(memory + stage * kBytes);
      ptx::cp_async_commit();
    }
  }
  __device__ __forceinline__ char* next() {
    ptx::cp_async_wait<1>();
    __syncthreads();
    fetch(memory + (at == 0 ? 2 : at - 1) * kBytes);
    ptx::cp_async_commit();
    char* const stage = memory + at * kBytes;
    at = at == 2 ? 0 : at + 1;
    return stage;
  }
};

template <int kCount>
struct Halves {
  std::uint32_t big[kCount], small[kCount];

  /// big: the nearest number of 11 bits, as cvt.rna.tf32 has it, in less instructions.
  __device__ __forceinline__ void set(int i, float x) {
    big[i] = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    small[i] = __float_as_uint(x - __uint_as_float(big[i]));  // NaN of what is not finite
  }
};

/// Each product after those of the other tiles that do not wait for it.
template <int kTiles>
__device__ __forceinline__ void multiply(float (*d)[4], const Halves<4>& a,
                                         const Halves<2> (&b)[kTiles]) {
#pragma unroll
  for (int c = 0; c < kTiles; ++c) ptx::mma_16x8x8_tf32(d[c], a.small, b[c].big[0], b[c].big[1]);
#pragma unroll
  for (int c = 0; c < kTiles; ++c) ptx::mma_16x8x8_tf32(d[c], a.big, b[c].small[0], b[c].small[1]);
#pragma unroll
  for (int c = 0; c < kTiles; ++c) ptx::mma_16x8x8_tf32(d[c], a.big, b[c].big[0], b[c].big[1]);
}

/// sums += a b^T of the slices of 16 rows and of 8 * kTiles rows.
template <int kTiles>
__device__ __forceinline__ void multiply_rows(float (&sums)[kTiles][4], const char* a,
                                              const char* b) {
  constexpr int kGroup = 4;
  static_assert(kTiles % kGroup == 0);
  const int lane = threadIdx.x % 32;
  const ptx::SharedAddress of_a = ptx::shared_address(a) + Slice::at(lane & 15, lane >> 4);
  const ptx::SharedAddress of_b =
      ptx::shared_address(b) + Slice::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  float more[kTiles][4] = {};
#pragma unroll
  for (int kk = 0; kk < kSlice / 8; ++kk) {
    std::uint32_t r[4];
    ptx::ldmatrix_4(r, Slice::right(of_a, kk));
    Halves<4> rA;
#pragma unroll
    for (int e = 0; e < 4; ++e) rA.set(e, __uint_as_float(r[e]));
#pragma unroll
    for (int c = 0; c < kTiles; c += kGroup) {
      Halves<2> rB[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; t += 2) {
        ptx::ldmatrix_4(r, Slice::right(of_b, kk) + (c + t) * (8 * kSliceRow));
#pragma unroll
        for (int e = 0; e < 4; ++e) rB[t + e / 2].set(e % 2, __uint_as_float(r[e]));
      }
      multiply(more + c, rA, rB);
    }
  }
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[c][e] += more[c][e];
  }
}

/// sums[first...] = sums * factor of the row + a b: a lies in registers as sums do, b is a slice of
/// 8 * kTiles rows. The order of those in a product is that of a in the registers.
template <int kTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_columns(float (&sums)[kColumnTiles][4], int first,
                                                 const float (&factor)[2],
                                                 const float (&a)[kTiles][4], const char* b) {
  const int lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const char* const rows[2] = {b + Slice::at(pair * 2, quad / 4) + quad % 4 * 4,
                               b + Slice::at(pair * 2 + 1, quad / 4) + quad % 4 * 4};
  float more[kSlice / 8][4] = {};
#pragma unroll
  for (int kk = 0; kk < kTiles; ++kk) {
    Halves<4> rA;
#pragma unroll
    for (int e = 0; e < 4; ++e) rA.set(e, a[kk][e % 2 * 2 + e / 2]);
    Halves<2> rB[kSlice / 8];
#pragma unroll
    for (int c = 0; c < kSlice / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto at = reinterpret_cast<std::uintptr_t>(rows[e]) ^ (c * 32);
        rB[c].set(e, *reinterpret_cast<const float*>(at + kk * (8 * kSliceRow)));
      }
    }
    multiply(more, rA, rB);
  }
#pragma unroll
  for (int c = 0; c < kSlice / 8; ++c) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[first + c][e] = fmaf(sums[first + c][e], factor[e / 2], more[c][e]);
    }
  }
}

}  // namespace fastkern::cuda::attention_detail
