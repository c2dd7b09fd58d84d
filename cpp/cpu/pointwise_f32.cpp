// SPDX-License-Identifier: Apache-2.0
// Pointwise functions in f32: f16, bf16 and f32.
#include <algorithm>

#include "pointwise.h"

namespace fastkern::cpu {
namespace {

/// sin and cos: a block with an argument beyond what the loop reduces goes through libm.
template <int kQuarters>
bool evaluate_periodic(const void* const* in, const Number*, void* out, std::int64_t n) {
  const float* const a = static_cast<const float*>(in[0]);
  float* const to = static_cast<float*>(out);
  bool large = false;
  with_best_isa([&]() __attribute__((always_inline)) {
    int found = 0;
    for (std::int64_t i = 0; i < n; ++i) found |= !(math::abs(a[i]) <= math::kPeriods);
    large = found != 0;
  });
  if (large) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = kQuarters == 0 ? math::sin(a[i]) : math::cos(a[i]);
    return true;
  }
  with_best_isa([&]() __attribute__((always_inline)) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < n; ++i) to[i] = math::sin_within<kQuarters>(a[i]);
  });
  return true;
}

}  // namespace

Evaluate evaluate_f32(Pointwise f) {
  if (f == Pointwise::sin) return evaluate_periodic<0>;
  if (f == Pointwise::cos) return evaluate_periodic<1>;
  static constexpr Evaluate kTable[] = {
#define FASTKERN_ENTRY(name, inputs, promotion, types, ...) \
  entry<functor::name, float, ((types) & kFloat) != 0>(),
      FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY)
#undef FASTKERN_ENTRY
  };
  return kTable[static_cast<int>(f)];
}

}  // namespace fastkern::cpu
