// SPDX-License-Identifier: Apache-2.0
// Dropout, alone and between a bias and a residual stream. Which elements are dropped is said in
// philox.h: it follows from seed, offset and the element's number (row * N + column) alone.
#pragma once

#include <cstddef>

#include "fastkern/norm.h"

namespace fastkern {

/// y = dropout(x). Its gradient is the same call on dy.
struct DropoutCall {
  const char* op = "fastkern::dropout";  // for error messages
  TensorRef x, y;                        // (..., N), f32 | f16 | bf16, of one type
  Dropout dropout;
};

/// y = residual + dropout(x + bias), computed in f32 and rounded once.
struct BiasDropoutAdd {
  const char* op = "fastkern::bias_dropout_add";
  TensorRef x;            // (..., N), f32 | f16 | bf16
  TensorRef bias;         // (N), f32 | f16 | bf16, dense; not given: 0
  TensorRef residual, y;  // (..., N), f32 | f16 | bf16
  Dropout dropout;
};

/// dx = dropout(dy), dbias = sum of it over the rows. The gradient of residual is dy itself.
struct BiasDropoutAddBwd {
  const char* op = "fastkern::bias_dropout_add_bwd";
  TensorRef dy;     // (..., N), f32 | f16 | bf16
  TensorRef dx;     // (..., N), f32 | f16 | bf16; or not given
  TensorRef dbias;  // (N), f32 | f16 | bf16, dense; or not given
  Dropout dropout;
  void* workspace = nullptr;       // cuda: column_sums_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

namespace cpu {
FASTKERN_API void dropout(const DropoutCall& args);
FASTKERN_API void bias_dropout_add(const BiasDropoutAdd& args);
FASTKERN_API void bias_dropout_add_bwd(const BiasDropoutAddBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void dropout(const DropoutCall& args, Stream stream);
FASTKERN_API void bias_dropout_add(const BiasDropoutAdd& args, Stream stream);
FASTKERN_API void bias_dropout_add_bwd(const BiasDropoutAddBwd& args, Stream stream);
}  // namespace cuda
}  // namespace fastkern
