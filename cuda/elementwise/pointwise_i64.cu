// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of integers and booleans, in i64: pointwise_kernel.cuh for each line.
#include "pointwise_table.cuh"

#define FASTKERN_TYPE std::int64_t
#define FASTKERN_KIND kInt

namespace fastkern::pointwise_detail {

Launcher launcher_i64(Pointwise f) {
  switch (f) {
    FASTKERN_POINTWISE_UNARY(FASTKERN_CASE)
    FASTKERN_POINTWISE_BINARY(FASTKERN_CASE)
    FASTKERN_POINTWISE_TERNARY(FASTKERN_CASE)
    default:
      return nullptr;
  }
}

}  // namespace fastkern::pointwise_detail
