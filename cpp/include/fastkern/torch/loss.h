// SPDX-License-Identifier: Apache-2.0
// Losses on at::Tensor, with gradients; to be included through fastkern/torch.h, which says how it
// is linked.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>

#include "fastkern/torch/common.h"

namespace fastkern {

/// What a cross entropy may be told: the arguments of fastkern.cross_entropy in Python.
struct CrossEntropyOptions {
  MaybeTensor weight = std::nullopt;  // (V), one for each class; not differentiable
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0, lse_square_scale = 0.0, softcap = 0.0, logit_scale = 1.0;
  std::int64_t reduction = at::Reduction::Mean;  // or None, Sum
};

namespace detail {

struct LossOps {
  using T = const at::Tensor&;
  using M = const MaybeTensor&;
  using I = std::int64_t;
  using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
  using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

  static Four fwd(T logits, T target, const CrossEntropyOptions& o) {
    static const auto op = find_operator<Four(T, T, M, I, double, double, double, double, I)>(
        "fastkern::cross_entropy_fwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(logits, target, given(o.weight), o.ignore_index, o.label_smoothing,
                   o.lse_square_scale, o.softcap, o.logit_scale, o.reduction);
  }
  static at::Tensor bwd(M dloss, M dlse, M dzloss, T logits, T target, T state,
                        const CrossEntropyOptions& o) {
    static const auto op =
        find_operator<at::Tensor(M, M, M, T, T, M, T, I, double, double, double, double, I)>(
            "fastkern::cross_entropy_bwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(dloss, dlse, dzloss, logits, target, given(o.weight), state, o.ignore_index,
                   o.label_smoothing, o.lse_square_scale, o.softcap, o.logit_scale, o.reduction);
  }
  /// Losses of rows from `first` on, and their gradient over the logits.
  static void part(at::Tensor& logits, T target, T totals, at::Tensor& rows, M dloss, I first,
                   bool grad, const CrossEntropyOptions& o) {
    static const auto op =
        find_operator<void(at::Tensor&, T, M, T, at::Tensor&, M, I, bool, I, double, double, double,
                           double, I)>("fastkern::cross_entropy_part_");
    op.call(logits, target, given(o.weight), totals, rows, dloss, first, grad, o.ignore_index,
            o.label_smoothing, o.lse_square_scale, o.softcap, o.logit_scale, o.reduction);
  }
  static std::tuple<at::Tensor, at::Tensor> sums(T target, at::Tensor& totals, M rows, I classes,
                                                 const CrossEntropyOptions& o) {
    static const auto op =
        find_operator<std::tuple<at::Tensor, at::Tensor>(T, M, at::Tensor&, M, I, I, I)>(
            "fastkern::cross_entropy_sums_");
    return op.call(target, given(o.weight), totals, rows, classes, o.ignore_index, o.reduction);
  }
  static void scale_unless_one(at::Tensor& x, T factor) {
    static const auto op = find_operator<void(at::Tensor&, T)>("fastkern::scale_unless_one_");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.call(x, factor);
  }
};

/// The options in what autograd keeps for backward; the weight is a saved tensor.
inline void keep(torch::autograd::AutogradContext* ctx, const CrossEntropyOptions& o) {
  ctx->saved_data["integers"] = std::vector<std::int64_t>{o.ignore_index, o.reduction};
  ctx->saved_data["numbers"] =
      std::vector<double>{o.label_smoothing, o.lse_square_scale, o.softcap, o.logit_scale};
}
inline CrossEntropyOptions kept(torch::autograd::AutogradContext* ctx, const at::Tensor& weight) {
  const auto integers = ctx->saved_data["integers"].toIntVector();
  const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
  return {maybe(weight), integers[0], numbers[0], numbers[1], numbers[2], numbers[3], integers[1]};
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static Variables forward(Context* ctx, const at::Tensor& logits, const at::Tensor& target,
                           const CrossEntropyOptions& o) {
    ctx->set_materialize_grads(false);
    auto [loss, lse, zloss, state] = LossOps::fwd(logits, target, o);
    ctx->save_for_backward({logits, target, or_undefined(given(o.weight)), state});
    keep(ctx, o);
    return {loss, lse, zloss};
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    Variables result(3);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const Variables saved = ctx->get_saved_variables();
    result[0] = LossOps::bwd(maybe(grads[0]), maybe(grads[1]), maybe(grads[2]), saved[0], saved[1],
                             saved[3], kept(ctx, saved[2]));
    return differentiable_once(std::move(result), "fastkern::cross_entropy");
  }
};

struct LinearLoss {
  at::Tensor loss, dhidden, dweight, dbias;
};

/// The loss, and those gradients that are needed, in chunks of rows.
inline LinearLoss linear_loss(const at::Tensor& hidden_, const at::Tensor& weight_,
                              const at::Tensor& target_, const MaybeTensor& bias,
                              const CrossEntropyOptions& o, std::int64_t chunk_rows,
                              bool need_hidden, bool need_weight, bool need_bias) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const std::int64_t width = weight_.size(1), classes = weight_.size(0);
  const at::Tensor hidden = hidden_.contiguous().view({-1, width}), weight = weight_.contiguous();
  const std::int64_t rows = hidden.size(0);
  const bool soft = target_.is_floating_point(), wanted = need_hidden || need_weight || need_bias;
  const at::Tensor target =
      soft ? target_.contiguous().view({rows, classes}) : target_.contiguous().view({rows});
  const auto floats = hidden.options().dtype(at::kFloat);
  at::Tensor of_rows = at::zeros({3, rows}, floats), totals = at::zeros({2}, floats);
  LossOps::sums(target, totals, std::nullopt, classes, o);
  LinearLoss result;
  if (need_hidden) result.dhidden = at::zeros_like(hidden);
  if (need_weight) result.dweight = at::zeros_like(weight);
  if (need_bias) result.dbias = at::zeros({1, classes}, weight.options());
  // As many rows as make 1004 MiB of logits, in multiples of 128.
  const std::int64_t fit =
      (std::int64_t{1004} << 20) / (classes * static_cast<std::int64_t>(weight.element_size()));
  const std::int64_t chunk = std::max<std::int64_t>(
      std::min(rows, chunk_rows > 0 ? chunk_rows : std::max<std::int64_t>(fit / 128, 1) * 128), 1);
  at::Tensor buffer = at::zeros({chunk, classes}, weight.options());
  const at::Tensor ones = need_bias ? at::ones({1, chunk}, weight.options()) : at::Tensor();
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t count = std::min(chunk, rows - first);
    at::Tensor logits = buffer.narrow(0, 0, count);
    const at::Tensor part = hidden.narrow(0, first, count);
    if (bias) {
      at::addmm_out(logits, *bias, part, weight.t());
    } else {
      at::mm_out(logits, part, weight.t());
    }
    LossOps::part(logits, target, totals, of_rows, std::nullopt, first, wanted, o);
    if (need_hidden) {
      at::Tensor to = result.dhidden.narrow(0, first, count);
      at::mm_out(to, logits, weight);
    }
    if (need_weight) at::addmm_out(result.dweight, result.dweight, logits.t(), part);
    if (need_bias) at::addmm_out(result.dbias, result.dbias, ones.narrow(1, 0, count), logits);
  }
  result.loss = std::get<0>(LossOps::sums(target, totals, of_rows, classes, o));
  if (need_hidden) result.dhidden = result.dhidden.view(hidden_.sizes());
  if (need_bias) result.dbias = result.dbias.view({classes});
  return result;
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static at::Tensor forward(Context* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& target, const MaybeTensor& bias,
                            const CrossEntropyOptions& o, std::int64_t chunk_rows) {
    LinearLoss found =
        linear_loss(hidden, weight, target, bias, o, chunk_rows, hidden.requires_grad(),
                    weight.requires_grad(), bias && bias->requires_grad());
    ctx->saved_data["dhidden"] = found.dhidden, ctx->saved_data["dweight"] = found.dweight;
    ctx->saved_data["dbias"] = found.dbias, ctx->saved_data["given"] = false;
    return found.loss;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    TORCH_CHECK(!ctx->saved_data["given"].toBool(),
                "fastkern::linear_cross_entropy: backward of the C++ function may run once");
    ctx->saved_data["given"] = true;
    Variables result(6);
    const char* const names[] = {"dhidden", "dweight", "dbias"};
    const std::size_t places[] = {0, 1, 3};
    for (std::size_t i = 0; i < 3; ++i) {
      at::Tensor grad = ctx->saved_data[names[i]].toTensor();
      if (grad.defined()) LossOps::scale_unless_one(grad, grads[0]);
      result[places[i]] = grad;
    }
    return differentiable_once(std::move(result), "fastkern::linear_cross_entropy");
  }
};

}  // namespace detail

