// SPDX-License-Identifier: Apache-2.0
// Softmax, its logarithm, the logarithm of the sum of exponentials, and softmax under a mask.
//
//   z = x                        softmax, log_softmax, logsumexp
//   z = scale * x + mask         `masked`; z = -inf where a mask of i8 is 0 or `causal` hides x
//   m = max z,   s = sum(exp(z - m))
//   softmax      y = exp(z - m) / s
//   log_softmax  y = (z - m) - log(s)
//   logsumexp    y = m + log(s)                      one for each row
//
// M rows of N numbers, computed in f32 and rounded once. A row is the last dimension or, where
// `middle` is set, the middle one of a dense (A, N, C).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>

#include "fastkern/core.h"

namespace fastkern {

enum class SoftmaxKind : std::uint8_t { softmax, log_softmax, logsumexp };

/// "any" is f32 | f16 | bf16, for each operand on its own; (..., N) may have any row strides.
struct SoftmaxFwd {
  const char* op = "fastkern::softmax";  // for error messages
  SoftmaxKind kind = SoftmaxKind::softmax;
  bool middle = false;  // x is a dense (A, N, C)
  TensorRef x;          // (..., N) any; rounded to the type of y first, if that is narrower
  TensorRef y;          // (..., N) any, or dense (A, N, C); logsumexp: dense, one for each row

  bool masked = false;  // softmax over the last dimension; a row that is all hidden becomes 0
  bool causal = false;  // row i of (..., S, N) sees the first N - S + i + 1 columns
  double scale = 1.0;
  TensorRef mask;  // (..., N) of the sizes of x, any or i8, strides as in mask_rows; or not given

  void* workspace = nullptr;       // cuda: softmax_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

/// softmax: dx = scale * y * (dy - sum(dy * y)); log_softmax: dx = dy - exp(y) * sum(dy);
/// logsumexp: dx = dy * exp(x - lse). A mask has done its work in y.
struct SoftmaxBwd {
  const char* op = "fastkern::softmax_bwd";
  SoftmaxKind kind = SoftmaxKind::softmax;
  bool middle = false;
  TensorRef dy;         // (..., N) any; logsumexp: dense, one for each row
  TensorRef y;          // (..., N) any: the result; logsumexp: x
  TensorRef lse;        // logsumexp: the result, dense, one for each row
  TensorRef dx;         // (..., N) any
  bool causal = false;  // what was hidden has a gradient of 0 and is not read
  double scale = 1.0;
  void* workspace = nullptr;       // cuda: softmax_bwd_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

/// Rows of a mask: row r = (i * sizes[0] + j) * sizes[1] + k starts at the sum of i, j and k times
/// their strides. Strides count elements and may be 0.
struct MaskRows {
  std::array<std::int64_t, 2> sizes{1, 1};
  std::array<std::int64_t, 3> strides{};
  std::int64_t column_stride = 0;

  std::int64_t start(std::int64_t row) const {
    return row / sizes[1] / sizes[0] * strides[0] + row / sizes[1] % sizes[0] * strides[1] +
           row % sizes[1] * strides[2];
  }
};

/// True and fills `rows` if the leading dimensions of a mask merge into at most three strides.
inline bool as_mask_rows(const TensorRef& t, MaskRows& rows) {
  if (t.ndim < 1) return false;
  std::array<std::int64_t, 3> sizes{1, 1, 1}, strides{};
  int levels = 0;  // innermost first
  for (int d = t.ndim - 2; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (levels > 0 && t.strides[d] == strides[levels - 1] * sizes[levels - 1]) {
      sizes[levels - 1] *= t.sizes[d];
    } else if (levels == 3) {
      return false;
    } else {
      sizes[levels] = t.sizes[d];
      strides[levels++] = t.strides[d];
    }
  }
  rows = {{std::max<std::int64_t>(sizes[1], 1), std::max<std::int64_t>(sizes[0], 1)},
          {strides[2], strides[1], strides[0]},
          t.sizes[t.ndim - 1] == 1 ? 1 : t.strides[t.ndim - 1]};
  return true;
}

/// Columns that row `row` of (..., S, N) sees under a causal mask aligned bottom right.
constexpr std::int64_t causal_columns(std::int64_t row, std::int64_t queries, std::int64_t n) {
  return std::clamp<std::int64_t>(n - queries + row % queries + 1, 0, n);
}

/// S of (..., S, N).
inline std::int64_t queries_of(const TensorRef& t) {
  return t.ndim > 1 ? std::max<std::int64_t>(t.sizes[t.ndim - 2], 1) : 1;
}

namespace cpu {
FASTKERN_API void softmax(const SoftmaxFwd& args);
FASTKERN_API void softmax_bwd(const SoftmaxBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void softmax(const SoftmaxFwd& args, Stream stream);
FASTKERN_API void softmax_bwd(const SoftmaxBwd& args, Stream stream);
/// 0 but for rows that no cluster of blocks can hold.
FASTKERN_API std::size_t softmax_workspace(const SoftmaxFwd& args, int device);
FASTKERN_API std::size_t softmax_bwd_workspace(const SoftmaxBwd& args, int device);

// Who owns a row: a function of its length and element type alone, and of the GPU having clusters;
// so a row's result does not depend on the batch. The element type is that of the operands where
// they all have one, else f32.

/// Rows of up to 1,024 packs of 16 bytes wait in registers, `operands` of them (1 forward, 2
/// backward); longer ones in shared memory, from some length on in that of a cluster of blocks; the
/// longest pass through twice, in segments.
constexpr Plan softmax_plan(std::int64_t n, DType dtype, int operands, bool clusters = true) {
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = (n + vector - 1) / vector;
  if (vectors <= 1024) {
    const int packs = vectors > 64 ? 4 : 2;  // up to 128 a warp has a row, and no barrier
    const int needed = static_cast<int>((vectors + packs - 1) / packs);
    const int row = needed <= 64 ? std::max(2, static_cast<int>(std::bit_ceil<unsigned>(needed)))
                                 : (needed + 31) / 32 * 32;
    const int block = row <= 64 ? 128 : row;
    return {.kernel = "softmax_registers_kernel",
            .threads_per_block = block,
            .rows_per_block = block / row,
            .threads_per_row = row,
            .elements_per_thread = packs * vector};
  }
  struct Shape {
    int blocks, most;  // most packs of an operand in a block
  };
  constexpr Shape forward[] = {{1, 4096}, {4, 2048}, {8, 2048}, {16, 2048}, {16, 6144}};
  constexpr Shape backward[] = {{1, 2048}, {2, 2048}, {4, 2048}, {8, 2048}, {16, 3072}};
  for (const auto [blocks, most] : operands == 1 ? forward : backward) {
    if (vectors > std::int64_t{blocks} * most || (blocks > 1 && !clusters)) continue;
    const std::int64_t part = (vectors + blocks - 1) / blocks;
    const int threads = part <= (operands == 1 && blocks > 1 ? 2048 : 1536) ? 256 : 512;
    return {.kernel = "softmax_shared_kernel",
            .threads_per_block = threads,
            .rows_per_block = 1,
            .threads_per_row = threads,
            .elements_per_thread = vector,
            .shared_bytes = 16 * part * operands,
            .blocks_per_row = blocks};
  }
  return {"softmax_segments_kernel", 512, 1, 512, vector, false};
}
}  // namespace cuda
}  // namespace fastkern
