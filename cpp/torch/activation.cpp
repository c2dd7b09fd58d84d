// SPDX-License-Identifier: Apache-2.0
// Gated activations for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/activation.py.
#include "fastkern/activation.h"

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "tensor.h"
#include "text.h"

namespace fastkern::torch_layer {
namespace {

/// The arguments that an operator may have beside its tensors.
struct Options {
  ActivationKind kind;
  bool interleaved = false;
  ActivationNumbers numbers = {};
};

ActivationKind gelu_of(const Text& approximate, const char* op) {
  if (approximate.value == "none") return ActivationKind::gelu;
  FK_CHECK(approximate.value == "tanh", op, ": approximate must be \"none\" or \"tanh\", got \"",
           approximate.value, "\"");
  return ActivationKind::gelu_tanh;
}

Options clamped(double alpha, double limit, double up_offset, bool interleaved, const char* op) {
  check_finite(alpha, op, "alpha");
  FK_CHECK(limit > 0.0, op, ": limit must be above 0, got ", limit);
  check_finite(up_offset, op, "up_offset");
  return {ActivationKind::clamped_silu,
          interleaved,
          {static_cast<float>(alpha), static_cast<float>(limit), static_cast<float>(up_offset)}};
}

/// Columns `begin` to `begin + n` of the last dimension.
TensorRef columns(TensorRef t, std::int64_t begin, std::int64_t n) {
  const int last = t.ndim - 1;
  if (t.data) {
    t.data = static_cast<char*>(t.data) + begin * t.strides[last] * size_of(t.dtype);
  }
  t.sizes[last] = n;
  return t;
}

/// A call that is being put together: `a` sets device, type and shape of the rest.
class Call {
 public:
  Call(const char* op, const Tensor& a, const OptionalTensor& b, const Options& options)
      : op_(op), options_(options), a_(ref_of(a, op, "a")), device_(device_of(a)) {
    FK_CHECK(a_.ndim >= 1, op, ": a must have at least one dimension, got a scalar of shape ()");
    const int last = a_.ndim - 1;
    result_ = a_;
    if (b) {
      b_ = operand(*b, a_, "b");
      FK_CHECK(!options.interleaved, op, ": interleaved must be False with b, got True");
    } else {
      FK_CHECK(a_.sizes[last] % 2 == 0, op,
               ": a must have an even last dimension without b, got shape ", a_.shape());
      result_.sizes[last] /= 2;
    }
  }

  Device device() const { return device_; }
  DType dtype() const { return a_.dtype; }
  bool packed() const { return !b_.given(); }
  bool empty() const { return result_.numel() == 0; }

  /// An operand of the shape of the result.
  TensorRef like_result(const Tensor& t, const char* argument) const {
    return operand(t, result_, argument);
  }
  /// Inputs that kernels can read; to be called after the checks.
  template <class Args>
  void make_readable(const Tensor& a, const OptionalTensor& b, Args& args) {
    keep(make_rows(a, a_));
    if (!packed()) keep(make_rows(*b, b_));
    args.op = op_;
    args.kind = options_.kind;
    args.numbers = options_.numbers;
    place(a_, b_, args.gate, args.up, args.pairs);
  }
  void make_rows_of(const Tensor& t, TensorRef& ref) { keep(make_rows(t, ref)); }

  Tensor new_result(DType dtype, TensorRef& ref) const {
    Tensor t = new_like(result_, dtype, device_);
    ref = dense_ref(t, result_, dtype);
    return t;
  }
  /// The gradients of a and b, or what stands for one that is not needed.
  std::tuple<Tensor, Tensor> new_gradients(bool need_da, bool need_db, GatedBwd& args) const {
    Tensor da = need_da ? new_like(a_, device_) : no_output(dtype(), device_);
    Tensor db = need_db && !packed() ? new_like(b_, device_) : no_output(dtype(), device_);
    place(need_da ? dense_ref(da, a_) : TensorRef{},
          need_db && !packed() ? dense_ref(db, b_) : TensorRef{}, args.dgate, args.dup,
          args.dpairs);
    return {std::move(da), std::move(db)};
  }

