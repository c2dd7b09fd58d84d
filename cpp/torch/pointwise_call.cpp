// SPDX-License-Identifier: Apache-2.0
// Checks, promotion, device, shape and layout of a pointwise call, as torch has them.
#include "pointwise_call.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <span>
#include <string>

#include "fastkern/scalar.h"
#include "pointwise_strides.h"

namespace fastkern::torch_layer {
namespace {

template <class T>
T value_at(const void* data) {
  return *static_cast<const T*>(data);
}

/// Of a CPU tensor without dimensions.
Number read(const TensorRef& ref) {
  switch (ref.dtype) {
    case DType::f32:
      return value_at<float>(ref.data);
    case DType::f16:
      return to_float(value_at<f16>(ref.data));
    case DType::bf16:
      return to_float(value_at<bf16>(ref.data));
    case DType::f64:
      return value_at<double>(ref.data);
    case DType::u8:
      return static_cast<std::int64_t>(value_at<std::uint8_t>(ref.data));
    case DType::i8:
      return static_cast<std::int64_t>(value_at<std::int8_t>(ref.data));
    case DType::i16:
      return static_cast<std::int64_t>(value_at<std::int16_t>(ref.data));
    case DType::i32:
      return static_cast<std::int64_t>(value_at<std::int32_t>(ref.data));
    case DType::i64:
      return value_at<std::int64_t>(ref.data);
    case DType::boolean:
      return value_at<std::uint8_t>(ref.data) != 0;
    case DType::c64:
      return std::complex<double>(value_at<std::complex<float>>(ref.data));
    case DType::c128:
      return value_at<std::complex<double>>(ref.data);
    default:
      fail("fastkern: no number of type ", name_of(ref.dtype));
  }
}

/// A number in the common type, as torch takes it: integers always, floats where they are compared.
Number as_common(Number v, DType type) {
  const float f = static_cast<float>(v.real);
  switch (type) {
    case DType::f16:
      return to_float(from_float<f16>(f));
    case DType::bf16:
      return to_float(from_float<bf16>(f));
    case DType::u8:
      return static_cast<std::int64_t>(static_cast<std::uint8_t>(v.integer));
    case DType::i8:
      return static_cast<std::int64_t>(static_cast<std::int8_t>(v.integer));
    case DType::i16:
      return static_cast<std::int64_t>(static_cast<std::int16_t>(v.integer));
    case DType::i32:
      return static_cast<std::int64_t>(static_cast<std::int32_t>(v.integer));
    default:
      return v;
  }
}

/// Functions that mean nothing for booleans, and that torch refuses for them.
bool refuses_boolean(Pointwise f) {
  return f == Pointwise::neg || f == Pointwise::sub || f == Pointwise::relu;
}

bool is_division(Pointwise f) { return f == Pointwise::div_trunc || f == Pointwise::div_floor; }

}  // namespace

void PointwiseArguments::add(const Tensor& t, const char* name, bool promotes) {
  Argument& a = arguments_[count_];
  a.ref = number_ref_of(t, op_, name);
  a.name = name;
  a.tensor = &t;
  a.type = {a.ref.dtype, a.ref.ndim == 0 ? OperandKind::zero_dim : OperandKind::tensor};
  a.promotes = promotes;
  ++count_;
}

void PointwiseArguments::add_number(Number value, DType dtype, const char* name) {
  Argument& a = arguments_[count_++];
  a.name = name;
  a.number = value;
  a.type = {dtype, OperandKind::number};
}

void PointwiseArguments::check_boolean() const {
  const Argument& a = arguments_[count_ - 1];
  FK_CHECK(a.type.dtype == DType::boolean || a.type.dtype == DType::u8, op_, ": ", a.name,
           " must be bool, got ", dtype_text(a.type.dtype));
}

DType PointwiseArguments::common() const {
  std::array<OperandType, kMaxInputs> found;
  int count = 0;
  for (int i = 0; i < count_; ++i) {
    if (arguments_[i].promotes) found[count++] = arguments_[i].type;
  }
  const CommonType common = common_type(std::span(found.data(), static_cast<std::size_t>(count)));
  FK_CHECK(common.exists, op_, ": ", arguments_[count_ - 1].name,
           " must not be complex where the other operand is torch.float16: there is no complex32");
  return common.dtype;
}

void PointwiseArguments::refuse_type(const char* wanted) const {
  const Argument* first = &arguments_[0];
  for (int i = count_ - 1; i >= 0; --i) {
    const Argument& a = arguments_[i];
    if (a.promotes && category_of(a.type.dtype) == category_of(types_.common)) first = &a;
  }
  fail(op_, ": ", first->name, " must be ", wanted, ", got ", dtype_text(first->type.dtype));
}

void PointwiseArguments::check_types() const {
  const unsigned allowed = pointwise_info(function_).types;
  const TypeCategory category = category_of(types_.compute);
  const unsigned wanted = category == TypeCategory::complex    ? kComplex
                          : category == TypeCategory::floating ? kFloat
                                                               : kInt;
  if (!(allowed & wanted)) {
    refuse_type(allowed == kInt              ? "of an integer type or bool"
                : !(allowed & kInt)          ? "of a floating-point type"
                : allowed == (kInt | kFloat) ? "of a real type"
                                             : "of another type");
  }
  if (types_.common == DType::boolean && refuses_boolean(function_)) refuse_type("other than bool");
  if (types_.compute == DType::boolean && is_division(function_)) refuse_type("other than bool");
  if (alpha_ != 1.0 && category < TypeCategory::floating) {
    FK_CHECK(alpha_ == std::trunc(alpha_) && std::abs(alpha_) <= 0x1p53, op_,
             ": alpha must be an integer where the operands are, got ", alpha_);
  }
}

void PointwiseArguments::find_device() {
  const Argument* owner = nullptr;
  for (int i = 0; i < count_; ++i) {
    const Argument& a = arguments_[i];
    if (!a.tensor) continue;
    const Device device = device_of(*a.tensor);
    if (!owner ||
        (owner->ref.ndim == 0 && !device_.is_cuda && (device.is_cuda || a.ref.ndim > 0))) {
      owner = &a;
      device_ = device;
    }
  }
  const bool numbers = owner->ref.ndim > 0 || device_.is_cuda;
  for (int i = 0; i < count_; ++i) {
    Argument& a = arguments_[i];
    if (!a.tensor || &a == owner) continue;
    const Device device = device_of(*a.tensor);
    const bool on_host = device.type == aoti_torch_device_type_cpu() && a.ref.ndim == 0;
    if (numbers && on_host) {
      a.number = read(a.ref);
      a.tensor = nullptr;
    } else {
      check_device(*a.tensor, device_, op_, a.name, owner->name);
    }
  }
}

void PointwiseArguments::broadcast() {
  int dims = 0;
  for (int i = 0; i < count_; ++i) {
    if (arguments_[i].tensor) dims = std::max(dims, arguments_[i].ref.ndim);
  }
  shape_.ndim = 0;
  for (int i = 0; i < count_; ++i) {
    const Argument& a = arguments_[i];
    if (!a.tensor) continue;
    if (a.ref.ndim > shape_.ndim) {  // what there is moves to the end
      const int ahead = a.ref.ndim - shape_.ndim;
      for (int d = shape_.ndim - 1; d >= 0; --d) shape_.sizes[d + ahead] = shape_.sizes[d];
      std::copy_n(a.ref.sizes.begin(), ahead, shape_.sizes.begin());
      shape_.ndim = a.ref.ndim;
    }
    const int offset = shape_.ndim - a.ref.ndim;
    for (int d = 0; d < a.ref.ndim; ++d) {
      const std::int64_t size = a.ref.sizes[d];
      std::int64_t& common = shape_.sizes[offset + d];
      if (size == 1 || size == common) continue;
      FK_CHECK(common == 1, op_, ": ", a.name, " must broadcast with shape ", shape_.shape(),
               ", got ", a.ref.shape());
      common = size;
    }
  }
}

void PointwiseArguments::prepare() {
  types_ = promoted(pointwise_info(function_).promotion, common());
  const bool tests = function_ == Pointwise::isnan || function_ == Pointwise::isinf;
  if (tests && category_of(types_.compute) < TypeCategory::floating) {
    types_.compute = DType::f32;  // of integers neither is so
  }
  check_types();
  find_device();
  broadcast();
  if (pointwise_info(function_).promotion == Promotion::always_bool ||
      category_of(types_.common) == TypeCategory::integer) {
    for (int i = 0; i < count_; ++i) {
      Argument& a = arguments_[i];
      if (!a.tensor) a.number = as_common(a.number, types_.common);
    }
  }
}

TensorRef PointwiseArguments::new_layout() const {
  std::array<TensorRef, kMaxInputs> like;
  std::size_t count = 0;
  for (int i = 0; i < count_; ++i) {
    if (arguments_[i].tensor) like[count++] = arguments_[i].ref;
  }
  return layout_as_torch(shape_, std::span(like.data(), count), static_cast<int>(count) < count_);
}

void PointwiseArguments::run(const TensorRef& out) {
  PointwiseCall call;
  call.op = op_;
  call.function = function_;
  call.out = with_dimensions(out);
  call.compute = types_.compute;
  for (int i = 0; i < count_; ++i) {
    const Argument& a = arguments_[i];
    call.in[i] = a.tensor ? Operand(with_dimensions(a.ref)) : Operand(a.number);
  }
  call.scalars[0] = Number(alpha_);
  if (!device_.is_cuda) return cpu::pointwise(call);
  if constexpr (kHasCuda) cuda::pointwise(call, current_stream(device_));
}

Tensor PointwiseArguments::result() {
  prepare();
  TensorRef out = new_layout();
  Tensor made = new_strided(out, types_.result, device_);
  out.dtype = types_.result;
  out.data = data_of(made);
  run(out);
  return made;
}

void PointwiseArguments::write(const Tensor& t, const char* name) {
  prepare();
  TensorRef out = number_ref_of(t, op_, name);
  FK_CHECK(
      out.ndim == shape_.ndim &&
          std::equal(shape_.sizes.begin(), shape_.sizes.begin() + shape_.ndim, out.sizes.begin()),
      op_, ": ", name, " must have the shape of the result, ", shape_.shape(), ", got ",
      out.shape());
  FK_CHECK(can_cast(types_.result, out.dtype), op_, ": ", name, " must be able to hold ",
           dtype_text(types_.result), ", got ", dtype_text(out.dtype));
  check_device(t, device_, op_, name, arguments_[0].name);
  if (out.dtype == types_.result || compute_type(types_.result) == types_.result) return run(out);
  // The result is rounded, or wraps around, in its own type before it is converted.
  TensorRef layout = new_layout();
  layout.dtype = types_.result;
  Tensor narrow = new_strided(layout, types_.result, device_);
  layout.data = data_of(narrow);
  run(layout);
  PointwiseArguments copy(op_, Pointwise::copy);
  copy.add(narrow, name);
  copy.prepare();
  copy.run(out);
}

}  // namespace fastkern::torch_layer
