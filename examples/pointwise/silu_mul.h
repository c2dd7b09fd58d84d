// SPDX-License-Identifier: Apache-2.0
// The functions of the example, for the CPU and CUDA.
#pragma once

#include "fastkern/pointwise.h"

FASTKERN_POINTWISE(silu_mul, (a, b), a / (T(1) + exp(-a)) * b);
FASTKERN_POINTWISE(squared_relu, (x), max(x, T(0)) * max(x, T(0)));
FASTKERN_POINTWISE(mix, (a, b, weight), a + s(0) * weight * (b - a));
