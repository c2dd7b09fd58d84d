// SPDX-License-Identifier: Apache-2.0
// THE launcher: every kernel of the library goes through launch().
// It selects the stream's device for the call, leaves an empty grid alone, refuses one that CUDA
// cannot take, raises the shared-memory limit where needed, and turns a failed launch into an Error
// with the op's name.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>

#include "fastkern/core.h"

namespace fastkern::cuda {

inline void check(cudaError_t status, const char* op, const char* what) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // an error reported here must not surface again in somebody else's next call
  const bool no_code =
      status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction;
  fail(op, ": ", what, " failed: ", cudaGetErrorName(status), ", ", cudaGetErrorString(status),
       no_code ? "; this build has code for " : "", no_code ? build_info().cuda_archs : "");
}

/// Makes a device current for a scope; free when it already is.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op, "cudaGetDevice");
    if (previous_ != device) {
      check(cudaSetDevice(device), op, "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* op) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), op, "cudaDeviceGetAttribute");
  return value;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Compute capability times ten; asked of the driver once for each device.
inline int capability(int device, const char* op) {
  constexpr int kRemembered = 64;
  static std::atomic<int> remembered[kRemembered];
  if (device < kRemembered) {
    if (const int known = remembered[device].load(std::memory_order_relaxed)) return known;
  }
  const int value = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device, op) +
                    device_attribute(cudaDevAttrComputeCapabilityMinor, device, op);
  if (device < kRemembered) remembered[device].store(value, std::memory_order_relaxed);
  return value;
}

inline bool has_clusters(int device, const char* op) { return capability(device, op) >= 90; }

struct Launch {
  const char* op;     // for error messages
  std::int64_t grid;  // blocks, on x: the only axis without a 65,535 limit
  int block;          // threads
  std::size_t shared = 0;
  int cluster = 1;  // blocks of a cluster; above 1 only where has_clusters()
  /// The kernel begins with ptx::grid_wait(): it may be launched while the one before it ends.
  bool overlap = false;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Launch& shape, Stream stream, const Args&... args) {
  if (shape.grid == 0) return;
  FK_CHECK(shape.grid > 0 && shape.grid <= std::numeric_limits<std::int32_t>::max(), shape.op, ": ",
           shape.grid, " blocks do not fit a CUDA grid; split the call");
  const DeviceGuard guard(stream.device, shape.op);
  // Dynamic and static shared memory together may take 48 KB unasked; how much is static is the
  // kernel's secret.
  constexpr std::size_t kSurelyAllowed = 16 * 1024;
  if (shape.shared > kSurelyAllowed) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared)),
          shape.op, "raising the shared-memory limit");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (shape.overlap && has_clusters(stream.device, shape.op)) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    if (shape.cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            shape.op, "allowing clusters of 16");
    }
  }
  check(cudaLaunchKernelEx(&config, kernel, Params(args)...), shape.op, "kernel launch");
}

}  // namespace fastkern::cuda
