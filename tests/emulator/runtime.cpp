// SPDX-License-Identifier: Apache-2.0
// Functions of CUDA's runtime that the kernels' host parts call. A kernel's registers are not
// known: occupancy is as if they were never what is short.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "emulator.h"

namespace {

int blocks_per_processor(int threads, std::size_t shared) {
  constexpr std::size_t kReserved = 1024;  // of shared memory, for each block
  const std::size_t all = emulator::kDevices[emulator::device].shared_limit + kReserved;
  return std::min(emulator::kThreadsPerProcessor / threads,
                  static_cast<int>(all / (shared + kReserved)));
}

}  // namespace

extern "C" {

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads,
                                                          std::size_t shared) {
  *count = blocks_per_processor(threads, shared);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                           const cudaLaunchConfig_t* config) {
  const int blocks =
      emulator::kDevices[emulator::device].processors *
      blocks_per_processor(static_cast<int>(config->blockDim.x), config->dynamicSmemBytes);
  *count = blocks / static_cast<int>(config->gridDim.x);
  return cudaSuccess;
}

}  // extern "C"
