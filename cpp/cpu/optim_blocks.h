// SPDX-License-Identifier: Apache-2.0
// Blocks of a parameter's elements as float32, on their way from and to memory of any type.
#pragma once

#include <algorithm>
#include <cstring>

#include "fastkern/optim_code.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu {

inline constexpr int kOptimBlock = 512;  // elements; code blocks, that divide a chunk

/// Elements [at, at + n) of memory of any alignment.
template <class T>
FASTKERN_INLINE void load_block(const void* from, std::int64_t at, int n, float* out) {
  const char* const bytes = static_cast<const char*>(from) + at * sizeof(T);
  for (int i = 0; i < n; ++i) {
    T v;
    std::memcpy(&v, bytes + i * sizeof(T), sizeof(T));
    out[i] = to_float(v);
  }
}
template <class T>
FASTKERN_INLINE void store_block(void* to, std::int64_t at, int n, const float* in) {
  char* const bytes = static_cast<char*>(to) + at * sizeof(T);
  for (int i = 0; i < n; ++i) {
    const T v = from_float<T>(in[i]);
    std::memcpy(bytes + i * sizeof(T), &v, sizeof(T));
  }
}
FASTKERN_INLINE void load_block(DType type, const void* from, std::int64_t at, int n, float* out) {
  dispatch(type,
           [&]<class T>() __attribute__((always_inline)) { load_block<T>(from, at, n, out); });
}
FASTKERN_INLINE void store_block(DType type, void* to, std::int64_t at, int n, const float* in) {
  dispatch(type, [&]<class T>() __attribute__((always_inline)) { store_block<T>(to, at, n, in); });
}

/// A block of a parameter's elements as float32: values, gradients, states. What is float32 in
/// memory stays there.
struct OptimBuffers {
  float* p;
  const float* g;
  float* s[kOptimStates];
  float memory[2 + kOptimStates][kOptimBlock];
};
/// States that are not given are 0. Without a gradient there is no g.
void load_buffers(const OptimStep& a, const OptimTensor& t, const void* grad, std::int64_t at,
                  int n, OptimBuffers& b);
/// Values, rounded as the parameter's rounding says; `step` counts the one under way.
void store_values(const OptimStep& a, const OptimTensor& t, std::uint64_t step, std::int64_t at,
                  int n, const OptimBuffers& b);
void store_states(const OptimStep& a, const OptimTensor& t, std::int64_t at, int n,
                  const OptimBuffers& b);

/// f(tensor, chunk, first element, elements) for each block of chunks [begin, end), but of tensors
/// without a gradient.
template <class F>
void for_blocks(const OptimTable& table, std::int64_t begin, std::int64_t end, const F& f,
                std::int64_t block = kOptimBlock) {
  const std::int32_t* const first = table.first_chunk();
  std::int64_t i = std::upper_bound(first, first + table.tensors(), begin) - first - 1;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    while (chunk >= first[i + 1]) ++i;
    if (!table.grad()[i]) continue;
    const std::int64_t start = (chunk - first[i]) * kOptimChunk;
    const std::int64_t stop = std::min(start + kOptimChunk, table.tensor()[i].numel);
    for (std::int64_t at = start; at < stop; at += block) {
      f(i, chunk, at, static_cast<int>(std::min<std::int64_t>(block, stop - at)));
    }
  }
}

/// Whether a step is one loop over memory as it is: parameters rounded to nearest and gradients of
/// type `value`, states of type `state`, none missing.
inline bool is_plain(const OptimStep& a, const OptimTable& table, DType value, DType state) {
  bool plain = a.param == value && a.grad == value && a.state == state &&
               a.rounding == OptimRounding::nearest;
  for (int k = 0; k < optim_states(a.kind); ++k) plain = plain && table.tensor()[0].state[k];
  return plain;
}

/// What the step of a tensor starts from.
inline optim::Start optim_start(const OptimStep& a, const OptimTensor& t) {
  const OptimGroup& group = a.group[t.group];
  return {group, group.lr_tensor ? static_cast<double>(*group.lr_tensor) : group.lr,
          (t.step ? static_cast<std::uint64_t>(*t.step) : 0) + 1, t.product ? *t.product : 1.0,
          t.state[1] != nullptr};
}

}  // namespace fastkern::cpu
