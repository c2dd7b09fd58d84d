// SPDX-License-Identifier: Apache-2.0
// What the loss operators share: checks of the operands, all of them before anything is allocated,
// and the copies that some strides need. The fakes say the same in
// python/fastkern/ops/_loss_check.py.
#pragma once

#include <array>

#include "fastkern/loss.h"
#include "tensor.h"

namespace fastkern::torch_layer {

/// The arguments that every loss operator ends with.
struct LossNumbers {
  std::int64_t ignore_index;
  double label_smoothing, lse_square_scale, softcap, logit_scale;
  std::int64_t reduction;
};

/// A call that is being put together; `logits` sets the shape, whether they exist or not.
class LossCall {
 public:
  LossCall(const char* op, const Tensor& logits);
  LossCall(const char* op, const TensorRef& logits, Device device, const char* like);

  /// Target and weights of classes; fail() unless they fit.
  void operands(const Tensor& target, MaybeTensor weight, const char* weight_name = "weight");
  /// fail() unless they are in their range.
  void numbers(const LossNumbers& n);

  /// Makes target and weight what a kernel can read; to be called after the checks.
  void make_readable(const Tensor& target, MaybeTensor weight);
  void make_rows(MaybeTensor t, TensorRef& ref) { keep(torch_layer::make_rows(t, ref)); }
  /// A dense f32 tensor of the shape of the loss, or of a row's values; nullptr if not given.
  const float* gradient(MaybeTensor t, const char* argument, bool of_rows);

  /// What forward saved for backward.
  const float* state_of(const Tensor& state) const;

  const CrossEntropy& args() const { return args_; }
  bool reduced() const { return args_.reduction != Reduction::none; }
  std::int64_t rows() const { return rows_; }
  std::int64_t classes() const { return logits_.sizes[logits_.ndim - 1]; }
  Device device() const { return device_; }

  Tensor new_row_values() const {
    return new_dense(logits_.sizes.data(), logits_.ndim - 1, DType::f32, device_);
  }
  Tensor new_loss() const {
    return new_dense(logits_.sizes.data(), reduced() ? 0 : logits_.ndim - 1, DType::f32, device_);
  }
  Tensor new_state() const;

 private:
  void keep(OptionalTensor copy) {
    if (copy) copies_[copied_++] = std::move(copy);
  }

  TensorRef logits_;
  Device device_;
  const char* like_;
  std::int64_t rows_ = 1;
  CrossEntropy args_;
  TensorRef target_;
  std::array<OptionalTensor, 8> copies_;
  std::size_t copied_ = 0;
};

inline float* floats_of(const Tensor& t) { return static_cast<float*>(data_of(t)); }

void launch(CrossEntropyFwd& args, std::int64_t rows, Device device);
void launch(const CrossEntropyBwd& args, Device device);
void launch(LossSums& args, Device device);

}  // namespace fastkern::torch_layer
