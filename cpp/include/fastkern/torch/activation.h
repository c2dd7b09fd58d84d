// SPDX-License-Identifier: Apache-2.0
// Gated activations, bias_act, dropout and bias_dropout_add on at::Tensor, with gradients; to be
// included through fastkern/torch.h, which says how it is linked.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "fastkern/torch/common.h"

namespace fastkern {
namespace detail {

enum class Gate { swiglu, reglu, glu, geglu, clamped_swiglu };

/// What one of them is called with beside its tensors.
struct GateOptions {
  Gate gate = Gate::swiglu;
  bool interleaved = false;
  std::string approximate = "none";
  double alpha = 1.702, limit = 7.0, up_offset = 1.0;
};

inline at::Tensor gated_fwd(const at::Tensor& a, const MaybeTensor& b, const GateOptions& o) {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  switch (o.gate) {
    case Gate::swiglu: {
      static const auto op = find_operator<at::Tensor(T, M, bool)>("fastkern::swiglu_fwd");
      return op.call(a, b, o.interleaved);
    }
    case Gate::reglu: {
      static const auto op = find_operator<at::Tensor(T, M, bool)>("fastkern::reglu_fwd");
      return op.call(a, b, o.interleaved);
    }
    case Gate::glu: {
      static const auto op = find_operator<at::Tensor(T, M)>("fastkern::glu_fwd");
      return op.call(a, b);
    }
    case Gate::geglu: {
      static const auto op =
          find_operator<at::Tensor(T, M, c10::string_view, bool)>("fastkern::geglu_fwd");
      return op.call(a, b, o.approximate, o.interleaved);
    }
    default: {
      static const auto op = find_operator<at::Tensor(T, M, double, double, double, bool)>(
          "fastkern::clamped_swiglu_fwd");
      return op.call(a, b, o.alpha, o.limit, o.up_offset, o.interleaved);
    }
  }
}

inline std::tuple<at::Tensor, at::Tensor> gated_bwd(const at::Tensor& dy, const at::Tensor& a,
                                                    const MaybeTensor& b, const GateOptions& o,
                                                    bool need_da, bool need_db) {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  using Grads = std::tuple<at::Tensor, at::Tensor>;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  switch (o.gate) {
    case Gate::swiglu: {
      static const auto op =
          find_operator<Grads(T, T, M, bool, bool, bool)>("fastkern::swiglu_bwd");
      return op.call(dy, a, b, o.interleaved, need_da, need_db);
    }
    case Gate::reglu: {
      static const auto op = find_operator<Grads(T, T, M, bool, bool, bool)>("fastkern::reglu_bwd");
      return op.call(dy, a, b, o.interleaved, need_da, need_db);
    }
    case Gate::glu: {
      static const auto op = find_operator<Grads(T, T, M, bool, bool)>("fastkern::glu_bwd");
      return op.call(dy, a, b, need_da, need_db);
    }
    case Gate::geglu: {
      static const auto op =
          find_operator<Grads(T, T, M, c10::string_view, bool, bool, bool)>("fastkern::geglu_bwd");
      return op.call(dy, a, b, o.approximate, o.interleaved, need_da, need_db);
    }
    default: {
      static const auto op =
          find_operator<Grads(T, T, M, double, double, double, bool, bool, bool)>(
              "fastkern::clamped_swiglu_bwd");
      return op.call(dy, a, b, o.alpha, o.limit, o.up_offset, o.interleaved, need_da, need_db);
    }
  }
}

struct GatedFunction : torch::autograd::Function<GatedFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static at::Tensor forward(Context* ctx, const at::Tensor& a, const MaybeTensor& b,
                            const GateOptions& o) {
    ctx->save_for_backward({a, or_undefined(b)});
    ctx->saved_data["gate"] = static_cast<std::int64_t>(o.gate);
    ctx->saved_data["interleaved"] = o.interleaved;
    ctx->saved_data["approximate"] = o.approximate;
    ctx->saved_data["alpha"] = o.alpha;
    ctx->saved_data["limit"] = o.limit;
    ctx->saved_data["up_offset"] = o.up_offset;
    return gated_fwd(a, b, o);
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    GateOptions o;
    o.gate = static_cast<Gate>(ctx->saved_data["gate"].toInt());
    o.interleaved = ctx->saved_data["interleaved"].toBool();
    o.approximate = ctx->saved_data["approximate"].toStringRef();
    o.alpha = ctx->saved_data["alpha"].toDouble();
    o.limit = ctx->saved_data["limit"].toDouble();
    o.up_offset = ctx->saved_data["up_offset"].toDouble();
    const MaybeTensor b = maybe(saved[1]);
    const bool need_a = saved[0].requires_grad(), need_b = b && b->requires_grad();
    auto [da, db] = gated_bwd(grads[0], saved[0], b, o, need_a, need_b);
    constexpr const char* kNames[] = {"fastkern::swiglu", "fastkern::reglu", "fastkern::glu",
                                      "fastkern::geglu", "fastkern::clamped_swiglu"};
    return differentiable_once(
        {need_a ? da : at::Tensor(), need_b ? db : at::Tensor(), at::Tensor()},
        kNames[static_cast<int>(o.gate)]);
  }
};

inline at::Tensor gated(const at::Tensor& a, const MaybeTensor& b, const GateOptions& o) {
  if (!want_gradient(MaybeTensor(a), b)) return gated_fwd(a, b, o);
  return GatedFunction::apply(a, b, o);
}

struct BiasActFunction : torch::autograd::Function<BiasActFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static at::Tensor compute(const at::Tensor& x, const MaybeTensor& bias, const std::string& act) {
    static const auto op =
        find_operator<at::Tensor(const at::Tensor&, const MaybeTensor&, c10::string_view)>(
            "fastkern::bias_act_fwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(x, bias, act);
  }

