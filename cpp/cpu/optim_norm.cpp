// SPDX-License-Identifier: Apache-2.0
// The norm of gradients and their scaling on the CPU. A sum is that of each block in float32, in
// eight lanes, of the blocks of a chunk in float32 and of the chunks in float64, one after the
// other.
#include <cmath>

#include "optim_blocks.h"

namespace fastkern::cpu {
namespace {

FASTKERN_INLINE float block_squares(const float* v, int n) {
  float lanes[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) lanes[j] += v[i + j] * v[i + j];
  }
  for (; i < n; ++i) lanes[i % 8] += v[i] * v[i];
  float sum = 0.0f;
  for (int j = 0; j < 8; ++j) sum += lanes[j];
  return sum;
}

FASTKERN_INLINE float block_largest(const float* v, int n) {
  float largest = 0.0f;
  for (int i = 0; i < n; ++i) largest = optim::larger(largest, std::fabs(v[i]));
  return largest;
}

}  // namespace

void optim_norm(const OptimNorm& a) {
  const OptimTable table(const_cast<void*>(a.host), a.tensors);
  std::fill(a.partials, a.partials + table.chunks(), 0.0f);
  parallel_for(table.chunks(), 8, [&](std::int64_t begin, std::int64_t end) {
    for_blocks(table, begin, end, [&](std::int64_t i, std::int64_t chunk, std::int64_t at, int n) {
      float& total = a.partials[chunk];
      with_best_isa([&]() __attribute__((always_inline)) {
        float v[kOptimBlock];
        load_block(a.grad, table.grad()[i], at, n, v);
        total = a.largest ? optim::larger(total, block_largest(v, n)) : total + block_squares(v, n);
      });
    });
  });
  double sum = a.first ? 0.0 : *a.sum;
  for (std::int64_t c = 0; c < table.chunks(); ++c) {
    sum = a.largest ? optim::larger(static_cast<float>(sum), a.partials[c]) : sum + a.partials[c];
  }
  *a.sum = sum;
  if (a.last) {
    const optim::Clip clip = optim::clip_of(sum, a.largest, a.grad_scale, a.max_norm);
    *a.norm = clip.norm, *a.factor = clip.factor;
  }
}

void optim_scale(const OptimScale& a) {
  const float factor = *a.factor;
  if (factor == 1.0f) return;
  const OptimTable table(const_cast<void*>(a.host), a.tensors);
  parallel_for(table.chunks(), 8, [&](std::int64_t begin, std::int64_t end) {
    for_blocks(table, begin, end, [&](std::int64_t i, std::int64_t, std::int64_t at, int n) {
      void* const grad = const_cast<void*>(table.grad()[i]);
      with_best_isa([&]() __attribute__((always_inline)) {
        float v[kOptimBlock];
        load_block(a.grad, grad, at, n, v);
        for (int j = 0; j < n; ++j) v[j] = optim::mul(v[j], factor);
        store_block(a.grad, grad, at, n, v);
      });
    });
  });
}

}  // namespace fastkern::cpu
