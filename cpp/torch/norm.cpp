// SPDX-License-Identifier: Apache-2.0
// rms_norm and layer_norm for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/norm.py.
#include "fastkern/norm.h"

#include <string>
#include <tuple>
#include <utility>

#include "norm_call.h"

namespace fastkern::torch_layer {
namespace {

// The schemas of the two kinds differ in the order of arguments: eps is the third of rms_norm,
// which seldom has a bias.

template <NormKind kKind>
Tensor norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
            double weight_offset, OptionalType out_dtype) {
  NormFwd args;
  args.op = kKind == NormKind::rms ? "fastkern::rms_norm" : "fastkern::layer_norm";
  args.kind = kKind;
  args.eps = eps;
  args.weight_offset = weight_offset;
  NormCall call(args.op, x, eps, weight_offset);
  args.weight = call.affine(weight, "weight");
  args.bias = call.affine(bias, "bias");
  const DType out = float_type(out_dtype, call.x().dtype, args.op, "out_dtype");
  args.x = call.x();
  call.make_rows(x, args.x);
  call.make_dense(weight, args.weight);
  call.make_dense(bias, args.bias);
  Tensor y = call.new_rows(out, args.y);
  call.launch(args);
  return y;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps,
                const OptionalTensor& bias, double weight_offset, OptionalType out_dtype) {
  return norm<NormKind::rms>(x, weight, bias, eps, weight_offset, out_dtype);
}

template <NormKind kKind>
std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, const Tensor& x,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, double eps,
                                            double weight_offset, bool need_dx, bool need_dweight,
                                            bool need_dbias) {
  NormBwd args;
  args.op = kKind == NormKind::rms ? "fastkern::rms_norm_bwd" : "fastkern::layer_norm_bwd";
  args.kind = kKind;
  args.eps = eps;
  args.weight_offset = weight_offset;
  NormCall call(args.op, x, eps, weight_offset);
  args.x = call.x();
  args.dy = call.rows(dy, "dy");
  args.weight = call.affine(weight, "weight");
  const TensorRef bias_ref = call.affine(bias, "bias");
  call.check_needed(need_dweight, weight, "need_dweight", "weight");
  call.check_needed(need_dbias, bias, "need_dbias", "bias");

  call.make_rows(dy, args.dy);
  call.make_rows(x, args.x);
  call.make_dense(weight, args.weight);
  const DType x_type = args.x.dtype;
  Tensor dx = call.new_gradient(need_dx, call.x(), x_type, args.dx);
  Tensor dweight = call.new_gradient(need_dweight, args.weight, weight ? args.weight.dtype : x_type,
                                     args.dweight);
  Tensor dbias =
      call.new_gradient(need_dbias, bias_ref, bias ? bias_ref.dtype : x_type, args.dbias);
  if (need_dx || need_dweight || need_dbias) call.launch(args);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const char* name, const char* schema) {
    m.def((std::string(name) + schema).c_str());
  };
  for (const char* name : {"rms_norm", "rms_norm_fwd"}) {
    define(name,
           "(Tensor x, Tensor? weight=None, float eps=1e-06, Tensor? bias=None, float "
           "weight_offset=0.0, ScalarType? out_dtype=None) -> Tensor");
  }
  for (const char* name : {"layer_norm", "layer_norm_fwd"}) {
    define(name,
           "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, float "
           "weight_offset=0.0, ScalarType? out_dtype=None) -> Tensor");
  }
  for (const char* name : {"rms_norm_bwd", "layer_norm_bwd"}) {
    define(name,
           "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, "
           "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, "
           "Tensor dbias)");
  }
}

FASTKERN_REGISTER(m) {
  m.impl("rms_norm", box<&rms_norm>);
  m.impl("rms_norm_fwd", box<&rms_norm>);
  m.impl("rms_norm_bwd", box<&norm_bwd<NormKind::rms>>);
  m.impl("layer_norm", box<&norm<NormKind::layer>>);
  m.impl("layer_norm_fwd", box<&norm<NormKind::layer>>);
  m.impl("layer_norm_bwd", box<&norm_bwd<NormKind::layer>>);
}

}  // namespace fastkern::torch_layer
