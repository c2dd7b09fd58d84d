// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of two inputs and derivatives in f64: pointwise_kernel.cuh for each line.
#include "pointwise_table.cuh"

#define FASTKERN_TYPE double
#define FASTKERN_KIND kFloat

namespace fastkern::pointwise_detail {

Launcher launcher_f64_binary(Pointwise f) {
  switch (f) {
    FASTKERN_POINTWISE_BINARY(FASTKERN_CASE)
    FASTKERN_POINTWISE_BWD(FASTKERN_CASE)
    default:
      return nullptr;
  }
}

}  // namespace fastkern::pointwise_detail
