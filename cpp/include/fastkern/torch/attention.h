// SPDX-License-Identifier: Apache-2.0
// Attention on at::Tensor, with gradients; to be included through fastkern/torch.h, which says how
// it is linked.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "fastkern/torch/common.h"

namespace fastkern {

/// What an attention may be told beside q, k and v: the arguments of fastkern.flash_attn in Python.
struct AttentionOptions {
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;  // -1: unlimited
  std::optional<double> scale = std::nullopt;        // none: 1 / sqrt(D)
  MaybeTensor bias = std::nullopt;                   // (B or 1, H or 1, S or 1, T), float or bool
  MaybeTensor alibi_slopes = std::nullopt;           // (H) or (B, H), float; not differentiable
  double softcap = 0.0;
  MaybeTensor sinks = std::nullopt;  // (H)
  double dropout_p = 0.0;
  MaybeTensor seed = std::nullopt;    // one int64 on q's device; none: drawn with torch's generator
  MaybeTensor offset = std::nullopt;  // the same; none: 0, or drawn with the seed
  bool top_left = false;
  MaybeTensor prefix = std::nullopt;      // (B), int
  MaybeTensor block_mask = std::nullopt;  // (H or 1, S / block_size, T / block_size), bool
  std::int64_t block_size = 128;
  MaybeTensor seqused_q = std::nullopt, seqused_k = std::nullopt;  // (B), int
  bool deterministic = true;
};

namespace detail {

/// An operator whose arguments are `Lead`, the options and `Trail`.
template <class Result, class Lead, class... Trail>
struct AttentionOp;
template <class Result, class... Lead, class... Trail>
struct AttentionOp<Result, std::tuple<Lead...>, Trail...> {
  using Maybe = const MaybeTensor&;
  using Signature = Result(Lead..., bool, std::int64_t, std::int64_t, std::optional<double>, Maybe,
                           Maybe, double, Maybe, double, Maybe, Maybe, bool, Maybe, Maybe,
                           std::int64_t, Maybe, Maybe, bool, Trail...);
  const c10::TypedOperatorHandle<Signature> handle;

  explicit AttentionOp(const char* name) : handle(find_operator<Signature>(name)) {}
  Result operator()(Lead... lead, const AttentionOptions& o, Trail... trail) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(lead..., o.causal, o.window_left, o.window_right, o.scale, o.bias,
                       o.alibi_slopes, o.softcap, o.sinks, o.dropout_p, o.seed, o.offset,
                       o.top_left, o.prefix, o.block_mask, o.block_size, o.seqused_q, o.seqused_k,
                       o.deterministic, trail...);
  }
};

/// Packed tensors come with where their sequences start, others with undefined tensors for that.
struct AttentionOps {
  using T = const at::Tensor&;
  using OutLse = std::tuple<at::Tensor, at::Tensor>;
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static OutLse fwd(T q, T k, T v, T start_q, T start_k, const AttentionOptions& o) {
    if (start_q.defined()) {
      static const AttentionOp<OutLse, std::tuple<T, T, T, T, T>> op(
          "fastkern::flash_attn_varlen_fwd");
      return op(q, k, v, start_q, start_k, o);
    }
    static const AttentionOp<OutLse, std::tuple<T, T, T>> op("fastkern::flash_attn_fwd");
    return op(q, k, v, o);
  }

