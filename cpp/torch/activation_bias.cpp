// SPDX-License-Identifier: Apache-2.0
// The bias in front of an activation, dropout, and bias, dropout and residual, for torch: schema,
// checks, allocation, launch. Fakes and autograd: python/fastkern/ops/activation.py, dropout.py.
#include <array>
#include <tuple>
#include <utility>

#include "fastkern/activation.h"
#include "fastkern/dropout.h"
#include "tensor.h"
#include "text.h"

namespace fastkern::torch_layer {
namespace {

ActivationKind kind_of(const Text& act, const char* op) {
  if (act.value == "gelu") return ActivationKind::gelu;
  if (act.value == "gelu_tanh") return ActivationKind::gelu_tanh;
  if (act.value == "relu") return ActivationKind::relu;
  if (act.value == "silu") return ActivationKind::silu;
  FK_CHECK(act.value == "quick_gelu", op,
           ": act must be \"gelu\", \"gelu_tanh\", \"relu\", \"silu\" or \"quick_gelu\", got \"",
           act.value, "\"");
  return ActivationKind::quick_gelu;
}

/// A call that is being put together: x, whatever its name, sets device and shape of the rest.
class Call {
 public:
  Call(const char* op, const Tensor& x, const char* name, bool with_columns)
      : op_(op), name_(name), x_(ref_of(x, op, name)), device_(device_of(x)) {
    FK_CHECK(!with_columns || x_.ndim >= 1, op, ": ", name,
             " must have at least one dimension, got a scalar of shape ()");
  }

  Device device() const { return device_; }
  const TensorRef& x() const { return x_; }
  bool empty() const { return x_.numel() == 0; }

  TensorRef like_x(const Tensor& t, const char* argument, bool same_type) const {
    const TensorRef ref = ref_of(t, op_, argument);
    FK_CHECK(!same_type || ref.dtype == x_.dtype, op_, ": ", argument, " must be ",
             dtype_text(x_.dtype), " like ", name_, ", got ", dtype_text(ref.dtype));
    check_shape(ref, x_.sizes.data(), x_.ndim, op_, argument);
    check_device(t, device_, op_, argument, name_);
    return ref;
  }
  TensorRef bias(const OptionalTensor& t) const {
    if (!t) return {};
    const TensorRef ref = ref_of(*t, op_, "bias");
    check_shape(ref, &x_.sizes[x_.ndim - 1], 1, op_, "bias");
    check_device(*t, device_, op_, "bias", name_);
    return ref;
  }
  Dropout dropout(double p, const OptionalTensor& seed, const OptionalTensor& offset) const {
    FK_CHECK(p >= 0.0 && p <= 1.0, op_, ": p must be between 0 and 1, got ", p);
    Dropout dropout{p, nullptr, nullptr};
    if (seed) dropout.seed = one_int64(*seed, device_, op_, "seed", name_);
    if (offset) dropout.offset = one_int64(*offset, device_, op_, "offset", name_);
    FK_CHECK(seed || p == 0.0, op_, ": seed must be given with p > 0, got None");
    return dropout;
  }

  /// What kernels can read; to be called after the checks.
  void rows(const Tensor& t, TensorRef& ref) {
    if (ref.ndim == 0) ref = dense(ref.data, ref.dtype, 1);
    keep(make_rows(t, ref));
  }
  void columns(const OptionalTensor& t, TensorRef& ref) { keep(make_dense(t, ref)); }
  void complete(Dropout& dropout) {
    if (dropout.p == 0.0 || dropout.offset) return;
    keep(new_zero(device_));
    dropout.offset = static_cast<const std::int64_t*>(data_of(*copies_[copied_ - 1]));
  }
  Tensor new_like_x(DType dtype, TensorRef& ref) const {
    Tensor t = new_like(x_, dtype, device_);
    ref = dense_ref(t, x_, dtype);
    if (ref.ndim == 0) ref = dense(ref.data, dtype, 1);
    return t;
  }
  Tensor new_gradient(bool needed, const TensorRef& like, DType dtype, TensorRef& ref) const {
    if (!needed) return no_output(dtype, device_);
    Tensor t = new_like(like, dtype, device_);
    ref = dense_ref(t, like, dtype);
    if (empty()) set_zero(t);  // the sum of no rows; nothing is launched
    return t;
  }
  void check_needed(bool needed, const TensorRef& bias) const {
    FK_CHECK(bias.given() || !needed, op_, ": need_dbias must be False without bias, got True");
  }

