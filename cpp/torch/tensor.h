// SPDX-License-Identifier: Apache-2.0
// Between torch's stable tensors and fastkern's plain ones: views, checks, allocation, stream,
// launch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "box.h"
#include "fastkern/core.h"

namespace fastkern::torch_layer {

inline constexpr bool kHasCuda = FASTKERN_HAS_CUDA != 0;

struct Device {
  std::int32_t type = 0;   // torch's device type number
  std::int32_t index = 0;  // of the CUDA device
  bool is_cuda = false;
  bool operator==(const Device&) const = default;
};

Device device_of(const Tensor& t);
void* data_of(const Tensor& t);

/// A tensor argument that may be left out, whichever way the schema says so.
class MaybeTensor {
 public:
  MaybeTensor() = default;
  MaybeTensor(const Tensor& t) : tensor_(&t) {}
  MaybeTensor(const OptionalTensor& t) : tensor_(t ? &*t : nullptr) {}
  explicit operator bool() const { return tensor_ != nullptr; }
  const Tensor& operator*() const { return *tensor_; }

 private:
  const Tensor* tensor_ = nullptr;
};

/// torch's own number of the dtype of `t`, and the name of the dtype with a number.
std::int32_t type_of(const Tensor& t);
std::string type_text(std::int32_t type);
/// torch's numbers of a dtype of ours, and of int16.
std::int32_t torch_type(DType dtype);
std::int32_t int16_type();

/// A view of `t`, whatever its dtype, which the caller sets; fail() unless its rank is supported.
TensorRef view_of(const Tensor& t, const char* op, const char* argument);
/// A view of `t`; fail() unless its dtype is one of fastkern's and its rank is supported.
TensorRef ref_of(const Tensor& t, const char* op, const char* argument);

/// The same for operators that take f64 on the CPU.
TensorRef real_ref_of(const Tensor& t, const char* op, const char* argument);
DType real_type(OptionalType type, DType otherwise, Device device, const char* op,
                const char* argument);
/// A view of `t`; fail() unless its dtype is a number's (f8e4m3 is none) and its rank is supported.
TensorRef number_ref_of(const Tensor& t, const char* op, const char* argument);

/// The dtype asked for; fail() unless it is f32, f16 or bf16. Without one: `otherwise`.
DType float_type(OptionalType type, DType otherwise, const char* op, const char* argument);
/// The dtype asked for; fail() unless it is f8e4m3 or i8. Without one: f8e4m3.
DType quant_type(OptionalType type, const char* op, const char* argument);

/// Makes `ref`, the view of `t`, readable as rows where its strides are not (last dimension not
/// dense, or leading strides that do not merge into two): turns it to a dense copy, which is
/// returned and must outlive the launch.
OptionalTensor make_rows(MaybeTensor t, TensorRef& ref);

/// The same for operands that a kernel reads as one block.
OptionalTensor make_dense(MaybeTensor t, TensorRef& ref);

/// Uninitialised, row-major, from torch's allocator.
Tensor new_dense(const std::int64_t* sizes, int ndim, DType dtype, Device device);
Tensor new_dense(const std::int64_t* sizes, int ndim, std::int32_t type, Device device);
inline Tensor new_like(const TensorRef& like, Device device) {
  return new_dense(like.sizes.data(), like.ndim, like.dtype, device);
}
inline Tensor new_like(const TensorRef& like, DType dtype, Device device) {
  return new_dense(like.sizes.data(), like.ndim, dtype, device);
}
/// Uninitialised, with the sizes and strides of `layout`.
Tensor new_strided(const TensorRef& layout, DType dtype, Device device);
void set_zero(const Tensor& t);
/// One int64 that is 0.
Tensor new_zero(Device device);
/// The tensor that stands for an output nobody asked for.
Tensor no_output(DType dtype, Device device);
/// Uninitialised bytes for a kernel to work in.
Tensor new_bytes(std::size_t bytes, Device device);

/// The row-major view of a tensor just allocated with the shape of `like`.
TensorRef dense_ref(const Tensor& t, const TensorRef& like, DType dtype);
inline TensorRef dense_ref(const Tensor& t, const TensorRef& like) {
  return dense_ref(t, like, like.dtype);
}

/// torch's current stream on a CUDA device.
Stream current_stream(Device device);

/// fail() unless `t` is on `device`, the one of the argument `like`.
void check_device(const Tensor& t, Device device, const char* op, const char* argument,
                  const char* like = "x");
/// fail() unless `t` has exactly these sizes.
void check_shape(const TensorRef& t, const std::int64_t* sizes, int ndim, const char* op,
                 const char* argument);
/// fail() unless it is finite as a float.
void check_finite(double value, const char* op, const char* argument);
/// fail() unless it is 0 or a positive normal float, whose reciprocal is finite.
void check_softcap(double softcap, const char* op);

/// fail() unless `t` is a tensor of one element of this type, on the device of `like`; its address.
const std::int64_t* one_int64(const Tensor& t, Device device, const char* op, const char* argument,
                              const char* like = "x");
float* one_float(const Tensor& t, Device device, const char* op, const char* argument);

std::string dtype_text(DType dtype);  // "torch.bfloat16"
std::string shape_text(const std::int64_t* sizes, int ndim);

}  // namespace fastkern::torch_layer

/// FASTKERN_REGISTER(m) { m.impl("op", box<&f>); } registers the same functions for CPU and, in a
/// build that has it, CUDA tensors; what else a call brings (meta, sparse, ...) is torch's to
/// answer.
#define FASTKERN_REGISTER(m)                                                       \
  static void register_kernels(torch::stable::detail::StableLibrary&);             \
  STABLE_TORCH_LIBRARY_IMPL(fastkern, CPU, library) { register_kernels(library); } \
  FASTKERN_REGISTER_CUDA                                                           \
  static void register_kernels(torch::stable::detail::StableLibrary& m)

#if FASTKERN_HAS_CUDA
#define FASTKERN_REGISTER_CUDA \
  STABLE_TORCH_LIBRARY_IMPL(fastkern, CUDA, library) { register_kernels(library); }
#else
#define FASTKERN_REGISTER_CUDA
#endif
