// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of complex numbers: pointwise_kernel.cuh for each line.
#include "pointwise_table.cuh"

#define FASTKERN_TYPE T
#define FASTKERN_KIND kComplex

namespace fastkern::pointwise_detail {
namespace {

template <class T>
Launcher launcher(Pointwise f) {
  switch (f) {
    FASTKERN_POINTWISE_UNARY(FASTKERN_CASE)
    FASTKERN_POINTWISE_BINARY(FASTKERN_CASE)
    FASTKERN_POINTWISE_TERNARY(FASTKERN_CASE)
    default:
      return nullptr;
  }
}

}  // namespace

Launcher launcher_complex(Pointwise f, DType compute) {
  return compute == DType::c64 ? launcher<Complex<float>>(f) : launcher<Complex<double>>(f);
}

}  // namespace fastkern::pointwise_detail
