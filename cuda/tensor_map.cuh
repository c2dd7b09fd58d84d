// SPDX-License-Identifier: Apache-2.0
// Maps of tensors for the copy engine (ptx/tma.cuh), made on the host: a kernel takes them as
// `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "fastkern/core.h"
#include "launch.cuh"

namespace fastkern::cuda {

/// Sizes and byte strides, innermost first; the innermost is dense. Address and strides are
/// multiples of 16, sizes 1 to 2^32.
struct MapShape {
  void* data;
  DType dtype;
  std::int64_t sizes[4], strides[3];  // strides[i]: of sizes[i + 1]
  int box[4];                         // innermost 128 bytes at most, else 256 elements
};

/// The driver makes the maps; it is asked for by name, so that nothing links to it.
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

inline EncodeTensorMap tensor_map_encoder(const char* op) {
  static const EncodeTensorMap found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      function = nullptr;
    }
    return reinterpret_cast<EncodeTensorMap>(function);
  }();
  FK_CHECK(found, op, ": the CUDA driver has no cuTensorMapEncodeTiled; it must be 12.0 or later");
  return found;
}

/// With the swizzle of 128 bytes, zeros outside the tensor. Pure host work, about a microsecond:
/// may be captured.
inline CUtensorMap tensor_map(const MapShape& shape, const char* op) {
  const CUtensorMapDataType type = shape.dtype == DType::f16      ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : shape.dtype == DType::bf16   ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : shape.dtype == DType::f8e4m3 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(shape.sizes[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    // Nobody takes a step along a dimension of size 1, but the driver looks at its stride.
    if (i > 0) {
      strides[i - 1] = shape.sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(shape.strides[i - 1]);
    }
  }
  CUtensorMap map;
  const CUresult status =
      tensor_map_encoder(op)(&map, type, 4, shape.data, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FK_CHECK(status == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled failed with ",
           static_cast<int>(status), " for sizes ", shape.sizes[0], ", ", shape.sizes[1], ", ",
           shape.sizes[2], ", ", shape.sizes[3]);
  return map;
}

}  // namespace fastkern::cuda
