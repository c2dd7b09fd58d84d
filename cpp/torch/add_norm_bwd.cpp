// SPDX-License-Identifier: Apache-2.0
// Gradients of add_norm.cpp: one function for all of them, of which only that of a parallel one has
// a second output.
#include <string>
#include <tuple>
#include <utility>

#include "add_norm.h"

namespace fastkern::torch_layer {
namespace {

constexpr const char* kOps[] = {"fastkern::add_rms_norm_bwd", "fastkern::add_layer_norm_bwd"};
constexpr const char* kParallelOps[] = {"fastkern::add_rms_norm_parallel_bwd",
                                        "fastkern::add_layer_norm_parallel_bwd"};

struct SecondOutput {
  MaybeTensor dy, weight, bias;
  bool need_dweight = false;
  bool need_dbias = false;
};

struct Gradients {
  Tensor dx, dresidual, dweight, dbias, dweight2, dbias2;
};

/// The shape and dtype of a gradient is that of its operand; of one that is not there, anything.
Tensor new_affine_gradient(const NormCall& call, bool needed, const TensorRef& operand,
                           TensorRef& ref) {
  return call.new_gradient(needed, operand, operand.given() ? operand.dtype : call.x().dtype, ref);
}

Gradients backward(NormKind kind, const char* op, const Tensor& dy, MaybeTensor dh, const Tensor& h,
                   MaybeTensor weight, MaybeTensor bias, const SecondOutput& second, double eps,
                   double weight_offset, double dropout_p, MaybeTensor seed, MaybeTensor offset,
                   MaybeTensor rowscale, OptionalType x_dtype, OptionalType residual_dtype,
                   bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias) {
  NormBwd args;
  args.op = op;
  args.kind = kind;
  args.eps = eps;
  args.weight_offset = weight_offset;
  NormCall call(op, h, eps, weight_offset, "h");
  args.x = call.x();
  args.dy = call.rows(dy, "dy");
  args.dy2 = call.rows(second.dy, "dy2");
  args.dh = call.rows(dh, "dh");
  args.weight = call.affine(weight, "weight");
  const TensorRef bias_ref = call.affine(bias, "bias");
  args.weight2 = call.affine(second.weight, "weight2");
  const TensorRef bias2_ref = call.affine(second.bias, "bias2");
  args.rowscale = call.rowscale(rowscale);
  args.dropout = call.dropout(dropout_p, seed, offset);
  const DType x_type = float_type(x_dtype, args.x.dtype, op, "x_dtype");
  const DType residual_type = float_type(residual_dtype, args.x.dtype, op, "residual_dtype");
  call.check_needed(need_dweight, weight, "need_dweight", "weight");
  call.check_needed(need_dbias, bias, "need_dbias", "bias");
  call.check_needed(second.need_dweight, second.weight, "need_dweight2", "weight2");
  call.check_needed(second.need_dbias, second.bias, "need_dbias2", "bias2");

  const TensorRef weight_ref = args.weight, weight2_ref = args.weight2;
  call.make_rows(h, args.x);
  call.make_rows(dy, args.dy);
  call.make_rows(second.dy, args.dy2);
  call.make_rows(dh, args.dh);
  call.make_dense(weight, args.weight);
  call.make_dense(second.weight, args.weight2);
  call.make_dense(rowscale, args.rowscale);
  const bool plain = dropout_p == 0.0 && !rowscale;  // x and residual have the same gradient
  Gradients grads{
      .dx = call.new_gradient(need_dx, call.x(), x_type,
                              plain && !need_dresidual ? args.dx : args.dbranch),
      .dresidual = call.new_gradient(need_dresidual, call.x(), residual_type, args.dx),
      .dweight = new_affine_gradient(call, need_dweight, weight_ref, args.dweight),
      .dbias = new_affine_gradient(call, need_dbias, bias_ref, args.dbias),
      .dweight2 = new_affine_gradient(call, second.need_dweight, weight2_ref, args.dweight2),
      .dbias2 = new_affine_gradient(call, second.need_dbias, bias2_ref, args.dbias2)};
  if (need_dx || need_dresidual || need_dweight || need_dbias || second.need_dweight ||
      second.need_dbias) {
    call.launch(args);
  }
  return grads;
}

template <NormKind kKind>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_bwd(
    const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, double weight_offset, double dropout_p,
    const OptionalTensor& seed, const OptionalTensor& offset, const OptionalTensor& rowscale,
    OptionalType x_dtype, OptionalType residual_dtype, bool need_dx, bool need_dresidual,
    bool need_dweight, bool need_dbias) {
  Gradients g = backward(kKind, kOps[static_cast<int>(kKind)], dy, dh, h, weight, bias, {}, eps,
                         weight_offset, dropout_p, seed, offset, rowscale, x_dtype, residual_dtype,
                         need_dx, need_dresidual, need_dweight, need_dbias);
  return {std::move(g.dx), std::move(g.dresidual), std::move(g.dweight), std::move(g.dbias)};
}

template <NormKind kKind>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_parallel_bwd(
    const Tensor& dy, const Tensor& dy2, const OptionalTensor& dh, const Tensor& h,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& weight2,
    const OptionalTensor& bias2, double eps, double weight_offset, double dropout_p,
    const OptionalTensor& seed, const OptionalTensor& offset, const OptionalTensor& rowscale,
    OptionalType x_dtype, OptionalType residual_dtype, bool need_dx, bool need_dresidual,
    bool need_dweight, bool need_dbias, bool need_dweight2, bool need_dbias2) {
  const SecondOutput second{dy2, weight2, bias2, need_dweight2, need_dbias2};
  Gradients g = backward(kKind, kParallelOps[static_cast<int>(kKind)], dy, dh, h, weight, bias,
                         second, eps, weight_offset, dropout_p, seed, offset, rowscale, x_dtype,
                         residual_dtype, need_dx, need_dresidual, need_dweight, need_dbias);
  return {std::move(g.dx),    std::move(g.dresidual), std::move(g.dweight),
          std::move(g.dbias), std::move(g.dweight2),  std::move(g.dbias2)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string stream =
      "float eps, float weight_offset, float dropout_p, Tensor? seed, Tensor? offset, Tensor? "
      "rowscale, ScalarType? x_dtype, ScalarType? residual_dtype, bool need_dx, bool "
      "need_dresidual, bool need_dweight, bool need_dbias";
  const std::string one = "(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, " +
                          stream +
                          ") -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)";
  const std::string two =
      "(Tensor dy, Tensor dy2, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor? "
      "weight2, Tensor? bias2, " +
      stream +
      ", bool need_dweight2, bool need_dbias2) -> (Tensor dx, Tensor dresidual, Tensor dweight, "
      "Tensor dbias, Tensor dweight2, Tensor dbias2)";
  m.def(("add_rms_norm_bwd" + one).c_str());
  m.def(("add_layer_norm_bwd" + one).c_str());
  m.def(("add_rms_norm_parallel_bwd" + two).c_str());
  m.def(("add_layer_norm_parallel_bwd" + two).c_str());
}

FASTKERN_REGISTER(m) {
  m.impl("add_rms_norm_bwd", box<&add_norm_bwd<NormKind::rms>>);
  m.impl("add_layer_norm_bwd", box<&add_norm_bwd<NormKind::layer>>);
  m.impl("add_rms_norm_parallel_bwd", box<&add_norm_parallel_bwd<NormKind::rms>>);
  m.impl("add_layer_norm_parallel_bwd", box<&add_norm_parallel_bwd<NormKind::layer>>);
}

}  // namespace fastkern::torch_layer
