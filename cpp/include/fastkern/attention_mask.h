// SPDX-License-Identifier: Apache-2.0
// Where the sequences of attention lie and what their queries see, but for masks that are tensors:
// the same arithmetic for the CPU (Int: std::int64_t) and CUDA (int).
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastkern/attention.h"

namespace fastkern {

/// Batch entry b. Not packed: it begins at its own stride, so first_q and first_k are 0.
template <class Int>
struct AttentionSequence {
  Int first_q, first_k, queries, keys;
};

/// `total_q`, `total_k`: rows of the packed tensors, or of an entry. Whatever the numbers say, the
/// sequence lies within.
template <class Int>
constexpr AttentionSequence<Int> attention_sequence(const AttentionLengths& lengths, Int b,
                                                    Int total_q, Int total_k) {
  const auto cut = [](Int value, Int low, Int high) {
    return value < low ? low : value > high ? high : value;
  };
  AttentionSequence<Int> s{0, 0, total_q, total_k};
  if (lengths.start_q) {
    s.first_q = cut(lengths.start_q[b], 0, total_q);
    s.queries = cut(lengths.start_q[b + 1], s.first_q, total_q) - s.first_q;
    s.first_k = cut(lengths.start_k[b], 0, total_k);
    s.keys = cut(lengths.start_k[b + 1], s.first_k, total_k) - s.first_k;
  }
  if (lengths.used_q) s.queries = cut(lengths.used_q[b], 0, s.queries);
  if (lengths.used_k) s.keys = cut(lengths.used_k[b], 0, s.keys);
  return s;
}

/// Query i sees keys low(i) to high(i), and those below `prefix`.
template <class Int>
struct AttentionSight {
  // The key of query 0's own position, and where its window begins and ends: far away if unlimited.
  Int shift, window_begin, window_end;
  Int prefix, keys;

  constexpr Int cut(Int j) const { return j < 0 ? 0 : j > keys ? keys : j; }
  constexpr Int low(Int i) const { return cut(i + window_begin); }
  constexpr Int high(Int i) const { return cut(i + window_end); }

  /// What queries i0 to i1 see lies within these.
  constexpr Int begin(Int i0) const { return prefix > 0 ? 0 : low(i0); }
  constexpr Int end(Int i1) const { return high(i1 - 1) > prefix ? high(i1 - 1) : prefix; }
  /// Of `queries`, those that may see any of keys j0 to j1 lie within these.
  constexpr Int first_query(Int j0) const {
    return j0 < prefix || j0 < window_end ? 0 : j0 - window_end + 1;
  }
  constexpr Int last_query(Int j1, Int queries) const {
    const Int last = prefix > 0 ? queries : j1 - window_begin;
    return last < 0 ? 0 : last > queries ? queries : last;
  }
  /// Whether none of i0 to i1 sees any of j0 to j1.
  constexpr bool none(Int i0, Int i1, Int j0, Int j1) const {
    return j0 >= prefix && (j1 <= low(i0) || j0 >= high(i1 - 1));
  }
  /// Whether each of i0 to i1 sees all of j0 to j1.
  constexpr bool all(Int i0, Int i1, Int j0, Int j1) const {
    return j1 <= prefix || (j0 >= low(i1 - 1) && j1 <= high(i0));
  }
};

template <class Int>
constexpr AttentionSight<Int> attention_sight(const AttentionMask& mask,
                                              const AttentionSequence<Int>& s, Int b) {
  // Positions are below this: a window that begins or ends beyond is as good as unlimited.
  constexpr std::int64_t kFar = std::int64_t{1} << (sizeof(Int) == 4 ? 30 : 40);
  AttentionSight<Int> sight{};
  sight.shift = mask.top_left ? 0 : s.keys - s.queries;
  const bool from = mask.left >= 0 && mask.left < kFar + sight.shift;
  const bool to = mask.right >= 0 && mask.right < kFar - sight.shift;
  sight.window_begin = static_cast<Int>(from ? sight.shift - mask.left : -kFar);
  sight.window_end = static_cast<Int>(to ? sight.shift + mask.right + 1 : kFar);
  sight.keys = s.keys;
  if (mask.prefix) sight.prefix = sight.cut(mask.prefix[b]);
  return sight;
}

}  // namespace fastkern
