// SPDX-License-Identifier: Apache-2.0
// Normalisations over the last dimension, with the residual stream around them and the quantisation
// behind them. M rows of N columns; statistics and affine in f32, every result rounded once.
//
//   h = residual + dropout(x) * rowscale          (only if h is given; otherwise h is x)
//   y = norm(h) * (weight_offset + weight) + bias     and the same with weight2, bias2: y2
//   norm(h) = h * rsqrt(mean(h^2) + eps)              NormKind::rms
//           = (h - mean(h)) * rsqrt(var(h) + eps)     NormKind::layer, var over N, not N - 1
//
// h is rounded to its own type first and y is made of the rounded h. So y is norm(h), with the same
// bits where one kernel does both (docs/norm.md, Limits).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "fastkern/core.h"

namespace fastkern {

enum class NormKind : std::uint8_t { rms, layer };

/// Element e (row * N + column) is dropped as philox.h says. `seed` and `offset` lie where the
/// tensors lie.
struct Dropout {
  double p = 0.0;  // 0: none, the pointers are not read
  const std::int64_t* seed = nullptr;
  const std::int64_t* offset = nullptr;
};

/// "any" is f32 | f16 | bf16, for each operand on its own; (..., N) may have any row strides.
struct NormFwd {
  const char* op = "fastkern::norm";  // for error messages
  NormKind kind = NormKind::rms;
  TensorRef x;             // (..., N) any
  TensorRef weight, bias;  // (N) or (H, N) where x is (..., H, N); any, dense; not given: 1 and 0
  TensorRef y;             // (..., N) any; with `scale` f8e4m3 | i8
  double eps = 1e-6;
  double weight_offset = 0.0;  // added to weight, if that is given

  TensorRef residual;        // (..., N) any; not given: 0
  TensorRef h;               // (..., N) any; given: the residual stream. May be residual itself
  TensorRef rowscale;        // one for each row, any, dense; not given: 1
  Dropout dropout;           // of x
  TensorRef weight2, bias2;  // shaped like weight and bias
  TensorRef y2;              // (..., N) dtype of y; not given: no second output

  /// y = saturate(round(value / scale)), to nearest even, |y| <= 448 (f8e4m3) or 127 (i8).
  TensorRef scale;            // f32, dense: one for each row, written (max|value| / 448 or 127);
  bool static_scale = false;  // or, if this is set, (1), read
};

/// Gradients of NormFwd without quantisation. Statistics are recomputed from h, which the pass
/// reads anyway: forward saves nothing but its inputs and h.
struct NormBwd {
  const char* op = "fastkern::norm_bwd";
  NormKind kind = NormKind::rms;
  TensorRef dy;      // (..., N) any
  TensorRef x;       // (..., N) any: what was normalised, x or h
  TensorRef weight;  // as in NormFwd
  double eps = 1e-6;
  double weight_offset = 0.0;
  TensorRef dx;              // (..., N) any, or not given. Of h: the gradient of residual
  TensorRef dweight, dbias;  // (N) or (H, N), any, dense; or not given

  TensorRef dh;        // (..., N) any: gradient of h as an output, added to dx; or none
  TensorRef dbranch;   // (..., N) any: gradient of NormFwd::x, dropout(dx) * rowscale; or not given
  TensorRef rowscale;  // as in NormFwd
  Dropout dropout;     // as in NormFwd
  TensorRef dy2, weight2;  // of the second output; dy2 not given: there is none
  TensorRef dweight2, dbias2;

