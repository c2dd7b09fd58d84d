// SPDX-License-Identifier: Apache-2.0
// The operators as C++ functions on at::Tensor, with gradients, for programs that use LibTorch 2.10
// or later.
//
//   #include <fastkern/torch.h>
//   at::Tensor y = fastkern::rms_norm(x, weight);   // differentiable if x or weight requires grad
//   auto [y, h] = fastkern::add_rms_norm(x, residual, weight);
//   auto [out, lse] = fastkern::flash_attn(q, k, v, {.causal = true});
//   at::Tensor loss = std::get<0>(fastkern::cross_entropy(logits, target));
//
// This header is compiled by its user against the user's LibTorch and holds no kernels. The
// operators come from libfastkern_torch.so, which registers them when it is loaded, by one of
//   CMake     target_link_libraries(app PRIVATE fastkern::torch "${TORCH_LIBRARIES}"); the target
//             keeps the linker from dropping a library no symbol is taken from
//   by hand   -Wl,--no-as-needed -lfastkern_torch
//   run time  dlopen("/path/to/libfastkern_torch.so", RTLD_NOW) before the first call
//   Python    import fastkern, for extension modules
//
// Gradients: the formulas of the operators, "fastkern::rms_norm" and so on, are registered from
// Python. In a process without Python a call of one through the dispatcher is NOT differentiable:
// backward() warns once and leaves the gradients of its inputs undefined. The functions here bring
// their own formula and work everywhere. They can be differentiated once; a second derivative
// raises an error, but for merge_attention.
#pragma once

#include <ATen/ops/zeros_like.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "fastkern/torch/activation.h"
#include "fastkern/torch/attention.h"
#include "fastkern/torch/common.h"
#include "fastkern/torch/loss.h"
#include "fastkern/torch/optim.h"
#include "fastkern/torch/pointwise.h"
#include "fastkern/torch/rope.h"
#include "fastkern/torch/softmax.h"

namespace fastkern {
namespace detail {

/// What a norm is called with beside its tensors.
struct NormNumbers {
  double eps = 0.0;
  double weight_offset = 0.0;
  double dropout_p = 0.0;
  MaybeType residual_dtype = std::nullopt;
  MaybeType out_dtype = std::nullopt;
};

/// The operators of one kind, rms or layer, with arguments in one order.
template <bool kLayer>
struct NormOps {
  static at::Tensor norm(const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                         const NormNumbers& n) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if constexpr (kLayer) {
      static const auto op =
          find_operator<at::Tensor(const at::Tensor&, const MaybeTensor&, const MaybeTensor&,
                                   double, double, MaybeType)>("fastkern::layer_norm_fwd");
      return op.call(x, weight, bias, n.eps, n.weight_offset, n.out_dtype);
    } else {
      static const auto op = find_operator<at::Tensor(const at::Tensor&, const MaybeTensor&, double,
                                                      const MaybeTensor&, double, MaybeType)>(
          "fastkern::rms_norm_fwd");
      return op.call(x, weight, n.eps, bias, n.weight_offset, n.out_dtype);
    }
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_bwd(
      const at::Tensor& dy, const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
      const NormNumbers& n, bool need_dx, bool need_dweight, bool need_dbias) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const MaybeTensor&, const MaybeTensor&, double,
        double, bool, bool, bool)>(kLayer ? "fastkern::layer_norm_bwd" : "fastkern::rms_norm_bwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(dy, x, weight, bias, n.eps, n.weight_offset, need_dx, need_dweight, need_dbias);
  }

