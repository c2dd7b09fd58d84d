// SPDX-License-Identifier: Apache-2.0
// The residual stream in front of a norm: h = residual + dropout(x) * rowscale.
#pragma once

#include "norm_call.h"

namespace fastkern::torch_layer {

/// Arguments of the add_*_norm operators, which differ in their order and in what they have of
/// them.
struct AddNorm {
  NormKind kind;
  const char* op;
  const Tensor& x;
  MaybeTensor residual;
  MaybeTensor weight;
  MaybeTensor bias;
  double eps;
  double weight_offset;
  MaybeTensor weight2 = {};
  MaybeTensor bias2 = {};
  double dropout_p = 0.0;
  MaybeTensor seed = {};
  MaybeTensor offset = {};
  MaybeTensor rowscale = {};
};

/// The inputs, checked; readable by a kernel only after `make_readable`.
inline NormFwd checked_inputs(NormCall& call, const AddNorm& a) {
  NormFwd args;
  args.op = a.op;
  args.kind = a.kind;
  args.eps = a.eps;
  args.weight_offset = a.weight_offset;
  args.x = call.x();
  args.residual = call.rows(a.residual, "residual");
  args.weight = call.affine(a.weight, "weight");
  args.bias = call.affine(a.bias, "bias");
  args.weight2 = call.affine(a.weight2, "weight2");
  args.bias2 = call.affine(a.bias2, "bias2");
  args.rowscale = call.rowscale(a.rowscale);
  args.dropout = call.dropout(a.dropout_p, a.seed, a.offset);
  return args;
}

inline void make_readable(NormCall& call, const AddNorm& a, NormFwd& args) {
  call.make_rows(a.x, args.x);
  call.make_rows(a.residual, args.residual);
  call.make_dense(a.weight, args.weight);
  call.make_dense(a.bias, args.bias);
  call.make_dense(a.weight2, args.weight2);
  call.make_dense(a.bias2, args.bias2);
  call.make_dense(a.rowscale, args.rowscale);
}

/// The dtype of h.
inline DType stream_type(OptionalType asked, const NormFwd& args) {
  const DType otherwise = args.residual.given() ? args.residual.dtype : args.x.dtype;
  return float_type(asked, otherwise, args.op, "residual_dtype");
}

}  // namespace fastkern::torch_layer