 private:
  TensorRef operand(const Tensor& t, const TensorRef& like, const char* argument) const {
    const TensorRef ref = ref_of(t, op_, argument);
    FK_CHECK(ref.dtype == a_.dtype, op_, ": ", argument, " must be ", dtype_text(a_.dtype),
             " like a, got ", dtype_text(ref.dtype));
    check_shape(ref, like.sizes.data(), like.ndim, op_, argument);
    check_device(t, device_, op_, argument, "a");
    return ref;
  }
  /// Of `a` and `b`, or of the halves of a packed `a`, the first goes through the activation; of
  /// glu the second.
  void place(const TensorRef& a, const TensorRef& b, TensorRef& gate, TensorRef& up,
             TensorRef& pairs) const {
    if (options_.interleaved) {
      pairs = a;
      return;
    }
    TensorRef first = a, second = b;
    if (packed() && a.given()) {
      const std::int64_t n = result_.sizes[result_.ndim - 1];
      first = columns(a, 0, n);
      second = columns(a, n, n);
    }
    if (options_.kind == ActivationKind::sigmoid) std::swap(first, second);
    gate = first;
    up = second;
  }
  void keep(OptionalTensor&& copy) {
    if (copy) copies_[copied_++] = std::move(copy);
  }

  const char* op_;
  Options options_;
  TensorRef a_, b_, result_;
  Device device_;
  std::array<OptionalTensor, 3> copies_;  // for as long as the launch takes
  std::size_t copied_ = 0;
};

void launch(const GatedFwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::gated(args);
  } else if constexpr (kHasCuda) {
    cuda::gated(args, current_stream(device));
  }
}

void launch(const GatedBwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::gated_bwd(args);
  } else if constexpr (kHasCuda) {
    cuda::gated_bwd(args, current_stream(device));
  }
}

Tensor forward(const char* op, const Tensor& a, const OptionalTensor& b, const Options& options) {
  Call call(op, a, b, options);
  GatedFwd args;
  call.make_readable(a, b, args);
  Tensor y = call.new_result(call.dtype(), args.y);
  if (!call.empty()) launch(args, call.device());
  return y;
}

Tensor quantised(const char* op, const Tensor& a, const OptionalTensor& b, const Tensor& scale,
                 const Options& options, OptionalType quant_dtype) {
  Call call(op, a, b, options);
  GatedFwd args;
  args.scale = dense(one_float(scale, call.device(), op, "scale"), DType::f32, 1);
  const DType quant = quant_type(quant_dtype, op, "quant_dtype");
  call.make_readable(a, b, args);
  Tensor q = call.new_result(quant, args.y);
  if (!call.empty()) launch(args, call.device());
  return q;
}

using Gradients = std::tuple<Tensor, Tensor>;

Gradients backward(const char* op, const Tensor& dy, const Tensor& a, const OptionalTensor& b,
                   const Options& options, bool need_da, bool need_db) {
  Call call(op, a, b, options);
  GatedBwd args;
  args.dy = call.like_result(dy, "dy");
  FK_CHECK(b || !need_db, op, ": need_db must be False without b, got True");
  call.make_readable(a, b, args);
  call.make_rows_of(dy, args.dy);
  Gradients gradients = call.new_gradients(need_da, need_db, args);
  if (!call.empty() && (need_da || need_db)) launch(args, call.device());
  return gradients;
}

// ---- the operators ------------------------------------------------------------------------------

template <ActivationKind kKind>
Tensor plain(const Tensor& a, const OptionalTensor& b, bool interleaved) {
  const char* const op = kKind == ActivationKind::silu ? "fastkern::swiglu" : "fastkern::reglu";
  return forward(op, a, b, {kKind, interleaved});
}
template <ActivationKind kKind>
Gradients plain_bwd(const Tensor& dy, const Tensor& a, const OptionalTensor& b, bool interleaved,
                    bool need_da, bool need_db) {
  const char* const op =
      kKind == ActivationKind::silu ? "fastkern::swiglu_bwd" : "fastkern::reglu_bwd";
  return backward(op, dy, a, b, {kKind, interleaved}, need_da, need_db);
}

Tensor glu(const Tensor& a, const OptionalTensor& b) {
  return forward("fastkern::glu", a, b, {ActivationKind::sigmoid});
}
Gradients glu_bwd(const Tensor& dy, const Tensor& a, const OptionalTensor& b, bool need_da,
                  bool need_db) {
  return backward("fastkern::glu_bwd", dy, a, b, {ActivationKind::sigmoid}, need_da, need_db);
}

Tensor geglu(const Tensor& a, const OptionalTensor& b, const Text& approximate, bool interleaved) {
  constexpr const char* kOp = "fastkern::geglu";
  return forward(kOp, a, b, {gelu_of(approximate, kOp), interleaved});
}
Gradients geglu_bwd(const Tensor& dy, const Tensor& a, const OptionalTensor& b,
                    const Text& approximate, bool interleaved, bool need_da, bool need_db) {
  constexpr const char* kOp = "fastkern::geglu_bwd";
  return backward(kOp, dy, a, b, {gelu_of(approximate, kOp), interleaved}, need_da, need_db);
}

