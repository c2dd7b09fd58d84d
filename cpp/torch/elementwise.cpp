// SPDX-License-Identifier: Apache-2.0
// The pointwise functions for torch: one description a signature, and from the engine's table the
// operators that have it. Fakes and autograd: python/fastkern/ops/elementwise.py.
//
// The stable ABI has no type for "a number of any type": an operand that may be a number has an
// overload for tensors, one for integers (.int) and one for floating-point numbers (.float). The
// number stays on the host.
#include <algorithm>
#include <initializer_list>

#include "pointwise_forms.h"

namespace fastkern::torch_layer {
namespace {

using Call = PointwiseArguments;
using F = Pointwise;

constexpr const char* kOps[] = {
#define FASTKERN_NAME(name, ...) "fastkern::" #name,
    FASTKERN_POINTWISE_OPS(FASTKERN_NAME)
#undef FASTKERN_NAME
};
constexpr const char* kInPlaceOps[] = {
#define FASTKERN_NAME(name, ...) "fastkern::" #name "_",
    FASTKERN_POINTWISE_OPS(FASTKERN_NAME)
#undef FASTKERN_NAME
};

template <F kF>
struct Named {
  static constexpr F kFunction = kF;
  static constexpr const char* kOp = kOps[static_cast<int>(kF)];
  static constexpr const char* kInPlace = kInPlaceOps[static_cast<int>(kF)];
};

// ---- signatures ---------------------------------------------------------------------------------

template <F kF>
struct Unary : Named<kF> {
  static void fill(Call& call, const Tensor& input) { call.add(input, "input"); }
};

/// Other: const Tensor&, std::int64_t or double.
template <F kF, class Other>
struct Binary : Named<kF> {
  static void fill(Call& call, const Tensor& input, Other other) {
    call.add(input, "input");
    call.add(other, "other");
  }
};

template <F kF, class Other>
struct Scaled : Named<kF> {
  static void fill(Call& call, const Tensor& input, Other other, double alpha) {
    call.add(input, "input");
    call.add(other, "other");
    call.set_alpha(alpha);
  }
};

template <class Other>
struct Div : Named<F::div> {
  static void fill(Call& call, const Tensor& input, Other other, const OptionalText& rounding) {
    call.add(input, "input");
    call.add(other, "other");
    if (!rounding) return;
    const bool trunc = rounding->value == "trunc";
    FK_CHECK(trunc || rounding->value == "floor", call.op(),
             ": rounding_mode must be None, \"trunc\" or \"floor\", got \"", rounding->value, "\"");
    call.set_function(trunc ? F::div_trunc : F::div_floor);
  }
};

/// One of base and exponent is a tensor.
template <class Base, class Exponent>
struct Pow : Named<F::pow> {
  static void fill(Call& call, Base input, Exponent exponent) {
    call.add(input, "input");
    call.add(exponent, "exponent");
    if constexpr (std::is_same_v<Exponent, std::int64_t>) {
      FK_CHECK(exponent >= 0 || category_of(call.common()) >= TypeCategory::floating, call.op(),
               ": exponent must be at least 0 where input is an integer, got ", exponent);
    }
  }
};

bool is_tanh(const Call& call, const Text& approximate) {
  if (approximate.value == "none") return false;
  FK_CHECK(approximate.value == "tanh", call.op(),
           ": approximate must be \"none\" or \"tanh\", got \"", approximate.value, "\"");
  return true;
}

struct Gelu : Named<F::gelu> {
  static void fill(Call& call, const Tensor& input, const Text& approximate) {
    call.add(input, "input");
    if (is_tanh(call, approximate)) call.set_function(F::gelu_tanh);
  }
};

struct GeluBwd : Named<F::gelu_bwd> {
  static void fill(Call& call, const Tensor& dy, const Tensor& x, const Text& approximate) {
    call.add(dy, "dy");
    call.add(x, "x");
    if (is_tanh(call, approximate)) call.set_function(F::gelu_tanh_bwd);
  }
};

template <F kF>
struct BwdOfInput : Named<kF> {
  static void fill(Call& call, const Tensor& dy, const Tensor& x) {
    call.add(dy, "dy");
    call.add(x, "x");
  }
};

template <F kF>
struct BwdOfOutput : Named<kF> {
  static void fill(Call& call, const Tensor& dy, const Tensor& y) {
    call.add(dy, "dy");
    call.add(y, "y");
  }
};

/// Limit: an optional tensor, integer or floating-point number.
template <class Limit>
struct Clamp : Named<F::clamp> {
  static constexpr const char* kOp = "fastkern::clamp";
  static void fill(Call& call, const Tensor& input, Limit min, Limit max) {
    FK_CHECK(min || max, call.op(), ": min must be given, or max");
    call.add(input, "input");
    if (min) call.add(*min, "min");
    if (max) call.add(*max, "max");
    if (!min || !max) call.set_function(min ? F::clamp_min : F::clamp_max);
  }
};

template <class Input, class Other>
struct Where : Named<F::where> {
  static void fill(Call& call, const Tensor& condition, Input input, Other other) {
    call.add(condition, "condition", false);
    call.check_boolean();
    call.add(input, "input");
    call.add(other, "other");
  }
};

// ---- triu ---------------------------------------------------------------------------------------

void triu_into(const char* op, const Tensor& input, const Tensor& out, const char* name,
               std::int64_t diagonal) {
  Triangle args{.op = op, .x = number_ref_of(input, op, "input"), .out = {}, .diagonal = diagonal};
  FK_CHECK(args.x.ndim >= 2, op, ": input must have at least two dimensions, got ", args.x.ndim);
  const Device device = device_of(input);
  args.out = number_ref_of(out, op, name);
  check_shape(args.out, args.x.sizes.data(), args.x.ndim, op, name);
  FK_CHECK(args.out.dtype == args.x.dtype, op, ": ", name, " must be ", dtype_text(args.x.dtype),
           ", got ", dtype_text(args.out.dtype));
  check_device(out, device, op, name, "input");
  if (!device.is_cuda) return cpu::triu(args);
  if constexpr (kHasCuda) cuda::triu(args, current_stream(device));
}

Tensor triu(const Tensor& input, std::int64_t diagonal) {
  constexpr const char* kOp = "fastkern::triu";
  const TensorRef like = number_ref_of(input, kOp, "input");
  Tensor out = new_like(like, device_of(input));
  triu_into(kOp, input, out, "out", diagonal);
  return out;
}

void triu_out(const Tensor& input, std::int64_t diagonal, const Tensor& out) {
  triu_into("fastkern::triu", input, out, "out", diagonal);
}

void triu_(const Tensor& input, std::int64_t diagonal) {
  triu_into("fastkern::triu_", input, input, "input", diagonal);
}

// ---- which operator has which -------------------------------------------------------------------

constexpr bool is_one_of(F f, std::initializer_list<F> list) {
  return std::find(list.begin(), list.end(), f) != list.end();
}

/// Functions with a signature of their own, or that are part of another operator.
constexpr bool is_special(F f) {
  return is_one_of(f, {F::copy, F::gelu, F::gelu_tanh, F::rsub, F::div, F::div_trunc, F::div_floor,
                       F::pow, F::clamp_min, F::clamp_max, F::where, F::clamp, F::gelu_bwd,
                       F::gelu_tanh_bwd, F::add, F::sub});
}
constexpr bool is_bwd(F f) { return f >= F::relu_bwd; }
constexpr bool takes_integers(F f) {
  return !is_one_of(f, {F::maximum, F::minimum, F::logical_and, F::logical_or});
}
constexpr bool takes_floats(F f) {
  return takes_integers(f) && !is_one_of(f, {F::bitwise_and, F::bitwise_or});
}
constexpr bool has_in_place(F f) {
  return !is_one_of(f, {F::isnan, F::isinf, F::maximum, F::minimum});
}

template <F kF, class To>
void one(const To& to) {
  if constexpr (is_special(kF)) {
  } else if constexpr (is_bwd(kF)) {
    if constexpr (is_one_of(kF, {F::tanh_bwd, F::sigmoid_bwd, F::relu_bwd})) {
      to.template forms<BwdOfOutput<kF>>("", "Tensor dy, Tensor y");
    } else {
      to.template forms<BwdOfInput<kF>>("", "Tensor dy, Tensor x");
    }
  } else if constexpr (pointwise_info(kF).inputs == 1) {
    to.template forms<Unary<kF>>("", "Tensor input");
    if constexpr (has_in_place(kF)) to.template in_place<Unary<kF>>("", "Tensor input");
  } else {
    const auto all = [&]<class Op>(const std::string& overload, const std::string& arguments) {
      to.template forms<Op>(overload, arguments);
      if constexpr (has_in_place(kF)) to.template in_place<Op>(overload, arguments);
    };
    all.template operator()<Binary<kF, const Tensor&>>("", "Tensor input, Tensor other");
    if constexpr (takes_integers(kF)) {
      all.template operator()<Binary<kF, std::int64_t>>("int", "Tensor input, int other");
    }
    if constexpr (takes_floats(kF)) {
      all.template operator()<Binary<kF, double>>("float", "Tensor input, float other");
    }
  }
}

template <class To>
void special(const To& to) {
  using Integer = std::optional<std::int64_t>;
  using Float = std::optional<double>;
  const auto all = [&]<class Op>(const char* overload, const std::string& arguments) {
    to.template forms<Op>(overload, arguments);
    to.template in_place<Op>(overload, arguments);
  };
  const std::string alpha = ", float alpha=1.0", rounding = ", str? rounding_mode=None";
  all.template operator()<Scaled<F::add, const Tensor&>>("", "Tensor input, Tensor other" + alpha);
  all.template operator()<Scaled<F::add, std::int64_t>>("int", "Tensor input, int other" + alpha);
  all.template operator()<Scaled<F::add, double>>("float", "Tensor input, float other" + alpha);
  all.template operator()<Scaled<F::sub, const Tensor&>>("", "Tensor input, Tensor other" + alpha);
  all.template operator()<Scaled<F::sub, std::int64_t>>("int", "Tensor input, int other" + alpha);
  all.template operator()<Scaled<F::sub, double>>("float", "Tensor input, float other" + alpha);
  all.template operator()<Div<const Tensor&>>("", "Tensor input, Tensor other" + rounding);
  all.template operator()<Div<std::int64_t>>("int", "Tensor input, int other" + rounding);
  all.template operator()<Div<double>>("float", "Tensor input, float other" + rounding);
  all.template operator()<Pow<const Tensor&, const Tensor&>>("", "Tensor input, Tensor exponent");
  all.template operator()<Pow<const Tensor&, std::int64_t>>("int", "Tensor input, int exponent");
  all.template operator()<Pow<const Tensor&, double>>("float", "Tensor input, float exponent");
  to.template forms<Pow<std::int64_t, const Tensor&>>("int_base", "int input, Tensor exponent");
  to.template forms<Pow<double, const Tensor&>>("float_base", "float input, Tensor exponent");
  all.template operator()<Gelu>("", "Tensor input, str approximate=\"none\"");
  to.template forms<GeluBwd>("", "Tensor dy, Tensor x, str approximate=\"none\"");
  all.template operator()<Clamp<const OptionalTensor&>>(
      "", "Tensor input, Tensor? min=None, Tensor? max=None");
  all.template operator()<Clamp<Integer>>("int", "Tensor input, int? min=None, int? max=None");
  all.template operator()<Clamp<Float>>("float", "Tensor input, float? min=None, float? max=None");
  const std::string where = "Tensor condition, ";
  using T = const Tensor&;
  to.template forms<Where<T, T>>("", where + "Tensor input, Tensor other");
  to.template forms<Where<T, std::int64_t>>("int_other", where + "Tensor input, int other");
  to.template forms<Where<T, double>>("float_other", where + "Tensor input, float other");
  to.template forms<Where<std::int64_t, T>>("int_input", where + "int input, Tensor other");
  to.template forms<Where<double, T>>("float_input", where + "float input, Tensor other");
}

template <class To>
void each(const To& to) {
#define FASTKERN_EACH(name, ...) one<F::name>(to);
  FASTKERN_POINTWISE_OPS(FASTKERN_EACH)
#undef FASTKERN_EACH
  special(to);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const Definer definer{m};
  each(definer);
  definer.define("triu", "(Tensor input, int diagonal=0) -> Tensor");
  definer.define("triu.out", "(Tensor input, int diagonal=0, *, Tensor(a!) out) -> ()");
  definer.define("triu_", "(Tensor(a!) input, int diagonal=0) -> ()");
}

FASTKERN_REGISTER(m) {
  each(Implementer{m});
  m.impl("triu", box<&triu>);
  m.impl("triu.out", box<&triu_out>);
  m.impl("triu_", box<&triu_>);
}

}  // namespace fastkern::torch_layer
