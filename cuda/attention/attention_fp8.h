// SPDX-License-Identifier: Apache-2.0
// Between the files of attention of 8-bit operands on CUDA.
#pragma once

#include "attention/attention_scores.cuh"

namespace fastkern::cuda::attention_detail {

/// Keys of a block where operands have so many columns.
constexpr int fp8_keys(int columns) { return columns > 64 && columns <= 128 ? 192 : 128; }
/// Bytes that the values of a block take in a row, once transposed.
constexpr int fp8_slots(int keys) { return (keys + 127) / 128 * 128; }

/// A scale for each batch entry and key head.
struct Fp8Scale {
  const float* data;  // nullptr: 1
  std::int64_t batch, head;

  __device__ __forceinline__ float at(int b, int g) const {
    return data ? data[b * batch + g * head] : 1.0f;
  }
};

/// Before which block of transposed values those of a sequence of packed tensors begin; whatever
/// lengths are, those of the next begin behind.
__device__ __forceinline__ int fp8_first_block(int first_k, int b, int keys) {
  return first_k / keys + b;
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
