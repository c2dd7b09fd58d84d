// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <tuple>

#include "fastkern/core.h"

namespace fastkern::cuda {

inline void check(cudaError_t, const char*, const char*) {}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char*) : previous_(emulator::device) { emulator::device = device; }
  ~DeviceGuard() { emulator::device = previous_; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline int capability(int device, const char*) { return emulator::kDevices[device].capability; }

inline bool has_clusters(int device, const char* op) { return capability(device, op) >= 90; }

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* op) {
  const emulator::Device& of = emulator::kDevices[device];
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return of.shared_limit;
    case cudaDevAttrMultiProcessorCount:
      return of.processors;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return emulator::kThreadsPerProcessor;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    default:
      fail(op, ": the emulator does not know device attribute ", static_cast<int>(attribute));
  }
}

struct Launch {
  const char* op;
  std::int64_t grid;
  int block;
  std::size_t shared = 0;
  int cluster = 1;
  bool overlap = false;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& shape, Stream stream, const Args&... args) {
  if (shape.grid == 0) return;
  FK_CHECK(shape.grid > 0 && shape.grid <= std::numeric_limits<std::int32_t>::max(), shape.op, ": ",
           shape.grid, " blocks do not fit a CUDA grid; split the call");
  const DeviceGuard guard(stream.device, shape.op);
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, {static_cast<Params>(args)...}};
  emulator::run_grid(
      {.op = shape.op,
       .blocks = static_cast<long>(shape.grid),
       .threads = shape.block,
       .shared = static_cast<long>(shape.shared),
       .cluster = shape.cluster,
       .overlap = shape.overlap},
      [](void* p) {
        const Call& call = *static_cast<Call*>(p);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}

}  // namespace fastkern::cuda
