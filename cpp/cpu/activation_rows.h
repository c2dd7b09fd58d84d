// SPDX-License-Identifier: Apache-2.0
// What activations and dropout share on the CPU: pieces of rows as f32, so that there is one loop
// for all types, and the formulas of activation_formula.h in plain arithmetic.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "exponential.h"
#include "fastkern/activation_formula.h"
#include "rowwise.h"

namespace fastkern::cpu {

template <bool kWide>
struct HostMath {
  static constexpr bool kPrecise = kWide;
  FASTKERN_INLINE static float exp(float v) {
    const float e = exp_to_zero(v);
    return v > 88.0f ? std::numeric_limits<float>::infinity() : e;
  }
  FASTKERN_INLINE static float reciprocal(float v) { return 1.0f / v; }
};

/// f.template operator()<M>() with the arithmetic for results of a type.
template <class F>
void with_math(DType type, const F& f) {
  if (type == DType::f32) return f.template operator()<HostMath<true>>();
  f.template operator()<HostMath<false>>();
}

/// Elements that are worked on at a time, in the nearest cache.
constexpr std::int64_t kPiece = 512;

/// Whether rows follow one another without a gap.
inline bool is_dense(const Rows& r) {
  return r.count <= 1 || (r.inner >= r.count && r.inner_stride == r.length);
}

/// Makes operands that are all dense one row each.
inline void flatten(std::initializer_list<TensorRef*> operands, const char* op) {
  for (const TensorRef* t : operands) {
    if (t->given() && !is_dense(rows_of(*t, op, "operands"))) return;
  }
  for (TensorRef* t : operands) {
    if (t->given()) *t = dense(t->data, t->dtype, std::int64_t{1}, t->numel());
  }
}

/// body(row, first column, columns, scratch) for pieces of all rows, on the threads there are;
/// `scratch` has `floats` rows of kPiece.
template <class Body>
void each_piece(std::int64_t rows, std::int64_t n, std::int64_t floats, const Body& body) {
  if (rows * n == 0) return;
  const std::int64_t length = std::min(n, kPiece), pieces = (n + length - 1) / length;
  parallel_for(rows * pieces, row_grain(length), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(floats, kPiece);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = pieces == 1 ? i : i / pieces, first = (i - row * pieces) * length;
      body(row, first, std::min(length, n - first), scratch);
    }
  });
}

/// Columns of a row as f32: where they lie if that is their type, else converted into `scratch`.
inline const float* read_piece(const RowTensor& t, std::int64_t row, std::int64_t first,
                               std::int64_t count, float* scratch) {
  if (t.dtype() == DType::f32) return t.row<const float>(row) + first;
  dispatch(t.dtype(), [&]<class T>() {
    const T* in = t.row<const T>(row) + first;
    for_columns(count, [=](std::int64_t c)
                           __attribute__((always_inline)) { scratch[c] = to_float(in[c]); });
  });
  return scratch;
}

/// Where columns of a row are computed: in place if they are f32, else in `scratch`, from where
/// write_piece brings them.
inline float* target_piece(const RowTensor& t, std::int64_t row, std::int64_t first,
                           float* scratch) {
  return t.dtype() == DType::f32 ? t.row<float>(row) + first : scratch;
}
inline void write_piece(const RowTensor& t, std::int64_t row, std::int64_t first,
                        std::int64_t count, const float* values) {
  if (t.dtype() == DType::f32) return;
  dispatch(t.dtype(), [&]<class T>() {
    T* out = t.row<T>(row) + first;
    for_columns(count, [=](std::int64_t c)
                           __attribute__((always_inline)) { out[c] = from_float<T>(values[c]); });
  });
}

/// Sums over rows, over fixed groups of them and then over the groups: the split depends on the
/// sizes alone, so the result does not depend on threads.
class ColumnSums {
 public:
  ColumnSums(std::int64_t m, std::int64_t n, bool wanted);

  std::int64_t groups() const { return groups_; }
  std::int64_t begin(std::int64_t group) const { return group * m_ / groups_; }
  /// The sums of a group, zeros at first.
  float* of(std::int64_t group) const { return sums_.data() + group * n_; }
  void finish(const TensorRef& out) const;

 private:
  std::int64_t m_, n_, groups_;
  Floats sums_;
};

}  // namespace fastkern::cpu
