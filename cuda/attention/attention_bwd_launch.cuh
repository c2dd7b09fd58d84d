// SPDX-License-Identifier: Apache-2.0
// The tiles of attention backward by head dimension; included by the .cu of each element type.
#pragma once

#include <algorithm>
#include <array>

#include "attention/attention_bwd.cuh"
#include "attention/attention_launch.h"

namespace fastkern::cuda::attention_detail {

/// As many as L2 holds the queries, dout and sums of dq of, and enough for a block to wait little.
inline int heads_together(const Backward& p, int columns, Stream stream, const char* op) {
  // Of a causal mask half of the queries, on average.
  const std::int64_t head = static_cast<std::int64_t>(p.f.queries) * columns * (2 + 2 + 4) /
                            (p.f.mask.right >= 0 ? 2 : 1);
  const int most = device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
  const std::int64_t l2 = device_attribute(cudaDevAttrL2CacheSize, stream.device, op);
  return static_cast<int>(std::clamp<std::int64_t>(l2 / head, most / 4 + 1, most));
}

struct BwdTile {
  int queries, keys, tiles, split;  // tiles: of 16 keys, a warp; split: warps that share them

  constexpr int warps() const { return keys / 16 / tiles * split; }
  constexpr int bytes(int columns) const { return bwd_bytes(columns, queries, keys, split); }
};

/// The first whose shared memory a device has is launched; all devices have that of the last. With
/// 255 registers a thread there is room for dk and dv of 128 columns of 16 keys, or of 64 of 32,
/// and for scores of 64 queries; extras take some of them.
using BwdTiles = std::array<BwdTile, 3>;
template <bool kExtras>
constexpr BwdTiles bwd_tiles(int columns) {
  if (columns <= 64 && kExtras) return {{{64, 128, 2, 2}, {64, 64, 1, 2}}};
  if (columns <= 64) return {{{128, 128, 2, 2}, {64, 128, 2, 2}, {64, 64, 1, 2}}};
  if (columns <= 96) return {{{64, 128, 2, 2}, {32, 64, 2, 2}}};
  if (columns <= 128 && kExtras) return {{{32, 128, 2, 2}, {32, 64, 2, 2}}};
  if (columns <= 128) return {{{64, 128, 2, 2}, {32, 128, 2, 2}, {32, 64, 2, 2}}};
  if (columns <= 192) return {{{64, 64, 1, 2}, {32, 64, 1, 2}, {32, 32, 1, 2}}};
  return {{{64, 64, 2, 4}, {32, 64, 1, 2}, {32, 16, 1, 2}}};
}

template <class T, bool kExtras, int kD, int kIndex = 0>
void launch_bwd_tile(Backward& p, Stream stream, const char* op) {
  constexpr BwdTile kTile = bwd_tiles<kExtras>(kD)[kIndex];
  static_assert(kTile.queries > 0 && kTile.queries <= kMostQueries &&
                kTile.queries >= kLeastQueries);
  constexpr int kBytes = kTile.bytes(kD);
  if constexpr (!fits_all<kExtras>(kBytes)) {
    if (!fits<kExtras>(kBytes, stream, op))
      return launch_bwd_tile<T, kExtras, kD, kIndex + 1>(p, stream, op);
  }
  if constexpr (fits_some<kExtras>(kBytes)) {
    const bool packed = p.f.lengths.start_q;
    p.blocks = static_cast<int>(ceil_div(p.f.queries, kTile.queries)) + (packed ? p.f.batch : 0);
    p.key_blocks = static_cast<int>(ceil_div(p.f.keys, kTile.keys)) + (packed ? p.f.batch : 0);
    p.together = heads_together(p, kD, stream, op);
    constexpr int kInstead =
        kIndex > 0 ? bwd_tiles<kExtras>(kD)[std::max(kIndex - 1, 0)].bytes(kD) : 0;
    launch(attention_bwd_kernel<T, kD, kTile.queries, kTile.keys, kTile.tiles, kTile.split,
                                kInstead, kExtras>,
           {.op = op,
            .grid = static_cast<std::int64_t>(p.key_blocks) * p.kv_heads * (packed ? 1 : p.f.batch),
            .block = kTile.warps() * 32,
            .shared = kBytes,
            .overlap = true},
           stream, p);
  }
}

template <class T, bool kExtras>
void launch_bwd_as(Backward& p, Stream stream, const char* op) {
  dispatch_columns(std::max(p.f.d, p.f.dv), op,
                   [&]<int kD>() { launch_bwd_tile<T, kExtras, kD>(p, stream, op); });
}

template <class T>
void launch_bwd_first(const Backward& p, Stream stream, const char* op) {
  const std::int64_t heads =
      p.f.heads * static_cast<std::int64_t>(p.f.lengths.start_q ? 1 : p.f.batch);
  launch(attention_bwd_first_kernel<T>,
         {.op = op,
          .grid = heads * ceil_div(p.f.queries, kFirstThreads / first_width<T>(p.f)),
          .block = kFirstThreads,
          .overlap = true},
         stream, p);
}

template <class T>
void launch_bwd_bias(const Backward& p, const BiasGradient& to, Stream stream, const char* op) {
  dispatch_ceil<64, 128, 256>(std::max(p.f.d, p.f.dv), [&]<int kD>() {
    const std::int64_t blocks = to.queries == 1 ? 1 : ceil_div(p.f.queries, 64);
    launch(attention_bwd_bias_kernel<T, kD>,
           {.op = op,
            .grid = ceil_div(p.f.keys, 64) * blocks * to.batch * to.heads,
            .block = 128,
            .shared = static_cast<std::size_t>(4 * 64 * kD * 2),
            .overlap = true},
           stream, p, to);
  });
}

}  // namespace fastkern::cuda::attention_detail
