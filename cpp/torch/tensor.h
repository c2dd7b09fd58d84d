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

/// A view of `t`; fail() unless its dtype is one of fastkern's and its rank is supported.
TensorRef ref_of(const Tensor& t, const char* op, const char* argument);

/// Makes `ref`, the view of `t`, readable as rows where its strides are not (last dimension not
/// dense, or leading strides that do not merge into two): turns it to a dense copy, which is
/// returned and must outlive the launch.
OptionalTensor make_rows(const Tensor& t, TensorRef& ref);
inline OptionalTensor make_rows(const OptionalTensor& t, TensorRef& ref) {
  return t ? make_rows(*t, ref) : std::nullopt;
}

/// Uninitialised, row-major, from torch's allocator.
Tensor new_dense(const std::int64_t* sizes, int ndim, DType dtype, Device device);
inline Tensor new_like(const TensorRef& like, Device device) {
  return new_dense(like.sizes.data(), like.ndim, like.dtype, device);
}
/// The tensor that stands for an output nobody asked for.
Tensor no_output(DType dtype, Device device);
/// Uninitialised bytes for a kernel to work in.
Tensor new_bytes(std::size_t bytes, Device device);

/// The row-major view of a tensor just allocated with the shape of `like`.
TensorRef dense_ref(const Tensor& t, const TensorRef& like);

/// torch's current stream on a CUDA device.
Stream current_stream(Device device);

/// fail() unless `t` is on `device`, the one of x.
void check_device(const Tensor& t, Device device, const char* op, const char* argument);
/// fail() unless `t` has exactly these sizes.
void check_shape(const TensorRef& t, const std::int64_t* sizes, int ndim, const char* op,
                 const char* argument);

std::string dtype_text(DType dtype);  // "torch.bfloat16"

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
