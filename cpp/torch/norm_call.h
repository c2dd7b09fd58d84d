// SPDX-License-Identifier: Apache-2.0
// What the norm operators share: checks of the operands, all of them before anything is allocated,
// and the copies that some strides need. The fakes say the same in
// python/fastkern/ops/_norm_check.py.
#pragma once

#include <array>

#include "fastkern/norm.h"
#include "tensor.h"

namespace fastkern::torch_layer {

/// A call that is being put together: x sets the device and the shape of everything else.
class NormCall {
 public:
  NormCall(const char* op, const Tensor& x, double eps, double weight_offset,
           const char* x_name = "x");

  const char* op() const { return op_; }
  Device device() const { return device_; }
  const TensorRef& x() const { return x_; }

  /// (..., N), any strides; not given if `t` is not.
  TensorRef rows(MaybeTensor t, const char* argument) const;
  /// (N) or (H, N), of the shape of those before it.
  TensorRef affine(MaybeTensor t, const char* argument);
  TensorRef rowscale(MaybeTensor t) const;
  /// fail() if a gradient is asked for of an operand that is not there.
  void check_needed(bool needed, MaybeTensor t, const char* argument, const char* operand) const;
  Dropout dropout(double p, MaybeTensor seed, MaybeTensor offset) const;

  /// Makes `ref`, the view of `t`, what a kernel can read; to be called after the checks.
  void make_rows(MaybeTensor t, TensorRef& ref) { keep(torch_layer::make_rows(t, ref)); }
  void make_dense(MaybeTensor t, TensorRef& ref) { keep(torch_layer::make_dense(t, ref)); }

  /// A new (..., N) tensor and, in `ref`, its view.
  Tensor new_rows(DType dtype, TensorRef& ref) const;
  /// The gradient of an operand: a new tensor, or the stand-in for one that is not needed.
  Tensor new_gradient(bool needed, const TensorRef& like, DType dtype, TensorRef& ref) const;

  void launch(NormFwd& args);
  void launch(NormBwd& args);

 private:
  /// Points to an offset of 0 if dropout has none.
  void complete(Dropout& dropout);
  void keep(OptionalTensor&& copy) {
    if (copy) copies_[copied_++] = std::move(copy);
  }

  const char* op_;
  const char* x_name_;
  TensorRef x_;
  Device device_;
  TensorRef affine_;  // the first one given
  const char* affine_name_ = nullptr;
  std::array<OptionalTensor, 10> copies_;  // for as long as the launch takes
  std::size_t copied_ = 0;
};

}  // namespace fastkern::torch_layer
