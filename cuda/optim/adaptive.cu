// SPDX-License-Identifier: Apache-2.0
// AMSGrad, Adagrad, RMSprop, NAdam, RAdam and the momentum of Muon: the kernel of optim_step.cuh,
// one instance each.
#include "optim/optim_launch.h"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {

void launch_other(const OptimStep& args, const StepParams& a, Stream stream) {
  switch (args.kind) {
    case OptimKind::amsgrad:
      return launch_step<optim::Adam<true>, false>(args, a, stream);
    case OptimKind::adagrad:
      return launch_step<optim::Adagrad, false>(args, a, stream);
    case OptimKind::rmsprop:
      return launch_step<optim::RmsProp, false>(args, a, stream);
    case OptimKind::nadam:
      return launch_step<optim::NAdam, false>(args, a, stream);
    case OptimKind::radam:
      return launch_step<optim::RAdam, false>(args, a, stream);
    case OptimKind::muon:
      return launch_step<optim::Muon, false>(args, a, stream);
    default:
      fail(args.op, ": kind must be one of OptimKind, got ", static_cast<int>(args.kind));
  }
}

}  // namespace fastkern::cuda