Tensor clamped_swiglu(const Tensor& a, const OptionalTensor& b, double alpha, double limit,
                      double up_offset, bool interleaved) {
  constexpr const char* kOp = "fastkern::clamped_swiglu";
  return forward(kOp, a, b, clamped(alpha, limit, up_offset, interleaved, kOp));
}
Gradients clamped_swiglu_bwd(const Tensor& dy, const Tensor& a, const OptionalTensor& b,
                             double alpha, double limit, double up_offset, bool interleaved,
                             bool need_da, bool need_db) {
  constexpr const char* kOp = "fastkern::clamped_swiglu_bwd";
  return backward(kOp, dy, a, b, clamped(alpha, limit, up_offset, interleaved, kOp), need_da,
                  need_db);
}

Tensor swiglu_static_quant(const Tensor& a, const OptionalTensor& b, const Tensor& scale,
                           bool interleaved, OptionalType quant_dtype) {
  return quantised("fastkern::swiglu_static_quant", a, b, scale,
                   {ActivationKind::silu, interleaved}, quant_dtype);
}
Tensor geglu_static_quant(const Tensor& a, const OptionalTensor& b, const Tensor& scale,
                          const Text& approximate, bool interleaved, OptionalType quant_dtype) {
  constexpr const char* kOp = "fastkern::geglu_static_quant";
  return quantised(kOp, a, b, scale, {gelu_of(approximate, kOp), interleaved}, quant_dtype);
}
Tensor clamped_swiglu_static_quant(const Tensor& a, const OptionalTensor& b, const Tensor& scale,
                                   double alpha, double limit, double up_offset, bool interleaved,
                                   OptionalType quant_dtype) {
  constexpr const char* kOp = "fastkern::clamped_swiglu_static_quant";
  return quantised(kOp, a, b, scale, clamped(alpha, limit, up_offset, interleaved, kOp),
                   quant_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const std::string& op, const std::string& options) {
    const std::string inputs = "Tensor a, Tensor? b=None" + options;
    for (const std::string end : {"", "_fwd"})
      m.def((op + end + "(" + inputs + ") -> Tensor").c_str());
    m.def((op + "_bwd(Tensor dy, " + inputs +
           ", bool need_da=True, bool need_db=True) -> (Tensor da, Tensor db)")
              .c_str());
  };
  const auto define_quant = [&](const std::string& op, const std::string& options) {
    m.def((op + "_static_quant(Tensor a, Tensor? b, Tensor scale" + options +
           ", ScalarType? quant_dtype=None) -> Tensor")
              .c_str());
  };
  const std::string interleaved = ", bool interleaved=False";
  const std::string approximate = ", str approximate=\"none\"" + interleaved;
  const std::string limits =
      ", float alpha=1.702, float limit=7.0, float up_offset=1.0" + interleaved;
  define("swiglu", interleaved);
  define("reglu", interleaved);
  define("glu", "");
  define("geglu", approximate);
  define("clamped_swiglu", limits);
  define_quant("swiglu", interleaved);
  define_quant("geglu", approximate);
  define_quant("clamped_swiglu", limits);
}

FASTKERN_REGISTER(m) {
  m.impl("swiglu", box<&plain<ActivationKind::silu>>);
  m.impl("swiglu_fwd", box<&plain<ActivationKind::silu>>);
  m.impl("swiglu_bwd", box<&plain_bwd<ActivationKind::silu>>);
  m.impl("reglu", box<&plain<ActivationKind::relu>>);
  m.impl("reglu_fwd", box<&plain<ActivationKind::relu>>);
  m.impl("reglu_bwd", box<&plain_bwd<ActivationKind::relu>>);
  m.impl("glu", box<&glu>);
  m.impl("glu_fwd", box<&glu>);
  m.impl("glu_bwd", box<&glu_bwd>);
  m.impl("geglu", box<&geglu>);
  m.impl("geglu_fwd", box<&geglu>);
  m.impl("geglu_bwd", box<&geglu_bwd>);
  m.impl("clamped_swiglu", box<&clamped_swiglu>);
  m.impl("clamped_swiglu_fwd", box<&clamped_swiglu>);
  m.impl("clamped_swiglu_bwd", box<&clamped_swiglu_bwd>);
  m.impl("swiglu_static_quant", box<&swiglu_static_quant>);
  m.impl("geglu_static_quant", box<&geglu_static_quant>);
  m.impl("clamped_swiglu_static_quant", box<&clamped_swiglu_static_quant>);
}

}  // namespace fastkern::torch_layer
