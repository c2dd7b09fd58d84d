// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_hopper_fwd_launch.cuh"

namespace fastkern::cuda::attention_detail {

template void launch_hopper_fwd_as<__half, false>(Forward&, Stream, const char*);
template void launch_hopper_fwd_as<__half, true>(Forward&, Stream, const char*);

}  // namespace fastkern::cuda::attention_detail
