// SPDX-License-Identifier: Apache-2.0
// Products of small matrices in f32: the blocks of attention, which are in the nearer caches and
// too small and too many to be handed to a library. Each element is summed over k in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace fastkern::cpu {

/// Columns of what matmul() writes are a multiple of this, and B has them too.
inline constexpr std::int64_t kMatmulColumns = 16;

namespace matmul_detail {

template <int kFloats>
struct VectorOf {
  using Type [[gnu::vector_size(kFloats * 4), gnu::aligned(4), gnu::may_alias]] = float;
};

/// kRows x kColumns vectors of C, kept in registers.
template <int kFloats, int kRows, int kColumns, bool kAdd>
FASTKERN_INLINE void tile(std::int64_t k, const float* a, std::int64_t a_row, std::int64_t a_k,
                          const float* b, std::int64_t b_row, float* c, std::int64_t c_row) {
  using Vector = typename VectorOf<kFloats>::Type;
  Vector sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      sums[r][v] = kAdd ? *reinterpret_cast<const Vector*>(c + r * c_row + v * kFloats) : Vector{};
    }
  }
  for (std::int64_t i = 0; i < k; ++i, a += a_k, b += b_row) {
    Vector of_b[kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      of_b[v] = *reinterpret_cast<const Vector*>(b + v * kFloats);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float of_a = a[r * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) sums[r][v] += of_a * of_b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      *reinterpret_cast<Vector*>(c + r * c_row + v * kFloats) = sums[r][v];
    }
  }
}

template <int kFloats, int kColumns, bool kAdd>
FASTKERN_INLINE void strip(std::int64_t m, std::int64_t k, const float* a, std::int64_t a_row,
                           std::int64_t a_k, const float* b, std::int64_t b_row, float* c,
                           std::int64_t c_row) {
  constexpr int kRows = kColumns == 1 ? 8 : kFloats == 16 ? 6 : 4;
  std::int64_t r = 0;
  for (; r + kRows <= m; r += kRows) {
    tile<kFloats, kRows, kColumns, kAdd>(k, a + r * a_row, a_row, a_k, b, b_row, c + r * c_row,
                                         c_row);
  }
  for (; r + 2 <= m; r += 2) {
    tile<kFloats, 2, kColumns, kAdd>(k, a + r * a_row, a_row, a_k, b, b_row, c + r * c_row, c_row);
  }
  for (; r < m; ++r) {
    tile<kFloats, 1, kColumns, kAdd>(k, a + r * a_row, a_row, a_k, b, b_row, c + r * c_row, c_row);
  }
}

}  // namespace matmul_detail

/// C = A B, or C += A B: A is m x k with any strides, the rows of B and C are dense.
template <bool kAdd>
void matmul(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t a_row,
            std::int64_t a_k, const float* b, std::int64_t b_row, float* c, std::int64_t c_row) {
  with_best_isa([=]<int kFloats>() __attribute__((always_inline)) {
    constexpr int kColumns = kFloats == 16 ? 4 : 2;
    std::int64_t done = 0;
    for (; done + kColumns * kFloats <= n; done += kColumns * kFloats) {
      matmul_detail::strip<kFloats, kColumns, kAdd>(m, k, a, a_row, a_k, b + done, b_row, c + done,
                                                    c_row);
    }
    for (; done < n; done += kFloats) {
      matmul_detail::strip<kFloats, 1, kAdd>(m, k, a, a_row, a_k, b + done, b_row, c + done, c_row);
    }
  });
}

}  // namespace fastkern::cpu
