// SPDX-License-Identifier: Apache-2.0
// Group normalisation for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/group_norm.py.
#include "fastkern/group_norm.h"

#include <cmath>
#include <tuple>
#include <utility>

#include "tensor.h"
#include "text.h"

namespace fastkern::torch_layer {

namespace {

Activation activation_of(const Text& text, const char* op) {
  if (text.value == "none") return Activation::none;
  FK_CHECK(text.value == "silu", op, ": activation must be \"none\" or \"silu\", got \"",
           text.value, "\"");
  return Activation::silu;
}

/// A call that is being put together: x sets the device, the shape and the layout of the rest.
class Call {
 public:
  Call(const char* op, const Tensor& x, std::int64_t num_groups, double eps, const Text& activation)
      : op_(op), ref_(ref_of(x, op, "x")), device_(device_of(x)) {
    FK_CHECK(ref_.ndim >= 2, op, ": x must have at least two dimensions, got shape ", ref_.shape());
    FK_CHECK(num_groups >= 1 && ref_.sizes[1] % num_groups == 0, op,
             ": num_groups must be at least 1 and divide the ", ref_.sizes[1],
             " channels of x, got ", num_groups);
    FK_CHECK(std::isfinite(eps) && eps >= 0.0, op, ": eps must be finite and >= 0, got ", eps);
    activation_ = activation_of(activation, op);
  }

  Device device() const { return device_; }
  Activation activation() const { return activation_; }

  TensorRef channels(const OptionalTensor& t, const char* argument) const {
    if (!t) return {};
    const TensorRef ref = ref_of(*t, op_, argument);
    check_shape(ref, &ref_.sizes[1], 1, op_, argument);
    check_device(*t, device_, op_, argument);
    return ref;
  }
  TensorRef gradient(const Tensor& dy) const {
    const TensorRef ref = ref_of(dy, op_, "dy");
    FK_CHECK(ref.dtype == ref_.dtype, op_, ": dy must be ", dtype_text(ref_.dtype), " like x, got ",
             dtype_text(ref.dtype));
    check_shape(ref, ref_.sizes.data(), ref_.ndim, op_, "dy");
    check_device(dy, device_, op_, "dy");
    return ref;
  }
  TensorRef statistics(const OptionalTensor& t, std::int64_t num_groups) const {
    if (!t) return {};
    const TensorRef ref = ref_of(*t, op_, "stats");
    const std::int64_t sizes[] = {ref_.sizes[0], num_groups, 2};
    FK_CHECK(ref.dtype == DType::f32, op_, ": stats must be torch.float32, got ",
             dtype_text(ref.dtype));
    check_shape(ref, sizes, 3, op_, "stats");
    check_device(*t, device_, op_, "stats");
    return ref;
  }
  void check_needed(bool needed, const OptionalTensor& t, const char* argument,
                    const char* operand) const {
    FK_CHECK(t || !needed, op_, ": ", argument, " must be False without a ", operand, ", got True");
  }

  /// x as kernels read it; a copy, if it takes one, must outlive the launch.
  OptionalTensor readable_x(const Tensor& x, TensorRef& out) {
    OptionalTensor copy;
    out = ref_;
    if (image_layout(ref_) == ImageLayout::other) copy = make_dense(x, out);
    // The strides of new tensors: dense, whatever x has where they do not matter.
    ref_ = out;
    channels_last_ = image_layout(out) == ImageLayout::channels_last;
    std::int64_t stride = 1;
    const auto place = [&](int d) {
      ref_.strides[d] = stride;
      stride *= std::max<std::int64_t>(ref_.sizes[d], 1);
    };
    if (channels_last_) place(1);
    for (int d = ref_.ndim - 1; d >= 0; --d) {
      if (d != 1 || !channels_last_) place(d);
    }
    return copy;
  }

  /// Uninitialised, with the dtype, shape and layout of x.
  Tensor new_like_x(const Tensor& x, TensorRef& out) const {
    std::int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
    AtenTensorHandle handle = nullptr;
    FK_CHECK(aoti_torch_empty_strided(ref_.ndim, ref_.sizes.data(), ref_.strides.data(), type,
                                      device_.type, device_.index, &handle) == AOTI_TORCH_SUCCESS,
             op_, ": could not allocate a tensor of shape ", ref_.shape(), " (out of memory?)");
    Tensor result(handle);
    out = ref_;
    out.data = data_of(result);
    return result;
  }

  /// dy in the layout of x.
  OptionalTensor readable_dy(const Tensor& dy, TensorRef& out) const {
    const ImageLayout layout = image_layout(out), of_x = image_layout(ref_);
    if (layout == of_x) return std::nullopt;
    Tensor copy = new_like_x(dy, out);
    FK_CHECK(aoti_torch_copy_(copy.get(), dy.get(), 0) == AOTI_TORCH_SUCCESS, op_,
             ": could not copy dy of shape ", out.shape());
    return copy;
  }

