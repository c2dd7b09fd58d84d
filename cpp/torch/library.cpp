// SPDX-License-Identifier: Apache-2.0
// Loading this library makes torch's thread pool the one that fastkern's CPU kernels use.
#include <torch/csrc/stable/ops.h>

#include "fastkern/core.h"

namespace {

void run_on_torch_pool(std::int64_t count, std::int64_t grain, fastkern::ParallelBody body,
                       void* context) {
  torch::stable::parallel_for(
      0, count, grain, [&](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
}

[[maybe_unused]] const bool installed = (fastkern::set_parallel_for(run_on_torch_pool), true);

}  // namespace
