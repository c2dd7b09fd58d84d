// SPDX-License-Identifier: Apache-2.0
// The same on a GPU.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fastkern/cuda/elementwise/pointwise.cuh"
#include "silu_mul.h"

using namespace fastkern;

int main() {
  if (cuda::device_count() == 0) {
    std::puts("no GPU");
    return 77;
  }
  constexpr std::int64_t kRows = 1000, kColumns = 4096, kCount = kRows * kColumns;
  std::vector<float> x(kCount), gate(kColumns), out(kCount);
  for (std::int64_t i = 0; i < kCount; ++i) x[i] = 0.01f * static_cast<float>(i % 997) - 5.0f;
  for (std::int64_t i = 0; i < kColumns; ++i) gate[i] = 0.001f * static_cast<float>(i);
  char* memory = nullptr;
  cuda::check(cudaMalloc(&memory, 4 * (kCount + kColumns)), "example", "cudaMalloc");
  char* const of_gate = memory + 4 * kCount;
  cudaMemcpy(memory, x.data(), 4 * kCount, cudaMemcpyHostToDevice);
  cudaMemcpy(of_gate, gate.data(), 4 * kColumns, cudaMemcpyHostToDevice);

  const TensorRef tx = dense(memory, DType::f32, kRows, kColumns);
  cuda::pointwise<silu_mul>(tx, {tx, dense(of_gate, DType::f32, kColumns)});
  cuda::pointwise<squared_relu>(tx, {tx});
  cuda::pointwise<mix>(tx, {tx, Number(2), dense(of_gate, DType::f32, kColumns)}, {},
                       {Number(0.5)});

  cuda::check(cudaMemcpy(out.data(), memory, 4 * kCount, cudaMemcpyDeviceToHost), "example",
              "copy");
  cudaFree(memory);
  for (std::int64_t i = 0; i < kCount; ++i) {
    const double a = x[i], b = gate[i % kColumns], v = std::fmax(a / (1.0 + std::exp(-a)) * b, 0.0);
    const double expected = v * v + 0.5 * b * (2.0 - v * v);
    if (std::abs(out[i] - expected) > 1e-5 * (1.0 + std::abs(expected))) {
      std::printf("element %ld is %g, expected %g\n", static_cast<long>(i), out[i], expected);
      return 1;
    }
  }
  std::puts("all as expected");
  return 0;
}
