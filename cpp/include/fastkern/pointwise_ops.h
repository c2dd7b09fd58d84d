// SPDX-License-Identifier: Apache-2.0
// THE table of the pointwise functions: a line is an operator, on the CPU and on CUDA.
//
//   op(name, inputs, promotion, types, formula)
//
//   inputs     how many; in the formula they are a, b, c, of the compute type T
//   promotion  what the types of inputs make of the result's: Promotion
//   types      the compute types it is compiled for: kFloat (f32, f64), kInt (i64), kComplex
//   formula    the result. s(i) is run-time scalar i, math:: what pointwise_math.h has.
//
// Plain C++20, with CUDA's compiler as well: what comes out of it, Pointwise and pointwise_info(),
// needs no formula; the functors are in pointwise_math.h.
#pragma once

#include <array>
#include <cstdint>

namespace fastkern {

/// How the type of the result follows from the promoted type of the inputs.
enum class Promotion : std::uint8_t {
  standard,          // the promoted type; 16-bit floats are computed in f32
  no_opmath,         // the promoted type, and no arithmetic on it
  int_to_float,      // f32 where the inputs are integers or booleans
  always_bool,       // boolean
  complex_to_float,  // the real type of a complex one
  bool_to_long,      // i64 where the inputs are booleans
};

inline constexpr unsigned kFloat = 1, kInt = 2, kComplex = 4;

// clang-format off
#define FASTKERN_POINTWISE_UNARY(op)                                                              \
  op(copy,        1, no_opmath,        kFloat | kInt | kComplex, a)                               \
  op(abs,         1, complex_to_float, kFloat | kInt | kComplex, math::abs(a))                    \
  op(neg,         1, standard,         kFloat | kInt | kComplex, math::neg(a))                    \
  op(reciprocal,  1, int_to_float,     kFloat,                   T(1) / a)                        \
  op(sqrt,        1, int_to_float,     kFloat,                   math::sqrt(a))                   \
  op(rsqrt,       1, int_to_float,     kFloat,                   math::rsqrt(a))                  \
  op(exp,         1, int_to_float,     kFloat,                   math::exp(a))                    \
  op(sin,         1, int_to_float,     kFloat,                   math::sin(a))                    \
  op(cos,         1, int_to_float,     kFloat,                   math::cos(a))                    \
  op(tanh,        1, int_to_float,     kFloat,                   math::tanh(a))                   \
  op(sigmoid,     1, int_to_float,     kFloat,                   math::sigmoid(a))                \
  op(silu,        1, standard,         kFloat,                   a * math::sigmoid(a))            \
  op(gelu,        1, standard,         kFloat,                   math::gelu(a))                   \
  op(gelu_tanh,   1, standard,         kFloat,                   math::gelu_tanh(a))              \
  op(relu,        1, standard,         kFloat | kInt,            a < T(0) ? T(0) : a)             \
  op(bitwise_not, 1, no_opmath,        kInt,                     ~a)                              \
  op(logical_not, 1, always_bool,      kFloat | kInt | kComplex, !math::truth(a))                 \
  op(isnan,       1, always_bool,      kFloat,                   math::isnan(a))                  \
  op(isinf,       1, always_bool,      kFloat,                   math::isinf(a))

#define FASTKERN_POINTWISE_BINARY(op)                                                             \
  op(add,         2, standard,         kFloat | kInt | kComplex, math::add(a, math::mul(s(0), b))) \
  op(sub,         2, standard,         kFloat | kInt | kComplex, math::sub(a, math::mul(s(0), b))) \
  op(rsub,        2, standard,         kFloat | kInt | kComplex, math::sub(b, math::mul(s(0), a))) \
  op(mul,         2, standard,         kFloat | kInt | kComplex, math::mul(a, b))                 \
  op(div,         2, int_to_float,     kFloat,                   a / b)                           \
  op(div_trunc,   2, standard,         kFloat | kInt,            math::div_trunc(a, b))           \
  op(div_floor,   2, standard,         kFloat | kInt,            math::div_floor(a, b))           \
  op(pow,         2, bool_to_long,     kFloat | kInt,            math::pow(a, b))                 \
  op(maximum,     2, standard,         kFloat | kInt,            math::max(a, b))                 \
  op(minimum,     2, standard,         kFloat | kInt,            math::min(a, b))                 \
  op(clamp_min,   2, standard,         kFloat | kInt,            math::max(a, b))                 \
  op(clamp_max,   2, standard,         kFloat | kInt,            math::min(a, b))                 \
  op(bitwise_and, 2, no_opmath,        kInt,                     a & b)                           \
  op(bitwise_or,  2, no_opmath,        kInt,                     a | b)                           \
  op(logical_and, 2, always_bool,      kFloat | kInt | kComplex, math::truth(a) & math::truth(b)) \
  op(logical_or,  2, always_bool,      kFloat | kInt | kComplex, math::truth(a) | math::truth(b)) \
  op(eq,          2, always_bool,      kFloat | kInt | kComplex, a == b)                          \
  op(ne,          2, always_bool,      kFloat | kInt | kComplex, !(a == b))                       \
  op(lt,          2, always_bool,      kFloat | kInt,            a < b)                           \
  op(le,          2, always_bool,      kFloat | kInt,            a <= b)                          \
  op(gt,          2, always_bool,      kFloat | kInt,            a > b)                           \
  op(ge,          2, always_bool,      kFloat | kInt,            a >= b)

#define FASTKERN_POINTWISE_TERNARY(op)                                                            \
  op(where,       3, no_opmath,        kFloat | kInt | kComplex, math::truth(a) ? b : c)          \
  op(clamp,       3, standard,         kFloat | kInt,            math::min(math::max(a, b), c))

/// Derivatives: a is the gradient of the result, b the argument (of tanh and sigmoid: the result).
#define FASTKERN_POINTWISE_BWD(op)                                                                \
  op(relu_bwd,      2, standard,       kFloat,                   b <= T(0) ? T(0) : a)            \
  op(tanh_bwd,      2, standard,       kFloat,                   a * (T(1) - b * b))              \
  op(sigmoid_bwd,   2, standard,       kFloat,                   a * (T(1) - b) * b)              \
  op(silu_bwd,      2, standard,       kFloat,                   a * math::silu_grad(b))          \
  op(gelu_bwd,      2, standard,       kFloat,                   a * math::gelu_grad(b))          \
  op(gelu_tanh_bwd, 2, standard,       kFloat,                   a * math::gelu_tanh_grad(b))
// clang-format on

#define FASTKERN_POINTWISE_OPS(op) \
  FASTKERN_POINTWISE_UNARY(op)     \
  FASTKERN_POINTWISE_BINARY(op)    \
  FASTKERN_POINTWISE_TERNARY(op)   \
  FASTKERN_POINTWISE_BWD(op)

enum class Pointwise : std::uint8_t {
#define FASTKERN_ENUMERATOR(name, inputs, promotion, types, ...) name,
  FASTKERN_POINTWISE_OPS(FASTKERN_ENUMERATOR)
#undef FASTKERN_ENUMERATOR
};

struct PointwiseInfo {
  const char* name;
  int inputs;
  Promotion promotion;
  unsigned types;  // of kFloat, kInt, kComplex
};

inline constexpr PointwiseInfo kPointwise[] = {
#define FASTKERN_ROW(name, inputs, promotion, types, ...) \
  {#name, inputs, Promotion::promotion, types},
    FASTKERN_POINTWISE_OPS(FASTKERN_ROW)
#undef FASTKERN_ROW
};
inline constexpr int kPointwiseCount = sizeof(kPointwise) / sizeof(kPointwise[0]);

constexpr const PointwiseInfo& pointwise_info(Pointwise f) {
  return kPointwise[static_cast<int>(f)];
}

}  // namespace fastkern
