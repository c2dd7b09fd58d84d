// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/shared.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

using SharedAddress = std::uintptr_t;
inline SharedAddress shared_address(const void* shared) {
  return reinterpret_cast<SharedAddress>(shared);
}
/// Where the swizzle of 128 bytes puts a byte.
inline char* swizzled_address(SharedAddress at) {
  return reinterpret_cast<char*>(at ^ (at >> 7 & 7) << 4);
}

}  // namespace fastkern::ptx
