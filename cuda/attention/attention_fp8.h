// SPDX-License-Identifier: Apache-2.0
// Between the files of attention of 8-bit operands on CUDA.
#pragma once

#include "attention/attention_scores.cuh"

namespace fastkern::cuda::attention_detail {

/// Keys of a block where operands have so many columns, a multiple of 32.
constexpr int fp8_keys(int columns) { return columns > 64 && columns <= 128 ? 96 : 128; }

/// Keys that are transposed at a time, and a multiple of which rows of transposed values are.
inline constexpr int kFp8Keys = 128;

/// Of so many keys, in blocks of block_keys: rows that the blocks have, in multiples of kFp8Keys.
__host__ __device__ constexpr std::int64_t fp8_rows(std::int64_t keys, int block_keys) {
  const std::int64_t whole = (keys + block_keys - 1) / block_keys * block_keys;
  return (whole + kFp8Keys - 1) / kFp8Keys * kFp8Keys;
}

/// A scale for each batch entry and key head.
struct Fp8Scale {
  const float* data;  // nullptr: 1
  std::int64_t batch, head;

  __device__ __forceinline__ float at(int b, int g) const {
    return data ? data[b * batch + g * head] : 1.0f;
  }
};

/// Where the transposed values of a sequence of packed tensors begin; whatever lengths are, those
/// of the next begin behind its fp8_rows.
__device__ __forceinline__ int fp8_first_key(int first_k, int b) {
  return (first_k / kFp8Keys + 2 * b) * kFp8Keys;
}

struct Fp8Call {
  Forward f;
  View values;  // transposed: (B or 1, G, Dv, width), rows beside each other
  int width;
  Fp8Scale q_scale, k_scale, v_scale;
};

/// Where FASTKERN_HAS_SM90 and the device has capability 9.0.
void launch_hopper_fp8_any(Fp8Call& call, Stream stream, const char* op);

}  // namespace fastkern::cuda::attention_detail
