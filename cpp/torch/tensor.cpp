// SPDX-License-Identifier: Apache-2.0
// These run on every call: no heap allocation but for torch's own and for error messages.
#include "tensor.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "fastkern/rows.h"

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

std::string device_text(Device device) {
  if (device.is_cuda) return "cuda:" + std::to_string(device.index);
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  return "device type " + std::to_string(device.type);
}

// torch's own numbers, compared as numbers: its header-only conversion throws on types it does not
// know.
std::int32_t number_of(ScalarType type) { return static_cast<std::int32_t>(type); }

constexpr std::pair<DType, ScalarType> kTypes[] = {
    {DType::f32, ScalarType::Float},
    {DType::f16, ScalarType::Half},
    {DType::bf16, ScalarType::BFloat16},
    {DType::f8e4m3, ScalarType::Float8_e4m3fn},
    {DType::i8, ScalarType::Char},
    {DType::f64, ScalarType::Double},
    {DType::u8, ScalarType::Byte},
    {DType::i16, ScalarType::Short},
    {DType::i32, ScalarType::Int},
    {DType::i64, ScalarType::Long},
    {DType::boolean, ScalarType::Bool},
    {DType::c64, ScalarType::ComplexFloat},
    {DType::c128, ScalarType::ComplexDouble},
};

std::int32_t scalar_type(DType dtype) {
  for (const auto& [ours, torchs] : kTypes) {
    if (ours == dtype) return number_of(torchs);
  }
  fail("fastkern: no torch dtype for ", name_of(dtype));
}

/// torch lets None through where the schema asks for a tensor.
void check_defined(const Tensor& t, const char* op, const char* argument) {
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(t.get(), &defined));
  FK_CHECK(defined, op, ": ", argument, " must be a tensor, got None");
}

DType float_of(std::int32_t type, const char* op, const char* argument) {
  if (type == number_of(ScalarType::BFloat16)) return DType::bf16;
  if (type == number_of(ScalarType::Half)) return DType::f16;
  if (type == number_of(ScalarType::Float)) return DType::f32;
  fail(op, ": ", argument, " must be torch.float32, torch.float16 or torch.bfloat16, got ",
       type_text(type));
}

DType real_of(std::int32_t type, Device device, const char* op, const char* argument) {
  const bool wide = type == number_of(ScalarType::Double) && !device.is_cuda;
  return wide ? DType::f64 : float_of(type, op, argument);
}

void set_dense_strides(TensorRef& ref) {
  std::int64_t stride = 1;
  for (int d = ref.ndim - 1; d >= 0; --d) {
    ref.strides[d] = stride;
    stride *= std::max<std::int64_t>(ref.sizes[d], 1);
  }
}

Tensor dense_copy(const Tensor& t, TensorRef& ref) {
  AtenTensorHandle same = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &same));
  const torch::stable::Tensor dense = torch::stable::contiguous(torch::stable::Tensor(same));
  AtenTensorHandle copied = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(dense.get(), &copied));
  Tensor copy(copied);
  ref.data = data_of(copy);
  set_dense_strides(ref);
  return copy;
}

using CurrentStream = AOTITorchError (*)(std::int32_t, void**);

// The symbol lives in libtorch_cuda.so, which a CPU build of torch does not have: it is looked up
// at the first CUDA call, when the tensor at hand proves that the library is loaded.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  FK_CHECK(symbol,
           "fastkern: this torch has CUDA tensors but no libtorch_cuda.so with a current stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

std::string type_text(std::int32_t type) {
  static constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Float, "float32"},
      {ScalarType::Half, "float16"},
      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Double, "float64"},
      {ScalarType::Byte, "uint8"},
      {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},
      {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"},
      {ScalarType::Bool, "bool"},
      {ScalarType::ComplexHalf, "complex32"},
      {ScalarType::ComplexFloat, "complex64"},
      {ScalarType::ComplexDouble, "complex128"},
      {ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
      {ScalarType::Float8_e5m2, "float8_e5m2"},
  };
  for (const auto& [known, name] : kNames) {
    if (number_of(known) == type) return std::string("torch.") + name;
  }
  return "torch scalar type number " + std::to_string(type);
}

