// SPDX-License-Identifier: Apache-2.0
// The table of tensors on the device, what a launch is called with, and counting steps.
#pragma once

#include "fastkern/optim_formula.h"
#include "launch.cuh"
#include "ptx/memory.cuh"

namespace fastkern::cuda {

/// Where a chunk's tensor and its gradient are found.
struct TableParams {
  const std::int32_t* first_chunk;
  const OptimTensor* tensor;
  const void* const* table_grad;  // nullptr: `grad_inline` has them
  std::int32_t* counter;
  int tensors, chunks;
  const void* grad_inline[kOptimInlineGrads];

  __device__ __forceinline__ const void* grad_of(int tensor_) const {
    return table_grad ? table_grad[tensor_] : grad_inline[tensor_];
  }
};

struct StepParams : TableParams {
  DType param, grad, state;
  OptimRounding rounding;
  bool counts;  // the call adds to counts of steps
  int run = 1;  // chunks that a block of states of 8 bits works on
  const float *grad_scale, *grad_factor, *found_inf;
  std::uint64_t seed;
  float* workspace;
  OptimGroup group[kOptimGroups];
};

inline TableParams table_params(const void* host, void* device, std::int64_t tensors) {
  const OptimTable seen(const_cast<void*>(host), tensors), table(device, tensors);
  TableParams p;
  p.first_chunk = table.first_chunk();
  p.tensor = table.tensor();
  p.counter = table.counter();
  p.tensors = static_cast<int>(tensors);
  p.chunks = static_cast<int>(seen.chunks());
  p.table_grad = tensors > kOptimInlineGrads ? table.grad() : nullptr;
  for (std::int64_t i = 0; i < (p.table_grad ? 0 : tensors); ++i) p.grad_inline[i] = seen.grad()[i];
  return p;
}

/// The tensor of a chunk, the last whose first chunk is not behind it; each warp finds it, 32
/// places at a time.
__device__ __forceinline__ int find_tensor(const std::int32_t* first_chunk, int tensors,
                                           int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int low = 0, high = tensors;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, at = low + lane * step;
    const unsigned before = __ballot_sync(0xffffffffu, at < high && first_chunk[at] <= chunk);
    low += (31 - __clz(static_cast<int>(before))) * step;
    high = min(high, low + step);
  }
  return low;
}

/// What chunks are of: a tensor, from element `first` on; without a gradient nothing is updated.
struct ChunkPlace {
  int tensor;
  const void* grad;
  std::int64_t first;
};
__device__ __forceinline__ ChunkPlace place_of(const TableParams& a, int chunk) {
  const int tensor = find_tensor(a.first_chunk, a.tensors, chunk);
  return {tensor, a.grad_of(tensor), (chunk - a.first_chunk[tensor]) * kOptimChunk};
}

__device__ __forceinline__ optim::Start start_of(const StepParams& a, const OptimTensor& t) {
  const OptimGroup& group = a.group[t.group];
  return {group, group.lr_tensor ? static_cast<double>(*group.lr_tensor) : group.lr,
          (t.step ? static_cast<std::uint64_t>(*t.step) : 0) + 1,
          t.product ? static_cast<double>(*t.product) : 1.0, t.state[1] != nullptr};
}

/// How many blocks have read their counts before; of the thread that has read the block's. What is
/// added, always one, is made of what was read, so the numbers are drawn in the order of the reads
/// without a fence, for which the block would wait.
__device__ __forceinline__ int draw_turn(const StepParams& a, const optim::Start& start) {
  if (!a.counts) return 0;
  return ptx::draw_number(a.counter, start.steps != 0 && !(start.product > 1e300) ? 1 : 0);
}
/// The step is done for every tensor that has a gradient.
__device__ __forceinline__ void count_steps(const StepParams& a) {
  for (int i = static_cast<int>(threadIdx.x); i < a.tensors; i += static_cast<int>(blockDim.x)) {
    const OptimTensor& t = a.tensor[i];
    if (!a.grad_of(i)) continue;
    if (t.product) *t.product = optim::NAdam::next_product(start_of(a, t));
    if (t.step) *t.step += 1.0f;
  }
  if (threadIdx.x == 0) *a.counter = 0;
}

/// All threads of the block, at its end: adds to the counts if all blocks have read them.
__device__ __forceinline__ void end_turn(const StepParams& a, int turn, bool& shared) {
  if (!a.counts) return;
  if (threadIdx.x == 0) shared = turn == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (shared) count_steps(a);
}

}  // namespace fastkern::cuda
