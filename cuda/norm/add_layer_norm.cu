// SPDX-License-Identifier: Apache-2.0
// LayerNorm of a residual stream, with dropout, row scales and a second output at choice.
#include "norm/norm_launch.cuh"

namespace fastkern::cuda::norm_detail {

template void launch_fwd<NormKind::layer, Residual::add, false>(const NormFwd&, const Plan&, DType,
                                                                bool, Stream);
template void launch_fwd<NormKind::layer, Residual::dropout, false>(const NormFwd&, const Plan&,
                                                                    DType, bool, Stream);
template std::int64_t launch_bwd<NormKind::layer, Residual::add, Sums::affine>(const NormBwd&,
                                                                               const Split&,
                                                                               Stream);
template std::int64_t launch_bwd<NormKind::layer, Residual::dropout, Sums::affine>(const NormBwd&,
                                                                                   const Split&,
                                                                                   Stream);
template std::int64_t launch_bwd<NormKind::layer, Residual::dropout, Sums::two_outputs>(
    const NormBwd&, const Split&, Stream);

}  // namespace fastkern::cuda::norm_detail
