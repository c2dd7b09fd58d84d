// SPDX-License-Identifier: Apache-2.0
// The softmax family: the kernels of softmax_fwd.cuh for f16.
#include "softmax/softmax_fwd.cuh"

namespace fastkern::cuda::softmax_detail {

template void launch_fwd<__half>(const SoftmaxFwd&, const Plan&, Stream);

}  // namespace fastkern::cuda::softmax_detail
