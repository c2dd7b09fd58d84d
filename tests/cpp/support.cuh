// SPDX-License-Identifier: Apache-2.0
// What the CUDA tests share: a fixture that skips without a GPU, and device memory between
// canaries.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <type_traits>

#include "launch.cuh"
#include "support.h"

namespace fastkern::test {

inline void cuda_ok(cudaError_t status, const char* what = "CUDA") {
  cuda::check(status, "test", what);
}

/// Skips without a device; after each test the device must be healthy and no error pending.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device";
    cuda_ok(cudaSetDevice(0));
  }
  void TearDown() override {
    if (IsSkipped()) return;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
};

struct FreeDevice {
  void operator()(void* p) const { cudaFree(p); }
};

/// A host tensor's bytes, guards included, on the device.
class DeviceTensor {
 public:
  explicit DeviceTensor(const Tensor& host) : host_(host) {
    void* p = nullptr;
    cuda_ok(cudaMalloc(&p, std::max<std::size_t>(host.bytes().size(), 1)), "cudaMalloc");
    memory_.reset(p);
    upload();
  }

  TensorRef ref() const { return host_.ref(memory_.get()); }
  void upload() { copy(memory_.get(), host_.bytes().data(), cudaMemcpyHostToDevice); }
  Tensor download() const {
    Tensor copied = host_;
    copy(copied.bytes().data(), memory_.get(), cudaMemcpyDeviceToHost);
    return copied;
  }
  /// Takes over another tensor's bytes, in stream order and without waiting.
  void copy_on(cudaStream_t stream, const DeviceTensor& from) {
    cuda_ok(cudaMemcpyAsync(memory_.get(), from.memory_.get(), host_.bytes().size(),
                            cudaMemcpyDeviceToDevice, stream));
  }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    cuda_ok(cudaMemcpy(to, from, host_.bytes().size(), kind), "cudaMemcpy");
  }

  Tensor host_;
  std::unique_ptr<void, FreeDevice> memory_;
};

/// Plain values on the device, without guards.
template <class T>
class DeviceArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit DeviceArray(const std::vector<T>& host) : count_(host.size()) {
    void* p = nullptr;
    cuda_ok(cudaMalloc(&p, std::max<std::size_t>(count_ * sizeof(T), 16)), "cudaMalloc");
    memory_.reset(p);
    cuda_ok(cudaMemcpy(p, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  explicit DeviceArray(std::size_t count, T value = {})
      : DeviceArray(std::vector<T>(count, value)) {}

  T* data() const { return static_cast<T*>(memory_.get()); }
  std::vector<T> download() const {
    std::vector<T> host(count_);
    cuda_ok(cudaMemcpy(host.data(), data(), count_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    return host;
  }

 private:
  std::size_t count_;
  std::unique_ptr<void, FreeDevice> memory_;
};

/// A stream of its own that does not wait for the default one.
class SideStream {
 public:
  SideStream() { cuda_ok(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking)); }
  ~SideStream() { cudaStreamDestroy(handle_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  operator cudaStream_t() const { return handle_; }
  Stream stream() const { return {handle_, 0}; }

 private:
  cudaStream_t handle_ = nullptr;
};

}  // namespace fastkern::test
