// SPDX-License-Identifier: Apache-2.0
// Exact attention in O(S) memory. B batch entries, H query heads, G key heads (H a multiple of G:
// query head h reads key head h / (H / G)), S queries, T keys, head dims D of q and k, Dv of v.
//
//   s[i, j] = cap(scale * q[i] . k[j]) + bias[i, j] - slope * |position(i) - j|
//   cap(x)  = softcap * tanh(x / softcap), or x without a softcap
//   lse[i]  = log(sum over visible j of exp(s[i, j]) + exp(sink))
//   out[i]  = sum over visible j of dropout(exp(s[i, j] - lse[i])) * v[j]
//
// position(i) = i + T - S, or i where `top_left` is set. Query i sees key j if
//   position(i) - left <= j <= position(i) + right  or  j < prefix
// and blocks[i / size, j / size] is set, and bias, where that is a mask, is set at [i, j]. Causal
// means right = 0. S and T are those of the batch entry where it has lengths of its own. A query
// that sees nothing: out 0, lse -inf (with a sink: the sink), no gradients. No key or value beyond
// T is ever read.
#pragma once

#include <cstddef>

#include "fastkern/core.h"
#include "fastkern/norm.h"

namespace fastkern {

/// What makes visible and what does not; all of it optional.
struct AttentionMask {
  std::int64_t left = -1, right = -1;  // negative: unlimited
  bool top_left = false;
  const std::int32_t* prefix = nullptr;  // (B)
  TensorRef blocks;  // (H or 1, ceil(S / block_size), ceil(T / block_size)) i8, any strides
  std::int64_t block_size = 0;
};

/// Lengths of the batch entries. With `start_*` the tensors are packed, (total, heads, D), and
/// entry b has rows start[b] to start[b + 1]; else they are (B, length, heads, D). `used_*`: entry
/// b has so many rows at most. What the numbers say is cut to the tensors: no number makes a kernel
/// leave them. Queries in no sequence: out 0, lse -inf.
struct AttentionLengths {
  std::int64_t batch = 0;                                     // of packed tensors
  const std::int32_t *start_q = nullptr, *start_k = nullptr;  // (B + 1), both or none
  const std::int32_t *used_q = nullptr, *used_k = nullptr;    // (B)
};

/// The probability of query i of head h of entry b and key j is dropped if word j % 4 of
/// philox(seed, offset + ((b * H + h) << 32), (i << 30) + j / 4) is below dropout_threshold(p).
using AttentionDropout = Dropout;

/// "any" is f32 | f16 | bf16. q, k, v, out have one type.
struct AttentionFwd {
  const char* op = "fastkern::flash_attn";
  TensorRef q;    // (B, S, H, D), or packed; the last dimension dense, other strides any
  TensorRef k;    // (B, T, G, D)
  TensorRef v;    // (B, T, G, Dv)
  TensorRef out;  // (B, S, H, Dv), dense
  TensorRef lse;  // (B, H, S) f32, dense; packed: (H, total)
  double scale = 1.0;
  double softcap = 0.0;
  TensorRef bias;    // (B or 1, H or 1, S or 1, T) any, or i8: a mask; any strides
  TensorRef slopes;  // (H) or (B, H) f32, dense
  TensorRef sinks;   // (H) any, dense
  AttentionMask mask;
  AttentionLengths lengths;
  AttentionDropout dropout;

  // cuda: attention_workspace() bytes, 16-byte aligned. Without, the same numbers, perhaps later.
  void* workspace = nullptr;
  std::size_t workspace_size = 0;
};

/// Gradients; what is not given is not computed. Deterministic: every sum has a fixed order.
struct AttentionBwd {
  AttentionFwd fwd;      // as it was called, `out` and `lse` now read
  TensorRef dout;        // as out, any strides
  TensorRef dlse;        // as lse, f32, dense; or none
  TensorRef dq, dk, dv;  // as q, k, v, dense
  TensorRef dbias;       // as bias, of its type, dense: summed over the dimensions that are 1
  TensorRef dsinks;      // (H) of the type of sinks

  void* workspace = nullptr;       // cuda: attention_bwd_workspace() bytes, 256-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

/// Parts of one attention over K disjoint sets of keys, put together:
/// lse = log(sum of exp(lses)), out = sum of outs * exp(lses - lse).
struct MergeFwd {
  const char* op = "fastkern::merge_attention";
  TensorRef outs;  // (K, B, S, H, Dv) any, the last dimension dense
  TensorRef lses;  // (K, B, H, S) f32, any strides
  TensorRef out;   // (B, S, H, Dv), dense
  TensorRef lse;   // (B, H, S) f32, dense
};

/// Its gradients; what is not given is not computed. Where no part saw a key they are 0.
struct MergeBwd {
  const char* op = "fastkern::merge_attention_bwd";
  TensorRef dout;        // as out, the last dimension dense
  TensorRef dlse;        // as lse, f32, any strides; or none
  TensorRef outs, lses;  // as they were
  TensorRef douts;       // as outs, dense
  TensorRef dlses;       // as lses, dense
};

namespace cpu {
FASTKERN_API void attention(const AttentionFwd& args);
FASTKERN_API void attention_bwd(const AttentionBwd& args);
FASTKERN_API void merge_attention(const MergeFwd& args);
FASTKERN_API void merge_attention_bwd(const MergeBwd& args);
/// mask (B, H, S, T) i8, dense: 1 where dropout keeps.
FASTKERN_API void attention_dropout_mask(const TensorRef& mask, const AttentionDropout& dropout,
                                         const char* op);
}  // namespace cpu

namespace cuda {
FASTKERN_API void attention(const AttentionFwd& args, Stream stream);
FASTKERN_API std::size_t attention_workspace(const AttentionFwd& args, Stream stream);
/// Why a call takes the kernel that runs on every GPU, instead of the one for Hopper; nullptr: it
/// does not.
FASTKERN_API const char* attention_portable_because(const AttentionFwd& args, Stream stream);
FASTKERN_API void attention_bwd(const AttentionBwd& args, Stream stream);
/// The same of a backward call.
FASTKERN_API const char* attention_bwd_portable_because(const AttentionBwd& args, Stream stream);
FASTKERN_API std::size_t attention_bwd_workspace(const AttentionBwd& args, Stream stream);
FASTKERN_API void merge_attention(const MergeFwd& args, Stream stream);
FASTKERN_API void merge_attention_bwd(const MergeBwd& args, Stream stream);
FASTKERN_API void attention_dropout_mask(const TensorRef& mask, const AttentionDropout& dropout,
                                         const char* op, Stream stream);
}  // namespace cuda
}  // namespace fastkern
