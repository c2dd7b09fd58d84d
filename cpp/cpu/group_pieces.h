// SPDX-License-Identifier: Apache-2.0
// What both directions of group normalisation on the CPU share: formulas, and the cut of a call.
//
// A unit is what is normalised without looking at the rest: a group of a sample or, where channels
// are innermost, a sample. It is cut into pieces by the shape alone, and the sums of its pieces are
// added in order: the result depends neither on the number of threads nor on the batch.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "exponential.h"
#include "fastkern/group_norm.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu::groups {

inline constexpr int kLanes = 32;             // partial sums that hide the latency of an add
inline constexpr std::int64_t kPiece = 8192;  // elements, about the first-level cache
inline constexpr std::int64_t kRowPiece = 4 * kPiece;  // more: each also takes sums over groups

using Floats = std::vector<float>;

template <bool kSilu>
FASTKERN_INLINE float activate(float z) {
  return kSilu ? z * sigmoid(z) : z;
}

template <bool kSilu>
FASTKERN_INLINE float activate_grad(float dy, float z) {
  if (!kSilu) return dy;
  const float s = sigmoid(z);
  return dy * (s * (1.0f + z * (1.0f - s)));
}

template <class F>
void dispatch_activation(Activation activation, const F& f) {
  if (activation == Activation::silu) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

/// The sum of the first kCount lanes.
template <int kCount = kLanes>
FASTKERN_INLINE float fold_lanes(float (&lanes)[kLanes]) {
  for (int width = kCount / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

/// The sum of squared distances from the mean, from that of distances from a point `off` beside it.
FASTKERN_INLINE float corrected(float squares, float off, float count) {
  const float m2 = squares - count * off * off;
  return m2 < 0.0f ? 0.0f : m2;  // NaN stays
}

template <class Term>
FASTKERN_INLINE float lane_sum(std::int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] += term(i + l);
  }
  for (int l = 8; i < n; ++i, ++l) lanes[l] += term(i);
  return fold_lanes(lanes);
}

/// Mean and sum of squared distances from it, of n elements in two passes: the second one also
/// corrects the mean, which the first one knows to some ulps only. `at(i)` is element i.
struct Moments {
  float mean, m2;
};

template <class At>
FASTKERN_INLINE Moments moments_of(std::int64_t n, const At& at) {
  const float count = static_cast<float>(n), rough = lane_sum(n, at) / count;
  float sums[kLanes] = {}, squares[kLanes] = {};
  const auto add = [&](std::int64_t i, int l) __attribute__((always_inline)) {
    const float distance = at(i) - rough;
    sums[l] += distance;
    squares[l] += distance * distance;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) add(i + l, l);
  }
  for (int l = 0; i < n; ++i, ++l) add(i, l);
  const float off = fold_lanes(sums) / count;
  return {rough + off, corrected(fold_lanes(squares), off, count)};
}

/// Of `count` columns side by side.
FASTKERN_INLINE float sum_of(const float* columns, std::int64_t count) {
  if (count >= kLanes) {
    return lane_sum(count,
                    [&](std::int64_t i) __attribute__((always_inline)) { return columns[i]; });
  }
  float total = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) total += columns[i];
  return total;
}

/// How a tensor is cut. `fold`: positions side by side in one row of columns, so that loops over
/// few channels have some length.
struct Cut {
  GroupShape shape;
  bool by_rows;  // channels innermost; one position is that too
  std::int64_t fold = 1;

  explicit Cut(const GroupShape& s) : shape(s), by_rows(s.channels_last || s.positions == 1) {
    if (by_rows) fold = std::min(s.positions, 1 + 2 * kLanes / s.channels);
  }
  std::int64_t width() const { return shape.channels * fold; }
  std::int64_t units() const { return by_rows ? shape.batch : shape.group_count(); }
  /// By rows: positions of a piece.
  std::int64_t piece_rows() const { return fold * std::max<std::int64_t>(1, kRowPiece / width()); }
  std::int64_t row_pieces() const { return (shape.positions + piece_rows() - 1) / piece_rows(); }
  std::int64_t rows_of(std::int64_t piece) const {
    return std::min(piece_rows(), shape.positions - piece * piece_rows());
  }
  std::int64_t row_start(std::int64_t sample, std::int64_t piece) const {
    return (sample * shape.positions + piece * piece_rows()) * shape.channels;
  }
};

