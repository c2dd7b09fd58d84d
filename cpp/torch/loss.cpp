// SPDX-License-Identifier: Apache-2.0
// cross_entropy for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/loss.py.
#include "fastkern/loss.h"

#include <string>
#include <tuple>
#include <utility>

#include "fastkern/rows.h"
#include "loss_call.h"

namespace fastkern::torch_layer {
namespace {

/// Outputs and scratch of a forward call; what torch gets of them is taken out.
struct Outputs {
  explicit Outputs(const LossCall& call)
      : loss(call.new_loss()),
        lse(call.new_row_values()),
        zloss(call.new_loss()),
        state(call.new_state()) {
    if (!call.reduced()) return;
    const std::int64_t size = 2 * call.rows();
    rows.emplace(new_dense(&size, 1, DType::f32, call.device()));
  }

  void put_into(CrossEntropyFwd& args, std::int64_t count) const {
    args.lse = floats_of(lse);
    args.state = floats_of(state);
    args.row_loss = rows ? floats_of(*rows) : floats_of(loss);
    args.row_zloss = rows ? args.row_loss + count : floats_of(zloss);
    if (rows) args.loss = floats_of(loss), args.zloss = floats_of(zloss);
  }

  Tensor loss, lse, zloss, state;
  OptionalTensor rows;  // losses of rows that are not asked for one by one
};

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    std::int64_t ignore_index, double label_smoothing, double lse_square_scale, double softcap,
    double logit_scale, std::int64_t reduction) {
  const char* const op = "fastkern::cross_entropy";
  LossCall call(op, logits);
  call.operands(target, weight);
  call.numbers({ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction});
  call.make_readable(target, weight);
  CrossEntropyFwd args{call.args()};
  call.make_rows(logits, args.logits);
  Outputs out(call);
  out.put_into(args, call.rows());
  launch(args, call.rows(), call.device());
  return {std::move(out.loss), std::move(out.lse), std::move(out.zloss), std::move(out.state)};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_grad_(const Tensor& logits, const Tensor& target,
                                                       const OptionalTensor& weight,
                                                       std::int64_t ignore_index,
                                                       double label_smoothing,
                                                       double lse_square_scale, double softcap,
                                                       double logit_scale, std::int64_t reduction) {
  const char* const op = "fastkern::cross_entropy_grad_";
  LossCall call(op, logits);
  call.operands(target, weight);
  call.numbers({ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction});
  FK_CHECK(call.reduced(), op, ": reduction must be 1 (mean) or 2 (sum), got ", reduction);
  CrossEntropyFwd args{call.args()};
  Rows rows;
  FK_CHECK(as_rows(args.logits, rows), op,
           ": logits must have a dense last dimension and leading ones that merge into at most two "
           "strides, to be written in place; got shape ",
           args.logits.shape());
  call.make_readable(target, weight);
  args = CrossEntropyFwd{call.args()};
  args.grad = args.logits;
  Outputs out(call);
  out.put_into(args, call.rows());
  launch(args, call.rows(), call.device());
  return {std::move(out.loss), std::move(out.lse), std::move(out.zloss)};
}

Tensor cross_entropy_bwd(const OptionalTensor& dloss, const OptionalTensor& dlse,
                         const OptionalTensor& dzloss, const Tensor& logits, const Tensor& target,
                         const OptionalTensor& weight, const Tensor& state,
                         std::int64_t ignore_index, double label_smoothing, double lse_square_scale,
                         double softcap, double logit_scale, std::int64_t reduction) {
  const char* const op = "fastkern::cross_entropy_bwd";
  LossCall call(op, logits);
  call.operands(target, weight);
  call.numbers({ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, reduction});
  const float* const saved = call.state_of(state);
  const float* const gradients[] = {call.gradient(dloss, "dloss", !call.reduced()),
                                    call.gradient(dlse, "dlse", true),
                                    call.gradient(dzloss, "dzloss", !call.reduced())};
  call.make_readable(target, weight);
  CrossEntropyBwd args{call.args()};
  args.state = saved;
  args.dloss = gradients[0], args.dlse = gradients[1], args.dzloss = gradients[2];
  Tensor dlogits = new_like(args.logits, call.device());
  args.dlogits = dense_ref(dlogits, args.logits);
  call.make_rows(logits, args.logits);
  if (call.rows() > 0) launch(args, call.device());
  return dlogits;
}

std::tuple<> scale_unless_one_(const Tensor& x, const Tensor& factor) {
  const char* const op = "fastkern::scale_unless_one_";
  TensorRef ref = ref_of(x, op, "x");
  const Device device = device_of(x);
  const float* const by = one_float(factor, device, op, "factor");
  TensorRef flat = dense(ref.data, ref.dtype, ref.numel());
  std::int64_t stride = 1;
  for (int d = ref.ndim - 1; d >= 0; --d) {
    FK_CHECK(ref.strides[d] == stride || ref.sizes[d] <= 1 || ref.numel() == 0, op,
             ": x must be contiguous, got shape ", ref.shape());
    stride *= ref.sizes[d];
  }
  if (ref.numel() == 0) return {};
  if (!device.is_cuda) {
    cpu::scale_unless_one(flat, by);
  } else if constexpr (kHasCuda) {
    cuda::scale_unless_one(flat, by, current_stream(device));
  }
  return {};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string options =
      "Tensor? weight=None, int ignore_index=-100, float label_smoothing=0.0, float "
      "lse_square_scale=0.0, float softcap=0.0, float logit_scale=1.0, int reduction=1";
  for (const char* name : {"cross_entropy", "cross_entropy_fwd"}) {
    m.def((std::string(name) + "(Tensor logits, Tensor target, " + options +
           ") -> (Tensor loss, Tensor lse, Tensor zloss, Tensor state)")
              .c_str());
  }
  m.def(("cross_entropy_grad_(Tensor(a!) logits, Tensor target, " + options +
         ") -> (Tensor loss, Tensor lse, Tensor zloss)")
            .c_str());
  m.def(
      "cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor? dzloss, Tensor logits, Tensor "
      "target, Tensor? weight, Tensor state, int ignore_index, float label_smoothing, float "
      "lse_square_scale, float softcap, float logit_scale, int reduction) -> Tensor dlogits");
  m.def("scale_unless_one_(Tensor(a!) x, Tensor factor) -> ()");
}

FASTKERN_REGISTER(m) {
  m.impl("cross_entropy", box<&cross_entropy>);
  m.impl("cross_entropy_fwd", box<&cross_entropy>);
  m.impl("cross_entropy_grad_", box<&cross_entropy_grad_>);
  m.impl("cross_entropy_bwd", box<&cross_entropy_bwd>);
  m.impl("scale_unless_one_", box<&scale_unless_one_>);
}

}  // namespace fastkern::torch_layer
