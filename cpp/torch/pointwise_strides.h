// SPDX-License-Identifier: Apache-2.0
// The strides of a new result.
#pragma once

#include <span>

#include "fastkern/core.h"

namespace fastkern::torch_layer {

/// A tensor without dimensions as one of shape (1), which is how the kernels want it.
TensorRef with_dimensions(TensorRef ref);

/// `layout`, which has the sizes, with the strides that torch would choose for these tensor
/// operands, `numbers` or not beside them. `operands` are changed.
TensorRef layout_as_torch(TensorRef layout, std::span<TensorRef> operands, bool numbers);

}  // namespace fastkern::torch_layer
