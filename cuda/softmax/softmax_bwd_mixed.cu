// SPDX-License-Identifier: Apache-2.0
// The softmax family: the kernels of softmax_bwd.cuh for operands of several types.
#include "softmax/softmax_bwd.cuh"

namespace fastkern::cuda::softmax_detail {

template void launch_bwd<Mixed>(const SoftmaxBwd&, const Plan&, Stream);

}  // namespace fastkern::cuda::softmax_detail