  static std::tuple<at::Tensor, at::Tensor> add_norm(
      const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
      const MaybeTensor& bias, const MaybeTensor& seed, const MaybeTensor& offset,
      const MaybeTensor& rowscale, const NormNumbers& n) {
    using Outputs = std::tuple<at::Tensor, at::Tensor>;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if constexpr (kLayer) {
      static const auto op =
          find_operator<Outputs(const at::Tensor&, const MaybeTensor&, const MaybeTensor&,
                                const MaybeTensor&, double, double, double, const MaybeTensor&,
                                const MaybeTensor&, const MaybeTensor&, MaybeType, MaybeType)>(
              "fastkern::add_layer_norm_fwd");
      return op.call(x, residual, weight, bias, n.eps, n.weight_offset, n.dropout_p, seed, offset,
                     rowscale, n.residual_dtype, n.out_dtype);
    } else {
      static const auto op =
          find_operator<Outputs(const at::Tensor&, const MaybeTensor&, const MaybeTensor&, double,
                                const MaybeTensor&, double, double, const MaybeTensor&,
                                const MaybeTensor&, const MaybeTensor&, MaybeType, MaybeType)>(
              "fastkern::add_rms_norm_fwd");
      return op.call(x, residual, weight, n.eps, bias, n.weight_offset, n.dropout_p, seed, offset,
                     rowscale, n.residual_dtype, n.out_dtype);
    }
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_bwd(
      const at::Tensor& dy, const MaybeTensor& dh, const at::Tensor& h, const MaybeTensor& weight,
      const MaybeTensor& bias, const MaybeTensor& seed, const MaybeTensor& offset,
      const MaybeTensor& rowscale, const NormNumbers& n, at::ScalarType x_dtype, bool need_dx,
      bool need_dresidual, bool need_dweight, bool need_dbias) {
    static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const MaybeTensor&, const at::Tensor&, const MaybeTensor&,
        const MaybeTensor&, double, double, double, const MaybeTensor&, const MaybeTensor&,
        const MaybeTensor&, MaybeType, MaybeType, bool, bool, bool, bool)>(
        kLayer ? "fastkern::add_layer_norm_bwd" : "fastkern::add_rms_norm_bwd");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(dy, dh, h, weight, bias, n.eps, n.weight_offset, n.dropout_p, seed, offset,
                   rowscale, x_dtype, n.residual_dtype, need_dx, need_dresidual, need_dweight,
                   need_dbias);
  }
};

/// One formula for all: with kAdd the outputs are (y, h), else (y), and there is neither residual
/// nor seed, offset and rowscale.
template <bool kLayer, bool kAdd>
struct NormFunction : torch::autograd::Function<NormFunction<kLayer, kAdd>> {
  using Context = torch::autograd::AutogradContext;
  using Variables = torch::autograd::variable_list;
  using Ops = NormOps<kLayer>;

  static Variables forward(Context* ctx, const at::Tensor& x, const MaybeTensor& residual,
                           const MaybeTensor& weight, const MaybeTensor& bias,
                           const MaybeTensor& seed, const MaybeTensor& offset,
                           const MaybeTensor& rowscale, const NormNumbers& n) {
    ctx->set_materialize_grads(false);
    Variables outputs;
    if constexpr (kAdd) {
      auto [y, h] = Ops::add_norm(x, residual, weight, bias, seed, offset, rowscale, n);
      outputs = {y, h};
    } else {
      outputs = {Ops::norm(x, weight, bias, n)};
    }
    ctx->save_for_backward({outputs.size() > 1 ? outputs[1] : x, or_undefined(weight),
                            or_undefined(bias), or_undefined(seed), or_undefined(offset),
                            or_undefined(rowscale)});
    ctx->saved_data["eps"] = n.eps;
    ctx->saved_data["weight_offset"] = n.weight_offset;
    ctx->saved_data["dropout_p"] = n.dropout_p;
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["residual_dtype"] = residual.value_or(x).scalar_type();
    return outputs;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    const Variables saved = ctx->get_saved_variables();
    const at::Tensor& normalised = saved[0];
    const MaybeTensor weight = maybe(saved[1]), bias = maybe(saved[2]), rowscale = maybe(saved[5]);
    std::size_t edge = 0;  // torch counts the tensors that were given
    const auto needs = [&](bool is_given) { return is_given && ctx->needs_input_grad(edge++); };
    const bool need_dx = needs(true),
               need_dresidual = needs(ctx->saved_data["has_residual"].toBool()),
               need_dweight = needs(weight.has_value()), need_dbias = needs(bias.has_value());
    NormNumbers n;
    n.eps = ctx->saved_data["eps"].toDouble();
    n.weight_offset = ctx->saved_data["weight_offset"].toDouble();
    at::Tensor dx, dresidual, dweight, dbias;
    if constexpr (kAdd) {
      const at::ScalarType x_dtype = ctx->saved_data["x_dtype"].toScalarType();
      n.dropout_p = ctx->saved_data["dropout_p"].toDouble();
      n.residual_dtype = ctx->saved_data["residual_dtype"].toScalarType();
      const bool same = n.dropout_p == 0.0 && !rowscale && x_dtype == *n.residual_dtype;
      const at::Tensor dy =
          grads[0].defined() ? grads[0] : at::zeros_like(normalised);  // nothing was made of y
      std::tie(dx, dresidual, dweight, dbias) = Ops::add_norm_bwd(
          dy, maybe(grads[1]), normalised, weight, bias, maybe(saved[3]), maybe(saved[4]), rowscale,
          n, x_dtype, need_dx || (same && need_dresidual), need_dresidual && !same, need_dweight,
          need_dbias);
      if (same) dresidual = dx;
    } else {
      std::tie(dx, dweight, dbias) =
          Ops::norm_bwd(grads[0], normalised, weight, bias, n, need_dx, need_dweight, need_dbias);
    }
    const auto if_needed = [](bool need, const at::Tensor& t) { return need ? t : at::Tensor(); };
    Variables result(8);  // one for each argument of forward
    result[0] = if_needed(need_dx, dx);
    result[1] = if_needed(need_dresidual, dresidual);
    result[2] = if_needed(need_dweight, dweight);
    result[3] = if_needed(need_dbias, dbias);
    constexpr const char* kPlain = kLayer ? "fastkern::layer_norm" : "fastkern::rms_norm";
    constexpr const char* kAdded = kLayer ? "fastkern::add_layer_norm" : "fastkern::add_rms_norm";
    return differentiable_once(std::move(result), kAdd ? kAdded : kPlain);
  }
};

template <bool kLayer>
at::Tensor norm(const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                const NormNumbers& n) {
  if (!want_gradient(MaybeTensor(x), weight, bias))
    return NormOps<kLayer>::norm(x, weight, bias, n);
  const MaybeTensor none;
  return NormFunction<kLayer, false>::apply(x, none, weight, bias, none, none, none, n)[0];
}

template <bool kLayer>
std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& x, const MaybeTensor& residual,
                                            const MaybeTensor& weight, const MaybeTensor& bias,
                                            MaybeTensor seed, MaybeTensor offset,
                                            const MaybeTensor& rowscale, const NormNumbers& n) {
  TORCH_CHECK(!want_gradient(rowscale), "fastkern: rowscale must not require grad");
  if (n.dropout_p > 0.0 && !seed) draw(x, seed, offset);
  if (!want_gradient(MaybeTensor(x), residual, weight, bias)) {
    return NormOps<kLayer>::add_norm(x, residual, weight, bias, seed, offset, rowscale, n);
  }
  const auto outputs =
      NormFunction<kLayer, true>::apply(x, residual, weight, bias, seed, offset, rowscale, n);
  return {outputs[0], outputs[1]};
}

}  // namespace detail

