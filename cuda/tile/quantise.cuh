// SPDX-License-Identifier: Apache-2.0
// Packs of floats to rows of f8e4m3 or i8.
#pragma once

#include <cuda_fp8.h>

#include "tile/pack.cuh"

namespace fastkern::tile {

inline constexpr float kLargestF8 = 448.0f, kLargestI8 = 127.0f;

/// Rounds to nearest even, saturates; NaN is NaN in f8e4m3 and 0 in i8.
template <int kCount>
__device__ __forceinline__ void quantise(const float (&v)[kCount], float inverse, DType dtype,
                                         std::uint32_t (&words)[kCount / 4]) {
  if (dtype == DType::i8) {
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = __float2int_rn(v[4 * w + j] * inverse);  // saturates, NaN gives 0
        words[w] |= (static_cast<std::uint32_t>(max(-127, min(127, i))) & 255u) << 8 * j;
      }
    }
    return;
  }
#pragma unroll
  for (int w = 0; w < kCount / 4; ++w) {
    const auto pair = [&](int at) -> std::uint32_t {
      return __nv_cvt_float2_to_fp8x2({v[at] * inverse, v[at + 1] * inverse}, __NV_SATFINITE,
                                      __NV_E4M3);
    };
    words[w] = pair(4 * w) | pair(4 * w + 2) << 16;
  }
}

template <class T, class Column>
__device__ __forceinline__ void store_quantised(const RowView<T>& y, char* row, Column column,
                                                Column n, const float (&v)[kVector<T>],
                                                float inverse) {
  constexpr int kV = kVector<T>;
  std::uint32_t words[kV / 4];
  quantise<kV>(v, inverse, y.dtype, words);
  if (y.whole && column + kV <= n) {
    if constexpr (kV == 8) {
      ptx::st_global_8(row + column, {words[0], words[1]});
    } else {
      *reinterpret_cast<std::uint32_t*>(row + column) = words[0];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    if (column + j < n) row[column + j] = static_cast<char>(words[j / 4] >> 8 * (j % 4));
  }
}

}  // namespace fastkern::tile
