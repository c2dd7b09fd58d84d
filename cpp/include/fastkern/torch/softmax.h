// SPDX-License-Identifier: Apache-2.0
// The softmax family on at::Tensor, with gradients; to be included through fastkern/torch.h, which
// says how it is linked.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "fastkern/torch/common.h"

namespace fastkern {
namespace detail {

enum class SoftmaxOp { softmax, log_softmax, logsumexp, masked, causal };

/// What one of them is called with beside its tensors.
struct SoftmaxOptions {
  SoftmaxOp op = SoftmaxOp::softmax;
  std::int64_t dim = -1;
  MaybeType dtype = std::nullopt;
  bool keepdim = false;
  double scale = 1.0;
};

inline at::Tensor softmax_fwd(const at::Tensor& x, const MaybeTensor& mask,
                              const SoftmaxOptions& o) {
  using T = const at::Tensor&;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  switch (o.op) {
    case SoftmaxOp::softmax: {
      static const auto op =
          find_operator<at::Tensor(T, std::int64_t, MaybeType)>("fastkern::softmax_fwd");
      return op.call(x, o.dim, o.dtype);
    }
    case SoftmaxOp::log_softmax: {
      static const auto op =
          find_operator<at::Tensor(T, std::int64_t, MaybeType)>("fastkern::log_softmax_fwd");
      return op.call(x, o.dim, o.dtype);
    }
    case SoftmaxOp::logsumexp: {
      static const auto op =
          find_operator<at::Tensor(T, std::int64_t, bool)>("fastkern::logsumexp_fwd");
      return op.call(x, o.dim, o.keepdim);
    }
    case SoftmaxOp::masked: {
      static const auto op =
          find_operator<at::Tensor(T, const MaybeTensor&, double)>("fastkern::masked_softmax_fwd");
      return op.call(x, mask, o.scale);
    }
    default: {
      static const auto op = find_operator<at::Tensor(T, double)>("fastkern::causal_softmax_fwd");
      return op.call(x, o.scale);
    }
  }
}

/// `kept`: x for logsumexp, else nothing.
inline at::Tensor softmax_bwd(const at::Tensor& dy, const at::Tensor& y, const at::Tensor& kept,
                              const SoftmaxOptions& o) {
  using T = const at::Tensor&;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  switch (o.op) {
    case SoftmaxOp::softmax: {
      static const auto op =
          find_operator<at::Tensor(T, T, std::int64_t, MaybeType)>("fastkern::softmax_bwd");
      return op.call(dy, y, o.dim, o.dtype);
    }
    case SoftmaxOp::log_softmax: {
      static const auto op =
          find_operator<at::Tensor(T, T, std::int64_t, MaybeType)>("fastkern::log_softmax_bwd");
      return op.call(dy, y, o.dim, o.dtype);
    }
    case SoftmaxOp::logsumexp: {
      static const auto op =
          find_operator<at::Tensor(T, T, T, std::int64_t)>("fastkern::logsumexp_bwd");
      if (!o.keepdim) return op.call(dy, kept, y, o.dim);
      return op.call(dy.squeeze(o.dim), kept, y.squeeze(o.dim), o.dim);
    }
    case SoftmaxOp::masked: {
      static const auto op =
          find_operator<at::Tensor(T, T, double)>("fastkern::masked_softmax_bwd");
      return op.call(dy, y, o.scale);
    }
    default: {
      static const auto op =
          find_operator<at::Tensor(T, T, double)>("fastkern::causal_softmax_bwd");
      return op.call(dy, y, o.scale);
    }
  }
}

struct SoftmaxFunction : torch::autograd::Function<SoftmaxFunction> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;

  static at::Tensor forward(Context* ctx, const at::Tensor& x, const MaybeTensor& mask,
                            const SoftmaxOptions& o) {
    at::Tensor y = softmax_fwd(x, mask, o);
    ctx->save_for_backward({y, o.op == SoftmaxOp::logsumexp ? x : at::Tensor()});
    ctx->saved_data["op"] = static_cast<std::int64_t>(o.op);
    ctx->saved_data["dim"] = o.dim;
    ctx->saved_data["keepdim"] = o.keepdim;
    ctx->saved_data["scale"] = o.scale;
    ctx->saved_data["dtype"] = x.scalar_type();
    return y;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    SoftmaxOptions o;
    o.op = static_cast<SoftmaxOp>(ctx->saved_data["op"].toInt());
    o.dim = ctx->saved_data["dim"].toInt();
    o.keepdim = ctx->saved_data["keepdim"].toBool();
    o.scale = ctx->saved_data["scale"].toDouble();
    o.dtype = ctx->saved_data["dtype"].toScalarType();
    constexpr const char* kNames[] = {"fastkern::softmax", "fastkern::log_softmax",
                                      "fastkern::logsumexp", "fastkern::masked_softmax",
                                      "fastkern::causal_softmax"};
    return differentiable_once({softmax_bwd(grads[0], saved[0], saved[1], o), {}, {}},
                               kNames[static_cast<int>(o.op)]);
  }
};

inline at::Tensor softmax(const at::Tensor& x, const MaybeTensor& mask, const SoftmaxOptions& o) {
  TORCH_CHECK(!want_gradient(mask), "fastkern::masked_softmax: mask must not require grad, it has ",
              "no gradient here; detach it");
  if (!want_gradient(MaybeTensor(x))) return softmax_fwd(x, mask, o);
  return SoftmaxFunction::apply(x, mask, o);
}

}  // namespace detail

/// exp(x - max(x)) / sum(exp(x - max(x))) over `dim`, the fastkern.softmax of Python.
///   x      at least one dimension, float32, float16 or bfloat16, any strides
///   dtype  what x is converted to first; none: its own
/// Returns the shape of x, contiguous, of dtype.
inline at::Tensor softmax(const at::Tensor& x, std::int64_t dim = -1,
                          MaybeType dtype = std::nullopt) {
  return detail::softmax(x, std::nullopt, {detail::SoftmaxOp::softmax, dim, dtype});
}

/// The logarithm of softmax.
inline at::Tensor log_softmax(const at::Tensor& x, std::int64_t dim = -1,
                              MaybeType dtype = std::nullopt) {
  return detail::softmax(x, std::nullopt, {detail::SoftmaxOp::log_softmax, dim, dtype});
}

/// log(sum(exp(x))) over `dim`; the dtype of x, its shape without `dim` or with 1 for it.
inline at::Tensor logsumexp(const at::Tensor& x, std::int64_t dim = -1, bool keepdim = false) {
  return detail::softmax(x, std::nullopt,
                         {detail::SoftmaxOp::logsumexp, dim, std::nullopt, keepdim});
}

/// Softmax of x * scale + mask over the last dimension or, where mask is bool, of x * scale where
/// it is true; 0 in rows that are masked as a whole. `mask` broadcasts to the shape of x; it has no
/// gradient.
inline at::Tensor masked_softmax(const at::Tensor& x, const MaybeTensor& mask = std::nullopt,
                                 double scale = 1.0) {
  return detail::softmax(x, detail::given(mask),
                         {detail::SoftmaxOp::masked, -1, std::nullopt, false, scale});
}

/// Softmax of x * scale, (..., S, N), where row i sees the first N - S + i + 1 columns.
inline at::Tensor causal_softmax(const at::Tensor& x, double scale = 1.0) {
  return detail::softmax(x, std::nullopt,
                         {detail::SoftmaxOp::causal, -1, std::nullopt, false, scale});
}

}  // namespace fastkern
