// SPDX-License-Identifier: Apache-2.0
// SGD: the kernel of optim_step.cuh for it.
#include "optim/optim_launch.h"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {

void launch_sgd(const OptimStep& args, const StepParams& a, Stream stream) {
  launch_step<optim::Sgd, true>(args, a, stream);
}

}  // namespace fastkern::cuda
