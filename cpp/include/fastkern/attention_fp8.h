// SPDX-License-Identifier: Apache-2.0
// Attention of operands in 8 bits with scales, forward. attention.h says what is computed; here
//
//   q[i] . k[j]  is  q_scale * k_scale * (q[i] . k[j])
//   v[j]         is  v_scale * v[j]
//
// with the scales of the batch entry and of the key head that query head h reads.
#pragma once

#include <cstddef>

#include "fastkern/attention.h"

namespace fastkern {

struct AttentionFp8Fwd {
  /// q, k, v: f8e4m3; out: bf16. No softcap, bias, slopes, blocks, prefix or dropout.
  AttentionFwd fwd;
  TensorRef q_scale, k_scale, v_scale;  // (B, G) f32, any strides; not given: 1

  void* workspace = nullptr;       // cuda: attention_fp8_workspace() bytes, 256-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

namespace cpu {
FASTKERN_API void attention_fp8(const AttentionFp8Fwd& args);
}  // namespace cpu

namespace cuda {
/// On compute capability 9.0 alone; head dimensions are multiples of 16, 256 at most, and q, k and
/// v lie in 16 bytes and are not expanded. Probabilities are rounded to f8e4m3.
FASTKERN_API void attention_fp8(const AttentionFp8Fwd& args, Stream stream);
FASTKERN_API std::size_t attention_fp8_workspace(const AttentionFp8Fwd& args);
}  // namespace cuda
}  // namespace fastkern
