// SPDX-License-Identifier: Apache-2.0
// From a description of an operator its three forms: functional, `out=`, in place; each as a schema
// and a kernel.
//
// A description has
//   kOp    its name, "fastkern::exp"
//   fill   fill(PointwiseArguments&, const Tensor& input, ...): adds the operands
#pragma once

#include <string>

#include "pointwise_call.h"
#include "text.h"

namespace fastkern::torch_layer {

template <class Op, class Fill = decltype(&Op::fill)>
struct Forms;

template <class Op, class... Args>
struct Forms<Op, void (*)(PointwiseArguments&, Args...)> {
  static PointwiseArguments arguments(const char* op, Args... args) {
    PointwiseArguments call(op, Op::kFunction);
    Op::fill(call, args...);
    return call;
  }
  static Tensor functional(Args... args) { return arguments(Op::kOp, args...).result(); }
  static void out(Args... args, const Tensor& out) {
    arguments(Op::kOp, args...).write(out, "out");
  }
};

/// In place: the first argument is written.
template <class Op, class Fill = decltype(&Op::fill)>
struct InPlace;

template <class Op, class... Args>
struct InPlace<Op, void (*)(PointwiseArguments&, const Tensor&, Args...)> {
  static void run(const Tensor& input, Args... args) {
    PointwiseArguments call(Op::kInPlace, Op::kFunction);
    Op::fill(call, input, args...);
    call.write(input, "input");
  }
};

/// "fastkern::exp" -> "exp"
inline std::string short_name(const char* op) {
  return std::string(op).substr(std::string("fastkern::").size());
}

inline std::string overload_name(const char* op, const std::string& overload) {
  return overload.empty() ? short_name(op) : short_name(op) + "." + overload;
}

inline std::string out_name(const char* op, const std::string& overload) {
  return short_name(op) + "." + (overload.empty() ? "out" : overload + "_out");
}

struct Definer {
  torch::stable::detail::StableLibrary& library;

  void define(const std::string& name, const std::string& schema) const {
    library.def((name + schema).c_str());
  }
  template <class Op>
  void forms(const std::string& overload, const std::string& arguments) const {
    define(overload_name(Op::kOp, overload), "(" + arguments + ") -> Tensor");
    define(out_name(Op::kOp, overload), "(" + arguments + ", *, Tensor(a!) out) -> ()");
  }
  template <class Op>
  void in_place(const std::string& overload, std::string arguments) const {
    arguments.replace(0, std::string("Tensor").size(), "Tensor(a!)");
    define(overload_name(Op::kInPlace, overload), "(" + arguments + ") -> ()");
  }
};

struct Implementer {
  torch::stable::detail::StableLibrary& library;

  template <class Op>
  void forms(const std::string& overload, const std::string&) const {
    library.impl(overload_name(Op::kOp, overload).c_str(), box<&Forms<Op>::functional>);
    library.impl(out_name(Op::kOp, overload).c_str(), box<&Forms<Op>::out>);
  }
  template <class Op>
  void in_place(const std::string& overload, const std::string&) const {
    library.impl(overload_name(Op::kInPlace, overload).c_str(), box<&InPlace<Op>::run>);
  }
};

}  // namespace fastkern::torch_layer
