// SPDX-License-Identifier: Apache-2.0
// Operands of attention as the copy engine sees them.
#pragma once

#include "attention/attention_scores.cuh"
#include "tensor_map.cuh"

namespace fastkern::cuda::attention_detail {

/// What a tensor is to the copy engine: `rows` rows of `columns` in `heads` heads; boxes of 64
/// columns and `box` rows. With `pack`: of 2^pack heads side by side a row each, then the next row
/// of these; coordinates are column, head, row, entry then, else column, row, head, entry.
template <class T>
CUtensorMap hopper_map(const View& view, int columns, int rows, int heads, int entries, int box,
                       const char* op, int pack = 0) {
  const DType dtype = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
  if (pack > 0) {
    return tensor_map({view.data,
                       dtype,
                       {columns, heads, rows, entries},
                       {view.head, view.row, view.batch},
                       {64, 1 << pack, box >> pack, 1}},
                      op);
  }
  return tensor_map({view.data,
                     dtype,
                     {columns, rows, heads, entries},
                     {view.row, view.head, view.batch},
                     {64, box, 1, 1}},
                    op);
}

}  // namespace fastkern::cuda::attention_detail
