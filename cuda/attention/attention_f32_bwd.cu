// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_f32_bwd.cuh"

#include <algorithm>

#include "attention/attention_bwd_launch.cuh"

namespace fastkern::cuda::attention_detail {

template void launch_bwd_first<float>(const Backward&, Stream, const char*);

void launch_bwd_f32(Backward& p, Stream stream, const char* op) {
  const Forward& f = p.f;
  const bool packed = f.lengths.start_q;
  const auto launch_for = [&](auto* kernel, std::int64_t blocks, int heads, int width,
                              int columns) {
    launch(kernel,
           {.op = op,
            .grid = blocks * heads * (packed ? 1 : f.batch) * ceil_div(width, columns),
            .block = kF32Threads,
            .shared = 3 * kF32Stage,
            .overlap = true},
           stream, p, has_extras(f));
  };
  const auto blocks_of = [&](int rows) {
    return static_cast<int>(ceil_div(rows, kF32Rows)) + (packed ? f.batch : 0);
  };
  if (p.dk.data || p.dv.data) {
    p.key_blocks = blocks_of(f.keys);
    const int width = std::max(f.d, f.dv);
    dispatch_ceil<64, 128>(width, [&]<int kColumns>() {
      launch_for(attention_f32_bwd_kernel<kColumns, true>, p.key_blocks, p.kv_heads, width,
                 kColumns);
    });
  }
  if (p.dq.data) {
    p.f.blocks = blocks_of(f.queries);
    dispatch_ceil<64, 128, 256>(f.d, [&]<int kColumns>() {
      launch_for(attention_f32_bwd_kernel<kColumns, false>, p.f.blocks, f.heads, f.d, kColumns);
    });
  }
}

template <>
void launch_bwd_bias<float>(const Backward& p, const BiasGradient& to, Stream stream,
                            const char* op) {
  const std::int64_t blocks = to.queries == 1 ? 1 : ceil_div(p.f.queries, kF32Others);
  launch(attention_f32_bwd_bias_kernel,
         {.op = op,
          .grid = ceil_div(p.f.keys, kF32Rows) * blocks * to.batch * to.heads,
          .block = kF32Threads,
          .shared = 3 * kF32Stage,
          .overlap = true},
         stream, p, to);
}

}  // namespace fastkern::cuda::attention_detail
