// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of tensors: any types, any strides, broadcast. Which there are, and their
// formulas: pointwise_ops.h. How a call is planned: pointwise_plan.h.
//
//   out[i] = f(in[0][i], in[1][i], ...)
//
// Inputs are read as `compute`, the function is evaluated in it, and the result is converted to the
// type of `out`: rounded once; to an integer cut off towards zero and wrapped around; to a boolean
// != 0.
#pragma once

#include <array>
#include <complex>
#include <cstdint>

#include "fastkern/core.h"
#include "fastkern/pointwise_ops.h"

namespace fastkern {

inline constexpr int kMaxInputs = 3;
inline constexpr int kMaxScalars = 2;

/// A number of the host: an operand instead of a tensor, or a run-time scalar. Integers keep all 64
/// bits where they are computed with as integers.
struct Number {
  double real = 0.0, imag = 0.0;
  std::int64_t integer = 0;

  constexpr Number() = default;
  constexpr Number(double v) : real(v), integer(to_integer(v)) {}
  constexpr Number(float v) : Number(static_cast<double>(v)) {}
  constexpr Number(std::int64_t v) : real(static_cast<double>(v)), integer(v) {}
  constexpr Number(int v) : Number(static_cast<std::int64_t>(v)) {}
  constexpr Number(bool v) : Number(static_cast<std::int64_t>(v)) {}
  constexpr Number(std::complex<double> v)
      : real(v.real()), imag(v.imag()), integer(to_integer(v.real())) {}

 private:
  static constexpr std::int64_t to_integer(double v) {
    return v >= -0x1p63 && v < 0x1p63 ? static_cast<std::int64_t>(v) : 0;
  }
};

/// An input: a tensor, or a number.
struct Operand {
  TensorRef tensor;  // of any type but f8e4m3; not given: the number is meant
  Number number;

  Operand() = default;
  Operand(const TensorRef& t) : tensor(t) {}
  Operand(Number v) : number(v) {}
};

/// The type in which inputs of `promoted` type are computed: f32 for itself, f16 and bf16; i64 for
/// all integers; the others are their own.
constexpr DType compute_type(DType promoted) {
  switch (promoted) {
    case DType::f16:
    case DType::bf16:
      return DType::f32;
    case DType::i8:
    case DType::u8:
    case DType::i16:
    case DType::i32:
      return DType::i64;
    default:
      return promoted;
  }
}

/// A call. An input has at most as many dimensions as `out`; they count from the last, and those of
/// size 1 are repeated. A tensor without dimensions is given as one of shape (1).
struct PointwiseCall {
  const char* op = "fastkern::pointwise";  // for error messages
  Pointwise function = Pointwise::copy;
  TensorRef out;                               // may be an input, exactly; else no element of one
  std::array<Operand, kMaxInputs> in;          // the first pointwise_info(function).inputs of them
  std::array<Number, kMaxScalars> scalars{1};  // alpha of add, sub and rsub
  DType compute = DType::f32;  // f32 | f64 | i64 | boolean (of what i64 has) | c64 | c128
};

/// out = x on and above diagonal number `diagonal` of each matrix, 0 below it; of one type, any.
struct Triangle {
  const char* op = "fastkern::triu";
  TensorRef x;    // (..., M, N)
  TensorRef out;  // (..., M, N), may be x
  std::int64_t diagonal = 0;
};

/// The first column of a row that is kept.
constexpr std::int64_t triangle_start(std::int64_t row, std::int64_t columns,
                                      std::int64_t diagonal) {
  // Far diagonals must not overflow.
  if (diagonal >= columns) return columns;
  const std::int64_t start = row + diagonal;
  return start < 0 ? 0 : start > columns ? columns : start;
}
/// Throws where the matrices do not match or share memory.
FASTKERN_API void check_triangle(const Triangle& args);

namespace cpu {
/// A division of integers by zero (div_trunc, div_floor) is an Error.
FASTKERN_API void pointwise(const PointwiseCall& call);
FASTKERN_API void triu(const Triangle& args);
}  // namespace cpu

namespace cuda {
/// Integers divided by zero give any number.
FASTKERN_API void pointwise(const PointwiseCall& call, Stream stream);
FASTKERN_API void triu(const Triangle& args, Stream stream);
}  // namespace cuda
}  // namespace fastkern
