// SPDX-License-Identifier: Apache-2.0
// A pointwise function of your own, in one line:
//
//   FASTKERN_POINTWISE(silu_mul, (a, b), a / (T(1) + exp(-a)) * b)
//
//   fastkern::cpu::pointwise<silu_mul>(out, {x, y});
//   fastkern::cuda::pointwise<silu_mul>(out, {x, y}, stream);   //
//   fastkern/cuda/elementwise/pointwise.cuh
//
// Operands are what those of the library's functions are: any types and strides, broadcast, tensors
// or numbers (elementwise.h). T is the compute type; write numbers as T(0.5). The functions of
// pointwise_math.h can be called without their namespace; s(0) and s(1) are run-time scalars.
#pragma once

#include <array>
#include <initializer_list>
#include <span>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise_math.h"

#define FASTKERN_TYPED_1(a) T a
#define FASTKERN_TYPED_2(a, b) T a, T b
#define FASTKERN_TYPED_3(a, b, c) T a, T b, T c
#define FASTKERN_CALLED_1 a
#define FASTKERN_CALLED_2 a, b
#define FASTKERN_CALLED_3 a, b, c
#define FASTKERN_PICK(first, second, third, picked, ...) picked
#define FASTKERN_COUNT(...) FASTKERN_PICK(__VA_ARGS__, 3, 2, 1, 0)
#define FASTKERN_JOIN(a, b) a##b
#define FASTKERN_JOINED(a, b) FASTKERN_JOIN(a, b)
#define FASTKERN_TYPED(...) \
  FASTKERN_JOINED(FASTKERN_TYPED_, FASTKERN_COUNT(__VA_ARGS__))(__VA_ARGS__)
#define FASTKERN_CALLED(...) FASTKERN_JOINED(FASTKERN_CALLED_, FASTKERN_COUNT(__VA_ARGS__))

#define FASTKERN_POINTWISE(name, parameters, ...)                                    \
  struct name {                                                                      \
    static constexpr int kInputs = FASTKERN_COUNT parameters;                        \
    static constexpr unsigned kTypes = ::fastkern::kFloat;                           \
    static constexpr const char* kName = #name;                                      \
    template <class T>                                                               \
    static FASTKERN_HD T formula(FASTKERN_TYPED parameters,                          \
                                 [[maybe_unused]] const ::fastkern::Scalars<T>& s) { \
      using ::fastkern::math::abs, ::fastkern::math::cos, ::fastkern::math::erf,     \
          ::fastkern::math::exp, ::fastkern::math::floor, ::fastkern::math::gelu,    \
          ::fastkern::math::gelu_tanh, ::fastkern::math::max, ::fastkern::math::min, \
          ::fastkern::math::pow, ::fastkern::math::rsqrt, ::fastkern::math::sigmoid, \
          ::fastkern::math::sin, ::fastkern::math::sqrt, ::fastkern::math::tanh,     \
          ::fastkern::math::trunc;                                                   \
      return ::fastkern::as<T>(__VA_ARGS__);                                         \
    }                                                                                \
    template <class T>                                                               \
    static FASTKERN_HD T apply(T a, [[maybe_unused]] T b, [[maybe_unused]] T c,      \
                               const ::fastkern::Scalars<T>& s) {                    \
      return formula<T>(FASTKERN_CALLED parameters, s);                              \
    }                                                                                \
  }

namespace fastkern {

/// The scalars of a call of such a function.
using PointwiseScalars = std::array<Number, kMaxScalars>;

namespace cpu {

/// out[i] = f(in[0][i], ...) of n elements of the compute type; `out` may be an input. False if
/// something was divided by zero that must not be.
using Evaluate = bool (*)(const void* const* in, const Number* scalars, void* out, std::int64_t n);

/// The same as pointwise() for a loop of the caller's in f32 or f64.
FASTKERN_API void pointwise_loop(const char* op, const TensorRef& out, std::span<const Operand> in,
                                 DType compute, const PointwiseScalars& scalars, Evaluate evaluate);

/// F in T, float or double.
template <class F, class T = float>
void pointwise(const TensorRef& out, std::initializer_list<Operand> in,
               const PointwiseScalars& scalars = {}) {
  FK_CHECK(in.size() == F::kInputs, F::kName, ": ", F::kInputs, " inputs are needed, got ",
           in.size());
  const Evaluate evaluate = [](const void* const* from, const Number* numbers, void* to,
                               std::int64_t n) {
    const T* const a = static_cast<const T*>(from[0]);
    const T* const b = F::kInputs > 1 ? static_cast<const T*>(from[1]) : a;
    const T* const c = F::kInputs > 2 ? static_cast<const T*>(from[2]) : a;
    const Scalars<T> s{{static_cast<T>(numbers[0].real), static_cast<T>(numbers[1].real)}};
    for (std::int64_t i = 0; i < n; ++i)
      static_cast<T*>(to)[i] = F::template apply<T>(a[i], b[i], c[i], s);
    return true;
  };
  pointwise_loop(F::kName, out, std::span(in.begin(), in.size()),
                 sizeof(T) == sizeof(float) ? DType::f32 : DType::f64, scalars, evaluate);
}

}  // namespace cpu
}  // namespace fastkern