  void* workspace = nullptr;       // cuda: norm_bwd_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

namespace cpu {
FASTKERN_API void norm(const NormFwd& args);
FASTKERN_API void norm_bwd(const NormBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void norm(const NormFwd& args, Stream stream);
FASTKERN_API void norm_bwd(const NormBwd& args, Stream stream);
FASTKERN_API std::size_t norm_bwd_workspace(const NormBwd& args, int device);

// Who owns a row: a function of its length and element type alone, so a row's result does not
// depend on the batch. The element type is that of the operands where they all have one, else f32.
// `clusters`: compute capability 9.0 and later.

/// Threads for a row of `vectors` packs at most `packs` to each: a power of two.
constexpr int row_threads(std::int64_t vectors, int packs) {
  const auto needed = static_cast<std::uint64_t>((vectors + packs - 1) / packs);
  return static_cast<int>(std::bit_ceil(std::min<std::uint64_t>(needed, 1 << 20)));
}

constexpr std::int64_t row_vectors(std::int64_t n, DType dtype) {
  const std::int64_t vector = 16 / size_of(dtype);
  return (n + vector - 1) / vector;
}

constexpr Plan norm_plan(NormKind kind, std::int64_t n, DType dtype, bool clusters = true) {
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = row_vectors(n, dtype);
  const bool layer = kind == NormKind::layer;
  if (vectors <= 4 * 256) {
    int packs = layer || vectors > 512 ? 4 : 2;
    // A power of two up to 64 threads, of which several rows share a block; else whole warps.
    const auto team = [vectors](int each) { return std::max(2, row_threads(vectors, each)); };
    const bool several = row_threads(vectors, packs) <= 64;
    if (layer && vectors > 128 && vectors <= 192) {
      packs = 2;
    } else if (several && 3 * team(3) < packs * team(packs)) {
      packs = 3;  // fewer places stay empty
    }
    const int needed = static_cast<int>((vectors + packs - 1) / packs);
    const int row = needed <= 64 ? team(packs) : (needed + 31) / 32 * 32;
    const int block = row <= 64 ? 128 : row;
    return {.kernel = "norm_fwd_kernel",
            .threads_per_block = block,
            .rows_per_block = block / row,
            .threads_per_row = row,
            .elements_per_thread = packs * vector};
  }
  if (vectors <= 6144) {
    const int block = vectors <= 1536 ? 384 : 512;
    const int packs = static_cast<int>((vectors + 2 * block - 1) / (2 * block)) * 2;
    return {.kernel = "norm_shared_kernel",
            .threads_per_block = block,
            .rows_per_block = 1,
            .threads_per_row = block,
            .elements_per_thread = packs * vector,
            .shared_bytes = 16LL * packs * block};
  }
  for (const int block : {256, 512}) {
    const int blocks = row_threads(vectors, 4 * block);
    if (!clusters || blocks > 16) continue;
    return {.kernel = "norm_ring_kernel",
            .threads_per_block = block,
            .rows_per_block = 1,
            .threads_per_row = block,
            .elements_per_thread = 4 * vector,
            .stages = 3,
            .blocks_per_sm = 512 / block,
            .blocks_per_row = blocks};
  }
  return {"norm_fwd_long_kernel", 512, 1, 512, 4, false};
}

/// `two`: of two outputs. `shared_limit`: bytes of shared memory that a block may have; the default
/// is what compute capability 9.0 gives. `add`: with the gradient of h. `own`: a weight of the type
/// of the rows, without an offset, one for all heads: it needs no shared memory.
constexpr Plan norm_bwd_plan(NormKind kind, std::int64_t n, DType dtype, bool clusters = true,
                             std::int64_t shared_limit = 227 * 1024, bool add = false,
                             bool two = false, bool own = true) {
  struct Shape {
    int packs, block, most_blocks, blocks_per_sm;
    bool weights_in_shared, any_weight;
  };
  constexpr Shape shapes[] = {{3, 512, 1, 1, true, true},    {2, 512, 1, 1, true, true},
                              {4, 512, 16, 1, false, false}, {2, 512, 16, 1, true, true},
                              {2, 256, 16, 2, true, true},   {4, 512, 16, 1, false, true}};
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = row_vectors(n, dtype);
  const int stages = kind == NormKind::layer && size_of(dtype) == 4 ? 4 : 3;
  for (const Shape& shape : shapes) {
    if (two != (shape.block == 256 && shape.packs == 2) && two) continue;
    // Three packs where two or four leave more places empty.
    const auto places = [vectors](int packs) {
      return packs * std::max(2, row_threads(vectors, packs));
    };
    if (shape.packs == 3 && (add || places(2) <= places(3))) continue;
    if (!shape.weights_in_shared && (add || !(own || shape.any_weight))) continue;
    const std::int64_t threads = row_threads(vectors, shape.packs);
    const int blocks = std::max<int>(1, static_cast<int>(threads / shape.block));
    if (blocks > (clusters ? shape.most_blocks : 1)) continue;
    const std::int64_t small = 2048 + 64LL * blocks;  // exchanges, at most
    const std::int64_t ring = 16LL * stages * (2 + add + two) * shape.packs * shape.block;
    const std::int64_t weights =
        shape.weights_in_shared ? 4LL * (1 + two) * shape.packs * vector * shape.block : 0;
    if (small + ring + weights > shared_limit) continue;
    const int row = static_cast<int>(std::clamp<std::int64_t>(threads, 2, shape.block));
    const bool twice = 2 * (small + ring + weights) <= shared_limit;
    return {.kernel = "norm_bwd_kernel",
            .threads_per_block = shape.block,
            .rows_per_block = shape.block / row,
            .threads_per_row = row,
            .elements_per_thread = shape.packs * vector,
            .shared_bytes = ring + weights,
            .stages = stages,
            .blocks_per_sm = twice ? shape.blocks_per_sm : 1,
            .blocks_per_row = blocks};
  }
  return {"norm_bwd_long_kernel", 512, 1, 512, 4, false};
}
}  // namespace cuda
}  // namespace fastkern
