// SPDX-License-Identifier: Apache-2.0
// Softmax, log_softmax and logsumexp where an operand or the result is f64.
#pragma once

#include "fastkern/softmax.h"

namespace fastkern::cpu {

void softmax_f64(const SoftmaxFwd& args);
void softmax_f64_bwd(const SoftmaxBwd& args);

}  // namespace fastkern::cpu
