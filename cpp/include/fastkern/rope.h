// SPDX-License-Identifier: Apache-2.0
// Rotary position embeddings: pairs of a head's columns turned by an angle that depends on the
// token's position, alone or behind an RMS norm of each head.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)      the pairs of the first R columns of a head of D
//     halves        a, b = columns i, R/2 + i
//     interleaved   a, b = columns 2i, 2i + 1
//   columns R to D stay as they are
//   qk_norm_rope: x -> x * rsqrt(mean(x^2) + eps) * (weight_offset + weight) first
//
// Computed in f32 and rounded once. cos and sin come from tables, at the token's position.
#pragma once

#include <cstddef>

#include "fastkern/core.h"

namespace fastkern {

/// "any" is f32 | f16 | bf16. Which angle a token is turned by.
struct RopeAngles {
  /// (T, W) any: row p is for position p. (B or 1, S, W): a row for each token. W is R/2, or R with
  /// each number twice, at the columns that it belongs to: the first of both is read. sin is like
  /// cos. Dense last dimension, any other strides.
  TensorRef cos, sin;
  std::int64_t rotary_dim = 0;  // R: even, at most D
  bool interleaved = false;
  bool inverse = false;  // by the negative angle: the gradient, and the way back

  /// (B or 1, S) i64, or i32 if `narrow`; nullptr: a token's number in its sequence. Positions that
  /// the table has no row for: an Error on the CPU, NaN for the R columns on CUDA.
  const void* positions = nullptr;
  bool narrow = false;
  std::int64_t positions_batch_stride = 0, positions_stride = 1;  // elements

  /// B is 1, and the tokens are those of `sequences` sequences, of which number i begins at
  /// cu_seqlens[i] and ends before cu_seqlens[i + 1]. Tokens of no sequence stay as they are.
  const std::int32_t* cu_seqlens = nullptr;
  std::int64_t sequences = 0;
};

/// The head dimension of all operands is dense; other strides are any.
struct RopeFwd {
  const char* op = "fastkern::rope";  // for error messages
  TensorRef q, k;          // (B, S, H, D), (B, S, G, D) any; k of the type of q, or not given
  TensorRef q_out, k_out;  // like q and k, whose memory they may be
  RopeAngles angles;
};

/// As RopeFwd, behind a norm of each head; D is at most kQkNormMost.
struct QkNormRopeFwd {
  const char* op = "fastkern::qk_norm_rope";
  TensorRef q, k;
  TensorRef q_weight, k_weight;  // (D) any, dense; not given: 1
  TensorRef q_out, k_out;
  RopeAngles angles;
  double eps = 1e-6;
  double weight_offset = 0.0;
};

/// With g the gradient turned back and xhat = x * rstd:
///   dx = rstd * (g w - xhat * mean(g w xhat)),  dweight = sum over tokens and heads of g xhat
struct QkNormRopeBwd {
  const char* op = "fastkern::qk_norm_rope_bwd";
  TensorRef q, k;
  TensorRef q_weight, k_weight;
  TensorRef dq_out, dk_out;        // gradients of the outputs, of the type of q
  TensorRef dq, dk;                // like q and k; or not given
  TensorRef dq_weight, dk_weight;  // (D) any, dense; or not given
  RopeAngles angles;               // as in forward
  double eps = 1e-6;
  double weight_offset = 0.0;

  void* workspace = nullptr;       // cuda: qk_norm_rope_bwd_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

constexpr std::int64_t kQkNormMost = 512;

namespace cpu {
FASTKERN_API void rope(const RopeFwd& args);
FASTKERN_API void qk_norm_rope(const QkNormRopeFwd& args);
FASTKERN_API void qk_norm_rope_bwd(const QkNormRopeBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void rope(const RopeFwd& args, Stream stream);
FASTKERN_API void qk_norm_rope(const QkNormRopeFwd& args, Stream stream);
FASTKERN_API void qk_norm_rope_bwd(const QkNormRopeBwd& args, Stream stream);
FASTKERN_API std::size_t qk_norm_rope_bwd_workspace(const QkNormRopeBwd& args, int device);
}  // namespace cuda

}  // namespace fastkern