  static at::Tensor forward(Context* ctx, const at::Tensor& x, const MaybeTensor& bias,
                            const std::string& act) {
    ctx->save_for_backward({x, or_undefined(bias)});
    ctx->saved_data["act"] = act;
    return compute(x, bias, act);
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    using T = const at::Tensor&;
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
        T, T, const MaybeTensor&, c10::string_view, bool, bool)>("fastkern::bias_act_bwd");
    const Variables saved = ctx->get_saved_variables();
    const MaybeTensor bias = maybe(saved[1]);
    const bool need_x = saved[0].requires_grad(), need_bias = bias && bias->requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [dx, dbias] =
        op.call(grads[0], saved[0], bias, ctx->saved_data["act"].toStringRef(), need_x, need_bias);
    return differentiable_once(
        {need_x ? dx : at::Tensor(), need_bias ? dbias : at::Tensor(), at::Tensor()},
        "fastkern::bias_act");
  }
};

/// dropout and, with a residual, bias_dropout_add.
struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static at::Tensor compute(const at::Tensor& x, const MaybeTensor& bias,
                            const MaybeTensor& residual, double p, const MaybeTensor& seed,
                            const MaybeTensor& offset) {
    using T = const at::Tensor&;
    using M = const MaybeTensor&;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (!residual) {
      static const auto op = find_operator<at::Tensor(T, double, M, M)>("fastkern::dropout_fwd");
      return op.call(x, p, seed, offset);
    }
    static const auto op =
        find_operator<at::Tensor(T, M, T, double, M, M)>("fastkern::bias_dropout_add_fwd");
    return op.call(x, bias, *residual, p, seed, offset);
  }

  static at::Tensor forward(Context* ctx, const at::Tensor& x, const MaybeTensor& bias,
                            const MaybeTensor& residual, double p, const MaybeTensor& seed,
                            const MaybeTensor& offset) {
    ctx->save_for_backward({or_undefined(bias), or_undefined(seed), or_undefined(offset)});
    ctx->saved_data["p"] = p;
    ctx->saved_data["add"] = residual.has_value();
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["need_x"] = x.requires_grad();
    ctx->saved_data["need_residual"] = residual && residual->requires_grad();
    return compute(x, bias, residual, p, seed, offset);
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    using T = const at::Tensor&;
    using M = const MaybeTensor&;
    const Variables saved = ctx->get_saved_variables();
    const MaybeTensor bias = maybe(saved[0]), seed = maybe(saved[1]), offset = maybe(saved[2]);
    const double p = ctx->saved_data["p"].toDouble();
    const bool need_x = ctx->saved_data["need_x"].toBool();
    const bool need_bias = bias && bias->requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor dx, dbias, dresidual;
    if (!ctx->saved_data["add"].toBool()) {
      static const auto op = find_operator<at::Tensor(T, double, M, M)>("fastkern::dropout_bwd");
      dx = op.call(grads[0], p, seed, offset);
    } else {
      static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor>(
          T, M, double, M, M, MaybeType, bool, bool)>("fastkern::bias_dropout_add_bwd");
      std::tie(dx, dbias) = op.call(grads[0], bias, p, seed, offset,
                                    ctx->saved_data["x_dtype"].toScalarType(), need_x, need_bias);
      if (ctx->saved_data["need_residual"].toBool()) dresidual = grads[0];
    }
    return differentiable_once({need_x ? dx : at::Tensor(), need_bias ? dbias : at::Tensor(),
                                dresidual, at::Tensor(), at::Tensor(), at::Tensor()},
                               "fastkern::dropout");
  }
};

