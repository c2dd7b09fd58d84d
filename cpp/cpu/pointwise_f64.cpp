// SPDX-License-Identifier: Apache-2.0
// Pointwise functions in f64 and of complex numbers.
#include "pointwise.h"

namespace fastkern::cpu {

#define FASTKERN_ENTRY_F64(name, inputs, promotion, types, ...) \
  entry<functor::name, double, ((types) & kFloat) != 0>(),
#define FASTKERN_ENTRY_C64(name, inputs, promotion, types, ...) \
  entry<functor::name, Complex<float>, ((types) & kComplex) != 0>(),
#define FASTKERN_ENTRY_C128(name, inputs, promotion, types, ...) \
  entry<functor::name, Complex<double>, ((types) & kComplex) != 0>(),

Evaluate evaluate_f64(Pointwise f) {
  static constexpr Evaluate kTable[] = {FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY_F64)};
  return kTable[static_cast<int>(f)];
}

Evaluate evaluate_c64(Pointwise f) {
  static constexpr Evaluate kTable[] = {FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY_C64)};
  return kTable[static_cast<int>(f)];
}

Evaluate evaluate_c128(Pointwise f) {
  static constexpr Evaluate kTable[] = {FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY_C128)};
  return kTable[static_cast<int>(f)];
}

}  // namespace fastkern::cpu