 private:
  const char* op_;
  TensorRef ref_;
  Device device_;
  Activation activation_ = Activation::none;
  bool channels_last_ = false;
};

/// y, and the statistics if `stats` is somewhere to put them.
Tensor forward(const Tensor& x, std::int64_t num_groups, const OptionalTensor& weight,
               const OptionalTensor& bias, double eps, const Text& activation,
               OptionalTensor* stats) {
  constexpr const char* kOp = "fastkern::group_norm";
  Call call(kOp, x, num_groups, eps, activation);
  GroupNormFwd args;
  args.num_groups = num_groups;
  args.eps = eps;
  args.activation = call.activation();
  args.weight = call.channels(weight, "weight");
  args.bias = call.channels(bias, "bias");
  const OptionalTensor copies[] = {call.readable_x(x, args.x), make_dense(weight, args.weight),
                                   make_dense(bias, args.bias)};
  Tensor y = call.new_like_x(x, args.y);
  if (stats) {
    const std::int64_t sizes[] = {args.x.sizes[0], num_groups, 2};
    *stats = new_dense(sizes, 3, DType::f32, call.device());
    if (args.x.numel() == 0) set_zero(**stats);
    args.stats = dense(data_of(**stats), DType::f32, sizes[0], sizes[1], sizes[2]);
  }
  if (!call.device().is_cuda) {
    cpu::group_norm(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(call.device());
    args.workspace_size = cuda::group_norm_workspace(args, stream.device);
    const OptionalTensor workspace =
        args.workspace_size ? OptionalTensor(new_bytes(args.workspace_size, call.device()))
                            : std::nullopt;
    if (workspace) args.workspace = data_of(*workspace);
    cuda::group_norm(args, stream);
  }
  return y;
}

Tensor group_norm(const Tensor& x, std::int64_t num_groups, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, const Text& activation) {
  return forward(x, num_groups, weight, bias, eps, activation, nullptr);
}

std::tuple<Tensor, Tensor> group_norm_fwd_stats(const Tensor& x, std::int64_t num_groups,
                                                const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps,
                                                const Text& activation) {
  OptionalTensor stats;
  Tensor y = forward(x, num_groups, weight, bias, eps, activation, &stats);
  return {std::move(y), std::move(*stats)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(
    const Tensor& dy, const Tensor& x, std::int64_t num_groups, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& stats, double eps, const Text& activation,
    bool need_dx, bool need_dweight, bool need_dbias) {
  constexpr const char* kOp = "fastkern::group_norm_bwd";
  Call call(kOp, x, num_groups, eps, activation);
  GroupNormBwd args;
  args.num_groups = num_groups;
  args.eps = eps;
  args.activation = call.activation();
  args.dy = call.gradient(dy);
  args.weight = call.channels(weight, "weight");
  args.bias = call.channels(bias, "bias");
  args.stats = call.statistics(stats, num_groups);
  call.check_needed(need_dweight, weight, "need_dweight", "weight");
  call.check_needed(need_dbias, bias, "need_dbias", "bias");
  const OptionalTensor copies[] = {call.readable_x(x, args.x), call.readable_dy(dy, args.dy),
                                   make_dense(weight, args.weight), make_dense(bias, args.bias),
                                   make_dense(stats, args.stats)};

  const DType x_type = args.x.dtype;
  Tensor dx = need_dx ? call.new_like_x(x, args.dx) : no_output(x_type, call.device());
  const auto gradient = [&](bool needed, const TensorRef& like, TensorRef& out) {
    if (!needed) return no_output(like.given() ? like.dtype : x_type, call.device());
    Tensor result = new_like(like, call.device());
    out = dense_ref(result, like);
    return result;
  };
  Tensor dweight = gradient(need_dweight, args.weight, args.dweight);
  Tensor dbias = gradient(need_dbias, args.bias, args.dbias);
  if (!call.device().is_cuda) {
    cpu::group_norm_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(call.device());
    args.workspace_size = cuda::group_norm_bwd_workspace(args, stream.device);
    const Tensor workspace = new_bytes(args.workspace_size, call.device());
    args.workspace = data_of(workspace);
    cuda::group_norm_bwd(args, stream);
  }
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  m.def(
      "group_norm(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float "
      "eps=1e-05, str activation=\"none\") -> Tensor");
  m.def(
      "group_norm_fwd(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float "
      "eps=1e-05, str activation=\"none\") -> Tensor");
  m.def(
      "group_norm_fwd_stats(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, str activation=\"none\") -> (Tensor y, Tensor stats)");
  m.def(
      "group_norm_bwd(Tensor dy, Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, "
      "Tensor? stats=None, float eps=1e-05, str activation=\"none\", bool need_dx=True, bool "
      "need_dweight=True, bool need_dbias=True) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

FASTKERN_REGISTER(m) {
  m.impl("group_norm", box<&group_norm>);
  m.impl("group_norm_fwd", box<&group_norm>);
  m.impl("group_norm_fwd_stats", box<&group_norm_fwd_stats>);
  m.impl("group_norm_bwd", box<&group_norm_bwd>);
}

}  // namespace fastkern::torch_layer
