// SPDX-License-Identifier: Apache-2.0
// Optimizers: one call updates any number of parameters of one signature (types of parameters,
// gradients and states). All of them are cut into chunks; a table in memory that the kernel can
// read says which chunk is whose, so a step is one launch whatever their number and sizes.
#pragma once

#include <cstdint>

#include "fastkern/core.h"

namespace fastkern {

enum class OptimKind : std::uint8_t {
  adam,     // Adam and AdamW: states exp_avg, exp_avg_sq
  amsgrad,  // the same with max_exp_avg_sq as the third
  sgd,      // state momentum_buffer, if momentum is not 0
  lion,     // state exp_avg
  adagrad,  // state sum
  rmsprop,  // states square_avg; grad_avg if centered; momentum_buffer if momentum is not 0
  nadam,    // as adam, with a product for each parameter
  radam,    // as adam
  lamb,     // as adam
  muon,     // state momentum_buffer; `param` is not read and becomes the direction
};

/// How a parameter of 16 bits is kept. `extra` is what OptimTensor::extra points to.
enum class OptimRounding : std::uint8_t {
  nearest,     // no extra
  stochastic,  // bf16: up or down by chance, right on average; no extra
  kahan,       // extra: what rounding took away, in the type of the parameter; it is given back
  master,      // extra: f32, the value itself, of which the parameter is a copy
  remainder,   // bf16. extra: the lower 16 bits of the value, whose upper ones are the parameter
};

inline constexpr int kOptimStates = 3;
inline constexpr int kOptimCodedStates = 2;             // of kinds whose states may have 8 bits
inline constexpr std::int64_t kOptimCodeBlock = 256;    // elements that share a scale
inline constexpr int kOptimGroups = 32;                 // of one call
inline constexpr std::int64_t kOptimChunk = 16384;      // elements
inline constexpr std::int64_t kOptimInlineGrads = 448;  // tensors whose gradients are arguments

/// One parameter. All memory is dense, in the same order of elements; any alignment.
struct OptimTensor {
  void* param = nullptr;
  void* state[kOptimStates] = {};
  void* extra = nullptr;
  float* scale[kOptimCodedStates] = {};  // of states of 8 bits, one a block
  float* step = nullptr;     // steps done; the call adds one. Not given: the call is the first step
  float* product = nullptr;  // NAdam's product of momenta
  std::int64_t numel = 0;
  std::int32_t group = 0;   // of OptimStep::group
  std::uint32_t index = 0;  // for stochastic rounding, the parameter's own number
};

/// What a group of parameters has in common. Fields that an optimizer does not name are ignored.
struct OptimGroup {
  double lr = 0.0;
  const float* lr_tensor = nullptr;  // in memory that the kernel can read; if given, instead of lr
  double beta1 = 0.0;                // momentum of sgd, rmsprop and muon, lr_decay of adagrad
  double beta2 = 0.0;                // dampening of sgd, alpha of rmsprop
  double eps = 0.0;
  double weight_decay = 0.0;
  double decay_base = 0.0;  // nadam: 0.96 ^ momentum_decay
  bool decoupled = false;   // weight decay does not enter the gradient
  bool nesterov = false;
  bool maximize = false;
};

/// The memory of a table for so many tensors: a counter that is 0 between calls, the first chunk of
/// each tensor and the number of chunks, the tensors, their gradients (nullptr: not updated; of a
/// tensor without elements any other address).
class OptimTable {
 public:
  OptimTable() = default;
  OptimTable(void* memory, std::int64_t tensors)
      : memory_(static_cast<char*>(memory)), tensors_(tensors) {}
  static std::int64_t bytes(std::int64_t tensors) {
    return kHeader + chunk_bytes(tensors) + tensor_bytes(tensors) + padded(8 * tensors);
  }
  /// Where the gradients begin.
  static std::int64_t grad_offset(std::int64_t tensors) {
    return kHeader + chunk_bytes(tensors) + tensor_bytes(tensors);
  }
  std::int64_t tensors() const { return tensors_; }
  std::int32_t* counter() const { return reinterpret_cast<std::int32_t*>(memory_); }
  std::int32_t* first_chunk() const { return reinterpret_cast<std::int32_t*>(memory_ + kHeader); }
  OptimTensor* tensor() const {
    return reinterpret_cast<OptimTensor*>(memory_ + kHeader + chunk_bytes(tensors_));
  }
  const void** grad() const {
    return reinterpret_cast<const void**>(memory_ + grad_offset(tensors_));
  }
  std::int64_t chunks() const { return first_chunk()[tensors_]; }

