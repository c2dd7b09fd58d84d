// SPDX-License-Identifier: Apache-2.0
// The softmax family: the kernels of softmax_fwd.cuh for f32.
#include "softmax/softmax_fwd.cuh"

namespace fastkern::cuda::softmax_detail {

template void launch_fwd<float>(const SoftmaxFwd&, const Plan&, Stream);

}  // namespace fastkern::cuda::softmax_detail
