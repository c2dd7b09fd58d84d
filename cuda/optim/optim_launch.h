// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fastkern/optim.h"

namespace fastkern::cuda {

struct StepParams;

void launch_adam(const OptimStep& args, const StepParams& a, Stream stream);
void launch_sgd(const OptimStep& args, const StepParams& a, Stream stream);
void launch_lion(const OptimStep& args, const StepParams& a, Stream stream);
void launch_other(const OptimStep& args, const StepParams& a, Stream stream);
void launch_codes(const OptimStep& args, const StepParams& a, Stream stream);  // of 8 bits
void launch_lamb(const OptimStep& args, const StepParams& a, Stream stream);

}  // namespace fastkern::cuda