  /// Counter and first chunks, from the tensors' sizes; fail() beyond 2^31 chunks.
  void number_chunks(const char* op) const {
    std::int64_t chunk = 0;
    for (std::int64_t i = 0; i < kHeader / 4; ++i) counter()[i] = 0;
    for (std::int64_t i = 0; i < tensors_; ++i) {
      first_chunk()[i] = static_cast<std::int32_t>(chunk);
      chunk += (tensor()[i].numel + kOptimChunk - 1) / kOptimChunk;
      FK_CHECK(chunk < (std::int64_t{1} << 31), op,
               ": the tensors of one call must have less than ", "2^31 chunks of ", kOptimChunk,
               " elements, got more");
    }
    first_chunk()[tensors_] = static_cast<std::int32_t>(chunk);
  }

 private:
  static constexpr std::int64_t kHeader = 16;
  static constexpr std::int64_t padded(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }
  static constexpr std::int64_t chunk_bytes(std::int64_t tensors) {
    return padded(4 * (tensors + 1));
  }
  static constexpr std::int64_t tensor_bytes(std::int64_t tensors) {
    return padded(tensors * static_cast<std::int64_t>(sizeof(OptimTensor)));
  }
  char* memory_ = nullptr;
  std::int64_t tensors_ = 0;
};

/// One step. The signature is that of all tensors; types are f32, f16 or bf16, each its own. States
/// of adam, sgd and lion may be u8, codes of optim_code.h.
struct OptimStep {
  const char* op = "fastkern::optim_step";  // for error messages
  OptimKind kind = OptimKind::adam;
  OptimRounding rounding = OptimRounding::nearest;
  DType param = DType::f32, grad = DType::f32, state = DType::f32;
  std::int64_t tensors = 0;
  const void* host = nullptr;  // OptimTable in host memory
  void* table = nullptr;       // cuda: the same in device memory, written by optim_write
  int groups = 0;
  OptimGroup group[kOptimGroups];
  const float* grad_scale = nullptr;   // gradients are divided by it
  const float* grad_factor = nullptr;  // and multiplied with this
  const float* found_inf = nullptr;    // if not 0, nothing is changed
  std::uint64_t seed = 0;              // for stochastic rounding
  float* workspace = nullptr;          // lamb: optim_workspace(...) bytes
};

/// The norm of all gradients of tables, whose `param`s do not matter: one call for each table, the
/// last with `last`. Sums have an order that depends on the tensors alone.
struct OptimNorm {
  const char* op = "fastkern::optim_norm";
  DType grad = DType::f32;
  std::int64_t tensors = 0;
  const void* host = nullptr;
  void* table = nullptr;
  bool largest = false;  // the largest absolute value instead of the root of the squares' sum
  bool first = true, last = true;
  double max_norm = 0.0;
  const float* grad_scale = nullptr;
  float* partials = nullptr;  // one for each chunk
  double* sum = nullptr;      // what the tables so far add up to; between first and last
  float* norm = nullptr;      // with last: the norm of the gradients divided by grad_scale
  float* factor = nullptr;    // with last: what makes the norm at most max_norm; 1 if it is
};

/// Gradients times *factor, in place; not touched where it is 1.
struct OptimScale {
  const char* op = "fastkern::optim_scale";
  DType grad = DType::f32;
  std::int64_t tensors = 0;
  const void* host = nullptr;
  void* table = nullptr;
  const float* factor = nullptr;
};

/// How many states of OptimTensor a kind may use.
constexpr int optim_states(OptimKind kind) {
  switch (kind) {
    case OptimKind::amsgrad:
    case OptimKind::rmsprop:
      return 3;
    case OptimKind::sgd:
    case OptimKind::lion:
    case OptimKind::adagrad:
    case OptimKind::muon:
      return 1;
    default:
      return 2;
  }
}

/// Whether the states of a kind may have 8 bits.
constexpr bool optim_has_codes(OptimKind kind) {
  return kind == OptimKind::adam || kind == OptimKind::sgd || kind == OptimKind::lion;
}

/// Bytes of OptimStep::workspace; 0 for most kinds.
inline std::int64_t optim_workspace(OptimKind kind, std::int64_t tensors, std::int64_t chunks) {
  return kind == OptimKind::lamb ? 4 * (2 * chunks + tensors) : 0;
}

namespace cpu {
FASTKERN_API void optim_step(const OptimStep& args);
FASTKERN_API void optim_norm(const OptimNorm& args);
FASTKERN_API void optim_scale(const OptimScale& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void optim_step(const OptimStep& args, Stream stream);
FASTKERN_API void optim_norm(const OptimNorm& args, Stream stream);
FASTKERN_API void optim_scale(const OptimScale& args, Stream stream);
/// `bytes` from host to device memory, both aligned to 16 bytes, as arguments of kernels: in stream
/// order, without a wait, and part of a graph that is captured.
FASTKERN_API void optim_write(void* device, const void* host, std::int64_t bytes, const char* op,
                              Stream stream);
}  // namespace cuda
}  // namespace fastkern
