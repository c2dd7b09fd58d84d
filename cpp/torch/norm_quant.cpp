// SPDX-License-Identifier: Apache-2.0
// Norms that give f8e4m3 or i8, for torch: schema, checks, allocation, launch. Fakes:
// python/fastkern/ops/norm_quant.py.
#include <string>
#include <tuple>
#include <utility>

#include "add_norm.h"

namespace fastkern::torch_layer {
namespace {

struct Quantised {
  Tensor q, scale, h;
};

/// The stream h is made if `with_stream`; the scale is computed for each row unless it is given.
Quantised quantise(const AddNorm& a, const Tensor* scale, bool with_stream,
                   OptionalType residual_dtype, OptionalType quant_dtype) {
  NormCall call(a.op, a.x, a.eps, a.weight_offset);
  NormFwd args = checked_inputs(call, a);
  float* const given = scale ? one_float(*scale, call.device(), a.op, "scale") : nullptr;
  const DType stream = stream_type(residual_dtype, args);
  const DType quant = quant_type(quant_dtype, a.op, "quant_dtype");
  make_readable(call, a, args);

  Quantised made{call.new_rows(quant, args.y), Tensor(nullptr), Tensor(nullptr)};
  if (with_stream) made.h = call.new_rows(stream, args.h);
  if (scale) {
    args.scale = dense(given, DType::f32, 1);
    args.static_scale = true;
  } else {
    TensorRef shape = call.x();
    shape.sizes[shape.ndim - 1] = 1;
    made.scale = new_like(shape, DType::f32, call.device());
    args.scale = dense_ref(made.scale, shape, DType::f32);
    if (call.x().numel() == 0) set_zero(made.scale);  // rows of no columns
  }
  call.launch(args);
  return made;
}

using QuantAndScale = std::tuple<Tensor, Tensor>;
using QuantAndStream = std::tuple<Tensor, Tensor>;
using All = std::tuple<Tensor, Tensor, Tensor>;

QuantAndScale rms_norm_dynamic_quant(const Tensor& x, const OptionalTensor& weight, double eps,
                                     const OptionalTensor& bias, double weight_offset,
                                     OptionalType quant_dtype) {
  Quantised made = quantise({.kind = NormKind::rms,
                             .op = "fastkern::rms_norm_dynamic_quant",
                             .x = x,
                             .residual = {},
                             .weight = weight,
                             .bias = bias,
                             .eps = eps,
                             .weight_offset = weight_offset},
                            nullptr, false, {}, quant_dtype);
  return {std::move(made.q), std::move(made.scale)};
}

Tensor rms_norm_static_quant(const Tensor& x, const Tensor& scale, const OptionalTensor& weight,
                             double eps, const OptionalTensor& bias, double weight_offset,
                             OptionalType quant_dtype) {
  return quantise({.kind = NormKind::rms,
                   .op = "fastkern::rms_norm_static_quant",
                   .x = x,
                   .residual = {},
                   .weight = weight,
                   .bias = bias,
                   .eps = eps,
                   .weight_offset = weight_offset},
                  &scale, false, {}, quant_dtype)
      .q;
}

All add_rms_norm_dynamic_quant(const Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& weight, double eps, const OptionalTensor& bias,
                               double weight_offset, OptionalType residual_dtype,
                               OptionalType quant_dtype) {
  Quantised made = quantise({.kind = NormKind::rms,
                             .op = "fastkern::add_rms_norm_dynamic_quant",
                             .x = x,
                             .residual = residual,
                             .weight = weight,
                             .bias = bias,
                             .eps = eps,
                             .weight_offset = weight_offset},
                            nullptr, true, residual_dtype, quant_dtype);
  return {std::move(made.q), std::move(made.scale), std::move(made.h)};
}

QuantAndStream add_rms_norm_static_quant(const Tensor& x, const OptionalTensor& residual,
                                         const Tensor& scale, const OptionalTensor& weight,
                                         double eps, const OptionalTensor& bias,
                                         double weight_offset, OptionalType residual_dtype,
                                         OptionalType quant_dtype) {
  Quantised made = quantise({.kind = NormKind::rms,
                             .op = "fastkern::add_rms_norm_static_quant",
                             .x = x,
                             .residual = residual,
                             .weight = weight,
                             .bias = bias,
                             .eps = eps,
                             .weight_offset = weight_offset},
                            &scale, true, residual_dtype, quant_dtype);
  return {std::move(made.q), std::move(made.h)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string affine =
      "Tensor? weight=None, float eps=1e-06, Tensor? bias=None, float weight_offset=0.0, ";
  const std::string quant = "ScalarType? quant_dtype=None) -> ";
  const std::string both = "ScalarType? residual_dtype=None, " + quant;
  m.def(
      ("rms_norm_dynamic_quant(Tensor x, " + affine + quant + "(Tensor q, Tensor scale)").c_str());
  m.def(("rms_norm_static_quant(Tensor x, Tensor scale, " + affine + quant + "Tensor").c_str());
  m.def(("add_rms_norm_dynamic_quant(Tensor x, Tensor? residual, " + affine + both +
         "(Tensor q, Tensor scale, Tensor h)")
            .c_str());
  m.def(("add_rms_norm_static_quant(Tensor x, Tensor? residual, Tensor scale, " + affine + both +
         "(Tensor q, Tensor h)")
            .c_str());
}

FASTKERN_REGISTER(m) {
  m.impl("rms_norm_dynamic_quant", box<&rms_norm_dynamic_quant>);
  m.impl("rms_norm_static_quant", box<&rms_norm_static_quant>);
  m.impl("add_rms_norm_dynamic_quant", box<&add_rms_norm_dynamic_quant>);
  m.impl("add_rms_norm_static_quant", box<&add_rms_norm_static_quant>);
}

}  // namespace fastkern::torch_layer