// What is not given may be std::nullopt or an undefined tensor. Anything that the operator does not
// take throws a std::runtime_error that names the argument.

/// x * rsqrt(mean(x^2, -1) + eps) * (weight_offset + weight) + bias, the fastkern.rms_norm of
/// Python.
///   x             (..., N) float32, float16 or bfloat16, on the CPU or a CUDA device, any strides
///   weight, bias  (N), or (H, N) where x is (..., H, N); none: ones and zeros
///   eps           added inside the root; finite and >= 0
/// Returns (..., N), contiguous, out_dtype (none: that of x).
inline at::Tensor rms_norm(const at::Tensor& x, const MaybeTensor& weight = std::nullopt,
                           double eps = 1e-6, const MaybeTensor& bias = std::nullopt,
                           double weight_offset = 0.0, MaybeType out_dtype = std::nullopt) {
  detail::NormNumbers n;
  n.eps = eps, n.weight_offset = weight_offset, n.out_dtype = out_dtype;
  return detail::norm<false>(x, detail::given(weight), detail::given(bias), n);
}

/// (x - mean(x, -1)) * rsqrt(var(x, -1) + eps) * (weight_offset + weight) + bias.
inline at::Tensor layer_norm(const at::Tensor& x, const MaybeTensor& weight = std::nullopt,
                             const MaybeTensor& bias = std::nullopt, double eps = 1e-5,
                             double weight_offset = 0.0, MaybeType out_dtype = std::nullopt) {
  detail::NormNumbers n;
  n.eps = eps, n.weight_offset = weight_offset, n.out_dtype = out_dtype;
  return detail::norm<true>(x, detail::given(weight), detail::given(bias), n);
}

/// The residual stream in front of a norm, and what of it may be left out.
struct Branch {
  double dropout_p = 0.0;             // of x
  MaybeTensor seed = std::nullopt;    // one int64 on x's device; none: drawn with torch's generator
  MaybeTensor offset = std::nullopt;  // the same; none: 0, or drawn with the seed
  MaybeTensor rowscale = std::nullopt;      // x.sizes() without the last; not differentiable
  MaybeType residual_dtype = std::nullopt;  // of h; none: that of residual, or of x
};

