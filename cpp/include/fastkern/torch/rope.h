// SPDX-License-Identifier: Apache-2.0
// The rotary operators on at::Tensor, with gradients; to be included through fastkern/torch.h,
// which says how it is linked.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "fastkern/torch/common.h"

namespace fastkern {

/// Where tokens stand, and which columns make a pair; as in Python's fastkern.rope.
struct RopeOptions {
  MaybeTensor positions = std::nullopt;  // int64 or int32, (S), (B or 1, S) or (total)
  bool interleaved = false;
  std::optional<std::int64_t> rotary_dim = std::nullopt;  // none: D
  MaybeTensor cu_seqlens = std::nullopt;  // int32, (sequences + 1), for (total, H, D)
};

namespace detail {

using QAndK = std::tuple<at::Tensor, at::Tensor>;

inline QAndK rope_fwd(const at::Tensor& q, const MaybeTensor& k, const at::Tensor& cos,
                      const at::Tensor& sin, const RopeOptions& o, bool inverse) {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  static const auto op =
      find_operator<QAndK(T, M, T, T, M, bool, std::optional<std::int64_t>, M, bool)>(
          "fastkern::rope_fwd");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(q, k, cos, sin, given(o.positions), o.interleaved, o.rotary_dim,
                 given(o.cu_seqlens), inverse);
}

inline QAndK qk_norm_rope_fwd(const at::Tensor& q, const MaybeTensor& k,
                              const MaybeTensor& q_weight, const MaybeTensor& k_weight,
                              const at::Tensor& cos, const at::Tensor& sin, double eps,
                              double weight_offset, const RopeOptions& o) {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  static const auto op =
      find_operator<QAndK(T, M, M, M, T, T, double, double, M, bool, std::optional<std::int64_t>,
                          M)>("fastkern::qk_norm_rope_fwd");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(q, k, q_weight, k_weight, cos, sin, eps, weight_offset, given(o.positions),
                 o.interleaved, o.rotary_dim, given(o.cu_seqlens));
}

/// What backward needs of the options; tensors are saved elsewhere.
inline void save_options(torch::autograd::AutogradContext* ctx, const RopeOptions& o) {
  ctx->saved_data["interleaved"] = o.interleaved;
  ctx->saved_data["rotary_dim"] = o.rotary_dim;
}
inline RopeOptions saved_options(torch::autograd::AutogradContext* ctx, const at::Tensor& positions,
                                 const at::Tensor& cu_seqlens) {
  return {maybe(positions), ctx->saved_data["interleaved"].toBool(),
          ctx->saved_data["rotary_dim"].toOptional<std::int64_t>(), maybe(cu_seqlens)};
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, const at::Tensor& q, const MaybeTensor& k,
                           const at::Tensor& cos, const at::Tensor& sin, const RopeOptions& o,
                           bool inverse) {
    const auto [q_out, k_out] = rope_fwd(q, k, cos, sin, o, inverse);
    ctx->save_for_backward({cos, sin, or_undefined(o.positions), or_undefined(o.cu_seqlens)});
    save_options(ctx, o);
    ctx->saved_data["inverse"] = inverse;
    ctx->saved_data["with_k"] = k.has_value();
    return {q_out, k_out};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    const MaybeTensor dk =
        ctx->saved_data["with_k"].toBool() ? MaybeTensor(grads[1]) : std::nullopt;
    auto [dq, back] =
        rope_fwd(grads[0], dk, saved[0], saved[1], saved_options(ctx, saved[2], saved[3]),
                 !ctx->saved_data["inverse"].toBool());
    return differentiable_once({dq, dk ? back : at::Tensor(), {}, {}, {}, {}}, "fastkern::rope");
  }
};

struct QkNormRopeFunction : torch::autograd::Function<QkNormRopeFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, const at::Tensor& q, const MaybeTensor& k,
                           const MaybeTensor& q_weight, const MaybeTensor& k_weight,
                           const at::Tensor& cos, const at::Tensor& sin, double eps,
                           double weight_offset, const RopeOptions& o) {
    const auto [q_out, k_out] =
        qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, eps, weight_offset, o);
    ctx->save_for_backward({q, or_undefined(k), or_undefined(q_weight), or_undefined(k_weight), cos,
                            sin, or_undefined(o.positions), or_undefined(o.cu_seqlens)});
    save_options(ctx, o);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["weight_offset"] = weight_offset;
    for (const auto& [name, t] : {std::pair{"need_q", MaybeTensor(q)},
                                  {"need_k", k},
                                  {"need_q_weight", q_weight},
                                  {"need_k_weight", k_weight}})
      ctx->saved_data[name] = t && t->requires_grad();
    return {q_out, k_out};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    using T = const at::Tensor&;
    using M = const MaybeTensor&;
    using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    static const auto op =
        find_operator<Four(T, M, T, M, M, M, T, T, double, double, M, bool,
                           std::optional<std::int64_t>, M, bool, bool, bool, bool)>(
            "fastkern::qk_norm_rope_bwd");
    const Variables s = ctx->get_saved_variables();
    const RopeOptions o = saved_options(ctx, s[6], s[7]);
    const auto need = [&](const char* name) { return ctx->saved_data[name].toBool(); };
    const bool q = need("need_q"), k = need("need_k");
    const bool q_weight = need("need_q_weight"), k_weight = need("need_k_weight");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [dq, dk, dq_weight, dk_weight] =
        op.call(grads[0], s[1].defined() ? MaybeTensor(grads[1]) : std::nullopt, s[0], maybe(s[1]),
                maybe(s[2]), maybe(s[3]), s[4], s[5], ctx->saved_data["eps"].toDouble(),
                ctx->saved_data["weight_offset"].toDouble(), o.positions, o.interleaved,
                o.rotary_dim, o.cu_seqlens, q, k, q_weight, k_weight);
    const auto wanted = [](bool need, const at::Tensor& t) { return need ? t : at::Tensor(); };
    return differentiable_once({wanted(q, dq),
                                wanted(k, dk),
                                wanted(q_weight, dq_weight),
                                wanted(k_weight, dk_weight),
                                {},
                                {},
                                {},
                                {},
                                {}},
                               "fastkern::qk_norm_rope");
  }
};

