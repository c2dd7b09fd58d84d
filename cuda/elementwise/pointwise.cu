// SPDX-License-Identifier: Apache-2.0
// Pointwise functions on CUDA: the plan of a call and the file that has its kernel. What the kernel
// does is said in pointwise_kernel.cuh.
#include <span>

#include "fastkern/elementwise.h"
#include "pointwise_launch.h"

namespace fastkern::cuda {
namespace {

using namespace pointwise_detail;  // NOLINT: all of it is about this

Launcher launcher(const PointwiseCall& call) {
  const Pointwise f = call.function;
  switch (call.compute) {
    case DType::f32: {
      const Launcher unary = launcher_f32_unary(f);
      return unary ? unary : launcher_f32_binary(f);
    }
    case DType::f64: {
      const Launcher unary = launcher_f64_unary(f);
      return unary ? unary : launcher_f64_binary(f);
    }
    case DType::i64:
      return launcher_i64(f);
    case DType::c64:
    case DType::c128:
      return launcher_complex(f, call.compute);
    default:
      fail(call.op, ": compute must be f32, f64, i64, boolean, c64 or c128, got ",
           name_of(call.compute));
  }
}

}  // namespace

void pointwise(const PointwiseCall& original, Stream stream) {
  const PointwiseCall call = pointwise_simplified(original);
  const std::span in(call.in.data(), pointwise_info(call.function).inputs);
  const Launcher launch = launcher(call);
  FK_CHECK(launch, call.op, ": ", pointwise_info(call.function).name, " is not computed in ",
           name_of(call.compute));
  const PointwisePlan plan = pointwise_plan(call.op, call.out, in);
  launch(call.op, plan, call.scalars, stream);
}

}  // namespace fastkern::cuda
