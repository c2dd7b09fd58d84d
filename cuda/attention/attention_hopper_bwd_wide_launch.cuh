// SPDX-License-Identifier: Apache-2.0
// The tiles of attention backward on Hopper above 128 columns; included by the .cu of each element
// type.
#pragma once

#include <algorithm>

#include "attention/attention_bwd_launch.cuh"
#include "attention/attention_hopper_bwd_dq.cuh"
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
  using Dq = HopperDqTile<kD, kD <= 192 ? 5 : 4>;
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
  HopperBwdWide all{{.q = hopper_map<T>(f.q, f.d, f.queries, f.heads, entries, 64, op),
                     .k = hopper_map<T>(f.k, f.d, f.keys, p.kv_heads, entries, 64, op),
                     .v = hopper_map<T>(f.v, f.dv, f.keys, p.kv_heads, entries, 64, op),
                     .dout = hopper_map<T>(p.dout, f.dv, f.queries, f.heads, entries, 64, op),
                     .p = p,
                     .to_cap = f.softcap > 0.0f ? 2.0f * kLog2e * f.scale / f.softcap : 0.0f,
                     .from_cap = f.softcap / f.scale,
                     .over_scale = 1.0f / f.scale}};
  all.schedule = hopper_schedule(f, units, together(f.keys));
  const int kv_units = p.kv_heads * entries;
  const auto launch_as = [&](auto kernel, std::int64_t grid, int threads, int bytes) {
    launch(kernel,
           {.op = op,
            .grid = grid,
            .block = threads,
            .shared = static_cast<std::size_t>(bytes),
            .overlap = true},
           stream, all);
  };
  all.ds_row = static_cast<std::int64_t>(p.key_blocks) * kWideDsTile;
  all.ds_head = all.ds_row * p.blocks;
  if (p.ds_bytes == 0) {
    all.p.together = together(f.queries);
    launch_as(attention_hopper_bwd_keys_kernel<T, Keys, kChanges, false>,
              static_cast<std::int64_t>(p.key_blocks) * kv_units, Keys::kThreads, kKeysBytes);
    launch_as(attention_hopper_bwd_queries_kernel<T, Queries, kChanges>, all.schedule.tiles,
              Queries::kThreads, kQueriesBytes);
    return;
  }
  int at_a_time = static_cast<int>(p.ds_bytes / (all.ds_head * f.group));
  all.ds = p.ds;
  all.p.together = std::min(together(f.queries), at_a_time);
  all.schedule.section = all.p.together * f.group;
  at_a_time -= at_a_time % all.p.together;
  all.p.f.blocks = static_cast<int>(ceil_div(f.queries, Tiles::Dq::kM));
  for (int first = 0; first < kv_units; first += at_a_time) {
    const int some = std::min(at_a_time, kv_units - first);
    all.first_head = first * f.group;
    all.first_key_tile = first * p.key_blocks;
    all.first_query_tile = all.first_head * all.p.f.blocks;
    launch_as(attention_hopper_bwd_keys_kernel<T, Keys, kChanges, true>,
              static_cast<std::int64_t>(p.key_blocks) * some, Keys::kThreads, kKeysBytes);
    launch_as(attention_hopper_bwd_dq_kernel<T, typename Tiles::Dq>,
              static_cast<std::int64_t>(all.p.f.blocks) * some * f.group, Tiles::Dq::kThreads,
              sizeof(HopperDqShared<typename Tiles::Dq>));
  }
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