/// Cross entropy of logits (..., V) for classes (...), int64 or int32, or probabilities (..., V);
/// gives (loss, lse, zloss), all float32 and differentiable. The fastkern.cross_entropy of Python.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy(
    const at::Tensor& logits, const at::Tensor& target, const CrossEntropyOptions& options = {}) {
  TORCH_CHECK(!detail::want_gradient(MaybeTensor(target), detail::given(options.weight)),
              "fastkern::cross_entropy: target and weight must not require grad");
  if (!detail::want_gradient(MaybeTensor(logits))) {
    auto [loss, lse, zloss, state] = detail::LossOps::fwd(logits, target, options);
    return {loss, lse, zloss};
  }
  const auto outputs = detail::CrossEntropyFunction::apply(logits, target, options);
  return {outputs[0], outputs[1], outputs[2]};
}

/// The same of logits hidden @ weight.t() + bias, of which no more than a chunk of rows is there at
/// a time; gives the loss. hidden (..., H), weight (V, H), bias (V), all of one dtype. With a
/// gradient: reduction Mean or Sum, and one backward. The fastkern.linear_cross_entropy of Python.
inline at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                       const at::Tensor& target,
                                       const MaybeTensor& bias = std::nullopt,
                                       const CrossEntropyOptions& options = {},
                                       std::int64_t chunk_rows = 0) {
  const MaybeTensor b = detail::given(bias);
  TORCH_CHECK(
      weight.dim() == 2 && hidden.dim() > 0 && hidden.size(-1) == weight.size(1),
      "fastkern::linear_cross_entropy: weight must have shape (V, H) for hidden (..., H), got ",
      weight.sizes(), " and ", hidden.sizes());
  TORCH_CHECK(options.reduction != at::Reduction::None,
              "fastkern::linear_cross_entropy: reduction must be Mean or Sum, got None");
  if (!detail::want_gradient(MaybeTensor(hidden), MaybeTensor(weight), b)) {
    return detail::linear_loss(hidden, weight, target, b, options, chunk_rows, false, false, false)
        .loss;
  }
  return detail::LinearCrossEntropyFunction::apply(hidden, weight, target, b, options, chunk_rows);
}

}  // namespace fastkern
