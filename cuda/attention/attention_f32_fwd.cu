// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_f32_fwd.cuh"
#include "attention/attention_launch.h"
#include "dispatch.h"

namespace fastkern::cuda::attention_detail {

void launch_fwd_f32(Forward& p, Stream stream, const char* op) {
  const bool packed = p.lengths.start_q;
  p.blocks = static_cast<int>(ceil_div(p.queries, kF32Rows)) + (packed ? p.batch : 0);
  dispatch_ceil<64, 128, 256>(p.dv, [&]<int kColumns>() {
    launch(attention_f32_fwd_kernel<kColumns>,
           {.op = op,
            .grid = static_cast<std::int64_t>(p.blocks) * p.heads * (packed ? 1 : p.batch) *
                    ceil_div(p.dv, kColumns),
            .block = kF32Threads,
            .shared = 3 * (kF32Rows + kF32Keys) * kSliceRow,
            .overlap = true},
           stream, p, has_extras(p));
  });
}

}  // namespace fastkern::cuda::attention_detail
