// SPDX-License-Identifier: Apache-2.0
// Adam, SGD and Lion with states of 8 bits: the kernel of optim_coded.cuh for them.
#include "optim/optim_coded.cuh"
#include "optim/optim_launch.h"

namespace fastkern::cuda {

void launch_codes(const OptimStep& args, const StepParams& a, Stream stream) {
  switch (args.kind) {
    case OptimKind::adam:
      return launch_coded<optim::Adam<false>>(args, a, stream);
    case OptimKind::sgd:
      return launch_coded<optim::Sgd>(args, a, stream);
    case OptimKind::lion:
      return launch_coded<optim::Lion>(args, a, stream);
    default:
      fail(args.op, ": states of 8 bits must be those of adam, sgd or lion, got kind ",
           static_cast<int>(args.kind));
  }
}

}  // namespace fastkern::cuda
