// SPDX-License-Identifier: Apache-2.0
// Addresses in shared memory.
#pragma once

#include <cstdint>

namespace fastkern::ptx {

/// An address in shared memory, to be computed with: in one register.
using SharedAddress = std::uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

}  // namespace fastkern::ptx
