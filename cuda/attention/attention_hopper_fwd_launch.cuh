// SPDX-License-Identifier: Apache-2.0
// The tiles of attention forward on Hopper by head dimensions; included by the .cu of each element
// type.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/attention_hopper_fwd.cuh"
#include "attention/attention_hopper_map.cuh"
#include "attention/attention_launch.h"

namespace fastkern::cuda::attention_detail {

/// The first with room for the head dimensions is taken. With 232 registers a thread, 64 queries a
/// warpgroup leave room for results, scores and probabilities of 128 columns and 128 keys.
using HopperFwd64 = HopperTile<64, 64, 3, 128, 2, 2, true, true>;
using HopperFwd64Changed = HopperTile<64, 64, 2, 128, 2, 2, true, true>;
using HopperFwd96 = HopperTile<96, 96, 2, 128, 2, 2, true, true>;
using HopperFwd128 = HopperTile<128, 128, 2, 128, 2, 2, true, true>;
using HopperFwd128Long = HopperTile<128, 128, 3, 80, 2, 2, true, true, true>;
using HopperFwd192x128 = HopperTile<192, 128, 2, 128, 2, 1, false, true>;
using HopperFwd192 = HopperTile<192, 192, 2, 96, 2, 1, false, true>;
using HopperFwd256 = HopperTile<256, 256, 2, 64, 2, 1, false, true>;

template <class First, class... Rest, class F>
void dispatch_hopper(int d, int dv, F&& f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (d > First::kD || dv > First::kDv) return dispatch_hopper<Rest...>(d, dv, f);
  }
  f.template operator()<First>();
}

/// Of how many heads (a power of two, given by its exponent) tiles of `rows` hold the queries:
/// where that makes a tenth of the tiles superfluous, else of one.
inline int hopper_pack(const Forward& f, int rows) {
  const int sequences = f.lengths.start_q ? f.batch : 0;  // the last tile of each may not be full
  const auto tiles = [&](int pack) {
    return (f.heads >> pack) * (ceil_div(std::int64_t{f.queries} << pack, rows) + sequences);
  };
  int best = 0;
  for (int pack = 1; pack <= 6 && f.group % (1 << pack) == 0; ++pack) {
    if (tiles(pack) < tiles(best)) best = pack;
  }
  return 10 * tiles(best) <= 9 * tiles(0) ? best : 0;
}

/// Whether the longer tile of 128 columns is the faster one. Bits are not those of the shorter one,
/// so this looks at nothing that one entry of a batch has from another, nor at how many there are:
/// queries see 2048 keys or more on average, and tiles of one entry leave hardly more
/// multiprocessors idle.
inline bool hopper_is_long(const Forward& f, int multiprocessors) {
  if (f.lengths.start_q || f.lengths.used_q || f.lengths.used_k) return false;
  const bool left = f.mask.left >= 0, right = f.mask.right >= 0;
  std::int64_t seen = f.keys;
  if (left && right) {
    seen = std::min<std::int64_t>(seen, std::int64_t{f.mask.left} + f.mask.right + 1);
  } else if (left || right) {
    seen /= 2;
  }
  const auto time = [&](int groups) {
    const std::int64_t tiles = ceil_div(f.queries, 64 * groups) * std::int64_t{f.heads};
    return ceil_div(tiles, multiprocessors) * groups;
  };
  return seen >= 2048 && 100 * time(HopperFwd128Long::kGroups) <= 113 * time(HopperFwd128::kGroups);
}

/// Of how many heads tiles are given out at a time, longest first: as many as a third of L2 holds
/// the keys and values of, but of two tiles for each multiprocessor, for these to be done at once.
inline int hopper_given_section(const Forward& f, int pack, const Stream& stream,
                                int multiprocessors, const char* op) {
  const std::int64_t l2 = device_attribute(cudaDevAttrL2CacheSize, stream.device, op);
  const std::int64_t bytes = std::int64_t{2} * f.keys * (f.d + f.dv);  // of a head of keys
  const std::int64_t fit = l2 / 3 / std::max<std::int64_t>(bytes, 1) * (f.group >> pack);
  return static_cast<int>(std::max(fit, std::int64_t{2} * multiprocessors / f.blocks));
}

/// What the kernel is called with; f.blocks is set here.
template <class T, class Tile>
HopperForward hopper_forward(Forward& f, Stream stream, int multiprocessors, const char* op) {
  constexpr int kM = Tile::kM;
  const bool packed = f.lengths.start_q;
  const int pack = hopper_pack(f, kM);
  const int entries = packed ? 1 : f.batch, heads = f.heads >> pack, units = heads * entries;
  f.blocks = static_cast<int>(ceil_div(f.queries, kM >> pack)) + (packed ? f.batch : 0);
  const int section = f.given ? hopper_given_section(f, pack, stream, multiprocessors, op)
                              : hopper_section(units, multiprocessors);
  return {.q = hopper_map<T>(f.q, f.d, f.queries, f.heads, entries, Tile::kRoomRows, op, pack),
          .k = hopper_map<T>(f.k, f.d, f.keys, f.heads / f.group, entries, Tile::kN, op),
          .v = hopper_map<T>(f.v, f.dv, f.keys, f.heads / f.group, entries, Tile::kN, op),
          .out = hopper_map<T>(f.out, f.dv, f.queries, f.heads, entries, 64, op, pack),
          .f = f,
          .schedule = hopper_schedule(f, units, std::max(section, 1), pack)};
}

template <class T, class Tile, bool kChanges = false>
void launch_hopper_tile(const HopperForward& p, int multiprocessors, Stream stream,
                        const char* op) {
  constexpr int kBytes = sizeof(HopperShared<Tile>);
  static_assert(kBytes <= 227 * 1024);
  launch(attention_hopper_fwd_kernel<T, Tile, kChanges>,
         {.op = op,
          .grid = std::min(multiprocessors, p.schedule.tiles),
          .block = Tile::kThreads,
          .shared = kBytes,
          .overlap = true},
         stream, p);
}

template <class T, bool kChanges>
void launch_hopper_fwd_as(Forward& f, Stream stream, const char* op) {
  using Fwd64 = std::conditional_t<kChanges, HopperFwd64Changed, HopperFwd64>;
  dispatch_hopper<Fwd64, HopperFwd96, HopperFwd128, HopperFwd192x128, HopperFwd192, HopperFwd256>(
      f.d, f.dv, [&]<class Tile>() {
        const int multiprocessors =
            device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
        const auto run = [&]<class Taken>(std::type_identity<Taken>) {
          const HopperForward p = hopper_forward<T, Taken>(f, stream, multiprocessors, op);
          launch_hopper_tile<T, Taken, kChanges>(p, multiprocessors, stream, op);
        };
        if constexpr (std::is_same_v<Tile, HopperFwd128> && !kChanges) {
          if (hopper_is_long(f, multiprocessors))
            return run(std::type_identity<HopperFwd128Long>{});
        }
        run(std::type_identity<Tile>{});
      });
}

}  // namespace fastkern::cuda::attention_detail
