// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of integers and booleans, in i64.
#include "pointwise.h"

namespace fastkern::cpu {
namespace {

template <class F>
bool evaluate_division(const void* const* in, const Number* scalars, void* out, std::int64_t n) {
  const std::int64_t* const b = static_cast<const std::int64_t*>(in[1]);
  bool good = true;
  for (std::int64_t i = 0; i < n; ++i) good &= b[i] != 0;
  return evaluate<F, std::int64_t>(in, scalars, out, n) && good;
}

}  // namespace

Evaluate evaluate_i64(Pointwise f) {
  if (f == Pointwise::div_trunc) return evaluate_division<functor::div_trunc>;
  if (f == Pointwise::div_floor) return evaluate_division<functor::div_floor>;
  static constexpr Evaluate kTable[] = {
#define FASTKERN_ENTRY(name, inputs, promotion, types, ...) \
  entry<functor::name, std::int64_t, ((types) & kInt) != 0>(),
      FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY)
#undef FASTKERN_ENTRY
  };
  return kTable[static_cast<int>(f)];
}

}  // namespace fastkern::cpu
