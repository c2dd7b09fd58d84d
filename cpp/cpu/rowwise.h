// SPDX-License-Identifier: Apache-2.0
// What kernels that work row by row share: loops over columns, sums whose order is fixed, rows as
// f32 whatever they are stored as, moments, dropout.
//
// What is FASTKERN_INLINE goes into a with_best_isa. Keep what one of those holds small, and pick
// types and variants outside of it: in a function with all of them GCC runs out of registers for a
// loop, or leaves it scalar.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "fastkern/rows.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu {

/// body(c) for every column, in any order.
template <class Body>
FASTKERN_INLINE void columns(std::int64_t n, const Body& body) {
  const Body local = body;  // which no store in the loop can change
#pragma GCC ivdep
  for (std::int64_t c = 0; c < n; ++c) local(c);
}

/// The same as a function of its own, to be called from plain code. That costs about 5 ns.
template <class Body>
void for_columns(std::int64_t n, const Body& body) {
  with_best_isa([&]() __attribute__((always_inline)) { columns(n, body); });
}

// Independent partial sums: they hide the latency of an add, in two AVX-512 registers.
constexpr int kLanes = 32;
using Lanes = float[kLanes];

/// Vector by vector: GCC makes a call to memset of an initialiser.
template <int K>
FASTKERN_INLINE void clear(Lanes (&lanes)[K]) {
  using Sixteen [[gnu::vector_size(64)]] = float;
  for (Lanes& of_one : lanes) {
    for (int i = 0; i < kLanes; i += 16) {
      const Sixteen zeros = {};
      std::memcpy(of_one + i, &zeros, sizeof(zeros));
    }
  }
}

/// Lanes in halves, and halves again, four at a time: in registers, where a plain loop goes through
/// memory.
FASTKERN_INLINE float tree_sum(const Lanes& lanes) {
  using Four [[gnu::vector_size(16)]] = float;
  Four part[kLanes / 4];
  std::memcpy(part, lanes, sizeof(part));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

/// to += lanes, of which zeros are left.
template <int K>
FASTKERN_INLINE void add_lanes(Lanes (&lanes)[K], Lanes (&to)[K]) {
  for (int k = 0; k < K; ++k) {
    for (int l = 0; l < kLanes; ++l) to[k][l] += lanes[k][l];
  }
  clear(lanes);
}

/// K sums over the columns at once; term(c) is an array of K floats. Three levels, lanes of a
/// stretch, of a block of stretches, of the row: the rounding error of a long row grows with the
/// sum of their lengths, not with the product.
template <int K, class Term>
FASTKERN_INLINE std::array<float, K> lane_sums(std::int64_t n, const Term& term) {
  constexpr std::int64_t kStretch = 16 * kLanes, kBlock = 32 * kStretch;
  Lanes totals[K], block[K], lanes[K];
  clear(totals);
  clear(block);
  clear(lanes);
  std::int64_t i = 0;
  while (i < n) {
    const std::int64_t end = std::min(n, i + kStretch);
    for (; i + kLanes <= end; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const std::array<float, K> terms = term(i + l);
        for (int k = 0; k < K; ++k) lanes[k][l] += terms[k];
      }
    }
    for (int l = 0; i < end; ++i, ++l) {
      const std::array<float, K> terms = term(i);
      for (int k = 0; k < K; ++k) lanes[k][l] += terms[k];
    }
    add_lanes(lanes, block);
    if (i % kBlock == 0) add_lanes(block, totals);
  }
  add_lanes(block, totals);
  std::array<float, K> sums;
  for (int k = 0; k < K; ++k) sums[k] = tree_sum(totals[k]);
  return sums;
}

/// A tensor and its rows; nothing of it may be touched unless it is given(), as a required one is.
struct RowTensor {
  enum Presence { optional, required };

  RowTensor(const TensorRef& tensor, const char* op, const char* argument,
            Presence presence = optional)
      : ref(tensor) {
    if (!given() && presence == optional) return;
    rows = rows_of(tensor, op, argument);
    far = rows.count * rows.length * size_of(tensor.dtype) >= kFar;
  }

  bool given() const { return ref.given(); }
  DType dtype() const { return ref.dtype; }

  template <class T>
  FASTKERN_INLINE T* row(std::int64_t r) const {
    return static_cast<T*>(ref.data) + start(r);
  }

  /// Asks for the cache lines of row r of a tensor that is larger than the nearer caches: of the
  /// next row to be read while one is computed, of one to be written before its sums are known. A
  /// processor looks ahead by itself, but no further than to the end of a page.
  template <bool kWrite>
  FASTKERN_INLINE void prefetch(std::int64_t r) const {
    constexpr std::int64_t kLine = 64;
    if (!far || r >= rows.count) return;
    const std::int64_t element = size_of(ref.dtype), size = rows.length * element;
    const char* const bytes = static_cast<const char*>(ref.data) + start(r) * element;
    for (std::int64_t i = 0; i < size; i += kLine) __builtin_prefetch(bytes + i, kWrite);
  }

  TensorRef ref;
  Rows rows;
  bool far = false;  // larger than the nearer caches

 private:
  static constexpr std::int64_t kFar = 8 << 20;

  FASTKERN_INLINE std::int64_t start(std::int64_t r) const {
    // One level of strides is the rule, and a division takes as long as a hundred columns.
    return r < rows.inner ? r * rows.inner_stride : rows.start(r);
  }
};

/// A row in f32: where it lies if that is its type, else converted into `scratch`.
inline const float* load_row(const RowTensor& t, std::int64_t r, float* scratch) {
  if (t.dtype() == DType::f32) return t.row<const float>(r);
  dispatch(t.dtype(), [&]<class T>() {
    const T* in = t.row<const T>(r);
    for_columns(t.rows.length, [=](std::int64_t c) __attribute__((always_inline)) {
      scratch[c] = to_float(in[c]);
    });
  });
  return scratch;
}

