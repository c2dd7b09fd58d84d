// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <dlfcn.h>

#include <atomic>

#include "fastkern/rows.h"

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

std::string text_of(const std::vector<std::int64_t>& sizes) {
  std::string text = "(";
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    text += std::to_string(sizes[i]) + (i + 1 < sizes.size() ? ", " : "");
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::int32_t device_type_of(const Tensor& t) {
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

std::int32_t device_index_of(const Tensor& t) {
  std::int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

ScalarType scalar_type(DType dtype) {
  return dtype == DType::f32 ? ScalarType::Float : dtype == DType::f16 ? ScalarType::Half : ScalarType::BFloat16;
}

Tensor allocate(const std::vector<std::int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<std::int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = aoti_torch_empty_strided(
      static_cast<std::int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<std::int32_t>(type),
      device_type_of(like), device_index_of(like), &handle);
  FK_CHECK(status == AOTI_TORCH_SUCCESS, "fastkern: could not allocate a tensor of shape ", text_of(sizes), " on ",
           device_text(like), " (out of memory?)");
  return Tensor(handle);
}

using CurrentStream = AOTITorchError (*)(std::int32_t, void**);

// The symbol lives in libtorch_cuda.so, which a CPU build of torch does not have: it is looked up at the first
// CUDA call, when the tensor at hand proves that the library is loaded.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  FK_CHECK(symbol, "fastkern: this torch has CUDA tensors but no libtorch_cuda.so with a current stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

std::vector<std::int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::string shape_text(const Tensor& t) { return text_of(sizes_of(t)); }

std::string dtype_text(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    default:
      return "scalar type " + std::to_string(static_cast<int>(t.scalar_type()));
  }
}

std::string device_text(const Tensor& t) {
  const std::int32_t type = device_type_of(t);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device_index_of(t));
  return "device type " + std::to_string(type);
}

DType dtype_of(const Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      fail(op, ": ", argument, " must be torch.float32, torch.float16 or torch.bfloat16, got ", dtype_text(t));
  }
}

TensorRef ref_of(const Tensor& t, DType dtype) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  FK_CHECK(sizes.size() <= kMaxDims, "fastkern: at most ", kMaxDims, " dimensions are supported, got ",
           sizes.size());
  TensorRef ref{t.data_ptr(), dtype, static_cast<int>(sizes.size()), {}, {}};
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    ref.sizes[d] = sizes[d];
    ref.strides[d] = strides[d];
  }
  return ref;
}

TensorRef row_ref(Tensor& t, DType dtype) {
  TensorRef ref = ref_of(t, dtype);
  Rows rows;
  if (!as_rows(ref, rows)) {
    t = torch::stable::contiguous(t);
    ref = ref_of(t, dtype);
  }
  return ref;
}

Tensor empty_dense(const std::vector<std::int64_t>& sizes, DType dtype, const Tensor& like) {
  return allocate(sizes, scalar_type(dtype), like);
}

Tensor empty_dense_like(const Tensor& like, DType dtype) { return empty_dense(sizes_of(like), dtype, like); }

Tensor empty_bytes(std::size_t bytes, const Tensor& like) {
  return allocate({static_cast<std::int64_t>(bytes)}, ScalarType::Byte, like);
}

bool is_cuda(const Tensor& t) { return device_type_of(t) == aoti_torch_device_type_cuda(); }

bool same_device(const Tensor& a, const Tensor& b) {
  return device_type_of(a) == device_type_of(b) && device_index_of(a) == device_index_of(b);
}

Stream current_stream(const Tensor& t) {
  static const CurrentStream find = find_current_stream();
  Stream stream{nullptr, device_index_of(t)};
  FK_CHECK(find(stream.device, &stream.handle) == AOTI_TORCH_SUCCESS,
           "fastkern: torch gave no current stream for ", device_text(t));
  return stream;
}

void check_device(const Tensor& other, const Tensor& x, const char* op, const char* argument) {
  FK_CHECK(same_device(other, x), op, ": ", argument, " must be on ", device_text(x), " like x, got ",
           device_text(other));
}

void check_shape(const Tensor& t, const std::vector<std::int64_t>& sizes, const char* op, const char* argument) {
  FK_CHECK(sizes_of(t) == sizes, op, ": ", argument, " must have shape ", text_of(sizes), ", got ", shape_text(t));
}

}  // namespace fastkern::torch_layer
