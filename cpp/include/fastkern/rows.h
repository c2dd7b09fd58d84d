// SPDX-License-Identifier: Apache-2.0
// A tensor seen as rows of its last dimension, whatever the strides of the leading ones.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "fastkern/core.h"

namespace fastkern {

/// Row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride. One level (inner ==
/// count) covers every tensor whose leading dimensions merge; two levels cover a head slice of a
/// fused projection.
struct Rows {
  std::int64_t count = 0;   // M
  std::int64_t length = 0;  // N
  std::int64_t inner = 1;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;

  std::int64_t start(std::int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

/// True and fills `rows` if the last dimension is dense and the leading ones merge into at most two
/// levels.
inline bool as_rows(const TensorRef& t, Rows& rows) {
  if (t.ndim < 1) return false;
  rows = {};
  rows.length = t.sizes[t.ndim - 1];
  rows.count = 1;
  for (int d = 0; d < t.ndim - 1; ++d) rows.count *= t.sizes[d];
  if (rows.length > 1 && t.strides[t.ndim - 1] != 1) return false;
  if (rows.count * rows.length == 0) {
    rows.inner = std::max<std::int64_t>(rows.count, 1);
    return true;
  }
  std::array<std::int64_t, kMaxDims> sizes{}, strides{};
  int levels = 0;  // merged leading dimensions, innermost first
  for (int d = t.ndim - 2; d >= 0; --d) {
    if (t.sizes[d] == 1) continue;
    if (levels > 0 && t.strides[d] == strides[levels - 1] * sizes[levels - 1]) {
      sizes[levels - 1] *= t.sizes[d];
    } else {
      sizes[levels] = t.sizes[d];
      strides[levels++] = t.strides[d];
    }
  }
  if (levels > 2) return false;
  rows.inner = levels > 0 ? sizes[0] : 1;
  rows.inner_stride = levels > 0 ? strides[0] : 0;
  rows.outer_stride = levels > 1 ? strides[1] : 0;
  return true;
}

/// as_rows, or an Error that names `op` and `argument`.
inline Rows rows_of(const TensorRef& t, const char* op, const char* argument) {
  Rows rows;
  FK_CHECK(as_rows(t, rows), op, ": ", argument,
           " must have at least one dimension, a dense last one, and leading dimensions that "
           "merge into at most two strides; got shape ",
           t.shape());
  return rows;
}

}  // namespace fastkern
