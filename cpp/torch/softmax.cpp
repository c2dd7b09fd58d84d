// SPDX-License-Identifier: Apache-2.0
// The softmax family for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/softmax.py.
#include "fastkern/softmax.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "tensor.h"

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

/// A call that is being put together: x sets the device and the shape of the rest, `dim` how it is
/// seen: as rows of its last dimension but for ones behind, or as (A, N, C). `real`: f64 is taken
/// on the CPU.
class Call {
 public:
  Call(const char* op, const Tensor& x, std::int64_t dim, const char* x_name = "x",
       bool real = true)
      : op_(op),
        x_name_(x_name),
        real_(real),
        x_(real ? real_ref_of(x, op, x_name) : ref_of(x, op, x_name)),
        device_(device_of(x)) {
    FK_CHECK(x_.ndim >= 1, op, ": ", x_name,
             " must have at least one dimension, got a scalar of shape ()");
    FK_CHECK(dim >= -x_.ndim && dim < x_.ndim, op, ": dim must be between ", -x_.ndim, " and ",
             x_.ndim - 1, ", got ", dim);
    dim_ = static_cast<int>(dim < 0 ? dim + x_.ndim : dim);
    for (int d = dim_ + 1; d < x_.ndim; ++d) inner_ *= x_.sizes[d];
  }

  Device device() const { return device_; }
  const TensorRef& x() const { return x_; }
  bool middle() const { return inner_ != 1; }

  /// An operand of the shape of x.
  TensorRef like_x(const Tensor& t, const char* argument) const {
    const TensorRef ref = operand(t, argument);
    check_shape(ref, x_.sizes.data(), x_.ndim, op_, argument);
    check_device(t, device_, op_, argument, x_name_);
    return ref;
  }
  /// One number for each row: of the shape of x without the dimension.
  TensorRef row_numbers(const Tensor& t, const char* argument) const {
    const TensorRef ref = operand(t, argument);
    const TensorRef expected = without_dim(false);
    check_shape(ref, expected.sizes.data(), expected.ndim, op_, argument);
    check_device(t, device_, op_, argument, x_name_);
    return ref;
  }
  /// Broadcast to the shape of x with strides of 0.
  TensorRef mask(const OptionalTensor& t) const {
    if (!t) return {};
    TensorRef ref = view_of(*t, op_, "mask");
    const std::int32_t type = type_of(*t);
    const auto is = [&](ScalarType known) { return type == static_cast<std::int32_t>(known); };
    FK_CHECK(is(ScalarType::Bool) || is(ScalarType::Float) || is(ScalarType::Half) ||
                 is(ScalarType::BFloat16),
             op_, ": mask must be torch.bool, torch.float32, torch.float16 or torch.bfloat16, got ",
             type_text(type));
    ref.dtype = is(ScalarType::Bool) ? DType::i8 : ref_of(*t, op_, "mask").dtype;
    TensorRef wide = x_;
    wide.data = ref.data, wide.dtype = ref.dtype;
    bool fits = ref.ndim <= x_.ndim;
    for (int d = 0; fits && d < x_.ndim; ++d) {
      const int own = d - (x_.ndim - ref.ndim);
      const bool there = own >= 0 && ref.sizes[own] != 1;
      fits = !there || ref.sizes[own] == x_.sizes[d];
      wide.strides[d] = there ? ref.strides[own] : 0;
    }
    FK_CHECK(fits, op_, ": mask must broadcast to the shape of x, ", x_.shape(), ", got ",
             ref.shape());
    check_device(*t, device_, op_, "mask", x_name_);
    return wide;
  }

  /// Makes `ref`, the view of `t`, what a kernel can read; to be called after the checks.
  OptionalTensor readable(const Tensor& t, TensorRef& ref) const {
    if (middle()) {
      OptionalTensor copy = make_dense(t, ref);
      ref = folded(ref);
      return copy;
    }
    ref.ndim = dim_ + 1;  // ones behind it
    return make_rows(t, ref);
  }
  /// A new tensor of the shape of x, and its view.
  Tensor new_like_x(DType dtype, TensorRef& ref) const {
    Tensor t = new_like(x_, dtype, device_);
    ref = dense_ref(t, x_, dtype);
    if (middle()) {
      ref = folded(ref);
    } else {
      ref.ndim = dim_ + 1;
    }
    return t;
  }
  /// One number for each row: a new tensor without the dimension or, `keepdim`, with 1 for it.
  Tensor new_row_numbers(DType dtype, bool keepdim, TensorRef& ref) const {
    const TensorRef shape = without_dim(keepdim);
    Tensor t = new_like(shape, dtype, device_);
    ref = dense(data_of(t), dtype, shape.numel());
    return t;
  }
  std::int64_t rows() const { return without_dim(false).numel(); }

