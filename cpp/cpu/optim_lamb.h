// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fastkern/optim.h"

namespace fastkern::cpu {

void lamb_step(const OptimStep& a, const OptimTable& table);

}  // namespace fastkern::cpu
