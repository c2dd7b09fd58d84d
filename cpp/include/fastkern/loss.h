// SPDX-License-Identifier: Apache-2.0
// Cross entropy of M rows of V logits; everything in f32, gradients rounded once. For a row x with
// target t, class weights w (ones if not given) and label smoothing e:
//
//   z    = softcap * tanh(scale * x / softcap), or scale * x without a softcap
//   lse  = log sum_j exp(z_j)
//   q    = (1 - e) * [j == t] + e / V        hard targets: class indices
//        = (1 - e) * p_j + e / V             soft targets: probabilities p
//   loss = sum_j w_j q_j (lse - z_j),  zloss = lse_square_scale * lse^2
//
//   none: loss + zloss of each row      sum: of all rows
//   mean: sum(loss) / D + sum(zloss) / C, with C the rows that count and D the sum of w_t over
//         them; soft targets: C = D = M
//
// A row whose target is ignore_index does not count: it is not read, its loss, zloss, lse and
// gradient are 0. lse is NaN where log_softmax is (a row with +inf or NaN, or of -inf alone).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "fastkern/core.h"

namespace fastkern {

enum class Reduction : std::uint8_t { none, mean, sum };

/// M class indices, dense. A class outside of 0 .. V - 1: an Error on the CPU; on CUDA the row's
/// loss and gradient are NaN and nothing is read for it.
struct Classes {
  const void* data = nullptr;  // nullptr: not given
  bool narrow = false;         // std::int32_t instead of std::int64_t
};

/// "any" is f32 | f16 | bf16, for each operand on its own.
struct CrossEntropy {
  const char* op = "fastkern::cross_entropy";  // for error messages
  TensorRef logits;                            // (..., V) any, any row strides
  Classes target;                              // hard targets, or
  TensorRef probabilities;                     // (..., V) any: soft targets
  TensorRef weight;                            // (V) any, dense; not given: ones
  std::int64_t ignore_index = -100;            // of hard targets
  double label_smoothing = 0.0;
  double lse_square_scale = 0.0;
  double softcap = 0.0;  // 0: none
  double logit_scale = 1.0;
  Reduction reduction = Reduction::mean;
};

/// Floats of a call's state, for backward: of each row its maximum, its sum and what sum_j w_j q_j
/// comes to; and D and C.
inline constexpr std::int64_t kLossState = 3;
constexpr std::int64_t loss_state_size(std::int64_t rows) { return kLossState * rows + 2; }

/// Every array is dense; M floats where nothing else is said.
struct CrossEntropyFwd : CrossEntropy {
  float* row_loss = nullptr;  // none: the result, with zloss; else scratch
  float* row_zloss = nullptr;
  float* lse = nullptr;
  float* state = nullptr;                   // loss_state_size(M)
  float *loss = nullptr, *zloss = nullptr;  // 1, if reduced
  /// (..., V), type of logits, any row strides; may be logits itself. Given: the gradient by logits
  /// of `loss`, or of dloss . loss with M floats where nothing is reduced.
  TensorRef grad = {};
  const float* dloss = nullptr;
  /// D and C, where these rows are a part of a batch (loss_sums); loss and zloss are not wanted
  /// then. nullptr: they become the last two floats of state.
  const float* totals = nullptr;
  void* workspace = nullptr;  // CUDA: loss_workspace(M) bytes, aligned to 16
};

/// dlogits = the gradient by logits of  dloss . loss + dlse . lse + dzloss . zloss.
struct CrossEntropyBwd : CrossEntropy {
  const float* state = nullptr;
  /// Any of them nullptr: 0. dloss and dzloss: M floats if nothing is reduced, else 1.
  const float *dloss = nullptr, *dlse = nullptr, *dzloss = nullptr;
  bool dloss_is_one = false;      // instead of dloss
  const float* totals = nullptr;  // D and C; nullptr: the last two floats of state
  TensorRef dlogits = {};         // (..., V), type of logits
};

/// The sums of a call that needs them before it can begin, or after its parts: totals[0] = D,
/// totals[1] = C; and, if `loss` is given, loss and zloss of all M rows.
struct LossSums {
  const char* op = "fastkern::cross_entropy";
  Classes target;  // not given: soft targets, every row counts
  TensorRef weight;
  std::int64_t rows = 0, classes = 0, ignore_index = -100;
  Reduction reduction = Reduction::mean;
  const float *row_loss = nullptr, *row_zloss = nullptr;
  bool totals_given = false;
  float* totals = nullptr;
  float *loss = nullptr, *zloss = nullptr;
  void* workspace = nullptr;
};

namespace cpu {
FASTKERN_API void cross_entropy(const CrossEntropyFwd& args);
FASTKERN_API void cross_entropy_bwd(const CrossEntropyBwd& args);
FASTKERN_API void loss_sums(const LossSums& args);
/// x *= *factor, unless that is 1. `x`: dense, any.
FASTKERN_API void scale_unless_one(const TensorRef& x, const float* factor);
}  // namespace cpu

namespace cuda {

FASTKERN_API void cross_entropy(const CrossEntropyFwd& args, Stream stream);
FASTKERN_API void cross_entropy_bwd(const CrossEntropyBwd& args, Stream stream);
FASTKERN_API void loss_sums(const LossSums& args, Stream stream);
FASTKERN_API void scale_unless_one(const TensorRef& x, const float* factor, Stream stream);

inline constexpr std::int64_t kLossSumRows = 8192;  // of one block of the sums

constexpr std::size_t loss_workspace(std::int64_t rows) {
  const std::int64_t blocks = (rows + kLossSumRows - 1) / kLossSumRows;
  return blocks > 1 ? static_cast<std::size_t>(16 * blocks) : 0;
}

/// Forward: a warp, or a block, reads a row once. Its sums depend on v and dtype alone.
constexpr Plan cross_entropy_plan(std::int64_t v, DType dtype) {
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t packs = (std::max<std::int64_t>(v, 1) + vector - 1) / vector;
  const auto threads = static_cast<int>(std::clamp<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>((packs + 3) / 4)), 32, 256));
  const int rows = threads == 32 ? 4 : 1;
  return {"cross_entropy_fwd_kernel", threads * rows, rows, threads, 4 * vector, false};
}