std::int32_t torch_type(DType dtype) { return scalar_type(dtype); }
std::int32_t int16_type() { return number_of(ScalarType::Short); }

std::int32_t type_of(const Tensor& t) {
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

std::string dtype_text(DType dtype) { return type_text(scalar_type(dtype)); }

std::string shape_text(const std::int64_t* sizes, int ndim) {
  TensorRef shape;
  shape.ndim = ndim;
  std::copy(sizes, sizes + ndim, shape.sizes.begin());
  return shape.shape();
}

void* data_of(const Tensor& t) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &data));
  return data;
}

Device device_of(const Tensor& t) {
  static const std::int32_t cuda = aoti_torch_device_type_cuda();
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  device.is_cuda = device.type == cuda;
  return device;
}

TensorRef view_of(const Tensor& t, const char* op, const char* argument) {
  TensorRef ref;
  check_defined(t, op, argument);
  std::int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
  FK_CHECK(dims <= kMaxDims, op, ": ", argument, " must have at most ", kMaxDims,
           " dimensions, got ", dims);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  ref.ndim = static_cast<int>(dims);
  ref.data = data_of(t);
  std::copy(sizes, sizes + ref.ndim, ref.sizes.begin());
  std::copy(strides, strides + ref.ndim, ref.strides.begin());
  return ref;
}

TensorRef ref_of(const Tensor& t, const char* op, const char* argument) {
  TensorRef ref = view_of(t, op, argument);
  ref.dtype = float_of(type_of(t), op, argument);
  return ref;
}

TensorRef real_ref_of(const Tensor& t, const char* op, const char* argument) {
  TensorRef ref = view_of(t, op, argument);
  ref.dtype = real_of(type_of(t), device_of(t), op, argument);
  return ref;
}

DType real_type(OptionalType type, DType otherwise, Device device, const char* op,
                const char* argument) {
  return type ? real_of(type->number, device, op, argument) : otherwise;
}

TensorRef number_ref_of(const Tensor& t, const char* op, const char* argument) {
  TensorRef ref = view_of(t, op, argument);
  const std::int32_t type = type_of(t);
  for (const auto& [ours, torchs] : kTypes) {
    if (number_of(torchs) == type && ours != DType::f8e4m3) {
      ref.dtype = ours;
      return ref;
    }
  }
  fail(op, ": ", argument,
       " must be bool, an integer of up to 64 bits with a sign or 8 without, float16, bfloat16, "
       "float32, float64, complex64 or complex128, got ",
       type_text(type));
}

DType float_type(OptionalType type, DType otherwise, const char* op, const char* argument) {
  return type ? float_of(type->number, op, argument) : otherwise;
}

DType quant_type(OptionalType type, const char* op, const char* argument) {
  if (!type || type->number == number_of(ScalarType::Float8_e4m3fn)) return DType::f8e4m3;
  if (type->number == number_of(ScalarType::Char)) return DType::i8;
  fail(op, ": ", argument, " must be torch.float8_e4m3fn or torch.int8, got ",
       type_text(type->number));
}

OptionalTensor make_rows(MaybeTensor t, TensorRef& ref) {
  Rows rows;
  if (!t || as_rows(ref, rows)) return std::nullopt;
  return dense_copy(*t, ref);
}

OptionalTensor make_dense(MaybeTensor t, TensorRef& ref) {
  if (!t) return std::nullopt;
  std::int64_t stride = 1;
  bool dense = true;
  for (int d = ref.ndim - 1; d >= 0; --d) {
    dense = dense && (ref.strides[d] == stride || ref.sizes[d] == 1);
    stride *= ref.sizes[d];
  }
  if (dense || stride == 0) return std::nullopt;
  return dense_copy(*t, ref);
}

namespace {

Tensor allocate(const TensorRef& layout, std::int32_t type, Device device) {
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(layout.ndim, layout.sizes.data(), layout.strides.data(), type,
                               device.type, device.index, &handle);
  FK_CHECK(status == AOTI_TORCH_SUCCESS, "fastkern: could not allocate a tensor of shape ",
           layout.shape(), " and ", type_text(type), " on ", device_text(device),
           " (out of memory?)");
  return Tensor(handle);
}

}  // namespace

