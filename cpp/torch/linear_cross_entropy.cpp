// SPDX-License-Identifier: Apache-2.0
// The parts of linear_cross_entropy that are not torch's matrix products. They are put together in
// python/fastkern/ops/linear_cross_entropy.py: the stable ABI has no addmm, which adds up the
// gradient of the weight.
#include <string>
#include <tuple>
#include <utility>

#include "fastkern/loss.h"
#include "loss_call.h"

namespace fastkern::torch_layer {
namespace {

constexpr const char* kOp = "fastkern::linear_cross_entropy";  // what a user has called

/// Dense f32 of these sizes, written by the call.
float* written(const Tensor& t, const std::int64_t (&sizes)[2], int ndim, Device device,
               const char* op, const char* argument) {
  const TensorRef ref = ref_of(t, op, argument);
  FK_CHECK(ref.dtype == DType::f32, op, ": ", argument, " must be torch.float32, got ",
           dtype_text(ref.dtype));
  check_shape(ref, sizes, ndim, op, argument);
  check_device(t, device, op, argument, "logits");
  const bool dense = ref.strides[ndim - 1] == 1 && (ndim == 1 || ref.strides[0] == sizes[1]);
  FK_CHECK(dense || ref.numel() == 0, op, ": ", argument, " must be contiguous, got shape ",
           ref.shape());
  return static_cast<float*>(ref.data);
}

/// (M, V), of which the target tells M.
TensorRef all_logits(const Tensor& target, std::int64_t classes, DType dtype, const char* op) {
  const TensorRef t = view_of(target, op, "target");
  FK_CHECK(t.ndim == 1 || t.ndim == 2, op, ": target must have shape (M) or (M, V), got ",
           t.shape());
  return dense(nullptr, dtype, t.sizes[0], classes);
}

/// Losses of the rows from `first` on into columns of `rows` (3, M): loss, zloss, lse. `grad`:
/// their gradient is written over the logits.
std::tuple<> part(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                  const Tensor& totals, const Tensor& rows, const OptionalTensor& dloss,
                  std::int64_t first, bool grad, std::int64_t ignore_index, double label_smoothing,
                  double lse_square_scale, double softcap, double logit_scale,
                  std::int64_t reduction) {
  const char* const op = kOp;
  const TensorRef x = ref_of(logits, op, "logits");
  FK_CHECK(x.ndim == 2, op, ": logits must have shape (rows, V), got ", x.shape());
  const std::int64_t count = x.sizes[0], classes = x.sizes[1];
  const Device device = device_of(logits);
  LossCall call(op, all_logits(target, classes, x.dtype, op), device, "logits");
  call.operands(target, weight, "class_weight");
  call.numbers({ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction});
  FK_CHECK(first >= 0 && first + count <= call.rows(), op, ": first must be between 0 and ",
           call.rows() - count, ", got ", first);
  FK_CHECK(count == 0 || (x.strides[1] == 1 || classes == 1), op,
           ": logits must have a dense last dimension, got shape ", x.shape());
  const float* const of_totals = written(totals, {2, 0}, 1, device, op, "totals");
  float* const to = written(rows, {3, call.rows()}, 2, device, op, "rows");
  const float* const of_rows = call.gradient(dloss, "dloss", true);
  call.make_readable(target, weight);
  if (count == 0) return {};
  CrossEntropyFwd args{call.args()};
  args.logits = x;
  if (args.probabilities.given()) {
    TensorRef& p = args.probabilities;
    p.data = static_cast<char*>(p.data) + first * p.strides[0] * size_of(p.dtype);
    p.sizes[0] = count;
  } else {
    args.target.data = static_cast<const char*>(args.target.data) +
                       first * (args.target.narrow ? sizeof(std::int32_t) : sizeof(std::int64_t));
  }
  const std::int64_t size = loss_state_size(count);
  const Tensor state = new_dense(&size, 1, DType::f32, device);
  args.row_loss = to + first, args.row_zloss = to + call.rows() + first;
  args.lse = to + 2 * call.rows() + first;
  args.state = floats_of(state), args.totals = of_totals;
  args.dloss = of_rows ? of_rows + first : nullptr;
  if (grad) args.grad = args.logits;
  launch(args, count, device);
  return {};
}

/// Without `rows`: the totals that a mean is divided by. With: loss and zloss, summed up.
std::tuple<Tensor, Tensor> sums(const Tensor& target, const OptionalTensor& weight,
                                const Tensor& totals, const OptionalTensor& rows,
                                std::int64_t classes, std::int64_t ignore_index,
                                std::int64_t reduction) {
  const char* const op = kOp;
  const Device device = device_of(target);
  LossCall call(op, all_logits(target, classes, DType::f32, op), device, "target");
  call.operands(target, weight, "class_weight");
  call.numbers({ignore_index, 0.0, 0.0, 0.0, 1.0, reduction});
  LossSums args;
  args.op = op, args.rows = call.rows(), args.classes = classes, args.ignore_index = ignore_index;
  args.totals = written(totals, {2, 0}, 1, device, op, "totals");
  if (rows) args.row_loss = written(*rows, {3, call.rows()}, 2, device, op, "rows");
  call.make_readable(target, weight);
  args.target = call.args().target, args.weight = call.args().weight;
  args.reduction = call.args().reduction;
  if (!rows) {
    launch(args, device);
    return {no_output(DType::f32, device), no_output(DType::f32, device)};
  }
  Tensor loss = new_dense(nullptr, 0, DType::f32, device);
  Tensor zloss = new_dense(nullptr, 0, DType::f32, device);
  args.totals_given = true;
  args.row_zloss = args.row_loss + call.rows();
  args.loss = floats_of(loss), args.zloss = floats_of(zloss);
  launch(args, device);
  return {std::move(loss), std::move(zloss)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string operands =
      "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, Tensor? class_weight=None, "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float "
      "softcap=0.0, float logit_scale=1.0, int reduction=1, int chunk_rows=0";
  m.def(("linear_cross_entropy" + operands + ") -> Tensor").c_str());
  for (const char* name : {"linear_cross_entropy_grads", "linear_cross_entropy_grads_fwd"}) {
    m.def((name + operands +
           ", Tensor? dloss=None, bool need_dhidden=False, bool need_dweight=False, bool "
           "need_dbias=False) -> (Tensor loss, Tensor lse, Tensor zloss, Tensor dhidden, Tensor "
           "dweight, Tensor dbias)")
              .c_str());
  }
  m.def(
      "cross_entropy_part_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor totals, "
      "Tensor(b!) rows, Tensor? dloss, int first, bool grad, int ignore_index, float "
      "label_smoothing, float lse_square_scale, float softcap, float logit_scale, int reduction) "
      "-> ()");
  m.def(
      "cross_entropy_sums_(Tensor target, Tensor? weight, Tensor(a!) totals, Tensor? rows, int "
      "classes, int ignore_index, int reduction) -> (Tensor loss, Tensor zloss)");
}

FASTKERN_REGISTER(m) {
  m.impl("cross_entropy_part_", box<&part>);
  m.impl("cross_entropy_sums_", box<&sums>);
}

}  // namespace fastkern::torch_layer
