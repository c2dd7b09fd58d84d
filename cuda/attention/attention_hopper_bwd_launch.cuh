// SPDX-License-Identifier: Apache-2.0
// The tiles of attention backward on Hopper by head dimension; included by the .cu of each element
// type.
#pragma once

#include <algorithm>

#include "attention/attention_bwd_launch.cuh"
#include "attention/attention_hopper_bwd.cuh"
#include "attention/attention_hopper_map.cuh"

namespace fastkern::cuda::attention_detail {

/// With 240 registers a thread: dk and dv, scores, dp, and p and ds in 16 bits.
using HopperBwd64 = HopperBwdTile<64, 128>;
using HopperBwd128 = HopperBwdTile<128, 64>;
static_assert(HopperBwd128::kD == kHopperBwdColumns);

/// Heads whose blocks of keys are among each other. What all of them read and add to is to stay in
/// L2, half of which is another's copy; with fewer than these, blocks of one head wait for each
/// other's additions. Under a mask with a limit, where blocks of keys have few of queries, that is
/// what counts: each begins so many blocks of queries after the one before.
inline int hopper_heads_together(const Backward& p, int columns, int rows, Stream stream,
                                 const char* op) {
  const int most = device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
  const std::int64_t blocks = ceil_div(p.f.queries, rows) * p.f.group;
  if (p.f.mask.left >= 0 || p.f.mask.right >= 0)
    return static_cast<int>(std::clamp<std::int64_t>(5 * most / (blocks + 1), most / 4 + 1, most));
  const std::int64_t l2 = device_attribute(cudaDevAttrL2CacheSize, stream.device, op);
  const std::int64_t head =
      static_cast<std::int64_t>(p.f.queries) * p.f.group * columns * (2 + 2 + 4);
  return static_cast<int>(std::clamp<std::int64_t>(l2 / 3 / head, std::min(6, most), most));
}

template <class T>
void launch_hopper_bwd_as(Backward& p, Stream stream, const char* op) {
  const auto with = [&]<class Tile, bool kChanges>() {
    constexpr int kBytes = sizeof(HopperBwdShared<Tile>);
    static_assert(kBytes <= 227 * 1024);
    const Forward& f = p.f;
    const bool packed = f.lengths.start_q;
    const int entries = packed ? 1 : f.batch, more = packed ? f.batch : 0;
    p.blocks = static_cast<int>(ceil_div(f.queries, Tile::kM)) + more;
    p.key_blocks = static_cast<int>(ceil_div(f.keys, Tile::kN)) + more;
    p.together = hopper_heads_together(p, Tile::kD, Tile::kM, stream, op);
    const HopperBackward all{
        .q = hopper_map<T>(f.q, f.d, f.queries, f.heads, entries, Tile::kM, op),
        .k = hopper_map<T>(f.k, f.d, f.keys, p.kv_heads, entries, Tile::kN, op),
        .v = hopper_map<T>(f.v, f.dv, f.keys, p.kv_heads, entries, Tile::kN, op),
        .dout = hopper_map<T>(p.dout, f.dv, f.queries, f.heads, entries, Tile::kM, op),
        .p = p,
        .to_cap = f.softcap > 0.0f ? 2.0f * kLog2e * f.scale / f.softcap : 0.0f,
        .from_cap = f.softcap / f.scale,
        .over_scale = 1.0f / f.scale};
    launch(attention_hopper_bwd_kernel<T, Tile, kChanges>,
           {.op = op,
            .grid = std::min<std::int64_t>(
                device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op),
                static_cast<std::int64_t>(p.key_blocks) * p.kv_heads * entries),
            .block = Tile::kThreads,
            .shared = kBytes,
            .overlap = true},
           stream, all);
  };
  dispatch_bool(p.f.softcap > 0.0f || p.f.slopes.data, [&]<bool kChanges>() {
    if (std::max(p.f.d, p.f.dv) <= HopperBwd64::kD) {
      with.template operator()<HopperBwd64, kChanges>();
    } else {
      with.template operator()<HopperBwd128, kChanges>();
    }
  });
}

}  // namespace fastkern::cuda::attention_detail