/// Forward with the gradient: the row waits in the shared memory of a block or of a cluster, or is
/// read twice, by the two kernels of forward and backward.
constexpr Plan cross_entropy_grad_plan(std::int64_t v, DType dtype, bool clusters,
                                       std::int64_t shared_limit) {
  // Two blocks of the longest rows that one has for itself share a multiprocessor, three of the
  // parts of longer ones.
  constexpr std::int64_t kAlone = 104 * 1024, kPart = 72 * 1024, kExchange = 1152;
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t packs = (std::max<std::int64_t>(v, 1) + vector - 1) / vector;
  const std::int64_t bytes = 16 * packs;
  int blocks = 1;
  if (clusters && bytes > kAlone) {
    while (blocks < 16 && (packs + blocks - 1) / blocks * 16 > kPart) blocks *= 2;
  }
  const std::int64_t part = (packs + blocks - 1) / blocks;
  const auto threads = static_cast<int>(
      std::clamp<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>((part + 3) / 4)), 32, 512));
  const std::int64_t most =
      std::min<std::int64_t>(shared_limit - kExchange, blocks > 1 ? kPart : kAlone);
  if (16 * part > most) {
    Plan plan = cross_entropy_plan(v, dtype);
    plan.kernel = "cross_entropy_fwd_kernel, cross_entropy_bwd_kernel";
    return plan;
  }
  return {.kernel = "cross_entropy_grad_kernel",
          .threads_per_block = threads,
          .rows_per_block = 1,
          .threads_per_row = threads,
          .elements_per_thread = 4 * vector,
          .shared_bytes = kExchange + 16 * part,
          .blocks_per_row = blocks};
}

}  // namespace cuda
}  // namespace fastkern
