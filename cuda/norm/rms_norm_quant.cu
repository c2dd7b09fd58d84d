// SPDX-License-Identifier: Apache-2.0
// RMSNorm, of a residual stream or not, with its result in f8e4m3 or i8.
#include "norm/norm_launch.cuh"

namespace fastkern::cuda::norm_detail {

template void launch_fwd<NormKind::rms, Residual::none, true>(const NormFwd&, const Plan&, DType,
                                                              bool, Stream);
template void launch_fwd<NormKind::rms, Residual::add, true>(const NormFwd&, const Plan&, DType,
                                                             bool, Stream);

}  // namespace fastkern::cuda::norm_detail
