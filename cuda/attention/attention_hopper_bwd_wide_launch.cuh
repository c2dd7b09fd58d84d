// SPDX-License-Identifier: Apache-2.0
// The tiles of attention backward on Hopper above 128 columns; included by the .cu of each element
// type.
#pragma once

#include <algorithm>

#include "attention/attention_bwd_launch.cuh"
#include "attention/attention_hopper_bwd_keys.cuh"
#include "attention/attention_hopper_bwd_queries.cuh"
#include "attention/attention_hopper_map.cuh"

namespace fastkern::cuda::attention_detail {

/// The first with room for the head dimensions is taken. kAhead: where there are stages for it,
/// scores of a block are issued with gradients of the one before.
template <int kColumns, int kValueColumns, int kStages, int kKeyStages, int kValueStages,
          bool kAhead>
struct HopperBwdTiles {
  static constexpr int kD = kColumns, kDv = kValueColumns;
  using Keys = HopperKeysTile<kD, kDv, kStages, kAhead>;
  using Queries = HopperQueriesTile<kD, kDv, kKeyStages, kValueStages, kAhead>;
};
using HopperBwd192x128 = HopperBwdTiles<192, 128, 3, 3, 3, true>;
using HopperBwd192 = HopperBwdTiles<192, 192, 3, 3, 2, true>;
using HopperBwd256 = HopperBwdTiles<256, 256, 2, 2, 1, false>;

template <class T, class Tiles, bool kChanges>
void launch_hopper_bwd_tiles(Backward& p, Stream stream, const char* op) {
  using Keys = typename Tiles::Keys;
  using Queries = typename Tiles::Queries;
  constexpr int kKeysBytes = sizeof(HopperKeysShared<Keys>);
  constexpr int kQueriesBytes = sizeof(HopperQueriesShared<Queries>);
  static_assert(kKeysBytes <= 227 * 1024 && kQueriesBytes <= 227 * 1024);
  Forward& f = p.f;
  const bool packed = f.lengths.start_q;
  const int entries = packed ? 1 : f.batch, more = packed ? f.batch : 0, units = f.heads * entries;
  f.blocks = static_cast<int>(ceil_div(f.queries, Queries::kM)) + more;
  p.blocks = static_cast<int>(ceil_div(f.queries, Keys::kM)) + more;
  p.key_blocks = static_cast<int>(ceil_div(f.keys, Keys::kN)) + more;
  // Of so many heads at a time half of L2 holds what all of their blocks read.
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
  const std::int64_t l2 = device_attribute(cudaDevAttrL2CacheSize, stream.device, op);
  const auto together = [&](std::int64_t rows) {
    return static_cast<int>(std::clamp<std::int64_t>(
        l2 / std::max<std::int64_t>(rows * (Tiles::kD + Tiles::kDv) * 4, 1), 1, multiprocessors));
  };
  p.together = together(f.queries);
  const HopperBwdWide all{{.q = hopper_map<T>(f.q, f.d, f.queries, f.heads, entries, 64, op),
                           .k = hopper_map<T>(f.k, f.d, f.keys, p.kv_heads, entries, 64, op),
                           .v = hopper_map<T>(f.v, f.dv, f.keys, p.kv_heads, entries, 64, op),
                           .dout = hopper_map<T>(p.dout, f.dv, f.queries, f.heads, entries, 64, op),
                           .p = p,
                           .to_cap = f.softcap > 0.0f ? 2.0f * kLog2e * f.scale / f.softcap : 0.0f,
                           .from_cap = f.softcap / f.scale,
                           .over_scale = 1.0f / f.scale},
                          {.tiles = f.blocks * units,
                           .units = units,
                           .section = std::min(together(f.keys), units),
                           .heads = f.heads,
                           .pack = 0,
                           .longest_first = f.mask.right >= 0 && f.mask.left < 0,
                           .ahead = 0}};
  launch(attention_hopper_bwd_keys_kernel<T, Keys, kChanges>,
         {.op = op,
          .grid = static_cast<std::int64_t>(p.key_blocks) * p.kv_heads * entries,
          .block = Keys::kThreads,
          .shared = kKeysBytes,
          .overlap = true},
         stream, all);
  launch(attention_hopper_bwd_queries_kernel<T, Queries, kChanges>,
         {.op = op,
          .grid = all.schedule.tiles,
          .block = Queries::kThreads,
          .shared = kQueriesBytes,
          .overlap = true},
         stream, all);
}

/// dq in one kernel, dk and dv in another.
template <class T>
void launch_hopper_bwd_wide_as(Backward& p, Stream stream, const char* op) {
  dispatch_bool(p.f.softcap > 0.0f || p.f.slopes.data, [&]<bool kChanges>() {
    const int d = p.f.d, dv = p.f.dv;
    if (d <= HopperBwd192x128::kD && dv <= HopperBwd192x128::kDv) {
      launch_hopper_bwd_tiles<T, HopperBwd192x128, kChanges>(p, stream, op);
    } else if (std::max(d, dv) <= HopperBwd192::kD) {
      launch_hopper_bwd_tiles<T, HopperBwd192, kChanges>(p, stream, op);
    } else {
      launch_hopper_bwd_tiles<T, HopperBwd256, kChanges>(p, stream, op);
    }
  });
}

}  // namespace fastkern::cuda::attention_detail
