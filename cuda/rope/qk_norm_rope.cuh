// SPDX-License-Identifier: Apache-2.0
// What forward and backward of qk_norm_rope share: the threads of a head, its weight.
#pragma once

#include "dispatch.h"
#include "rope/rope.cuh"
#include "tile/team.cuh"

namespace fastkern::cuda::rope_detail {

/// q or k: its heads in groups that one thread takes together.
struct Side {
  int heads = 0, groups = 0;
  tile::ColumnView weight{};
};

inline Side side_of(const TensorRef& t, const TensorRef& weight, const Split& split,
                    int heads_a_thread) {
  Side side;
  if (!t.given()) return side;
  side.heads = static_cast<int>(t.sizes[2]);
  side.groups = static_cast<int>(ceil_div(side.heads, heads_a_thread));
  side.weight = tile::column_view(weight, t.sizes[3]);
  side.weight.whole = side.weight.whole && in_packs(split);
  return side;
}

/// Threads of a head: its lanes, rounded up to a power of two. At most a warp.
inline int width_of(const Split& split, const char* op) {
  FK_CHECK(split.lanes <= 32, op, ": rotary_dim must be a multiple of 16 in heads of ", split.n,
           " columns, got ", 2 * split.half);
  return static_cast<int>(std::bit_ceil(static_cast<unsigned>(split.lanes)));
}

/// A thread's sixteen numbers of a weight, plus the offset; ones if there is none.
struct Weights {
  float a[kColumns], b[kColumns];

  __device__ __forceinline__ void load(const tile::ColumnView& weight, const Columns& c,
                                       float offset) {
    weight.load(0, c.a, c.a_end, 1.0f, a);
    weight.load(0, c.b, c.b_end, 1.0f, b);
    if (!weight.data) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) a[i] += offset, b[i] += offset;
  }
};

/// Sums over the `width` lanes of a head, the same bits in each. All lanes of the warp call it.
template <int kValues>
__device__ __forceinline__ void sum_lanes(float (&values)[kValues], int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset >= width) continue;
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
}

/// The sum of products of two packs each, in an order that is written out: the instances of a
/// kernel must agree.
__device__ __forceinline__ float dot(const float (&a)[kColumns], const float (&b)[kColumns],
                                     float sum) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

}  // namespace fastkern::cuda::rope_detail
