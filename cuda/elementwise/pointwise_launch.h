// SPDX-License-Identifier: Apache-2.0
// Which launchers the files of the pointwise functions provide.
#pragma once

#include <array>

#include "fastkern/pointwise_plan.h"

namespace fastkern::pointwise_detail {

using Launcher = void (*)(const char* op, const PointwisePlan& plan,
                          const std::array<Number, kMaxScalars>& scalars, Stream stream);

/// nullptr where the table has no such line.
Launcher launcher_f32_unary(Pointwise f);
Launcher launcher_f32_binary(Pointwise f);
Launcher launcher_f64_unary(Pointwise f);
Launcher launcher_f64_binary(Pointwise f);
Launcher launcher_i64(Pointwise f);
Launcher launcher_complex(Pointwise f, DType compute);

}  // namespace fastkern::pointwise_detail
