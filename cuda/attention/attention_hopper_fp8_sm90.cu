// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_hopper_fp8_launch.cuh"

namespace fastkern::cuda::attention_detail {

void launch_hopper_fp8_any(Fp8Call& call, Stream stream, const char* op) {
  const int columns = std::max(call.f.d, call.f.dv);
  if (columns <= 64) return launch_hopper_fp8<HopperFp8Of64>(call, stream, op);
  if (columns <= 128) return launch_hopper_fp8<HopperFp8Of128>(call, stream, op);
  launch_hopper_fp8<HopperFp8Of256>(call, stream, op);
}

}  // namespace fastkern::cuda::attention_detail
