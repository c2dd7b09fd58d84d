// SPDX-License-Identifier: Apache-2.0
// The operators as C++ functions on at::Tensor, with gradients, for programs that use LibTorch 2.10
// or later.
//
//   #include <fastkern/torch.h>
//   at::Tensor y = fastkern::rms_norm(x, weight);   // differentiable if x or weight requires grad
//
// This header is compiled by its user against the user's LibTorch and holds no kernels. The
// operators come from libfastkern_torch.so, which registers them when it is loaded, by one of
//   CMake     target_link_libraries(app PRIVATE fastkern::torch "${TORCH_LIBRARIES}"); the target
//             keeps the linker from dropping a library no symbol is taken from
//   by hand   -Wl,--no-as-needed -lfastkern_torch
//   run time  dlopen("/path/to/libfastkern_torch.so", RTLD_NOW) before the first call
//   Python    import fastkern, for extension modules
//
// Gradients: the formula of the operator "fastkern::rms_norm" is registered from Python. In a
// process without Python a call of it through the dispatcher is NOT differentiable: backward()
// warns once and leaves the gradients of its inputs undefined. The functions here bring their own
// formula and work everywhere. They can be differentiated once; a second derivative raises an
// error.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace fastkern {
namespace detail {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(
      found.has_value(), name,
      " is not registered: libfastkern_torch.so is not loaded (link fastkern::torch or dlopen it)");
  return found->typed<Signature>();
}

/// First derivatives made with create_graph=True: usable, but an error once they are differentiated
/// themselves.
inline torch::autograd::variable_list differentiable_once(torch::autograd::variable_list grads,
                                                          const char* op) {
  if (!at::GradMode::is_enabled()) return grads;
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad = grad.detach().requires_grad_();
  }
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      std::string(op) +
          ": the C++ function can be differentiated once only, a second derivative was asked for",
      static_cast<std::int64_t>(grads.size()));
  return error->apply(std::move(grads));
}

inline at::Tensor rms_norm_fwd(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               double eps) {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, double)>(
          "fastkern::rms_norm_fwd");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, weight, eps);
}

inline std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy, const at::Tensor& x,
                                                       const std::optional<at::Tensor>& weight,
                                                       double eps, bool need_dx,
                                                       bool need_dweight) {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, bool)>(
      "fastkern::rms_norm_bwd");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(dy, x, weight, eps, need_dx, need_dweight);
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const std::optional<at::Tensor>& weight, double eps) {
    ctx->save_for_backward({x, weight.value_or(at::Tensor())});
    ctx->saved_data["eps"] = eps;
    return rms_norm_fwd(x, weight, eps);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> weight =
        saved[1].defined() ? std::optional(saved[1]) : std::nullopt;
    const bool need_dx = ctx->needs_input_grad(0),
               need_dweight = weight && ctx->needs_input_grad(1);
    const auto [dx, dweight] = rms_norm_bwd(
        grads[0], saved[0], weight, ctx->saved_data["eps"].toDouble(), need_dx, need_dweight);
    return differentiable_once(
        {need_dx ? dx : at::Tensor(), need_dweight ? dweight : at::Tensor(), at::Tensor()},
        "fastkern::rms_norm");
  }
};

}  // namespace detail

/// x * rsqrt(mean(x^2, -1) + eps) * weight, the fastkern.rms_norm of Python.
///   x       (..., N) float32, float16 or bfloat16, on the CPU or a CUDA device, any strides
///   weight  (N) float32, float16 or bfloat16; none (or an undefined tensor): ones
///   eps     added inside the root; finite and >= 0
/// Returns (..., N), contiguous, dtype of x. Anything else throws a std::runtime_error that names
/// the argument.
inline at::Tensor rms_norm(const at::Tensor& x,
                           const std::optional<at::Tensor>& weight = std::nullopt,
                           double eps = 1e-6) {
  const std::optional<at::Tensor> given = weight && weight->defined() ? weight : std::nullopt;
  const bool differentiate =
      at::GradMode::is_enabled() && (x.requires_grad() || (given && given->requires_grad()));
  return differentiate ? detail::RmsNorm::apply(x, given, eps)
                       : detail::rms_norm_fwd(x, given, eps);
}

}  // namespace fastkern
