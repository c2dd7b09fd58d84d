// SPDX-License-Identifier: Apache-2.0
// Normalisations over the last dimension. M rows of N columns; statistics and affine in f32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "fastkern/core.h"

namespace fastkern {

/// y = x * rsqrt(mean(x^2) + eps) * weight
struct RmsNormFwd {
  TensorRef x;       // (..., N) f32 | f16 | bf16, any row strides
  TensorRef weight;  // (N) f32 | f16 | bf16, or not given: 1
  TensorRef y;       // (..., N) dtype of x
  double eps = 1e-6;
};

/// Gradients of RmsNormFwd. The statistics are recomputed from x, which the pass reads anyway:
/// forward saves nothing but its inputs.
struct RmsNormBwd {
  TensorRef dy;                    // (..., N) dtype of x
  TensorRef x;                     // (..., N)
  TensorRef weight;                // (N) or not given
  TensorRef dx;                    // (..., N) dtype of x, or not given: not computed
  TensorRef dweight;               // (N) dtype of weight, dense, or not given: not computed
  void* workspace = nullptr;       // cuda: rms_norm_bwd_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
  double eps = 1e-6;
};

namespace cpu {
FASTKERN_API void rms_norm(const RmsNormFwd& args);
FASTKERN_API void rms_norm_bwd(const RmsNormBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void rms_norm(const RmsNormFwd& args, Stream stream);
FASTKERN_API void rms_norm_bwd(const RmsNormBwd& args, Stream stream);
FASTKERN_API std::size_t rms_norm_bwd_workspace(const RmsNormBwd& args, int device);

// Who owns a row: a function of its length and element type alone, so a row's result does not
// depend on the batch.

/// Threads for a row of `vectors` packs at most `packs` to each: a power of two, at least 4.
constexpr int row_threads(std::int64_t vectors, int packs) {
  const auto needed = static_cast<unsigned>((vectors + packs - 1) / packs);
  return std::max(4, static_cast<int>(std::bit_ceil(needed)));
}

constexpr Plan rms_norm_plan(std::int64_t n, DType dtype) {
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = (n + vector - 1) / vector;
  if (vectors > 8 * 1024) return {"rms_norm_fwd_long_kernel", 1024, 1, 1024, vector, false};
  if (vectors > 8 * 512) return {"rms_norm_fwd_kernel", 1024, 1, 1024, 8 * vector};
  if (vectors > 4 * 512) return {"rms_norm_fwd_kernel", 512, 1, 512, 8 * vector};
  if (vectors > 2 * 512) return {"rms_norm_fwd_kernel", 512, 1, 512, 4 * vector};
  const int row = row_threads(vectors, 2), block = std::max(128, row);
  return {"rms_norm_fwd_kernel", block, block / row, row, 2 * vector};
}

/// Backward keeps the weight and a ring of rows in shared memory. `shared_limit`: bytes that a
/// block, and all blocks of a multiprocessor together, may have; the default is what compute
/// capability 9.0 gives.
constexpr Plan rms_norm_bwd_plan(std::int64_t n, DType dtype,
                                 std::int64_t shared_limit = 227 * 1024) {
  constexpr int kPacks = 2, kThreadsPerSm = 512, kStagesMin = 2, kStagesMax = 4;
  constexpr std::int64_t kStatic = 10 * 1024;  // the kernel's static shared memory, at most
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = (n + vector - 1) / vector;
  const Plan read_again{"rms_norm_bwd_long_kernel", 1024, 1, 1024, vector, false};
  if (vectors > kPacks * 1024) return read_again;
  const int row = row_threads(vectors, kPacks);
  const int block = std::max(128, row), blocks_per_sm = std::max(1, kThreadsPerSm / block);
  const std::int64_t weight = 4 * static_cast<std::int64_t>(row) * kPacks * vector;
  const std::int64_t stage = 2 * 16 * static_cast<std::int64_t>(block) * kPacks;
  const std::int64_t stages =
      std::min<std::int64_t>(kStagesMax, (shared_limit / blocks_per_sm - kStatic - weight) / stage);
  if (stages < kStagesMin) return read_again;
  return {.kernel = "rms_norm_bwd_kernel",
          .threads_per_block = block,
          .rows_per_block = block / row,
          .threads_per_row = row,
          .elements_per_thread = kPacks * vector,
          .resident = true,
          .shared_bytes = weight + stages * stage,
          .stages = static_cast<int>(stages),
          .blocks_per_sm = blocks_per_sm};
}
}  // namespace cuda
}  // namespace fastkern
