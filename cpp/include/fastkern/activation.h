// SPDX-License-Identifier: Apache-2.0
// Gated activations, y = f(gate) * up, and the bias in front of an activation, y = f(x + bias).
// M rows of N numbers, computed in f32 and rounded once. What the functions f are:
// activation_formula.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "fastkern/core.h"

namespace fastkern {

enum class ActivationKind : std::uint8_t {
  silu,
  gelu,
  gelu_tanh,
  relu,
  sigmoid,
  clamped_silu,
  quick_gelu
};

/// What clamped_silu is made with.
struct ActivationNumbers {
  float alpha = 1.702f, limit = 7.0f, up_offset = 1.0f;
};

/// y = f(gate) * up. `kind` is not quick_gelu. "any" is f32 | f16 | bf16, one for all operands;
/// (..., N) may have any row strides. The halves of a packed (..., 2N) are two such operands; a
/// packed one of pairs, gate and up side by side, is `pairs`.
struct GatedFwd {
  const char* op = "fastkern::gated";  // for error messages
  ActivationKind kind = ActivationKind::silu;
  ActivationNumbers numbers;
  TensorRef gate, up;  // (..., N) any
  TensorRef pairs;     // or (..., 2N) any, instead of both
  TensorRef y;         // (..., N) any; with `scale` f8e4m3 | i8
  TensorRef scale;     // (1) f32: y = saturate(round(value / scale)), to nearest even, |y| <= 448
                       // (f8e4m3) or 127 (i8); or not given
};

/// Gradients of GatedFwd, from its inputs.
struct GatedBwd {
  const char* op = "fastkern::gated_bwd";
  ActivationKind kind = ActivationKind::silu;
  ActivationNumbers numbers;
  TensorRef dy;          // (..., N) any
  TensorRef gate, up;    // as in GatedFwd
  TensorRef pairs;       // as in GatedFwd
  TensorRef dgate, dup;  // (..., N) any; each may be not given
  TensorRef dpairs;      // (..., 2N) any, with `pairs`
};

/// y = f(x + bias). `kind` is neither sigmoid nor clamped_silu.
struct BiasAct {
  const char* op = "fastkern::bias_act";
  ActivationKind kind = ActivationKind::gelu;
  TensorRef x;     // (..., N) any
  TensorRef bias;  // (N), f32 | f16 | bf16, dense; not given: 0
  TensorRef y;     // (..., N), the type of x
};

/// dx = dy * f'(x + bias), dbias = sum of dx over the rows, of numbers not rounded before.
struct BiasActBwd {
  const char* op = "fastkern::bias_act_bwd";
  ActivationKind kind = ActivationKind::gelu;
  TensorRef dy, x;                 // (..., N), of one type
  TensorRef bias;                  // as in BiasAct
  TensorRef dx;                    // (..., N), the type of x; or not given
  TensorRef dbias;                 // (N), f32 | f16 | bf16, dense; or not given
  void* workspace = nullptr;       // cuda: column_sums_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

/// Who takes part in the sum of a column on the GPU: a function of the sizes and the type of the
/// operands, not of the device. `lanes` threads of a block share a row, `groups` rows are in a
/// block at a time; a block has `rows` rows, in turn, of `columns` columns, and leaves one sum
/// each.
struct ColumnPlan {
  int lanes = 1, groups = 1;
  std::int64_t columns = 1, rows = 1, strips = 1, slices = 1;
};

inline constexpr int kColumnThreads = 256;

/// kAtOnce: rows that a thread has under way. `sums`: blocks are to be few enough that their sums
/// are a small part of the traffic, and many enough for a GPU; else a block has one turn.
constexpr ColumnPlan column_plan(std::int64_t m, std::int64_t n, DType dtype, int at_once,
                                 bool sums) {
  constexpr std::int64_t kBlocks = 3072, kSlices = 512;
  const std::int64_t vector = 16 / size_of(dtype), packs = (n + vector - 1) / vector;
  ColumnPlan plan;
  plan.lanes = static_cast<int>(
      std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(packs, 1, 32))));
  plan.groups = kColumnThreads / plan.lanes;
  plan.columns = plan.lanes * vector;
  plan.strips = std::max<std::int64_t>((n + plan.columns - 1) / plan.columns, 1);
  plan.rows = static_cast<std::int64_t>(plan.groups) * at_once;
  const auto slices = [&](std::int64_t rows) { return (m + rows - 1) / rows; };
  while (sums && (plan.strips * slices(2 * plan.rows) >= kBlocks || slices(plan.rows) > kSlices))
    plan.rows *= 2;
  plan.slices = slices(plan.rows);
  return plan;
}

namespace cpu {
FASTKERN_API void gated(const GatedFwd& args);
FASTKERN_API void gated_bwd(const GatedBwd& args);
FASTKERN_API void bias_act(const BiasAct& args);
FASTKERN_API void bias_act_bwd(const BiasActBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void gated(const GatedFwd& args, Stream stream);
FASTKERN_API void gated_bwd(const GatedBwd& args, Stream stream);
FASTKERN_API void bias_act(const BiasAct& args, Stream stream);
FASTKERN_API void bias_act_bwd(const BiasActBwd& args, Stream stream);
/// Bytes for the sums over the rows of `dy` (..., N); 0 where `dbias` is not given.
FASTKERN_API std::size_t column_sums_workspace(const TensorRef& dy, const TensorRef& dbias);
}  // namespace cuda
}  // namespace fastkern
