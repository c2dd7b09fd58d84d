// SPDX-License-Identifier: Apache-2.0
// LAMB on the CPU: the states and, for each chunk, the squares of value and direction; their sums
// for each tensor, in the order of its chunks; then the parameter, its direction made again of the
// states.
#include "optim_lamb.h"

#include "optim_blocks.h"

namespace fastkern::cpu {
namespace {

using optim::Lamb;

/// The squares of values and of directions are added to `sums`, in eight lanes.
FASTKERN_INLINE void average_block(const Lamb::Numbers& numbers, float factor, int n,
                                   const OptimBuffers& b, float (&sums)[2]) {
  float lanes[2][8] = {}, direction[kOptimBlock];
  const Lamb::Numbers local = numbers;
  const float* const p = b.p;
  const float* const g = b.g;
  float* const s0 = b.s[0];
  float* const s1 = b.s[1];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float states[2] = {s0[i], s1[i]};
    Lamb::average(local, optim::mul(g[i], factor), states);
    s0[i] = states[0], s1[i] = states[1];
    direction[i] = Lamb::direction(local, p[i], states);
  }
  for (int i = 0; i < n; ++i) {
    lanes[0][i % 8] += p[i] * p[i];
    lanes[1][i % 8] += direction[i] * direction[i];
  }
  for (int j = 0; j < 8; ++j) sums[0] += lanes[0][j], sums[1] += lanes[1][j];
}

FASTKERN_INLINE void apply_block(const Lamb::Numbers& numbers, float step_size, int n,
                                 const OptimBuffers& b) {
  const Lamb::Numbers local = numbers;
  float* const p = b.p;
  const float* const s0 = b.s[0];
  const float* const s1 = b.s[1];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float states[2] = {s0[i], s1[i]};
    p[i] = optim::fma(-step_size, Lamb::direction(local, p[i], states), p[i]);
  }
}

}  // namespace

void lamb_step(const OptimStep& a, const OptimTable& table) {
  FK_CHECK(a.workspace, a.op, ": workspace must be given");
  const std::int64_t chunks = table.chunks();
  float* const sums = a.workspace;
  float* const ratios = sums + 2 * chunks;
  std::fill(sums, ratios, 0.0f);
  parallel_for(chunks, 4, [&](std::int64_t begin, std::int64_t end) {
    OptimBuffers buffers;
    for_blocks(table, begin, end, [&](std::int64_t i, std::int64_t chunk, std::int64_t at, int n) {
      const OptimTensor& t = table.tensor()[i];
      const optim::Start start = optim_start(a, t);
      const float factor = optim::gradient_factor(start.group, a.grad_factor, a.grad_scale);
      const Lamb::Numbers numbers = Lamb::numbers(start);
      float squares[2] = {sums[chunk], sums[chunks + chunk]};
      load_buffers(a, t, table.grad()[i], at, n, buffers);
      with_best_isa([&]() __attribute__((always_inline)) {
        average_block(numbers, factor, n, buffers, squares);
      });
      store_states(a, t, at, n, buffers);
      sums[chunk] = squares[0], sums[chunks + chunk] = squares[1];
    });
  });
  for (std::int64_t i = 0; i < table.tensors(); ++i) {
    double values = 0.0, directions = 0.0;
    for (std::int64_t c = table.first_chunk()[i]; c < table.first_chunk()[i + 1]; ++c) {
      values += sums[c], directions += sums[chunks + c];
    }
    ratios[i] = optim::trust_ratio(values, directions);
  }
  parallel_for(chunks, 4, [&](std::int64_t begin, std::int64_t end) {
    OptimBuffers buffers;
    for_blocks(table, begin, end, [&](std::int64_t i, std::int64_t, std::int64_t at, int n) {
      const OptimTensor& t = table.tensor()[i];
      const optim::Start start = optim_start(a, t);
      const Lamb::Numbers numbers = Lamb::numbers(start);
      load_buffers(a, t, nullptr, at, n, buffers);
      with_best_isa([&]() __attribute__((always_inline)) {
        apply_block(numbers, optim::mul(numbers.lr, ratios[i]), n, buffers);
      });
      store_values(a, t, start.steps, at, n, buffers);
    });
  });
}

}  // namespace fastkern::cpu