 private:
  TensorRef operand(const Tensor& t, const char* argument) const {
    return real_ ? real_ref_of(t, op_, argument) : ref_of(t, op_, argument);
  }
  TensorRef without_dim(bool keepdim) const {
    TensorRef shape = x_;
    if (keepdim) {
      shape.sizes[dim_] = 1;
    } else {
      std::copy(x_.sizes.begin() + dim_ + 1, x_.sizes.begin() + x_.ndim,
                shape.sizes.begin() + dim_);
      --shape.ndim;
    }
    return shape;
  }
  TensorRef folded(const TensorRef& ref) const {
    std::int64_t outer = 1;
    for (int d = 0; d < dim_; ++d) outer *= x_.sizes[d];
    return dense(ref.data, ref.dtype, outer, x_.sizes[dim_], inner_);
  }

  const char* op_;
  const char* x_name_;
  bool real_;
  TensorRef x_;
  Device device_;
  int dim_ = 0;
  std::int64_t inner_ = 1;
};

/// A mask whose strides no kernel reads, written out.
Tensor written_out(const Tensor& mask, TensorRef& wide, Device device, const char* op) {
  Tensor copy = new_dense(wide.sizes.data(), wide.ndim, type_of(mask), device);
  FK_CHECK(aoti_torch_copy_(copy.get(), mask.get(), 0) == AOTI_TORCH_SUCCESS, op,
           ": could not copy mask to shape ", wide.shape());
  wide = dense_ref(copy, wide);
  return copy;
}

void launch(SoftmaxFwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::softmax(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(device);
    args.workspace_size = cuda::softmax_workspace(args, stream.device);
    OptionalTensor workspace;
    if (args.workspace_size > 0) workspace = new_bytes(args.workspace_size, device);
    if (workspace) args.workspace = data_of(*workspace);
    cuda::softmax(args, stream);
  }
}

void launch(SoftmaxBwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::softmax_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(device);
    args.workspace_size = cuda::softmax_bwd_workspace(args, stream.device);
    OptionalTensor workspace;
    if (args.workspace_size > 0) workspace = new_bytes(args.workspace_size, device);
    if (workspace) args.workspace = data_of(*workspace);
    cuda::softmax_bwd(args, stream);
  }
}

template <SoftmaxKind kKind>
Tensor softmax(const Tensor& x, std::int64_t dim, OptionalType dtype) {
  SoftmaxFwd args;
  args.op = kKind == SoftmaxKind::softmax ? "fastkern::softmax" : "fastkern::log_softmax";
  args.kind = kKind;
  const Call call(args.op, x, dim);
  const DType out = real_type(dtype, call.x().dtype, call.device(), args.op, "dtype");
  args.middle = call.middle();
  args.x = call.x();
  const OptionalTensor copy = call.readable(x, args.x);
  Tensor y = call.new_like_x(out, args.y);
  if (call.x().numel() > 0) launch(args, call.device());
  return y;
}

template <SoftmaxKind kKind>
Tensor softmax_bwd(const Tensor& dy, const Tensor& y, std::int64_t dim, OptionalType x_dtype) {
  SoftmaxBwd args;
  args.op = kKind == SoftmaxKind::softmax ? "fastkern::softmax_bwd" : "fastkern::log_softmax_bwd";
  args.kind = kKind;
  const Call call(args.op, y, dim, "y");
  const DType out = real_type(x_dtype, call.x().dtype, call.device(), args.op, "x_dtype");
  args.middle = call.middle();
  args.y = call.x();
  args.dy = call.like_x(dy, "dy");
  const OptionalTensor copies[] = {call.readable(y, args.y), call.readable(dy, args.dy)};
  Tensor dx = call.new_like_x(out, args.dx);
  if (call.x().numel() > 0) launch(args, call.device());
  return dx;
}

Tensor logsumexp(const Tensor& x, std::int64_t dim, bool keepdim) {
  SoftmaxFwd args;
  args.op = "fastkern::logsumexp";
  args.kind = SoftmaxKind::logsumexp;
  const Call call(args.op, x, dim);
  args.middle = call.middle();
  args.x = call.x();
  const OptionalTensor copy = call.readable(x, args.x);
  Tensor y = call.new_row_numbers(args.x.dtype, keepdim, args.y);
  if (call.rows() > 0) launch(args, call.device());
  return y;
}

Tensor logsumexp_bwd(const Tensor& dy, const Tensor& x, const Tensor& lse, std::int64_t dim) {
  SoftmaxBwd args;
  args.op = "fastkern::logsumexp_bwd";
  args.kind = SoftmaxKind::logsumexp;
  const Call call(args.op, x, dim);
  args.middle = call.middle();
  args.y = call.x();
  args.dy = call.row_numbers(dy, "dy");
  args.lse = call.row_numbers(lse, "lse");
  const OptionalTensor copies[] = {call.readable(x, args.y), make_dense(dy, args.dy),
                                   make_dense(lse, args.lse)};
  for (TensorRef* t : {&args.dy, &args.lse}) *t = dense(t->data, t->dtype, call.rows());
  Tensor dx = call.new_like_x(call.x().dtype, args.dx);
  if (call.x().numel() > 0) launch(args, call.device());
  return dx;
}

