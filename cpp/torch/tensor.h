// SPDX-License-Identifier: Apache-2.0
// Between torch's stable tensors and fastkern's plain ones: views, checks, allocation, stream, launch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "fastkern/core.h"

namespace fastkern::torch_layer {

inline constexpr bool kHasCuda = FASTKERN_HAS_CUDA != 0;

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// "(4096, 7)"; one-element shapes as Python prints them.
std::string shape_text(const Tensor& t);
/// "torch.bfloat16", "torch.int64", ...
std::string dtype_text(const Tensor& t);
/// "cpu", "cuda:1", ...
std::string device_text(const Tensor& t);

/// The element type of `t`, or an error naming `op` and `argument`.
DType dtype_of(const Tensor& t, const char* op, const char* argument);

TensorRef ref_of(const Tensor& t, DType dtype);

/// A view of `t` as rows for the kernels: `t` itself where its strides allow, a dense copy otherwise
/// (last dimension not dense, or leading strides that do not merge into two). `t` is updated to what the view sees.
TensorRef row_ref(Tensor& t, DType dtype);

/// Uninitialised, row-major, on the device of `like`.
Tensor empty_dense(const std::vector<std::int64_t>& sizes, DType dtype, const Tensor& like);
Tensor empty_dense_like(const Tensor& like, DType dtype);
/// Uninitialised device bytes from torch's allocator.
Tensor empty_bytes(std::size_t bytes, const Tensor& like);

bool is_cuda(const Tensor& t);
bool same_device(const Tensor& a, const Tensor& b);

/// torch's current stream on the device of `t`.
Stream current_stream(const Tensor& t);

/// fail() unless `other` lives where `x` does.
void check_device(const Tensor& other, const Tensor& x, const char* op, const char* argument);
/// fail() unless `t` has exactly these sizes.
void check_shape(const Tensor& t, const std::vector<std::int64_t>& sizes, const char* op, const char* argument);

std::vector<std::int64_t> sizes_of(const Tensor& t);

}  // namespace fastkern::torch_layer

/// FASTKERN_REGISTER(m) { m.impl("op", TORCH_BOX(&f)); } registers the same functions for CPU and, in a build that
/// has it, CUDA tensors; what else a call brings (meta, sparse, ...) is torch's to answer.
#define FASTKERN_REGISTER(m)                                                  \
  static void register_kernels(torch::stable::detail::StableLibrary&);        \
  STABLE_TORCH_LIBRARY_IMPL(fastkern, CPU, library) { register_kernels(library); } \
  FASTKERN_REGISTER_CUDA                                                      \
  static void register_kernels(torch::stable::detail::StableLibrary& m)

#if FASTKERN_HAS_CUDA
#define FASTKERN_REGISTER_CUDA \
  STABLE_TORCH_LIBRARY_IMPL(fastkern, CUDA, library) { register_kernels(library); }
#else
#define FASTKERN_REGISTER_CUDA
#endif
