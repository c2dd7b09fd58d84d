// SPDX-License-Identifier: Apache-2.0
// The softmax family: the kernels of softmax_bwd.cuh for f16.
#include "softmax/softmax_bwd.cuh"

namespace fastkern::cuda::softmax_detail {

template void launch_bwd<__half>(const SoftmaxBwd&, const Plan&, Stream);

}  // namespace fastkern::cuda::softmax_detail