Tensor new_strided(const TensorRef& layout, DType dtype, Device device) {
  return allocate(layout, scalar_type(dtype), device);
}

Tensor new_dense(const std::int64_t* sizes, int ndim, std::int32_t type, Device device) {
  TensorRef shape;
  shape.ndim = ndim;
  std::copy(sizes, sizes + ndim, shape.sizes.begin());
  set_dense_strides(shape);
  return allocate(shape, type, device);
}

Tensor new_dense(const std::int64_t* sizes, int ndim, DType dtype, Device device) {
  return new_dense(sizes, ndim, scalar_type(dtype), device);
}

void set_zero(const Tensor& t) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get())); }

Tensor new_zero(Device device) {
  const std::int64_t size = 1;
  Tensor zero = new_dense(&size, 1, number_of(ScalarType::Long), device);
  set_zero(zero);
  return zero;
}

Tensor no_output(DType dtype, Device device) {
  const std::int64_t none = 0;
  return new_dense(&none, 1, dtype, device);
}

Tensor new_bytes(std::size_t bytes, Device device) {
  const std::int64_t size = static_cast<std::int64_t>(bytes);
  return new_dense(&size, 1, number_of(ScalarType::Byte), device);
}

TensorRef dense_ref(const Tensor& t, const TensorRef& like, DType dtype) {
  TensorRef ref = like;
  ref.dtype = dtype;
  ref.data = data_of(t);
  set_dense_strides(ref);
  return ref;
}

Stream current_stream(Device device) {
  static const CurrentStream find = find_current_stream();
  Stream stream{nullptr, device.index};
  FK_CHECK(find(device.index, &stream.handle) == AOTI_TORCH_SUCCESS,
           "fastkern: torch gave no current stream for ", device_text(device));
  return stream;
}

void check_device(const Tensor& t, Device device, const char* op, const char* argument,
                  const char* like) {
  const Device found = device_of(t);
  FK_CHECK(found == device, op, ": ", argument, " must be on ", device_text(device), " like ", like,
           ", got ", device_text(found));
}

void check_finite(double value, const char* op, const char* argument) {
  FK_CHECK(std::abs(value) <= std::numeric_limits<float>::max(), op, ": ", argument,
           " must be finite in float32, got ", value);
}

void check_softcap(double softcap, const char* op) {
  using Limits = std::numeric_limits<float>;
  FK_CHECK(softcap == 0.0 || (softcap >= Limits::min() && softcap <= Limits::max()), op,
           ": softcap must be 0 or a positive normal float32, got ", softcap);
}

void check_shape(const TensorRef& t, const std::int64_t* sizes, int ndim, const char* op,
                 const char* argument) {
  FK_CHECK(t.ndim == ndim && std::equal(sizes, sizes + ndim, t.sizes.begin()), op, ": ", argument,
           " must have shape ", shape_text(sizes, ndim), ", got ", t.shape());
}

namespace {

void* data_of_one(ScalarType type, const Tensor& t, Device device, const char* op,
                  const char* argument, const char* like) {
  check_defined(t, op, argument);
  const std::int32_t found = type_of(t);
  FK_CHECK(found == number_of(type), op, ": ", argument, " must be ", type_text(number_of(type)),
           ", got ", type_text(found));
  std::int64_t count = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(t.get(), &count));
  FK_CHECK(count == 1, op, ": ", argument, " must have one element, got ", count);
  check_device(t, device, op, argument, like);
  return data_of(t);
}

}  // namespace

const std::int64_t* one_int64(const Tensor& t, Device device, const char* op, const char* argument,
                              const char* like) {
  return static_cast<const std::int64_t*>(
      data_of_one(ScalarType::Long, t, device, op, argument, like));
}

float* one_float(const Tensor& t, Device device, const char* op, const char* argument) {
  return static_cast<float*>(data_of_one(ScalarType::Float, t, device, op, argument, "x"));
}

}  // namespace fastkern::torch_layer
