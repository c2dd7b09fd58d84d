// SPDX-License-Identifier: Apache-2.0
// The softmax family: the kernels of softmax_bwd.cuh for bf16.
#include "softmax/softmax_bwd.cuh"

namespace fastkern::cuda::softmax_detail {

template void launch_bwd<__nv_bfloat16>(const SoftmaxBwd&, const Plan&, Stream);

}  // namespace fastkern::cuda::softmax_detail