  static Gradients bwd(T dout, const MaybeTensor& dlse, T q, T k, T v, T out, T lse, T start_q,
                       T start_k, const AttentionOptions& o, const std::vector<bool>& needs) {
    using M = const MaybeTensor&;
    if (start_q.defined()) {
      static const AttentionOp<Gradients, std::tuple<T, M, T, T, T, T, T, T, T>, bool, bool, bool,
                               bool, bool>
          op("fastkern::flash_attn_varlen_bwd");
      return op(dout, dlse, q, k, v, out, lse, start_q, start_k, o, needs[0], needs[1], needs[2],
                needs[3], needs[4]);
    }
    static const AttentionOp<Gradients, std::tuple<T, M, T, T, T, T, T>, bool, bool, bool, bool,
                             bool>
        op("fastkern::flash_attn_bwd");
    return op(dout, dlse, q, k, v, out, lse, o, needs[0], needs[1], needs[2], needs[3], needs[4]);
  }
};

/// `bias` and `sinks` are those of the options, for torch to see.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, const at::Tensor& q, const at::Tensor& k,
                           const at::Tensor& v, const MaybeTensor& bias, const MaybeTensor& sinks,
                           const MaybeTensor& start_q, const MaybeTensor& start_k,
                           const AttentionOptions& o) {
    ctx->set_materialize_grads(false);
    const at::Tensor starts[] = {or_undefined(start_q), or_undefined(start_k)};
    auto [out, lse] = AttentionOps::fwd(q, k, v, starts[0], starts[1], o);
    Variables saved = {q, k, v, out, lse, starts[0], starts[1]};
    for (const MaybeTensor& t : {bias, o.alibi_slopes, sinks, o.seed, o.offset, o.prefix,
                                 o.block_mask, o.seqused_q, o.seqused_k}) {
      saved.push_back(or_undefined(t));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["integers"] = std::vector<std::int64_t>{
        o.causal, o.window_left, o.window_right, o.top_left, o.block_size, o.deterministic};
    const double scale = o.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
    ctx->saved_data["numbers"] = std::vector<double>{scale, o.softcap, o.dropout_p};
    return {out, lse};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    const auto option = [&](std::size_t i) { return maybe(saved[7 + i]); };
    const auto integers = ctx->saved_data["integers"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const AttentionOptions o{.causal = integers[0] != 0,
                             .window_left = integers[1],
                             .window_right = integers[2],
                             .scale = numbers[0],
                             .bias = option(0),
                             .alibi_slopes = option(1),
                             .softcap = numbers[1],
                             .sinks = option(2),
                             .dropout_p = numbers[2],
                             .seed = option(3),
                             .offset = option(4),
                             .top_left = integers[3] != 0,
                             .prefix = option(5),
                             .block_mask = option(6),
                             .block_size = integers[4],
                             .seqused_q = option(7),
                             .seqused_k = option(8),
                             .deterministic = integers[5] != 0};
    std::size_t edge = 0;  // torch counts the tensors that were given
    std::vector<bool> needs;
    for (const bool given : {true, true, true, o.bias.has_value(), o.sinks.has_value()}) {
      needs.push_back(given && ctx->needs_input_grad(edge++));
    }
    Variables result(8);  // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const at::Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(saved[3]);
    auto [dq, dk, dv, dbias, dsinks] =
        AttentionOps::bwd(dout, maybe(grads[1]), saved[0], saved[1], saved[2], saved[3], saved[4],
                          saved[5], saved[6], o, needs);
    const at::Tensor found[] = {dq, dk, dv, dbias, dsinks};
    for (std::size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) result[i] = found[i];
    }
    return differentiable_once(std::move(result), saved[5].defined() ? "fastkern::flash_attn_varlen"
                                                                     : "fastkern::flash_attn");
  }
};

inline std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& v, const MaybeTensor& start_q,
                                                    const MaybeTensor& start_k,
                                                    AttentionOptions o) {
  for (MaybeTensor* t : {&o.bias, &o.alibi_slopes, &o.sinks, &o.seed, &o.offset, &o.prefix,
                         &o.block_mask, &o.seqused_q, &o.seqused_k}) {
    *t = given(*t);
  }
  TORCH_CHECK(!want_gradient(o.alibi_slopes),
              "fastkern::flash_attn: alibi_slopes must not require grad");
  if (o.dropout_p > 0.0 && !o.seed) draw(q, o.seed, o.offset);
  if (!want_gradient(MaybeTensor(q), MaybeTensor(k), MaybeTensor(v), o.bias, o.sinks)) {
    return AttentionOps::fwd(q, k, v, or_undefined(start_q), or_undefined(start_k), o);
  }
  const auto outputs = AttentionFunction::apply(q, k, v, o.bias, o.sinks, start_q, start_k, o);
  return {outputs[0], outputs[1]};
}

