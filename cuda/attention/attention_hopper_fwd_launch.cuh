// SPDX-License-Identifier: Apache-2.0
// The tiles of attention forward on Hopper by head dimensions; included by the .cu of each element
// type.
#pragma once

#include <algorithm>

#include "attention/attention_hopper_fwd.cuh"
#include "attention/attention_hopper_map.cuh"
#include "attention/attention_launch.h"

namespace fastkern::cuda::attention_detail {

/// The first with room for the head dimensions is taken. With 232 registers a thread, 64 queries a
/// warpgroup leave room for results, scores and probabilities of 128 columns and 128 keys.
using HopperFwd64 = HopperTile<64, 64, 3, 128, 2, true, true>;
using HopperFwd96 = HopperTile<96, 96, 2, 128, 2, true, true>;
using HopperFwd128 = HopperTile<128, 128, 2, 128, 2, true, true>;
using HopperFwd192x128 = HopperTile<192, 128, 2, 128, 1, false, true>;
using HopperFwd192 = HopperTile<192, 192, 2, 112, 1, false, false>;
using HopperFwd256 = HopperTile<256, 256, 2, 80, 1, false, false>;

template <class First, class... Rest, class F>
void dispatch_hopper(int d, int dv, F&& f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (d > First::kD || dv > First::kDv) return dispatch_hopper<Rest...>(d, dv, f);
  }
  f.template operator()<First>();
}

template <class T>
void launch_hopper_fwd_as(Forward& f, Stream stream, const char* op) {
  dispatch_hopper<HopperFwd64, HopperFwd96, HopperFwd128, HopperFwd192x128, HopperFwd192,
                  HopperFwd256>(f.d, f.dv, [&]<class Tile>() {
    constexpr int kM = Tile::kM, kBytes = sizeof(HopperShared<Tile>);
    static_assert(kBytes <= 227 * 1024);
    const bool packed = f.lengths.start_q;
    const int entries = packed ? 1 : f.batch;
    const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
    f.blocks = static_cast<int>(ceil_div(f.queries, kM)) + (packed ? f.batch : 0);
    const int units = f.heads * entries;
    HopperForward p{
        .q = hopper_map<T>(f.q, f.d, f.queries, f.heads, entries, kM, op),
        .k = hopper_map<T>(f.k, f.d, f.keys, f.heads / f.group, entries, Tile::kN, op),
        .v = hopper_map<T>(f.v, f.dv, f.keys, f.heads / f.group, entries, Tile::kN, op),
        .out = hopper_map<T>(f.out, f.dv, f.queries, f.heads, entries, 64, op),
        .f = f,
        .schedule = {
            .tiles = f.blocks * units,
            .units = units,
            // Four blocks of queries of a head at a time share its keys in L2.
            .section = units <= multiprocessors / 2 ? units : std::max(multiprocessors / 4, 1),
            .longest_first = f.mask.right >= 0 && f.mask.left < 0}};
    launch(attention_hopper_fwd_kernel<T, Tile>,
           {.op = op,
            .grid = std::min(multiprocessors, p.schedule.tiles),
            .block = Tile::kThreads,
            .shared = kBytes,
            .overlap = true},
           stream, p);
  });
}

}  // namespace fastkern::cuda::attention_detail