  void launch(const BiasAct& args) const {
    if (!device_.is_cuda) {
      cpu::bias_act(args);
    } else if constexpr (kHasCuda) {
      cuda::bias_act(args, current_stream(device_));
    }
  }
  void launch(const DropoutCall& args) const {
    if (!device_.is_cuda) {
      cpu::dropout(args);
    } else if constexpr (kHasCuda) {
      cuda::dropout(args, current_stream(device_));
    }
  }
  void launch(const BiasDropoutAdd& args) const {
    if (!device_.is_cuda) {
      cpu::bias_dropout_add(args);
    } else if constexpr (kHasCuda) {
      cuda::bias_dropout_add(args, current_stream(device_));
    }
  }
  /// Of those that sum over rows.
  template <class Args>
  void launch_sums(Args& args) const {
    if (!device_.is_cuda) return on_cpu(args);
    if constexpr (kHasCuda) {
      const Stream stream = current_stream(device_);
      args.workspace_size = cuda::column_sums_workspace(args.dy, args.dbias);
      OptionalTensor workspace;
      if (args.workspace_size > 0) workspace = new_bytes(args.workspace_size, device_);
      if (workspace) args.workspace = data_of(*workspace);
      on_cuda(args, stream);
    }
  }

 private:
  static void on_cpu(const BiasActBwd& args) { cpu::bias_act_bwd(args); }
  static void on_cpu(const BiasDropoutAddBwd& args) { cpu::bias_dropout_add_bwd(args); }
  static void on_cuda(const BiasActBwd& args, Stream stream) {
    if constexpr (kHasCuda) cuda::bias_act_bwd(args, stream);
  }
  static void on_cuda(const BiasDropoutAddBwd& args, Stream stream) {
    if constexpr (kHasCuda) cuda::bias_dropout_add_bwd(args, stream);
  }
  void keep(OptionalTensor&& copy) {
    if (copy) copies_[copied_++] = std::move(copy);
  }

