// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/cp_async.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline void cp_async_16(void* shared, const void* global, int bytes) {
  emulator::cp_async(shared, global, 16, bytes);
}
inline void cp_async_8(void* shared, const void* global, int bytes) {
  emulator::cp_async(shared, global, 8, bytes);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int kPending>
inline void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

}  // namespace fastkern::ptx
