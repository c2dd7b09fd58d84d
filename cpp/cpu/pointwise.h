// SPDX-License-Identifier: Apache-2.0
// What the parts of the pointwise functions on the CPU share: blocks of elements in the compute
// type, how they come from memory of any type and go back, and the loops over them.
#pragma once

#include <cstdint>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise.h"
#include "fastkern/pointwise_math.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu {

/// nullptr where the table has no such line.
Evaluate evaluate_f32(Pointwise f);
Evaluate evaluate_f64(Pointwise f);
Evaluate evaluate_i64(Pointwise f);
Evaluate evaluate_c64(Pointwise f);
Evaluate evaluate_c128(Pointwise f);

/// The function of dense runs of S, bf16 or f16, computed in f32, into one of S: conversions and
/// formula in one loop. `numbers`: the inputs after the first, where they are no tensors; or
/// nullptr.
using EvaluateStored = void (*)(const void* const* in, const float* numbers, const Number* scalars,
                                void* out, std::int64_t n);
/// nullptr where there is no such loop.
EvaluateStored evaluate_stored(Pointwise f, DType stored);

/// n elements that lie `stride` bytes apart, to or from n of the compute type T.
template <class T>
void load_block(DType dtype, const char* from, std::int64_t stride, std::int64_t n, T* to);
template <class T>
void store_block(DType dtype, const T* from, std::int64_t n, char* to, std::int64_t stride);

template <class T>
FASTKERN_INLINE T number_as(const Number& v) {
  return static_cast<T>(v.real);
}
template <>
FASTKERN_INLINE std::int64_t number_as<std::int64_t>(const Number& v) {
  return v.integer;
}
template <>
FASTKERN_INLINE Complex<float> number_as<Complex<float>>(const Number& v) {
  return {static_cast<float>(v.real), static_cast<float>(v.imag)};
}
template <>
FASTKERN_INLINE Complex<double> number_as<Complex<double>>(const Number& v) {
  return {v.real, v.imag};
}

/// The loop over a block for functor F in type T.
template <class F, class T>
bool evaluate(const void* const* in, const Number* scalars, void* out, std::int64_t n) {
  const T* const a = static_cast<const T*>(in[0]);
  const T* const b = F::kInputs > 1 ? static_cast<const T*>(in[1]) : a;
  const T* const c = F::kInputs > 2 ? static_cast<const T*>(in[2]) : a;
  T* const to = static_cast<T*>(out);
  const Scalars<T> s{{number_as<T>(scalars[0]), number_as<T>(scalars[1])}};
  with_best_isa([&]() __attribute__((always_inline)) {
    const Scalars<T> local = s;  // which no store in the loop can change
#pragma GCC ivdep
    for (std::int64_t i = 0; i < n; ++i) to[i] = F::template apply<T>(a[i], b[i], c[i], local);
  });
  return true;
}

/// The entry of a table of such loops.
template <class F, class T, bool kCompiled>
constexpr Evaluate entry() {
  if constexpr (kCompiled) {
    return evaluate<F, T>;
  } else {
    return nullptr;
  }
}

}  // namespace fastkern::cpu
