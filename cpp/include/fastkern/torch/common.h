// SPDX-License-Identifier: Apache-2.0
// What the functions of fastkern/torch.h share; to be included through that.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

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

using MaybeTensor = std::optional<at::Tensor>;
using MaybeType = std::optional<at::ScalarType>;

/// None for what is not given, be it absent or undefined.
inline MaybeTensor given(const MaybeTensor& t) { return t && t->defined() ? t : std::nullopt; }
inline at::Tensor or_undefined(const MaybeTensor& t) { return t.value_or(at::Tensor()); }
inline MaybeTensor maybe(const at::Tensor& t) {
  return t.defined() ? MaybeTensor(t) : std::nullopt;
}

template <class... Tensors>
bool want_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && ((tensors && tensors->requires_grad()) || ...);
}

/// A seed and, if there is none, an offset, from torch's generator of the device of x.
inline void draw(const at::Tensor& x, MaybeTensor& seed, MaybeTensor& offset) {
  const std::vector<at::Tensor> drawn =
      at::randint(std::numeric_limits<std::int64_t>::max(), {2}, x.options().dtype(at::kLong))
          .unbind();
  seed = drawn[0];
  if (!offset) offset = drawn[1];
}

}  // namespace detail

using MaybeTensor = detail::MaybeTensor;
using MaybeType = detail::MaybeType;

}  // namespace fastkern
