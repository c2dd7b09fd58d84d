// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_hopper_fwd_launch.cuh"

namespace fastkern::cuda::attention_detail {

template void launch_hopper_fwd_as<__nv_bfloat16, false>(Forward&, Stream, const char*);
template void launch_hopper_fwd_as<__nv_bfloat16, true>(Forward&, Stream, const char*);

}  // namespace fastkern::cuda::attention_detail
