// SPDX-License-Identifier: Apache-2.0
// How elements that do not know of one another are shared out among threads. A thread has kPacks
// packs; those of a warp lie side by side (ThreadColumns).
//
//   flat    all operands are dense: one row of M * N. A block has one chunk of it; what is no whole
//           pack at the end of all is read and written element by element
//   rows    else a block has a row or an even part of one, or several short rows
#pragma once

#include <algorithm>
#include <bit>
#include <initializer_list>

#include "fastkern/rows.h"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "tile/formula_math.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda::activation_detail {

using tile::kVector;
using tile::Pack;
using tile::RowView;

inline constexpr int kMostThreads = 256;

struct Extent {
  std::int64_t rows, n;  // n: without the tail
  int chunk;             // columns of a block, or of a team
  int chunks;            // of a row; 0: flat
  int shift;             // log2 of the threads of a row, several of which share a block; 0: one row
  int tail;              // columns behind n: of the thread whose pack begins there
  int block;
  std::int64_t grid;
};

/// What a thread has.
template <class T, int kPacks>
struct Place {
  std::int64_t row, first;  // of its columns
  int n;                    // columns of the chunk

  __device__ __forceinline__ explicit Place(const Extent& e) : row(0), first(0) {
    if (e.chunks == 0) {
      first = static_cast<std::int64_t>(blockIdx.x) * e.chunk;
    } else if (e.shift > 0) {
      row = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> e.shift) +
            (threadIdx.x >> e.shift);
    } else if (e.chunks == 1) {
      row = blockIdx.x;
    } else {
      const unsigned whole = blockIdx.x / static_cast<unsigned>(e.chunks);
      row = whole;
      first = static_cast<std::int64_t>(blockIdx.x - whole * e.chunks) * e.chunk;
    }
    const std::int64_t left = e.n - first;
    n = row >= e.rows ? 0 : left < e.chunk ? static_cast<int>(left) : e.chunk;
  }
  __device__ __forceinline__ tile::ThreadColumns<T, kPacks> columns(const Extent& e) const {
    const int team = e.shift > 0 ? 1 << e.shift : static_cast<int>(blockDim.x);
    return {team, static_cast<int>(threadIdx.x) & (e.shift > 0 ? team - 1 : ~0), n};
  }
  /// Where the thread's chunk begins; `width`: bytes of an element.
  template <bool kPlain>
  __device__ __forceinline__ char* of(const RowView<T>& view, int width = sizeof(T)) const {
    return view.template row<kPlain>(row) + first * width;
  }
};

/// Which pack of the thread is the one with the tail; kPacks: none.
template <int kPacks, class Columns, class P>
__device__ __forceinline__ int tail_of(const Extent& e, const P& at, const Columns& columns) {
  int found = kPacks;
  if (e.tail > 0) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) found = columns(i) == at.n ? i : found;
  }
  return found;
}

/// Loads and stores of all packs of a thread. `row`: where its chunk begins.
template <bool kPlain, class T, int kPacks, class P, class Columns>
__device__ __forceinline__ void load_packs(const RowView<T>& view, const char* row, const Extent& e,
                                           const P& at, const Columns& columns,
                                           Pack<T> (&packs)[kPacks]) {
  view.template load<kPlain>(row, columns, at.n, packs);
  const int tail = tail_of<kPacks>(e, at, columns);
  if (tail == kPacks) return;
  const Pack<T> last = tile::load(reinterpret_cast<const T*>(row), at.n, at.n + e.tail, false);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) packs[i] = i == tail ? last : packs[i];
}
template <bool kPlain, class T, int kPacks, class P, class Columns>
__device__ __forceinline__ void store_packs(const RowView<T>& view, char* row, const Extent& e,
                                            const P& at, const Columns& columns,
                                            const Pack<T> (&packs)[kPacks]) {
  view.template store<kPlain>(row, columns, at.n, packs);
  const int tail = tail_of<kPacks>(e, at, columns);
  if (tail == kPacks) return;
  Pack<T> last = packs[0];
#pragma unroll
  for (int i = 1; i < kPacks; ++i) last = i == tail ? packs[i] : last;
  tile::store(reinterpret_cast<T*>(row), at.n, at.n + e.tail, false, last);
}

template <class T>
Extent flat_extent(std::int64_t count, int packs) {
  constexpr std::int64_t kBlocks = 512;  // enough for a GPU: of few elements blocks are small
  constexpr int kV = kVector<T>;
  Extent e{.rows = 1, .tail = static_cast<int>(count % kV)};
  e.n = count - e.tail;
  e.block = 256;
  while (e.block > 64 && e.n < kBlocks * e.block * packs * kV) e.block /= 2;
  e.chunk = e.block * packs * kV;
  e.grid = ceil_div(count, e.chunk);
  return e;
}

template <class T>
Extent row_extent(std::int64_t rows, std::int64_t n, int packs) {
  constexpr int kV = kVector<T>;
  Extent e{.rows = rows, .n = n};
  const std::int64_t threads = ceil_div(ceil_div(n, kV), packs);
  e.chunks = static_cast<int>(ceil_div(threads, kMostThreads));
  const int team = std::max(static_cast<int>(ceil_div(threads, std::max(e.chunks, 1))), 1);
  if (team <= 64) {
    e.shift = std::max(static_cast<int>(std::bit_width(static_cast<unsigned>(team - 1))), 1);
    e.block = 128;
    e.chunk = packs * kV << e.shift;
    e.grid = ceil_div(rows, e.block >> e.shift);
  } else {
    e.block = (team + 31) / 32 * 32;
    e.chunk = e.block * packs * kV;
    e.chunks = static_cast<int>(ceil_div(n, e.chunk));
    e.grid = rows * e.chunks;
  }
  return e;
}

/// Whether rows follow one another without a gap.
inline bool is_dense(const Rows& r) {
  return r.count <= 1 || (r.inner >= r.count && r.inner_stride == r.length);
}

/// Makes operands that are all dense one row each; whether they are.
inline bool flatten(std::initializer_list<TensorRef*> operands, const char* op) {
  for (const TensorRef* t : operands) {
    if (t->given() && !is_dense(rows_of(*t, op, "operands"))) return false;
  }
  for (TensorRef* t : operands) {
    if (t->given()) *t = dense(t->data, t->dtype, std::int64_t{1}, t->numel());
  }
  return true;
}

/// The rows of an operand that is one row with a tail are read in packs up to that.
template <class T>
RowView<T> view_of(TensorRef t, const Extent& e, const char* op, const char* argument) {
  if (t.given() && e.chunks == 0) t.sizes[1] -= e.tail;
  return tile::row_view<T>(t, op, argument);
}

/// How 16-bit results are computed, and those of f32.
template <class T>
using Math = tile::FormulaMath<sizeof(T) == 4>;

}  // namespace fastkern::cuda::activation_detail
