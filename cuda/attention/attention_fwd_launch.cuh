// SPDX-License-Identifier: Apache-2.0
// The tiles of attention forward by head dimensions and shared memory; included by the .cu of each
// element type.
#pragma once

#include <algorithm>
#include <array>

#include "attention/attention_fwd.cuh"
#include "attention/attention_launch.h"
#include "dispatch.h"

namespace fastkern::cuda::attention_detail {

/// Columns of queries and keys, and of values.
struct Widths {
  int d, dv;
};

struct Tile {
  int queries, keys, warps, blocks;  // blocks: of a multiprocessor, at least

  constexpr int bytes(Widths w) const { return fwd_bytes(w.d, w.dv, queries, keys); }
};

/// The first whose shared memory a device has is launched; all devices have that of the last. With
/// 255 registers a thread, 32 queries a warp leave room for results of 128 columns and scores of 64
/// keys. Extras take some of them.
using Tiles = std::array<Tile, 3>;
template <bool kExtras>
constexpr Tiles fwd_tiles(Widths w) {
  if (w.d <= 64) return {{{128, kExtras ? 64 : 128, 4, 2}}};
  if (w.d <= 96) return {{{128, 64, 4, 2}}};
  if (w.d <= 128) return {{{128, kExtras ? 32 : 64, 4, 2}}};
  if (w.dv <= 128) return {{{128, 32, 4, 2}}};
  if (w.d <= 192) return {{{128, 64, 8, 1}, {64, 32, 4, 2}}};
  if (w.d <= 256) return {{{128, 64, 8, 1}, {64, 32, 4, 2}}};
  return {{{128, 32, 8, 1}, {64, 16, 4, 1}, {32, 16, 2, 1}}};
}

/// Calls f with the first of the widths that has room; the last one if none has.
template <Widths kFirst, Widths... kRest, class F>
void dispatch_widths(int d, int dv, F&& f) {
  if constexpr (sizeof...(kRest) > 0) {
    if (d > kFirst.d || dv > kFirst.dv) return dispatch_widths<kRest...>(d, dv, f);
  }
  f.template operator()<kFirst>();
}

template <class T, bool kExtras, Widths kWidths, int kIndex = 0>
void launch_fwd_tile(Forward& p, Stream stream, const char* op) {
  constexpr Tile kTile = fwd_tiles<kExtras>(kWidths)[kIndex];
  static_assert(kTile.queries > 0);
  constexpr int kBytes = kTile.bytes(kWidths);
  if constexpr (!fits_all<kExtras>(kBytes)) {
    if (!fits<kExtras>(kBytes, stream, op))
      return launch_fwd_tile<T, kExtras, kWidths, kIndex + 1>(p, stream, op);
  }
  if constexpr (fits_some<kExtras>(kBytes)) {
    const bool packed = p.lengths.start_q;
    p.blocks = static_cast<int>(ceil_div(p.queries, kTile.queries)) + (packed ? p.batch : 0);
    constexpr int kInstead =
        kIndex > 0 ? fwd_tiles<kExtras>(kWidths)[std::max(kIndex - 1, 0)].bytes(kWidths) : 0;
    launch(attention_fwd_kernel<T, kWidths.d, kWidths.dv, kTile.queries, kTile.keys, kTile.warps,
                                kTile.blocks, kInstead, kExtras>,
           {.op = op,
            .grid = static_cast<std::int64_t>(p.blocks) * p.heads * (packed ? 1 : p.batch) *
                    ceil_div(p.dv, kWidths.dv),
            .block = kTile.warps * 32,
            .shared = kBytes,
            .overlap = true},
           stream, p);
  }
}

template <class T, bool kExtras>
void launch_fwd_as(Forward& p, Stream stream, const char* op) {
  FK_CHECK(std::max(p.d, p.dv) <= 512, op,
           ": there is no CUDA kernel for head dimensions above 512, got ", std::max(p.d, p.dv));
  dispatch_widths<Widths{32, 32}, Widths{64, 64}, Widths{96, 96}, Widths{128, 128},
                  Widths{192, 128}, Widths{192, 192}, Widths{256, 256}, Widths{512, kFwdColumns}>(
      p.d, p.dv, [&]<Widths kWidths>() { launch_fwd_tile<T, kExtras, kWidths>(p, stream, op); });
}

}  // namespace fastkern::cuda::attention_detail
