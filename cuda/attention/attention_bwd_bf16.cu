// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_bwd_launch.cuh"

namespace fastkern::cuda::attention_detail {

template void launch_bwd_as<__nv_bfloat16, false>(Backward&, Stream, const char*);
template void launch_bwd_as<__nv_bfloat16, true>(Backward&, Stream, const char*);
template void launch_bwd_first<__nv_bfloat16>(const Backward&, Stream, const char*);
template void launch_bwd_bias<__nv_bfloat16>(const Backward&, const BiasGradient&, Stream,
                                             const char*);

}  // namespace fastkern::cuda::attention_detail
