// SPDX-License-Identifier: Apache-2.0
// The residual add and the norm behind it, with one output, two outputs, or in place, for torch:
// schema, checks, allocation, launch. Fakes and autograd: python/fastkern/ops/add_norm.py.
#include "add_norm.h"

#include <string>
#include <tuple>
#include <utility>

#include "fastkern/rows.h"

namespace fastkern::torch_layer {
namespace {

using OneOutput = std::tuple<Tensor, Tensor>;           // y, h
using TwoOutputs = std::tuple<Tensor, Tensor, Tensor>;  // y, y2, h

// ---- forward ------------------------------------------------------------------------------------

/// y2 is made where there is a place for it.
OneOutput forward(const AddNorm& a, OptionalType residual_dtype, OptionalType out_dtype,
                  OptionalTensor* y2 = nullptr) {
  NormCall call(a.op, a.x, a.eps, a.weight_offset);
  NormFwd args = checked_inputs(call, a);
  const DType stream = stream_type(residual_dtype, args);
  const DType out = float_type(out_dtype, args.x.dtype, a.op, "out_dtype");
  make_readable(call, a, args);
  Tensor y = call.new_rows(out, args.y);
  if (y2) *y2 = call.new_rows(out, args.y2);
  Tensor h = call.new_rows(stream, args.h);
  call.launch(args);
  return {std::move(y), std::move(h)};
}

TwoOutputs forward_two(const AddNorm& a, OptionalType residual_dtype, OptionalType out_dtype) {
  OptionalTensor y2;
  auto [y, h] = forward(a, residual_dtype, out_dtype, &y2);
  return {std::move(y), std::move(*y2), std::move(h)};
}

OneOutput add_rms_norm(const Tensor& x, const OptionalTensor& residual,
                       const OptionalTensor& weight, double eps, const OptionalTensor& bias,
                       double weight_offset, double dropout_p, const OptionalTensor& seed,
                       const OptionalTensor& offset, const OptionalTensor& rowscale,
                       OptionalType residual_dtype, OptionalType out_dtype) {
  return forward({.kind = NormKind::rms,
                  .op = "fastkern::add_rms_norm",
                  .x = x,
                  .residual = residual,
                  .weight = weight,
                  .bias = bias,
                  .eps = eps,
                  .weight_offset = weight_offset,
                  .dropout_p = dropout_p,
                  .seed = seed,
                  .offset = offset,
                  .rowscale = rowscale},
                 residual_dtype, out_dtype);
}

OneOutput add_layer_norm(const Tensor& x, const OptionalTensor& residual,
                         const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         double weight_offset, double dropout_p, const OptionalTensor& seed,
                         const OptionalTensor& offset, const OptionalTensor& rowscale,
                         OptionalType residual_dtype, OptionalType out_dtype) {
  return forward({.kind = NormKind::layer,
                  .op = "fastkern::add_layer_norm",
                  .x = x,
                  .residual = residual,
                  .weight = weight,
                  .bias = bias,
                  .eps = eps,
                  .weight_offset = weight_offset,
                  .dropout_p = dropout_p,
                  .seed = seed,
                  .offset = offset,
                  .rowscale = rowscale},
                 residual_dtype, out_dtype);
}

TwoOutputs add_rms_norm_parallel(const Tensor& x, const OptionalTensor& residual,
                                 const OptionalTensor& weight, const OptionalTensor& weight2,
                                 double eps, const OptionalTensor& bias,
                                 const OptionalTensor& bias2, double weight_offset,
                                 double dropout_p, const OptionalTensor& seed,
                                 const OptionalTensor& offset, const OptionalTensor& rowscale,
                                 OptionalType residual_dtype, OptionalType out_dtype) {
  return forward_two({.kind = NormKind::rms,
                      .op = "fastkern::add_rms_norm_parallel",
                      .x = x,
                      .residual = residual,
                      .weight = weight,
                      .bias = bias,
                      .eps = eps,
                      .weight_offset = weight_offset,
                      .weight2 = weight2,
                      .bias2 = bias2,
                      .dropout_p = dropout_p,
                      .seed = seed,
                      .offset = offset,
                      .rowscale = rowscale},
                     residual_dtype, out_dtype);
}

TwoOutputs add_layer_norm_parallel(const Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& weight2, const OptionalTensor& bias2,
                                   double eps, double weight_offset, double dropout_p,
                                   const OptionalTensor& seed, const OptionalTensor& offset,
                                   const OptionalTensor& rowscale, OptionalType residual_dtype,
                                   OptionalType out_dtype) {
  return forward_two({.kind = NormKind::layer,
                      .op = "fastkern::add_layer_norm_parallel",
                      .x = x,
                      .residual = residual,
                      .weight = weight,
                      .bias = bias,
                      .eps = eps,
                      .weight_offset = weight_offset,
                      .weight2 = weight2,
                      .bias2 = bias2,
                      .dropout_p = dropout_p,
                      .seed = seed,
                      .offset = offset,
                      .rowscale = rowscale},
                     residual_dtype, out_dtype);
}

// ---- in place -----------------------------------------------------------------------------------

/// Whether rows can be written where they lie: each address belongs to one element.
bool writable(const TensorRef& t) {
  Rows rows;
  if (!as_rows(t, rows)) return false;
  if (rows.count * rows.length == 0) return true;
  std::int64_t near = rows.inner_stride, near_count = rows.inner;
  std::int64_t far = rows.outer_stride, far_count = rows.count / rows.inner;
  if (far_count > 1 && near_count > 1 && far < near) {
    std::swap(near, far);
    std::swap(near_count, far_count);
  }
  if (near_count == 1) near = 0;
  return (near_count == 1 || near >= rows.length) &&
         (far_count == 1 || far >= near * (near_count - 1) + rows.length);
}

Tensor in_place(const AddNorm& a, OptionalType out_dtype) {
  NormCall call(a.op, a.x, a.eps, a.weight_offset);
  NormFwd args = checked_inputs(call, a);
  const DType out = float_type(out_dtype, args.x.dtype, a.op, "out_dtype");
  FK_CHECK(writable(args.residual), a.op,
           ": residual must be writable in place: a dense last dimension, leading dimensions that "
           "merge into at most two strides, no element twice; got shape ",
           args.residual.shape(), " with strides ",
           shape_text(args.residual.strides.data(), args.residual.ndim));
  FK_CHECK(args.x.data != args.residual.data || args.x.numel() == 0, a.op,
           ": residual must not be the memory of x, which is read while residual is written");
  make_readable(call, a, args);
  args.h = args.residual;
  Tensor y = call.new_rows(out, args.y);
  call.launch(args);
  return y;
}

Tensor add_rms_norm_(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                     double eps, const OptionalTensor& bias, double weight_offset,
                     OptionalType out_dtype) {
  return in_place({.kind = NormKind::rms,
                   .op = "fastkern::add_rms_norm_",
                   .x = x,
                   .residual = residual,
                   .weight = weight,
                   .bias = bias,
                   .eps = eps,
                   .weight_offset = weight_offset},
                  out_dtype);
}

Tensor add_layer_norm_(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, double weight_offset,
                       OptionalType out_dtype) {
  return in_place({.kind = NormKind::layer,
                   .op = "fastkern::add_layer_norm_",
                   .x = x,
                   .residual = residual,
                   .weight = weight,
                   .bias = bias,
                   .eps = eps,
                   .weight_offset = weight_offset},
                  out_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const std::string& name, const std::string& schema) {
    m.def((name + schema).c_str());
  };
  const std::string branch =
      "float weight_offset=0.0, float dropout_p=0.0, Tensor? seed=None, Tensor? offset=None, "
      "Tensor? rowscale=None, ScalarType? residual_dtype=None, ScalarType? out_dtype=None";
  const std::string one = ") -> (Tensor y, Tensor h)", two = ") -> (Tensor y, Tensor y2, Tensor h)";
  for (const std::string end : {"", "_fwd"}) {
    define(
        "add_rms_norm" + end,
        "(Tensor x, Tensor? residual, Tensor? weight=None, float eps=1e-06, Tensor? bias=None, " +
            branch + one);
    define(
        "add_layer_norm" + end,
        "(Tensor x, Tensor? residual, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, " +
            branch + one);
    define("add_rms_norm_parallel" + end,
           "(Tensor x, Tensor? residual, Tensor? weight=None, Tensor? weight2=None, float "
           "eps=1e-06, Tensor? bias=None, Tensor? bias2=None, " +
               branch + two);
    define("add_layer_norm_parallel" + end,
           "(Tensor x, Tensor? residual, Tensor? weight=None, Tensor? bias=None, Tensor? "
           "weight2=None, Tensor? bias2=None, float eps=1e-05, " +
               branch + two);
  }
  const std::string more = "float weight_offset=0.0, ScalarType? out_dtype=None) -> Tensor";
  define(
      "add_rms_norm_",
      "(Tensor x, Tensor(a!) residual, Tensor? weight=None, float eps=1e-06, Tensor? bias=None, " +
          more);
  define("add_layer_norm_",
         "(Tensor x, Tensor(a!) residual, Tensor? weight=None, Tensor? bias=None, float "
         "eps=1e-05, " +
             more);
}

FASTKERN_REGISTER(m) {
  m.impl("add_rms_norm", box<&add_rms_norm>);
  m.impl("add_rms_norm_fwd", box<&add_rms_norm>);
  m.impl("add_layer_norm", box<&add_layer_norm>);
  m.impl("add_layer_norm_fwd", box<&add_layer_norm>);
  m.impl("add_rms_norm_parallel", box<&add_rms_norm_parallel>);
  m.impl("add_rms_norm_parallel_fwd", box<&add_rms_norm_parallel>);
  m.impl("add_layer_norm_parallel", box<&add_layer_norm_parallel>);
  m.impl("add_layer_norm_parallel_fwd", box<&add_layer_norm_parallel>);
  m.impl("add_rms_norm_", box<&add_rms_norm_>);
  m.impl("add_layer_norm_", box<&add_layer_norm_>);
}

}  // namespace fastkern::torch_layer
