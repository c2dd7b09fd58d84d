// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_hopper_fp8_launch.cuh"

namespace fastkern::cuda::attention_detail {

void launch_hopper_fp8_any(Fp8Call& call, Stream stream, const char* op) {
  const int columns = std::max(call.f.d, call.f.dv);
  if (columns <= 64) return launch_hopper_fp8<HopperFp8Of64>(call, stream, op);
  if (columns <= 128) return launch_hopper_fp8<HopperFp8Of128>(call, stream, op);
  // A sum of tensor cores of 16384 keys is not off by more than weights are. How long a sequence of
  // packed ones is nobody knows here, and what others are in the batch may change nothing.
  const bool few = call.f.keys <= 16384 && !call.f.lengths.start_q;
  if (few) return launch_hopper_fp8<HopperFp8Of256>(call, stream, op);
  launch_hopper_fp8<HopperFp8Of256Long>(call, stream, op);
}

}  // namespace fastkern::cuda::attention_detail