inline at::Tensor dropped(const at::Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual,
                          double p, MaybeTensor seed, MaybeTensor offset) {
  if (p != 0.0 && !seed) draw(x, seed, offset);
  if (!want_gradient(MaybeTensor(x), bias, residual))
    return DropoutFunction::compute(x, bias, residual, p, seed, offset);
  return DropoutFunction::apply(x, bias, residual, p, seed, offset);
}

}  // namespace detail

/// silu(a) * b, the fastkern.swiglu of Python.
///   a            (..., N) float32, float16 or bfloat16, any strides; without b a packed (..., 2N)
///   b            (..., N) of the dtype of a
///   interleaved  a packed a holds pairs, not halves
/// Returns (..., N), contiguous, of the dtype of a.
inline at::Tensor swiglu(const at::Tensor& a, const MaybeTensor& b = std::nullopt,
                         bool interleaved = false) {
  return detail::gated(a, detail::given(b), {detail::Gate::swiglu, interleaved});
}

/// gelu(a) * b; `approximate`: "none" or "tanh".
inline at::Tensor geglu(const at::Tensor& a, const MaybeTensor& b = std::nullopt,
                        const std::string& approximate = "none", bool interleaved = false) {
  return detail::gated(a, detail::given(b), {detail::Gate::geglu, interleaved, approximate});
}

/// relu(a) * b.
inline at::Tensor reglu(const at::Tensor& a, const MaybeTensor& b = std::nullopt,
                        bool interleaved = false) {
  return detail::gated(a, detail::given(b), {detail::Gate::reglu, interleaved});
}

/// a * sigmoid(b).
inline at::Tensor glu(const at::Tensor& a, const MaybeTensor& b = std::nullopt) {
  return detail::gated(a, detail::given(b), {detail::Gate::glu});
}

/// g * sigmoid(alpha * g) * (u + up_offset), g = min(a, limit), u = clamp(b, -limit, limit).
inline at::Tensor clamped_swiglu(const at::Tensor& a, const MaybeTensor& b = std::nullopt,
                                 double alpha = 1.702, double limit = 7.0, double up_offset = 1.0,
                                 bool interleaved = false) {
  return detail::gated(
      a, detail::given(b),
      {detail::Gate::clamped_swiglu, interleaved, "none", alpha, limit, up_offset});
}

/// act(x + bias); `act`: "gelu", "gelu_tanh", "relu", "silu" or "quick_gelu".
inline at::Tensor bias_act(const at::Tensor& x, const MaybeTensor& bias = std::nullopt,
                           const std::string& act = "gelu") {
  const MaybeTensor b = detail::given(bias);
  if (!detail::want_gradient(MaybeTensor(x), b)) return detail::BiasActFunction::compute(x, b, act);
  return detail::BiasActFunction::apply(x, b, act);
}

/// Elements of x are 0 with probability p, the others multiplied by 1 / (1 - p). Without a seed,
/// one int64 on the device of x, one is drawn from torch's generator.
inline at::Tensor dropout(const at::Tensor& x, double p = 0.5,
                          const MaybeTensor& seed = std::nullopt,
                          const MaybeTensor& offset = std::nullopt) {
  return detail::dropped(x, std::nullopt, std::nullopt, p, detail::given(seed),
                         detail::given(offset));
}

/// residual + dropout(x + bias), of the dtype of residual.
inline at::Tensor bias_dropout_add(const at::Tensor& x, const MaybeTensor& bias,
                                   const at::Tensor& residual, double p = 0.0,
                                   const MaybeTensor& seed = std::nullopt,
                                   const MaybeTensor& offset = std::nullopt) {
  return detail::dropped(x, detail::given(bias), residual, p, detail::given(seed),
                         detail::given(offset));
}

}  // namespace fastkern