inline void no_table_gradient(const char* op, const at::Tensor& cos, const at::Tensor& sin) {
  for (const auto& [name, t] : {std::pair{"cos", cos}, {"sin", sin}}) {
    TORCH_CHECK(!want_gradient(MaybeTensor(t)), op, ": ", name,
                " must not require grad, it has no gradient here; detach it");
  }
}

/// k as it was given: undefined where there was none.
inline QAndK q_and_k(at::Tensor q, at::Tensor k, bool with_k) {
  return {std::move(q), with_k ? std::move(k) : at::Tensor()};
}

}  // namespace detail

/// Rotary embeddings of q and k, the fastkern.rope of Python.
///   q         (B, S, H, D) or (total, H, D), float32, float16 or bfloat16
///   k         the same with heads of its own, or none
///   cos, sin  (T, W), or (B or 1, S, W): a row for each token; W is rotary_dim / 2 or rotary_dim
///   inverse   turns back
/// Returns q and k turned, contiguous; k is undefined where none was given.
inline std::tuple<at::Tensor, at::Tensor> rope(const at::Tensor& q, const MaybeTensor& k,
                                               const at::Tensor& cos, const at::Tensor& sin,
                                               const RopeOptions& options = {},
                                               bool inverse = false) {
  const MaybeTensor other = detail::given(k);
  detail::no_table_gradient("fastkern::rope", cos, sin);
  if (!detail::want_gradient(MaybeTensor(q), other)) {
    auto [q_out, k_out] = detail::rope_fwd(q, other, cos, sin, options, inverse);
    return detail::q_and_k(q_out, k_out, other.has_value());
  }
  const auto out = detail::RopeFunction::apply(q, other, cos, sin, options, inverse);
  return detail::q_and_k(out[0], out[1], other.has_value());
}

/// An RMS norm of each head of q and k, then rope, in one pass: the fastkern.qk_norm_rope of
/// Python.
///   q_weight, k_weight  (D), float32, float16 or bfloat16, or none
inline std::tuple<at::Tensor, at::Tensor> qk_norm_rope(
    const at::Tensor& q, const MaybeTensor& k, const MaybeTensor& q_weight,
    const MaybeTensor& k_weight, const at::Tensor& cos, const at::Tensor& sin, double eps = 1e-6,
    double weight_offset = 0.0, const RopeOptions& options = {}) {
  const MaybeTensor other = detail::given(k), of_q = detail::given(q_weight);
  const MaybeTensor of_k = detail::given(k_weight);
  detail::no_table_gradient("fastkern::qk_norm_rope", cos, sin);
  if (!detail::want_gradient(MaybeTensor(q), other, of_q, of_k)) {
    auto [q_out, k_out] =
        detail::qk_norm_rope_fwd(q, other, of_q, of_k, cos, sin, eps, weight_offset, options);
    return detail::q_and_k(q_out, k_out, other.has_value());
  }
  const auto out = detail::QkNormRopeFunction::apply(q, other, of_q, of_k, cos, sin, eps,
                                                     weight_offset, options);
  return detail::q_and_k(out[0], out[1], other.has_value());
}

}  // namespace fastkern
