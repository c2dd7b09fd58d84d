// SPDX-License-Identifier: Apache-2.0
// The same over the middle dimension of a dense (A, N, C).
#pragma once

#include "fastkern/softmax.h"

namespace fastkern::cpu {

void softmax_middle(const SoftmaxFwd& args);
void softmax_bwd_middle(const SoftmaxBwd& args);

}  // namespace fastkern::cpu
