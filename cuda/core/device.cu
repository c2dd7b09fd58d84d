// SPDX-License-Identifier: Apache-2.0
// What the devices of this machine are. Nothing here runs before somebody asks.
#include <cuda_runtime.h>

#include "fastkern/core.h"
#include "launch.cuh"

namespace fastkern::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

DeviceInfo device_info(int device) {
  const int count = device_count();
  FK_CHECK(device >= 0 && device < count, "fastkern::cuda::device_info: device must be in [0, ",
           count, "), got ", device);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "fastkern::cuda::device_info",
        "cudaGetDeviceProperties");
  return {
      .name = properties.name,
      .capability_major = properties.major,
      .capability_minor = properties.minor,
      .multiprocessors = properties.multiProcessorCount,
      .shared_memory_per_block = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin),
      .l2_bytes = properties.l2CacheSize,
      .memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem),
  };
}

}  // namespace fastkern::cuda
