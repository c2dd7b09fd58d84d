// SPDX-License-Identifier: Apache-2.0
// Channels-last: a block owns a slab of channels at some positions, a thread one pack of channels
// at every so-many-th of them; how that is cut, and sums over the positions of a block.
#pragma once

#include <algorithm>
#include <numeric>

#include "norm/group_norm.cuh"

namespace fastkern::cuda::group_detail {

constexpr int kLastPacks = 12;  // positions that a thread holds at a time, at most

/// The slabs of a row of channels.
struct Slabs {
  std::int64_t channels;  // C
  std::int32_t count;
  std::int32_t packs;  // of a slab, threads side by side

  int rows() const { return kLastBlock / packs; }
};

/// This thread's place in its block.
struct Cell {
  int packs, rows;       // of the block
  int x, y;              // y == rows: no part in it
  int slab;              // which
  std::int64_t channel;  // the first one of the slab
  int width;             // channels of the slab that there are
  std::int64_t pitch;    // elements from a position to the next

  template <int kV>
  static __device__ __forceinline__ Cell of(const Slabs& slabs, unsigned slab) {
    const int packs = slabs.packs, rows = kLastBlock / packs;
    const int x = threadIdx.x % packs, y = threadIdx.x / packs;
    const std::int64_t channel = static_cast<std::int64_t>(slab) * packs * kV;
    const int width =
        static_cast<int>(min(slabs.channels - channel, static_cast<std::int64_t>(packs) * kV));
    return {packs, rows, x, y, static_cast<int>(slab), channel, width, slabs.channels};
  }
};

/// Positions first + i * step of a slab that begins at `slab`; zero from `positions` on. kWhole:
/// in packs. Known at compile time, unlike elsewhere, because what it takes to read each element
/// alone would cost the other way registers it does not have.
template <bool kWhole, class T, int kPacks>
__device__ __forceinline__ void load_cells(const T* slab, const Cell& cell, int first, int step,
                                           int positions, Pack<T> (&out)[kPacks]) {
  const int column = cell.x * kVector<T>;
  if constexpr (kWhole) {
    const T* at = slab + first * cell.pitch + column;
    // Out of reach for a cell that takes no part.
    int position = column < cell.width && cell.y < cell.rows ? first : positions;
#pragma unroll
    for (int i = 0; i < kPacks; ++i, at += step * cell.pitch, position += step)
      out[i].bits = ptx::ld_global_nc_if(at, position < positions);
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int position = tile::opaque(first + i * step);
      const bool inside = position < positions && cell.y < cell.rows;
      out[i] = tile::load(slab + position * cell.pitch, column, inside ? cell.width : 0, false);
    }
  }
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_cell(T* slab, const Cell& cell, int position, int positions,
                                           const Pack<T>& v) {
  if (position >= positions || cell.y >= cell.rows) return;
  tile::store(slab + position * cell.pitch, cell.x * kVector<T>, cell.width, kWhole, v);
}

/// Rows of a slab's channels in shared memory. Four lanes read four rows of a channel side by side:
/// a length of 32 would put them into one bank.
__host__ __device__ constexpr int row_pitch(int channels) {
  return channels + (channels % 32 == 0 ? 8 : 0);
}

/// row[j] = v[j] for a pack's channels.
template <int kV>
__device__ __forceinline__ void put(float* row, const float (&v)[kV]) {
#pragma unroll
  for (int j = 0; j < kV; j += 4)
    *reinterpret_cast<float4*>(row + j) = {v[j], v[j + 1], v[j + 2], v[j + 3]};
}

/// body(channel, part, inside) with four lanes, parts 0 to 3, for every channel of a slab; whole
/// warps run it together.
template <class Body>
__device__ __forceinline__ void for_slab_channels(int channels, const Body& body) {
  for (int base = 0; base < channels; base += kLastBlock / 4) {
    const int channel = base + threadIdx.x / 4;
    body(channel, static_cast<int>(threadIdx.x % 4), channel < channels);
  }
}

__device__ __forceinline__ float sum_of_four(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/// How many of `total` positions fall to row y, when rows take turns: row 0, 1, ... lap - 1, row 0.
struct Turns {
  int full, rest;
  __device__ __forceinline__ Turns(int total, int lap) : full(total / lap), rest(total % lap) {}
  __device__ __forceinline__ int of(int y) const { return full + (y < rest); }
  /// Of `count` rows from `first` on.
  __device__ __forceinline__ int of(int first, int count) const {
    return full * count + min(max(rest - first, 0), count);
  }
};

/// Whether every position of the tensors, and every slab, begins where packs do.
template <class T>
bool rows_in_packs(const GroupShape& shape, std::initializer_list<const TensorRef*> tensors) {
  bool whole = true;
  for (const TensorRef* t : tensors) whole = whole && in_packs(*t, shape.channels);
  return whole;
}

/// Narrow slabs, wherever groups begin: at most 16 packs.
inline Slabs narrow_slabs(std::int64_t channels, int vector) {
  constexpr std::int64_t kMost = 16;
  const std::int64_t packs = ceil_div(channels, vector), count = ceil_div(packs, kMost);
  return {channels, static_cast<std::int32_t>(count),
          static_cast<std::int32_t>(ceil_div(packs, count))};
}

}  // namespace fastkern::cuda::group_detail
