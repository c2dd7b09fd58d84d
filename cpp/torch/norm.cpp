// SPDX-License-Identifier: Apache-2.0
// Norm ops for torch: schema, checks, allocation, launch. Fakes and autograd: python/fastkern/ops/norm.py.
#include "fastkern/norm.h"

#include <cmath>
#include <tuple>

#include "tensor.h"

namespace fastkern::torch_layer {
namespace {

DType check_norm_input(const Tensor& x, double eps, const char* op) {
  const DType dtype = dtype_of(x, op, "x");
  FK_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar of shape ()");
  FK_CHECK(std::isfinite(eps) && eps >= 0.0, op, ": eps must be finite and >= 0, got ", eps);
  return dtype;
}

TensorRef check_norm_weight(OptionalTensor& weight, const Tensor& x, const char* op) {
  if (!weight) return {};
  const DType dtype = dtype_of(*weight, op, "weight");
  check_shape(*weight, {x.size(x.dim() - 1)}, op, "weight");
  check_device(*weight, x, op, "weight");
  return row_ref(*weight, dtype);
}

Tensor rms_norm(Tensor x, OptionalTensor weight, double eps) {
  constexpr const char* kOp = "fastkern::rms_norm";
  const DType dtype = check_norm_input(x, eps, kOp);
  RmsNormFwd args{.x = {}, .weight = check_norm_weight(weight, x, kOp), .y = {}, .eps = eps};
  Tensor y = empty_dense_like(x, dtype);
  args.x = row_ref(x, dtype);
  args.y = ref_of(y, dtype);
  if (!is_cuda(x)) {
    cpu::rms_norm(args);
  } else if constexpr (kHasCuda) {
    cuda::rms_norm(args, current_stream(x));
  }
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dy, Tensor x, OptionalTensor weight, double eps, bool need_dx,
                                        bool need_dweight) {
  constexpr const char* kOp = "fastkern::rms_norm_bwd";
  const DType dtype = check_norm_input(x, eps, kOp);
  FK_CHECK(dtype_of(dy, kOp, "dy") == dtype, kOp, ": dy must be ", dtype_text(x), " like x, got ", dtype_text(dy));
  check_shape(dy, sizes_of(x), kOp, "dy");
  check_device(dy, x, kOp, "dy");
  FK_CHECK(weight || !need_dweight, kOp, ": need_dweight must be False without a weight, got True");

  RmsNormBwd args;
  args.eps = eps;
  args.weight = check_norm_weight(weight, x, kOp);
  Tensor dx = need_dx ? empty_dense_like(x, dtype) : empty_dense({0}, dtype, x);
  Tensor dweight = need_dweight ? empty_dense_like(*weight, args.weight.dtype)
                                : empty_dense({0}, weight ? args.weight.dtype : dtype, x);
  args.x = row_ref(x, dtype);
  args.dy = row_ref(dy, dtype);
  if (need_dx) args.dx = ref_of(dx, dtype);
  if (need_dweight) args.dweight = ref_of(dweight, args.weight.dtype);
  if (!is_cuda(x)) {
    cpu::rms_norm_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(x);
    const Tensor workspace = empty_bytes(cuda::rms_norm_bwd_workspace(args, stream.device), x);
    args.workspace = workspace.data_ptr();
    args.workspace_size = static_cast<std::size_t>(workspace.numel());
    cuda::rms_norm_bwd(args, stream);
  }
  return {dx, dweight};
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
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace fastkern::torch_layer