/// Row r, to be read with to_float: as it lies if it is bf16, which costs next to nothing to
/// convert, and T says so; else in f32.
template <class T>
FASTKERN_INLINE const T* typed_row(const RowTensor& t, std::int64_t r, float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    return load_row(t, r, scratch);
  } else {
    return t.row<const T>(r);
  }
}

/// Row r becomes value(c), rounded.
template <class Value>
void store_row(const RowTensor& t, std::int64_t r, const Value& value) {
  dispatch(t.dtype(), [&]<class T>() {
    T* out = t.row<T>(r);
    for_columns(t.rows.length, [=](std::int64_t c) __attribute__((always_inline)) {
      out[c] = from_float<T>(value(c));
    });
  });
}

/// Floats that start on a cache line and hold whatever was there.
class Floats {
 public:
  Floats() = default;
  explicit Floats(std::int64_t size)
      : size_(size), lines_(std::make_unique_for_overwrite<Line[]>((size + 15) / 16)) {}

  std::int64_t size() const { return size_; }
  FASTKERN_INLINE float* data() const { return reinterpret_cast<float*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::int64_t size_ = 0;
  std::unique_ptr<Line[]> lines_;
};

/// Rows of f32 for one thread, each on cache lines of its own, with room for what dropout writes
/// too much.
class Scratch {
 public:
  Scratch(std::int64_t rows, std::int64_t length)
      : stride_((length + 128 + 15) / 16 * 16), floats_(rows * stride_) {}

  FASTKERN_INLINE float* row(std::int64_t r) { return floats_.data() + r * stride_; }

 private:
  std::int64_t stride_;
  Floats floats_;
};

/// Parameters of N columns or of H x N in f32: row r is served by r % H. Not given: all `absent`.
class Parameters {
 public:
  Parameters(const TensorRef& t, std::int64_t n, float added, float absent)
      : n_(n),
        heads_(t.ndim == 2 ? std::max<std::int64_t>(t.sizes[0], 1) : 1),
        values_(heads_ * n) {
    std::fill_n(values_.data(), heads_ * n, absent);
    if (!t.given()) return;
    dispatch(t.dtype, [&]<class T>() {
      const T* in = static_cast<const T*>(t.data);
      for (std::int64_t i = 0; i < heads_ * n; ++i) values_.data()[i] = to_float(in[i]) + added;
    });
  }

  FASTKERN_INLINE const float* row(std::int64_t r) const {
    return values_.data() + (heads_ > 1 ? r % heads_ * n_ : 0);
  }

 private:
  std::int64_t n_, heads_;
  Floats values_;
};

FASTKERN_INLINE float rstd_of(float mean_of_squares, double eps) {
  return 1.0f / std::sqrt(mean_of_squares + static_cast<float>(eps));
}

/// Mean and variance of a row in one pass over differences from a pivot,
///
///   d = value(c) - pivot,  mean = pivot + shift,  shift = mean(d),  var = mean(d^2) - shift^2
///
/// which is as good as two passes where the pivot lies well within a deviation of the mean. The
/// mean of the first columns nearly always does; if not, pivot + shift takes its place. Keeping
/// shift apart keeps the digits that a mean far from zero has no room for.
struct Moments {
  float pivot = 0.0f, shift = 0.0f, var = 0.0f;
};

/// sums_of(pivot) returns the sums of d and of d^2. It is called for the final pivot last.
template <class Value, class SumsOf>
FASTKERN_INLINE Moments moments_of(std::int64_t n, const Value& value, const SumsOf& sums_of) {
  const std::int64_t first = std::min<std::int64_t>(n, kLanes);
  Lanes lanes[1];
  clear(lanes);
  for (std::int64_t c = 0; c < first; ++c) lanes[0][c] = value(c);
  Moments m{.pivot = tree_sum(lanes[0]) / static_cast<float>(first)};
  for (int attempt = 0;; ++attempt) {
    const std::array<float, 2> sums = sums_of(m.pivot);
    m.shift = sums[0] / static_cast<float>(n);
    m.var = sums[1] / static_cast<float>(n) - m.shift * m.shift;
    if (m.shift * m.shift <= 0.25f * m.var || attempt == 1) return m;
    m.pivot += m.shift;
  }
}

/// One value for each row, or ones.
struct RowScale {
  TensorRef ref;

  bool given() const { return ref.given(); }
  float at(std::int64_t r) const {
    float value = 1.0f;
    if (!given()) return value;
    dispatch(ref.dtype, [&]<class T>() { value = to_float(static_cast<const T*>(ref.data)[r]); });
    return value;
  }
};

/// What the elements of a tensor of rows of N are multiplied with; 0: dropped.
struct DropoutRows {
  DropoutRows(double p, const std::int64_t* seed_at, const std::int64_t* offset_at);

  /// The factors of row r, somewhere in `scratch`, a row of Scratch.
  float* factors(std::int64_t r, std::int64_t n, float* scratch) const {
    return factors_from(r * n, n, scratch);
  }
  /// The factors of `count` elements from number `first` on.
  float* factors_from(std::int64_t first, std::int64_t count, float* scratch) const;

  bool active;
  std::uint32_t threshold;
  float scale;
  std::uint64_t seed, offset;
};

/// A dropped element is 0 even if it was NaN.
FASTKERN_INLINE float dropped(float v, float factor) { return factor != 0.0f ? v * factor : 0.0f; }

}  // namespace fastkern::cpu
