// SPDX-License-Identifier: Apache-2.0
// RMSNorm: the kernels of norm_fwd.cuh, norm_ring.cuh and norm_bwd.cuh for it.
#include "norm/norm_launch.cuh"

namespace fastkern::cuda::norm_detail {

template void launch_fwd<NormKind::rms, Residual::none, false>(const NormFwd&, const Plan&, DType,
                                                               bool, Stream);
template std::int64_t launch_bwd<NormKind::rms, Residual::none, Sums::weight>(const NormBwd&,
                                                                              const Split&, Stream);
template std::int64_t launch_bwd<NormKind::rms, Residual::none, Sums::affine>(const NormBwd&,
                                                                              const Split&, Stream);

}  // namespace fastkern::cuda::norm_detail
