// SPDX-License-Identifier: Apache-2.0
// Adam and AdamW: the kernel of optim_step.cuh for it.
#include "optim/optim_launch.h"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {

void launch_adam(const OptimStep& args, const StepParams& a, Stream stream) {
  launch_step<optim::Adam<false>, true>(args, a, stream);
}

}  // namespace fastkern::cuda