/// A vector of channels as f32, repeated `fold` times.
inline Floats columns_of(const TensorRef& t, const Cut& cut, float missing) {
  const std::int64_t channels = cut.shape.channels;
  Floats out(cut.width(), missing);
  if (!t.given()) return out;
  dispatch(t.dtype, [&]<class W>() {
    const W* values = static_cast<const W*>(t.data);
    for (std::int64_t c = 0; c < channels; ++c) out[c] = to_float(values[c * t.strides[0]]);
  });
  for (std::int64_t i = channels; i < cut.width(); ++i) out[i] = out[i - channels];
  return out;
}

/// Values of groups, `stride` apart, as columns.
FASTKERN_INLINE void spread(const Cut& cut, const float* of_group, std::int64_t stride,
                            float* __restrict out) {
  const std::int64_t d = cut.shape.group_channels(), channels = cut.shape.channels;
  for (std::int64_t g = 0; g < cut.shape.groups; ++g) {
    const float value = of_group[g * stride];
    for (std::int64_t c = 0; c < d; ++c) out[g * d + c] = value;
  }
  for (std::int64_t f = 1; f < cut.fold; ++f) std::copy_n(out, channels, out + f * channels);
}

/// body(element, column) over rows of channels, `width` columns side by side.
template <class Body>
FASTKERN_INLINE void for_columns(std::int64_t elements, std::int64_t width, const Body& body) {
  std::int64_t first = 0;
  for (; first + width <= elements; first += width) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < width; ++i) body(first + i, i);
  }
#pragma GCC ivdep
  for (std::int64_t i = 0; i < elements - first; ++i) body(first + i, i);
}

/// The same for sums of columns, four rows at a time, so that they are loaded and stored once for
/// four: body(column, over_rows), where over_rows(term) is the sum of term(element) over those
/// rows.
template <class Body>
FASTKERN_INLINE void sum_columns(std::int64_t elements, std::int64_t width, const Body& body) {
  std::int64_t first = 0;
  for (; first + 4 * width <= elements; first += 4 * width) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < width; ++i) {
      body(i, [&](const auto& term) __attribute__((always_inline)) {
        return (term(first + i) + term(first + width + i)) +
               (term(first + 2 * width + i) + term(first + 3 * width + i));
      });
    }
  }
  for (; first < elements; first += width) {
    const std::int64_t count = std::min(width, elements - first);
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) {
      body(i, [&](const auto& term) __attribute__((always_inline)) { return term(first + i); });
    }
  }
}

/// Many units are worked on each by one thread.
inline constexpr std::int64_t kManyUnits = 16;
inline bool one_thread_a_unit(std::int64_t units, std::int64_t pieces) {
  return units >= kManyUnits || pieces == 1;
}

/// For every unit: first(unit, piece, partial) for its pieces, finish(unit, all its partials), then
/// second(unit, piece). Many units: each on one thread, while it is in the cache. Few: their pieces
/// are shared out, with all threads waiting for each other in between. The bits are the same.
template <class Partial, class First, class Finish, class Second>
void run_units(std::int64_t units, std::int64_t pieces, std::int64_t partials,
               std::int64_t unit_elements, std::int64_t scratch_floats, const First& first,
               const Finish& finish, const Second& second) {
  enum Phase { kAll, kFirst, kFinish, kSecond };
  std::vector<Partial> shared;
  // One function for all phases: the compiler may round one formula differently in two places.
  const auto run = [&](Phase phase, std::int64_t begin, std::int64_t end) {
    std::vector<Partial> own(phase == kAll ? pieces * partials : 0);
    Floats scratch(scratch_floats);
    with_best_isa([&]() __attribute__((always_inline)) {
      const bool whole = phase == kAll || phase == kFinish;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t unit = whole ? i : i / pieces;
        const std::int64_t from = whole ? 0 : i % pieces, to = whole ? pieces : from + 1;
        Partial* const all = phase == kAll ? own.data() : shared.data() + unit * pieces * partials;
        if (phase == kAll || phase == kFirst) {
          for (std::int64_t p = from; p < to; ++p)
            first(unit, p, all + p * partials, scratch.data());
        }
        if (whole) finish(unit, all);
        if (phase == kAll || phase == kSecond) {
          for (std::int64_t p = from; p < to; ++p) second(unit, p, scratch.data());
        }
      }
    });
  };
  const auto share_out = [&](Phase phase, std::int64_t count, std::int64_t grain) {
    parallel_for(count, grain,
                 [&](std::int64_t begin, std::int64_t end) { run(phase, begin, end); });
  };
  if (one_thread_a_unit(units, pieces)) return share_out(kAll, units, row_grain(unit_elements));
  shared.resize(units * pieces * partials);
  share_out(kFirst, units * pieces, row_grain(unit_elements / pieces));
  run(kFinish, 0, units);
  share_out(kSecond, units * pieces, row_grain(unit_elements / pieces));
}

}  // namespace fastkern::cpu::groups
