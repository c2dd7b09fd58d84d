// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/barrier.cuh.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline void bar_sync(int id, int threads) { emulator::block_barrier(id, threads); }

inline void bar_arrive(int id, int threads) { emulator::block_arrive(id, threads); }

}  // namespace fastkern::ptx
