// SPDX-License-Identifier: Apache-2.0
// What both directions of attention on the CPU share: operands, sequences, what a query sees, and
// the scores of a block.
//
// Blocks of 64 queries and 64 keys, in f32 whatever the operands are. Scores lie transposed, a row
// for each key and a column for each query, so that the softmax of 64 queries is 64 columns side by
// side and no sum goes across a vector; and a product needs only the queries transposed, once for
// all keys. Blocks begin at multiples of 64 of the sequence: a row's result does not depend on its
// neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"
#include "fastkern/attention.h"
#include "fastkern/attention_mask.h"
#include "fastkern/philox.h"
#include "fastkern/scalar.h"
#include "matmul.h"
#include "rowwise.h"

namespace fastkern::cpu::attention_detail {

inline constexpr std::int64_t kBlock = 64;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr std::int64_t blocks_of(std::int64_t n) { return (n + kBlock - 1) / kBlock; }
/// Columns as matmul() wants them.
constexpr std::int64_t padded(std::int64_t n) {
  return (n + kMatmulColumns - 1) / kMatmulColumns * kMatmulColumns;
}

/// q, k, v or one like them, packed or not: element (b, row, head, c). Only what load_rows() reads
/// may have columns that are not dense.
struct Operand {
  explicit Operand(const TensorRef& t)
      : data(static_cast<char*>(t.data)),
        dtype(t.dtype),
        batch(t.ndim == 4 ? t.strides[0] : 0),
        row(t.given() ? t.strides[t.ndim - 3] : 0),
        head(t.given() ? t.strides[t.ndim - 2] : 0),
        width(t.given() ? t.sizes[t.ndim - 1] : 0),
        column(t.given() ? t.strides[t.ndim - 1] : 1),
        present(t.given()) {}

  template <class T>
  T* at(std::int64_t b, std::int64_t r, std::int64_t h) const {
    return reinterpret_cast<T*>(data) + (b * batch + r * row + h * head);
  }

  char* data;
  DType dtype;
  std::int64_t batch, row, head, width, column;
  bool present;
};

/// `count` rows of one head in f32, each of padded(width) floats, the last of them 0.
inline void load_rows(const Operand& t, std::int64_t b, std::int64_t first, std::int64_t count,
                      std::int64_t head, float* out) {
  const std::int64_t width = t.width, stride = padded(width);
  dispatch_stored(t.dtype, [&]<class T>() {
    const T* const from = t.at<const T>(b, first, head);
    const std::int64_t row = t.row, column = t.column;
    if (column != 1) {  // a gradient of a transposition, or of a sum: one number for all
      for (std::int64_t r = 0; r < count; ++r) {
        float* const to = out + r * stride;
        for (std::int64_t c = 0; c < width; ++c) to[c] = to_float(from[r * row + c * column]);
        std::fill(to + width, to + stride, 0.0f);
      }
      return;
    }
    with_best_isa([=]() __attribute__((always_inline)) {
      for (std::int64_t r = 0; r < count; ++r) {
        const T* const in = from + r * row;
        float* const to = out + r * stride;
#pragma GCC ivdep
        for (std::int64_t c = 0; c < width; ++c) to[c] = to_float(in[c]);
        for (std::int64_t c = width; c < stride; ++c) to[c] = 0.0f;
      }
    });
  });
}

/// Rows of `stride` floats times row_scale[r] go to t.
inline void store_rows(const Operand& t, std::int64_t b, std::int64_t first, std::int64_t count,
                       std::int64_t head, const float* in, std::int64_t stride,
                       const float* row_scale) {
  const std::int64_t width = t.width;
  dispatch(t.dtype, [&]<class T>() {
    T* const to = t.at<T>(b, first, head);
    const std::int64_t row = t.row;
    with_best_isa([=]() __attribute__((always_inline)) {
      for (std::int64_t r = 0; r < count; ++r) {
        const float* const from = in + r * stride;
        const float scale = row_scale[r];
        T* const out = to + r * row;
#pragma GCC ivdep
        for (std::int64_t c = 0; c < width; ++c) out[c] = from_float<T>(from[c] * scale);
      }
    });
  });
}

/// out[c][r] = in[r][c] * scale; columns of out beyond `rows` are 0.
inline void transpose(std::int64_t rows, std::int64_t columns, const float* in, std::int64_t stride,
                      float scale, float* out) {
  constexpr std::int64_t kStrip = 16;  // a line of each row at a time
  for (std::int64_t first = 0; first < columns; first += kStrip) {
    const std::int64_t last = std::min(columns, first + kStrip);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = first; c < last; ++c) {
        out[c * kBlock + r] = in[r * stride + c] * scale;
      }
    }
    for (std::int64_t c = first; c < last; ++c) {
      for (std::int64_t r = rows; r < kBlock; ++r) out[c * kBlock + r] = 0.0f;
    }
  }
}

