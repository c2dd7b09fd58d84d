// SPDX-License-Identifier: Apache-2.0
// The tiles of attention of 8-bit operands on Hopper, and how one is launched.
#pragma once

#include <algorithm>

#include "attention/attention_fp8.h"
#include "attention/attention_hopper_fp8.cuh"
#include "tensor_map.cuh"

namespace fastkern::cuda::attention_detail {

using HopperFp8Of64 = HopperFp8Tile<64, 3, 1, 4, true, 16, 48>;
using HopperFp8Of128 = HopperFp8Tile<128, 3, 1, 3, true, 43, 24>;
// There is no room for sums besides those of the tensor cores: results of all keys are one, or
// those of a block.
using HopperFp8Of256 = HopperFp8Tile<256, 2, 1, 2, true, 0, 32>;
using HopperFp8Of256Long = HopperFp8Tile<256, 2, 4, 2, false, 0, 0>;

/// f.blocks is set here.
template <class Tile>
void launch_hopper_fp8(Fp8Call& call, Stream stream, const char* op) {
  constexpr int kM = Tile::kM, kBytes = sizeof(HopperFp8Shared<Tile>);
  static_assert(kBytes <= 227 * 1024);
  Forward& f = call.f;
  const bool packed = f.lengths.start_q;
  const int entries = packed ? 1 : f.batch, kv_heads = f.heads / f.group;
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
  f.blocks = static_cast<int>(ceil_div(f.queries, kM)) + (packed ? f.batch : 0);
  const int units = f.heads * entries;
  const auto map = [&](const View& view, int columns, int rows, int heads, int box) {
    return tensor_map({view.data,
                       DType::f8e4m3,
                       {columns, rows, heads, entries},
                       {view.row, view.head, view.batch},
                       {128, box, 1, 1}},
                      op);
  };
  const CUtensorMap queries = map(f.q, f.d, f.queries, f.heads, kM);
  // Without keys nothing of them is fetched; a map must be of something.
  const bool any = f.keys > 0;
  const HopperFp8Forward p{
      .q = queries,
      .k = any ? map(f.k, f.d, f.keys, kv_heads, Tile::kN) : queries,
      .v = any ? map(call.values, call.width, f.dv, kv_heads, Tile::kDv) : queries,
      .out = tensor_map({f.out.data,
                         DType::bf16,
                         {f.dv, f.queries, f.heads, entries},
                         {f.out.row, f.out.head, f.out.batch},
                         {64, 64, 1, 1}},
                        op),
      .f = f,
      .schedule = hopper_schedule(f, units, hopper_section(units, multiprocessors)),
      .q_scale = call.q_scale,
      .k_scale = call.k_scale,
      .v_scale = call.v_scale};
  launch(attention_hopper_fp8_kernel<Tile>,
         {.op = op,
          .grid = std::min(multiprocessors, p.schedule.tiles),
          .block = Tile::kThreads,
          .shared = kBytes,
          .overlap = true},
         stream, p);
}

}  // namespace fastkern::cuda::attention_detail