  const char* op_;
  const char* name_;
  TensorRef x_;
  Device device_;
  std::array<OptionalTensor, 5> copies_;  // for as long as the launch takes
  std::size_t copied_ = 0;
};

using Gradients = std::tuple<Tensor, Tensor>;

// ---- bias and activation ------------------------------------------------------------------------

Tensor bias_act(const Tensor& x, const OptionalTensor& bias, const Text& act) {
  BiasAct args;
  Call call(args.op, x, "x", true);
  args.x = call.x();
  args.bias = call.bias(bias);
  args.kind = kind_of(act, args.op);
  call.rows(x, args.x);
  call.columns(bias, args.bias);
  Tensor y = call.new_like_x(args.x.dtype, args.y);
  if (!call.empty()) call.launch(args);
  return y;
}

Gradients bias_act_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                       const Text& act, bool need_dx, bool need_dbias) {
  BiasActBwd args;
  Call call(args.op, x, "x", true);
  args.x = call.x();
  args.dy = call.like_x(dy, "dy", true);
  args.bias = call.bias(bias);
  args.kind = kind_of(act, args.op);
  call.check_needed(need_dbias, args.bias);
  call.rows(x, args.x);
  call.rows(dy, args.dy);
  call.columns(bias, args.bias);
  Tensor dx = call.new_gradient(need_dx, call.x(), args.x.dtype, args.dx);
  const DType type = args.bias.given() ? args.bias.dtype : args.x.dtype;
  Tensor dbias = call.new_gradient(need_dbias, args.bias, type, args.dbias);
  if (!call.empty() && (need_dx || need_dbias)) call.launch_sums(args);
  return {std::move(dx), std::move(dbias)};
}

// ---- dropout ------------------------------------------------------------------------------------

Tensor drop(const char* op, const char* name, const Tensor& x, double p, const OptionalTensor& seed,
            const OptionalTensor& offset) {
  DropoutCall args;
  args.op = op;
  Call call(op, x, name, false);
  args.x = call.x();
  args.dropout = call.dropout(p, seed, offset);
  call.rows(x, args.x);
  call.complete(args.dropout);
  Tensor y = call.new_like_x(args.x.dtype, args.y);
  if (!call.empty()) call.launch(args);
  return y;
}

Tensor dropout(const Tensor& x, double p, const OptionalTensor& seed,
               const OptionalTensor& offset) {
  return drop("fastkern::dropout", "x", x, p, seed, offset);
}

Tensor dropout_bwd(const Tensor& dy, double p, const OptionalTensor& seed,
                   const OptionalTensor& offset) {
  return drop("fastkern::dropout_bwd", "dy", dy, p, seed, offset);
}

// ---- bias, dropout and residual -----------------------------------------------------------------

Tensor bias_dropout_add(const Tensor& x, const OptionalTensor& bias, const Tensor& residual,
                        double p, const OptionalTensor& seed, const OptionalTensor& offset) {
  BiasDropoutAdd args;
  Call call(args.op, x, "x", true);
  args.x = call.x();
  args.bias = call.bias(bias);
  args.residual = call.like_x(residual, "residual", false);
  args.dropout = call.dropout(p, seed, offset);
  call.rows(x, args.x);
  call.rows(residual, args.residual);
  call.columns(bias, args.bias);
  call.complete(args.dropout);
  Tensor y = call.new_like_x(args.residual.dtype, args.y);
  if (!call.empty()) call.launch(args);
  return y;
}

Gradients bias_dropout_add_bwd(const Tensor& dy, const OptionalTensor& bias, double p,
                               const OptionalTensor& seed, const OptionalTensor& offset,
                               OptionalType x_dtype, bool need_dx, bool need_dbias) {
  BiasDropoutAddBwd args;
  Call call(args.op, dy, "dy", true);
  args.dy = call.x();
  const TensorRef operand = call.bias(bias);
  args.dropout = call.dropout(p, seed, offset);
  const DType type = float_type(x_dtype, args.dy.dtype, args.op, "x_dtype");
  call.check_needed(need_dbias, operand);
  call.rows(dy, args.dy);
  call.complete(args.dropout);
  Tensor dx = call.new_gradient(need_dx, call.x(), type, args.dx);
  Tensor dbias = call.new_gradient(need_dbias, operand, operand.dtype, args.dbias);
  if (!call.empty() && (need_dx || need_dbias)) call.launch_sums(args);
  return {std::move(dx), std::move(dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string bias_and_act = "Tensor x, Tensor? bias=None, str act=\"gelu\"";
  const std::string drawn = "Tensor? seed=None, Tensor? offset=None";
  const std::string gradients =
      "bool need_dx=True, bool need_dbias=True) -> (Tensor dx, Tensor dbias)";
  for (const std::string end : {"", "_fwd"}) {
    m.def(("bias_act" + end + "(" + bias_and_act + ") -> Tensor").c_str());
    m.def(("dropout" + end + "(Tensor x, float p=0.5, " + drawn + ") -> Tensor").c_str());
    m.def(("bias_dropout_add" + end + "(Tensor x, Tensor? bias, Tensor residual, float p=0.0, " +
           drawn + ") -> Tensor")
              .c_str());
  }
  m.def(("bias_act_bwd(Tensor dy, " + bias_and_act + ", " + gradients).c_str());
  m.def(("dropout_bwd(Tensor dy, float p, " + drawn + ") -> Tensor").c_str());
  m.def(("bias_dropout_add_bwd(Tensor dy, Tensor? bias, float p, " + drawn +
         ", ScalarType? x_dtype=None, " + gradients)
            .c_str());
}

FASTKERN_REGISTER(m) {
  m.impl("bias_act", box<&bias_act>);
  m.impl("bias_act_fwd", box<&bias_act>);
  m.impl("bias_act_bwd", box<&bias_act_bwd>);
  m.impl("dropout", box<&dropout>);
  m.impl("dropout_fwd", box<&dropout>);
  m.impl("dropout_bwd", box<&dropout_bwd>);
  m.impl("bias_dropout_add", box<&bias_dropout_add>);
  m.impl("bias_dropout_add_fwd", box<&bias_dropout_add>);
  m.impl("bias_dropout_add_bwd", box<&bias_dropout_add_bwd>);
}

}  // namespace fastkern::torch_layer
