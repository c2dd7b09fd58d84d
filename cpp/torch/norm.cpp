// SPDX-License-Identifier: Apache-2.0
// Norm ops for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/norm.py.
#include "fastkern/norm.h"

#include <cmath>
#include <tuple>
#include <utility>

#include "tensor.h"

namespace fastkern::torch_layer {
namespace {

TensorRef check_norm_input(const Tensor& x, double eps, const char* op) {
  const TensorRef ref = ref_of(x, op, "x");
  FK_CHECK(ref.ndim >= 1, op, ": x must have at least one dimension, got a scalar of shape ()");
  FK_CHECK(std::isfinite(eps) && eps >= 0.0, op, ": eps must be finite and >= 0, got ", eps);
  return ref;
}

TensorRef check_norm_weight(const OptionalTensor& weight, const TensorRef& x, Device device,
                            const char* op) {
  if (!weight) return {};
  const TensorRef ref = ref_of(*weight, op, "weight");
  check_shape(ref, &x.sizes[x.ndim - 1], 1, op, "weight");
  check_device(*weight, device, op, "weight");
  return ref;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  constexpr const char* kOp = "fastkern::rms_norm";
  RmsNormFwd args{.x = check_norm_input(x, eps, kOp), .weight = {}, .y = {}, .eps = eps};
  const Device device = device_of(x);
  args.weight = check_norm_weight(weight, args.x, device, kOp);
  const OptionalTensor x_copy = make_rows(x, args.x), weight_copy = make_rows(weight, args.weight);
  Tensor y = new_like(args.x, device);
  args.y = dense_ref(y, args.x);
  if (!device.is_cuda) {
    cpu::rms_norm(args);
  } else if constexpr (kHasCuda) {
    cuda::rms_norm(args, current_stream(device));
  }
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x,
                                        const OptionalTensor& weight, double eps, bool need_dx,
                                        bool need_dweight) {
  constexpr const char* kOp = "fastkern::rms_norm_bwd";
  RmsNormBwd args;
  args.eps = eps;
  args.x = check_norm_input(x, eps, kOp);
  args.dy = ref_of(dy, kOp, "dy");
  const Device device = device_of(x);
  FK_CHECK(args.dy.dtype == args.x.dtype, kOp, ": dy must be ", dtype_text(args.x.dtype),
           " like x, got ", dtype_text(args.dy.dtype));
  check_shape(args.dy, args.x.sizes.data(), args.x.ndim, kOp, "dy");
  check_device(dy, device, kOp, "dy");
  FK_CHECK(weight || !need_dweight, kOp, ": need_dweight must be False without a weight, got True");
  args.weight = check_norm_weight(weight, args.x, device, kOp);
  const OptionalTensor copies[] = {make_rows(x, args.x), make_rows(dy, args.dy),
                                   make_rows(weight, args.weight)};

  Tensor dx = need_dx ? new_like(args.x, device) : no_output(args.x.dtype, device);
  Tensor dweight = need_dweight ? new_like(args.weight, device)
                                : no_output(weight ? args.weight.dtype : args.x.dtype, device);
  if (need_dx) args.dx = dense_ref(dx, args.x);
  if (need_dweight) args.dweight = dense_ref(dweight, args.weight);
  if (!device.is_cuda) {
    cpu::rms_norm_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(device);
    args.workspace_size = cuda::rms_norm_bwd_workspace(args, stream.device);
    const Tensor workspace = new_bytes(args.workspace_size, device);
    args.workspace = data_of(workspace);
    cuda::rms_norm_bwd(args, stream);
  }
  return {std::move(dx), std::move(dweight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  m.def("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06) -> Tensor");
  m.def("rms_norm_fwd(Tensor x, Tensor? weight=None, float eps=1e-06) -> Tensor");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight=None, float eps=1e-06, bool need_dx=True, "
      "bool need_dweight=True) -> (Tensor dx, Tensor dweight)");
}

FASTKERN_REGISTER(m) {
  m.impl("rms_norm", box<&rms_norm>);
  m.impl("rms_norm_fwd", box<&rms_norm>);
  m.impl("rms_norm_bwd", box<&rms_norm_bwd>);
}

}  // namespace fastkern::torch_layer
