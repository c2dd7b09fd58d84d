// SPDX-License-Identifier: Apache-2.0
// What the rotary operators share: checks of the operands, all of them before anything is
// allocated, and the copies that some strides need. The fakes say the same in
// python/fastkern/ops/_rope_check.py.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <utility>

#include "fastkern/rope.h"
#include "tensor.h"

namespace fastkern::torch_layer {

/// The arguments that follow the tables.
struct RopeOptions {
  OptionalTensor positions;
  bool interleaved;
  std::optional<std::int64_t> rotary_dim;
  OptionalTensor cu_seqlens;
};

template <>
struct boxing::Parameter<RopeOptions> {
  static constexpr std::size_t kArguments = 4;
  static RopeOptions next(const StableIValue*& at);
};

/// A call that is being put together; q sets dtype, shape and device.
class RopeCall {
 public:
  /// fail() unless q and k are heads of one type.
  RopeCall(const char* op, const Tensor& q, const OptionalTensor& k);

  /// fail() unless t is like the tensor of heads `like`, "q" or "k".
  TensorRef heads_like(const Tensor& t, const TensorRef& like, const char* argument) const;
  /// fail() unless it is a weight of the head dimension.
  TensorRef weight(const OptionalTensor& t, const char* argument) const;
  /// fail() unless they are what a norm takes, and the heads no larger.
  void check_norm(double eps, double weight_offset);
  void tables(const Tensor& cos, const Tensor& sin, const RopeOptions& options);
  /// fail() if t cannot be written where it lies.
  void check_writable(const TensorRef& t, const char* argument) const;

  /// Makes operands what a kernel can read; to be called after the checks.
  void make_heads(MaybeTensor t, TensorRef& ref);
  void make_dense(MaybeTensor t, TensorRef& ref) { keep(torch_layer::make_dense(t, ref)); }
  void make_readable(const Tensor& cos, const Tensor& sin, const RopeOptions& options);

  /// A new tensor of the shape of heads, or what stands for none, and its view with four
  /// dimensions.
  Tensor new_heads(bool wanted, const TensorRef& like, TensorRef& out) const;
  Tensor new_weight(bool wanted, const TensorRef& like, TensorRef& out) const;

  const TensorRef& q() const { return q_; }
  const TensorRef& k() const { return k_; }
  const RopeAngles& angles() const { return angles_; }
  Device device() const { return device_; }
  /// (total, H, D) as (1, total, H, D).
  static TensorRef four(const TensorRef& t);

 private:
  std::int64_t tokens() const { return q_.sizes[q_.ndim - 3]; }
  void positions(const OptionalTensor& t);
  void cu_seqlens(const OptionalTensor& t, bool with_positions);
  void keep(OptionalTensor copy) {
    if (copy) copies_[copied_++] = std::move(copy);
  }

  const char* op_;
  TensorRef q_, k_;
  Device device_;
  bool normed_ = false;
  RopeAngles angles_;
  TensorRef cu_seqlens_;
  std::array<OptionalTensor, 9> copies_;
  std::size_t copied_ = 0;
};

}  // namespace fastkern::torch_layer