/// h = residual + dropout(x) * rowscale, y = rms_norm(h, weight, eps, bias, weight_offset); gives
/// (y, h). Without a residual nothing is added.
inline std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight = std::nullopt,
    double eps = 1e-6, const MaybeTensor& bias = std::nullopt, double weight_offset = 0.0,
    const Branch& branch = {}, MaybeType out_dtype = std::nullopt) {
  using detail::given;
  const detail::NormNumbers n{eps, weight_offset, branch.dropout_p, branch.residual_dtype,
                              out_dtype};
  return detail::add_norm<false>(x, given(residual), given(weight), given(bias), given(branch.seed),
                                 given(branch.offset), given(branch.rowscale), n);
}

/// The same with layer_norm(h, weight, bias, eps, weight_offset).
inline std::tuple<at::Tensor, at::Tensor> add_layer_norm(
    const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight = std::nullopt,
    const MaybeTensor& bias = std::nullopt, double eps = 1e-5, double weight_offset = 0.0,
    const Branch& branch = {}, MaybeType out_dtype = std::nullopt) {
  using detail::given;
  const detail::NormNumbers n{eps, weight_offset, branch.dropout_p, branch.residual_dtype,
                              out_dtype};
  return detail::add_norm<true>(x, given(residual), given(weight), given(bias), given(branch.seed),
                                given(branch.offset), given(branch.rowscale), n);
}

// Quantised, without a gradient: q * scale is the norm. quant_dtype is at::kFloat8_e4m3fn or
// at::kChar.

/// (q, scale) with a scale for each row, (..., 1) float32.
inline std::tuple<at::Tensor, at::Tensor> rms_norm_dynamic_quant(
    const at::Tensor& x, const MaybeTensor& weight = std::nullopt, double eps = 1e-6,
    const MaybeTensor& bias = std::nullopt, double weight_offset = 0.0,
    at::ScalarType quant_dtype = at::kFloat8_e4m3fn) {
  static const auto op = detail::find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const MaybeTensor&, double, const MaybeTensor&, double, MaybeType)>(
      "fastkern::rms_norm_dynamic_quant");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, detail::given(weight), eps, detail::given(bias), weight_offset, quant_dtype);
}

/// q for a given scale, one float32 on x's device.
inline at::Tensor rms_norm_static_quant(const at::Tensor& x, const at::Tensor& scale,
                                        const MaybeTensor& weight = std::nullopt, double eps = 1e-6,
                                        const MaybeTensor& bias = std::nullopt,
                                        double weight_offset = 0.0,
                                        at::ScalarType quant_dtype = at::kFloat8_e4m3fn) {
  static const auto op =
      detail::find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const MaybeTensor&,
                                       double, const MaybeTensor&, double, MaybeType)>(
          "fastkern::rms_norm_static_quant");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, scale, detail::given(weight), eps, detail::given(bias), weight_offset,
                 quant_dtype);
}

/// (q, scale, h) of the residual stream h = residual + x.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm_dynamic_quant(
    const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight = std::nullopt,
    double eps = 1e-6, const MaybeTensor& bias = std::nullopt, double weight_offset = 0.0,
    MaybeType residual_dtype = std::nullopt, at::ScalarType quant_dtype = at::kFloat8_e4m3fn) {
  static const auto op = detail::find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const MaybeTensor&, const MaybeTensor&, double, const MaybeTensor&, double,
      MaybeType, MaybeType)>("fastkern::add_rms_norm_dynamic_quant");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, detail::given(residual), detail::given(weight), eps, detail::given(bias),
                 weight_offset, residual_dtype, quant_dtype);
}

/// (q, h) for a given scale.
inline std::tuple<at::Tensor, at::Tensor> add_rms_norm_static_quant(
    const at::Tensor& x, const MaybeTensor& residual, const at::Tensor& scale,
    const MaybeTensor& weight = std::nullopt, double eps = 1e-6,
    const MaybeTensor& bias = std::nullopt, double weight_offset = 0.0,
    MaybeType residual_dtype = std::nullopt, at::ScalarType quant_dtype = at::kFloat8_e4m3fn) {
  static const auto op = detail::find_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const MaybeTensor&, const at::Tensor&, const MaybeTensor&, double,
      const MaybeTensor&, double, MaybeType, MaybeType)>("fastkern::add_rms_norm_static_quant");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, detail::given(residual), scale, detail::given(weight), eps, detail::given(bias),
                 weight_offset, residual_dtype, quant_dtype);
}

}  // namespace fastkern
