// SPDX-License-Identifier: Apache-2.0
// One call of a pointwise function: operands are added one after the other, then the result is made
// or written where it is wanted.
#pragma once

#include <array>
#include <cstdint>

#include "fastkern/elementwise.h"
#include "fastkern/promotion.h"
#include "tensor.h"

namespace fastkern::torch_layer {

class PointwiseArguments {
 public:
  PointwiseArguments(const char* op, Pointwise function) : op_(op), function_(function) {}

  const char* op() const { return op_; }

  /// Another function, of as many operands or more.
  void set_function(Pointwise function) { function_ = function; }

  /// An operand. Of those that do not promote, such as a condition, the type is not asked for.
  void add(const Tensor& t, const char* name, bool promotes = true);
  void add(std::int64_t value, const char* name) { add_number(Number(value), DType::i64, name); }
  void add(double value, const char* name) { add_number(Number(value), DType::f32, name); }

  /// fail() unless the operand added last is bool (or uint8, as in torch).
  void check_boolean() const;

  /// alpha of add and sub; an integer where the operands are.
  void set_alpha(double alpha) { alpha_ = alpha; }

  /// The type that the operands so far have in common.
  DType common() const;

  Tensor result();
  /// Over `out`, whose shape must be the result's and whose type must be able to hold it.
  void write(const Tensor& out, const char* name);

 private:
  struct Argument {
    const char* name = "";
    const Tensor* tensor = nullptr;  // nullptr: a number
    TensorRef ref;
    Number number;
    OperandType type;
    bool promotes = true;
  };

  void add_number(Number value, DType dtype, const char* name);
  void prepare();
  void check_types() const;
  void find_device();
  void broadcast();
  TensorRef new_layout() const;
  void run(const TensorRef& out);
  [[noreturn]] void refuse_type(const char* wanted) const;

  const char* op_;
  Pointwise function_;
  std::array<Argument, kMaxInputs> arguments_;
  int count_ = 0;
  double alpha_ = 1.0;
  PromotedTypes types_;
  Device device_;
  TensorRef shape_;
};

}  // namespace fastkern::torch_layer
