// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_hopper_bwd_wide_launch.cuh"

namespace fastkern::cuda::attention_detail {

template void launch_hopper_bwd_wide_as<__half>(Backward&, Stream, const char*);

}  // namespace fastkern::cuda::attention_detail
