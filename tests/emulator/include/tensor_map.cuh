// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/tensor_map.cuh: a map is the shape itself.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "fastkern/core.h"

namespace fastkern::cuda {

struct MapShape {
  void* data;
  DType dtype;
  std::int64_t sizes[4], strides[3];
  int box[4];
};

inline CUtensorMap tensor_map(const MapShape& shape, const char* op) {
  static_assert(sizeof(MapShape) <= sizeof(CUtensorMap));
  bool fits = reinterpret_cast<std::uintptr_t>(shape.data) % 16 == 0;
  for (int i = 0; i < 4; ++i) {
    fits = fits && shape.sizes[i] > 0 && shape.box[i] > 0 && shape.box[i] <= 256;
    if (i > 0 && shape.sizes[i] > 1) {
      fits = fits && shape.strides[i - 1] % 16 == 0 && shape.strides[i - 1] > 0;
    }
  }
  FK_CHECK(fits && shape.box[0] * size_of(shape.dtype) <= 128, op,
           ": no tensor for the copy engine");
  CUtensorMap map;
  std::memcpy(&map, &shape, sizeof shape);
  return map;
}

}  // namespace fastkern::cuda
