// SPDX-License-Identifier: Apache-2.0
#include "norm_call.h"

#include <cmath>
#include <string>

namespace fastkern::torch_layer {

NormCall::NormCall(const char* op, const Tensor& x, double eps, double weight_offset,
                   const char* x_name)
    : op_(op), x_name_(x_name), x_(ref_of(x, op, x_name)), device_(device_of(x)) {
  FK_CHECK(x_.ndim >= 1, op, ": ", x_name,
           " must have at least one dimension, got a scalar of shape ()");
  FK_CHECK(std::isfinite(eps) && eps >= 0.0, op, ": eps must be finite and >= 0, got ", eps);
  check_finite(weight_offset, op, "weight_offset");
}

TensorRef NormCall::rows(MaybeTensor t, const char* argument) const {
  if (!t) return {};
  const TensorRef ref = ref_of(*t, op_, argument);
  check_shape(ref, x_.sizes.data(), x_.ndim, op_, argument);
  check_device(*t, device_, op_, argument, x_name_);
  return ref;
}

TensorRef NormCall::affine(MaybeTensor t, const char* argument) {
  if (!t) return {};
  const TensorRef ref = ref_of(*t, op_, argument);
  if (affine_name_) {
    FK_CHECK(ref.ndim == affine_.ndim && ref.sizes == affine_.sizes, op_, ": ", argument,
             " must have shape ", affine_.shape(), " like ", affine_name_, ", got ", ref.shape());
  } else {
    const int lead = x_.ndim - ref.ndim;
    const bool fits = (ref.ndim == 1 || ref.ndim == 2) && lead >= 0 &&
                      std::equal(&x_.sizes[lead], &x_.sizes[x_.ndim], ref.sizes.begin());
    FK_CHECK(fits, op_, ": ", argument, " must have shape ", shape_text(&x_.sizes[x_.ndim - 1], 1),
             x_.ndim > 1 ? " or " + shape_text(&x_.sizes[x_.ndim - 2], 2) : std::string(), ", got ",
             ref.shape());
    affine_ = ref;
    affine_name_ = argument;
  }
  check_device(*t, device_, op_, argument, x_name_);
  return ref;
}

TensorRef NormCall::rowscale(MaybeTensor t) const {
  if (!t) return {};
  TensorRef ref = ref_of(*t, op_, "rowscale");
  check_shape(ref, x_.sizes.data(), x_.ndim - 1, op_, "rowscale");
  check_device(*t, device_, op_, "rowscale", x_name_);
  if (ref.ndim == 0) ref = dense(ref.data, ref.dtype, 1);  // x is one row
  return ref;
}

void NormCall::check_needed(bool needed, MaybeTensor t, const char* argument,
                            const char* operand) const {
  FK_CHECK(t || !needed, op_, ": ", argument, " must be False without ", operand, ", got True");
}

Dropout NormCall::dropout(double p, MaybeTensor seed, MaybeTensor offset) const {
  FK_CHECK(p >= 0.0 && p <= 1.0, op_, ": dropout_p must be between 0 and 1, got ", p);
  Dropout dropout{p, nullptr, nullptr};
  if (seed) dropout.seed = one_int64(*seed, device_, op_, "seed", x_name_);
  if (offset) dropout.offset = one_int64(*offset, device_, op_, "offset", x_name_);
  FK_CHECK(seed || p == 0.0, op_, ": seed must be given with dropout_p > 0, got None");
  return dropout;
}

Tensor NormCall::new_rows(DType dtype, TensorRef& ref) const {
  Tensor t = new_like(x_, dtype, device_);
  ref = dense_ref(t, x_, dtype);
  return t;
}

Tensor NormCall::new_gradient(bool needed, const TensorRef& like, DType dtype,
                              TensorRef& ref) const {
  if (!needed) return no_output(dtype, device_);
  Tensor t = new_like(like, dtype, device_);
  ref = dense_ref(t, like, dtype);
  if (x_.numel() == 0) set_zero(t);  // the sum of no rows; nothing is launched
  return t;
}

void NormCall::complete(Dropout& dropout) {
  if (dropout.p == 0.0 || dropout.offset) return;
  keep(new_zero(device_));
  dropout.offset = static_cast<const std::int64_t*>(data_of(*copies_[copied_ - 1]));
}

void NormCall::launch(NormFwd& args) {
  if (x_.numel() == 0) return;
  complete(args.dropout);
  if (!device_.is_cuda) {
    cpu::norm(args);
  } else if constexpr (kHasCuda) {
    cuda::norm(args, current_stream(device_));
  }
}

void NormCall::launch(NormBwd& args) {
  if (x_.numel() == 0) return;
  complete(args.dropout);
  if (!device_.is_cuda) {
    cpu::norm_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(device_);
    args.workspace_size = cuda::norm_bwd_workspace(args, stream.device);
    const Tensor workspace = new_bytes(args.workspace_size, device_);
    args.workspace = data_of(workspace);
    cuda::norm_bwd(args, stream);
  }
}

}  // namespace fastkern::torch_layer