/// softmax(scale * x + mask) over the last dimension.
Tensor masked(const char* op, const Tensor& x, const OptionalTensor* mask, bool causal,
              double scale) {
  SoftmaxFwd args;
  args.op = op;
  args.masked = true;
  args.causal = causal;
  args.scale = scale;
  const Call call(args.op, x, -1, "x", false);
  FK_CHECK(!causal || call.x().ndim >= 2, op, ": x must have at least two dimensions, got shape ",
           call.x().shape());
  check_finite(scale, op, "scale");
  if (mask) args.mask = call.mask(*mask);
  args.x = call.x();
  OptionalTensor copies[] = {call.readable(x, args.x), std::nullopt};
  MaskRows rows;
  if (args.mask.given() && !as_mask_rows(args.mask, rows)) {
    copies[1] = written_out(**mask, args.mask, call.device(), op);
  }
  Tensor y = call.new_like_x(args.x.dtype, args.y);
  if (call.x().numel() > 0) launch(args, call.device());
  return y;
}

Tensor masked_softmax(const Tensor& x, const OptionalTensor& mask, double scale) {
  return masked("fastkern::masked_softmax", x, &mask, false, scale);
}

Tensor causal_softmax(const Tensor& x, double scale) {
  return masked("fastkern::causal_softmax", x, nullptr, true, scale);
}

template <bool kCausal>
Tensor masked_bwd(const Tensor& dy, const Tensor& y, double scale) {
  SoftmaxBwd args;
  args.op = kCausal ? "fastkern::causal_softmax_bwd" : "fastkern::masked_softmax_bwd";
  args.causal = kCausal;
  args.scale = scale;
  const Call call(args.op, y, -1, "y", false);
  FK_CHECK(!kCausal || call.x().ndim >= 2, args.op,
           ": y must have at least two dimensions, got shape ", call.x().shape());
  args.y = call.x();
  args.dy = call.like_x(dy, "dy");
  check_finite(scale, args.op, "scale");
  const OptionalTensor copies[] = {call.readable(y, args.y), call.readable(dy, args.dy)};
  Tensor dx = call.new_like_x(call.x().dtype, args.dx);
  if (call.x().numel() > 0) launch(args, call.device());
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  m.def("softmax(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor");
  m.def("softmax_fwd(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor");
  m.def("softmax_bwd(Tensor dy, Tensor y, int dim, ScalarType? x_dtype=None) -> Tensor");
  m.def("log_softmax(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor");
  m.def("log_softmax_fwd(Tensor x, int dim=-1, ScalarType? dtype=None) -> Tensor");
  m.def("log_softmax_bwd(Tensor dy, Tensor y, int dim, ScalarType? x_dtype=None) -> Tensor");
  m.def("logsumexp(Tensor x, int dim=-1, bool keepdim=False) -> Tensor");
  m.def("logsumexp_fwd(Tensor x, int dim=-1, bool keepdim=False) -> Tensor");
  m.def("logsumexp_bwd(Tensor dy, Tensor x, Tensor lse, int dim) -> Tensor");
  m.def("masked_softmax(Tensor x, Tensor? mask=None, float scale=1.0) -> Tensor");
  m.def("masked_softmax_fwd(Tensor x, Tensor? mask=None, float scale=1.0) -> Tensor");
  m.def("masked_softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
  m.def("causal_softmax(Tensor x, float scale=1.0) -> Tensor");
  m.def("causal_softmax_fwd(Tensor x, float scale=1.0) -> Tensor");
  m.def("causal_softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
}

FASTKERN_REGISTER(m) {
  m.impl("softmax", box<&softmax<SoftmaxKind::softmax>>);
  m.impl("softmax_fwd", box<&softmax<SoftmaxKind::softmax>>);
  m.impl("softmax_bwd", box<&softmax_bwd<SoftmaxKind::softmax>>);
  m.impl("log_softmax", box<&softmax<SoftmaxKind::log_softmax>>);
  m.impl("log_softmax_fwd", box<&softmax<SoftmaxKind::log_softmax>>);
  m.impl("log_softmax_bwd", box<&softmax_bwd<SoftmaxKind::log_softmax>>);
  m.impl("logsumexp", box<&logsumexp>);
  m.impl("logsumexp_fwd", box<&logsumexp>);
  m.impl("logsumexp_bwd", box<&logsumexp_bwd>);
  m.impl("masked_softmax", box<&masked_softmax>);
  m.impl("masked_softmax_fwd", box<&masked_softmax>);
  m.impl("masked_softmax_bwd", box<&masked_bwd<false>>);
  m.impl("causal_softmax", box<&causal_softmax>);
  m.impl("causal_softmax_fwd", box<&causal_softmax>);
  m.impl("causal_softmax_bwd", box<&masked_bwd<true>>);
}

}  // namespace fastkern::torch_layer
