// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of your own on CUDA: FASTKERN_POINTWISE (fastkern/pointwise.h), compiled by
// your nvcc with -std=c++20 --expt-relaxed-constexpr --extended-lambda. The kernel is the
// library's.
#pragma once

#include "fastkern/pointwise.h"
#include "pointwise_kernel.cuh"

namespace fastkern::cuda {

/// F in T, float or double.
template <class F, class T = float>
void pointwise(const TensorRef& out, std::initializer_list<Operand> in, Stream stream = {},
               const PointwiseScalars& scalars = {}) {
  FK_CHECK(in.size() == F::kInputs, F::kName, ": ", F::kInputs, " inputs are needed, got ",
           in.size());
  const PointwisePlan plan = pointwise_plan(F::kName, out, std::span(in.begin(), in.size()));
  pointwise_detail::launch_pointwise<F, T>(F::kName, plan, scalars, stream);
}

}  // namespace fastkern::cuda