/// The gradient is made of torch's operators.
struct MergeFunction : torch::autograd::Function<MergeFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  using OutLse = std::tuple<at::Tensor, at::Tensor>;

  static OutLse merge(const at::Tensor& outs, const at::Tensor& lses) {
    static const auto op = find_operator<OutLse(const at::Tensor&, const at::Tensor&)>(
        "fastkern::merge_attention_fwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(outs, lses);
  }

  static Variables forward(Context* ctx, const at::Tensor& outs, const at::Tensor& lses) {
    ctx->set_materialize_grads(false);
    auto [out, lse] = merge(outs, lses);
    ctx->save_for_backward({outs, lses, lse});
    return {out, lse};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    const at::Tensor &outs = saved[0], &lses = saved[1], &lse = saved[2];
    // A part that saw nothing may be anything, and so may the gradients where none saw a key.
    const at::Tensor hidden = lses.isneginf(), empty = lse.isneginf();
    const at::Tensor weights = (lses - lse.masked_fill(empty, 0.0)).exp();
    const auto rows = [](const at::Tensor& t) { return t.transpose(-1, -2).unsqueeze(-1); };
    at::Tensor douts, dlses;
    if (grads[0].defined()) {
      const at::Tensor dout = grads[0].to(at::kFloat);
      douts = (rows(weights) * dout).masked_fill(rows(hidden), 0.0).to(outs.scalar_type());
      const at::Tensor seen = outs.to(at::kFloat).masked_fill(rows(hidden), 0.0);
      const at::Tensor parts = (seen * dout).contiguous().sum(-1).transpose(-1, -2);
      dlses = weights * (parts - (weights * parts).sum(0));
    }
    if (grads[1].defined()) {
      const at::Tensor more = weights * grads[1];
      dlses = dlses.defined() ? dlses + more : more;
    }
    if (dlses.defined()) dlses = dlses.masked_fill(empty, 0.0);
    return {ctx->needs_input_grad(0) ? douts : at::Tensor(),
            ctx->needs_input_grad(1) ? dlses : at::Tensor()};
  }
};

}  // namespace detail

/// softmax(scale * q k^T + bias) v, the fastkern.flash_attn of Python: (out, lse).
///   q  (B, S, H, D) float32, float16 or bfloat16, on the CPU
///   k  (B, T, G, D) of q's type, G a divisor of H;  v  (B, T, G, Dv)
/// Returns (B, S, H, Dv) of q's type and (B, H, S) float32, both contiguous, both differentiable.
inline std::tuple<at::Tensor, at::Tensor> flash_attn(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& v,
                                                     const AttentionOptions& options = {}) {
  return detail::attention(q, k, v, std::nullopt, std::nullopt, options);
}

/// The same on B packed sequences: q (total, H, D), k (total, G, D), v (total, G, Dv); sequence b
/// has the rows cu_seqlens[b] to cu_seqlens[b + 1], (B + 1) int. Returns (total, H, Dv), (H,
/// total).
inline std::tuple<at::Tensor, at::Tensor> flash_attn_varlen(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, const AttentionOptions& options = {}) {
  return detail::attention(q, k, v, cu_seqlens_q, cu_seqlens_k, options);
}

/// Attentions over K disjoint sets of keys, put together: outs (K, B, S, H, Dv), lses (K, B, H, S)
/// float32. Returns (out, lse) as flash_attn does.
inline std::tuple<at::Tensor, at::Tensor> merge_attention(const at::Tensor& outs,
                                                          const at::Tensor& lses) {
  if (!detail::want_gradient(MaybeTensor(outs), MaybeTensor(lses))) {
    return detail::MergeFunction::merge(outs, lses);
  }
  const auto outputs = detail::MergeFunction::apply(outs, lses);
  return {outputs[0], outputs[1]};
}

}  // namespace fastkern