/// Where a batch entry lies, and how long it is.
struct Sequence : AttentionSequence<std::int64_t> {
  std::int64_t batch;  // 0 of packed tensors
  std::int64_t entry;
};

/// What query i of a sequence sees, but for masks given as tensors.
using Sight = AttentionSight<std::int64_t>;

struct QueryBlock {
  std::int64_t entry, first;
};

/// A call, checked and ready to be read.
struct Problem {
  explicit Problem(const AttentionFwd& a);

  Sequence sequence(std::int64_t b) const {
    return {attention_sequence(args.lengths, b, total_q, total_k), packed ? 0 : b, b};
  }
  Sight sight(const Sequence& s) const {
    return attention_sight<std::int64_t>(args.mask, s, s.entry);
  }
  /// Those of all entries. A thread gets some that follow each other, and under a causal mask the
  /// last ones of a sequence take longest: so first and last by turns.
  std::vector<QueryBlock> query_blocks() const;
  /// Whether the block mask leaves anything of this block of scores.
  bool listed(std::int64_t h, std::int64_t i0, std::int64_t j0) const;
  /// Whether rows may belong to no sequence, or lie beyond its used part.
  bool ragged() const { return args.lengths.start_q || args.lengths.used_q || args.lengths.used_k; }
  std::int64_t lse_at(const Sequence& s, std::int64_t h, std::int64_t i) const {
    return packed ? h * total_q + s.first_q + i : (s.batch * heads + h) * total_q + i;
  }
  std::int64_t kv_head(std::int64_t h) const { return h / (heads / kv_heads); }
  float sink(std::int64_t h) const;

  AttentionFwd args;
  Operand q, k, v, out;
  bool packed;
  std::int64_t batch, heads, kv_heads, total_q, total_k, d, dv;
  float scale, softcap;
  std::uint32_t threshold = 0;
  float keep_scale = 1.0f;
  std::uint64_t seed = 0, offset = 0;
};

/// Scores of queries i0 to i1 (transposed and scaled in `qt`) and keys j0 to j1 (rows of `k`),
/// transposed: s[j][i]. What is not seen is -inf. `capped`, if there is a softcap and it is wanted:
/// the scores without bias.
void block_scores(const Problem& p, const Sequence& at, const Sight& sight, std::int64_t h,
                  std::int64_t i0, std::int64_t i1, std::int64_t j0, std::int64_t j1,
                  const float* qt, const float* k, float* s, float* capped);

/// What dropout multiplies the probabilities of a block with, transposed like them.
void block_dropout(const Problem& p, const Sequence& at, std::int64_t h, std::int64_t i0,
                   std::int64_t i1, std::int64_t j0, std::int64_t j1, float* factors);

/// f(j0, j1) for each block of keys that queries i0 to i1 may see.
template <class F>
void each_key_block(const Problem& p, const Sight& sight, std::int64_t h, std::int64_t i0,
                    std::int64_t i1, const F& f) {
  const std::int64_t end = sight.end(i1);
  for (std::int64_t j0 = sight.begin(i0) / kBlock * kBlock; j0 < end; j0 += kBlock) {
    const std::int64_t j1 = std::min(sight.keys, j0 + kBlock);
    if (!sight.none(i0, i1, j0, j1) && p.listed(h, i0, j0)) f(j0, j1);
  }
}

inline void clear(const TensorRef& t) {
  if (t.given()) std::memset(t.data, 0, static_cast<std::size_t>(t.numel() * size_of(t.dtype)));
}

}  // namespace fastkern::cpu::attention_detail
