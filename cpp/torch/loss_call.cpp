// SPDX-License-Identifier: Apache-2.0
#include "loss_call.h"

#include <limits>

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

bool is(std::int32_t type, ScalarType wanted) { return type == static_cast<std::int32_t>(wanted); }

}  // namespace

// Braces: from left to right. None has no device.
LossCall::LossCall(const char* op, const Tensor& logits)
    : LossCall{op, ref_of(logits, op, "logits"), device_of(logits), "logits"} {}

LossCall::LossCall(const char* op, const TensorRef& logits, Device device, const char* like)
    : logits_(logits), device_(device), like_(like) {
  FK_CHECK(logits.ndim > 0, op, ": ", like,
           " must have at least one dimension, got a scalar of shape ()");
  FK_CHECK(classes() > 0, op, ": ", like, " must have at least one class, got shape ",
           logits.shape());
  for (int d = 0; d < logits.ndim - 1; ++d) rows_ *= logits.sizes[d];
  args_.op = op;
  args_.logits = logits;
}

void LossCall::operands(const Tensor& target, MaybeTensor weight, const char* weight_name) {
  target_ = view_of(target, args_.op, "target");
  const std::int32_t type = type_of(target);
  if (is(type, ScalarType::Long) || is(type, ScalarType::Int)) {
    check_shape(target_, logits_.sizes.data(), logits_.ndim - 1, args_.op, "target");
    args_.target.narrow = is(type, ScalarType::Int);
  } else {
    FK_CHECK(
        is(type, ScalarType::Float) || is(type, ScalarType::Half) || is(type, ScalarType::BFloat16),
        args_.op,
        ": target must hold classes in torch.int64 or torch.int32, or probabilities in "
        "torch.float32, torch.float16 or torch.bfloat16, got ",
        type_text(type));
    args_.probabilities = target_ = ref_of(target, args_.op, "target");
    check_shape(target_, logits_.sizes.data(), logits_.ndim, args_.op, "target");
  }
  check_device(target, device_, args_.op, "target", like_);
  if (!weight) return;
  args_.weight = ref_of(*weight, args_.op, weight_name);
  check_shape(args_.weight, &logits_.sizes[logits_.ndim - 1], 1, args_.op, weight_name);
  check_device(*weight, device_, args_.op, weight_name, like_);
}

void LossCall::numbers(const LossNumbers& n) {
  const char* const op = args_.op;
  constexpr double kMost = std::numeric_limits<float>::max();
  FK_CHECK(n.label_smoothing >= 0.0 && n.label_smoothing <= 1.0, op,
           ": label_smoothing must be between 0 and 1, got ", n.label_smoothing);
  FK_CHECK(n.lse_square_scale >= 0.0 && n.lse_square_scale <= kMost, op,
           ": lse_square_scale must be finite in float32 and >= 0, got ", n.lse_square_scale);
  check_softcap(n.softcap, op);
  check_finite(n.logit_scale, op, "logit_scale");
  FK_CHECK(n.reduction >= 0 && n.reduction <= 2, op,
           ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", n.reduction);
  args_.ignore_index = n.ignore_index;
  args_.label_smoothing = n.label_smoothing;
  args_.lse_square_scale = n.lse_square_scale;
  args_.softcap = n.softcap;
  args_.logit_scale = n.logit_scale;
  args_.reduction = static_cast<Reduction>(n.reduction);
}

void LossCall::make_readable(const Tensor& target, MaybeTensor weight) {
  if (args_.probabilities.given()) {
    make_rows(target, args_.probabilities);
  } else {
    keep(make_dense(target, target_));
    args_.target.data = target_.data;
  }
  keep(make_dense(weight, args_.weight));
}

const float* LossCall::gradient(MaybeTensor t, const char* argument, bool of_rows) {
  if (!t) return nullptr;
  TensorRef ref = ref_of(*t, args_.op, argument);
  FK_CHECK(ref.dtype == DType::f32, args_.op, ": ", argument, " must be torch.float32, got ",
           dtype_text(ref.dtype));
  check_shape(ref, logits_.sizes.data(), of_rows ? logits_.ndim - 1 : 0, args_.op, argument);
  check_device(*t, device_, args_.op, argument, like_);
  keep(make_dense(t, ref));
  return static_cast<const float*>(ref.data);
}

const float* LossCall::state_of(const Tensor& state) const {
  const TensorRef ref = view_of(state, args_.op, "state");
  const std::int64_t size = loss_state_size(rows_);
  FK_CHECK(is(type_of(state), ScalarType::Int), args_.op, ": state must be torch.int32, got ",
           type_text(type_of(state)));
  check_shape(ref, &size, 1, args_.op, "state");
  FK_CHECK(ref.strides[0] == 1, args_.op, ": state must be dense, got stride ", ref.strides[0]);
  check_device(state, device_, args_.op, "state", like_);
  return static_cast<const float*>(ref.data);
}

Tensor LossCall::new_state() const {
  const std::int64_t size = loss_state_size(rows_);
  return new_dense(&size, 1, static_cast<std::int32_t>(ScalarType::Int), device_);
}

void launch(CrossEntropyFwd& args, std::int64_t rows, Device device) {
  if (!device.is_cuda) {
    cpu::cross_entropy(args);
  } else if constexpr (kHasCuda) {
    const std::size_t bytes = cuda::loss_workspace(rows);
    const OptionalTensor workspace =
        bytes ? OptionalTensor(new_bytes(bytes, device)) : std::nullopt;
    args.workspace = workspace ? data_of(*workspace) : nullptr;
    cuda::cross_entropy(args, current_stream(device));
  }
}

void launch(const CrossEntropyBwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::cross_entropy_bwd(args);
  } else if constexpr (kHasCuda) {
    cuda::cross_entropy_bwd(args, current_stream(device));
  }
}

void launch(LossSums& args, Device device) {
  if (!device.is_cuda) {
    cpu::loss_sums(args);
  } else if constexpr (kHasCuda) {
    const std::size_t bytes = cuda::loss_workspace(args.rows);
    const OptionalTensor workspace =
        bytes ? OptionalTensor(new_bytes(bytes, device)) : std::nullopt;
    args.workspace = workspace ? data_of(*workspace) : nullptr;
    cuda::loss_sums(args, current_stream(device));
  }
}

}  // namespace fastkern::torch_layer
