// SPDX-License-Identifier: Apache-2.0
// The strides that torch gives a new result of a pointwise operator, to the last dimension of size
// 1: a fake result is torch's.
#include "pointwise_strides.h"

#include <algorithm>
#include <array>

#include "fastkern/pointwise_plan.h"

namespace fastkern::torch_layer {
namespace {

bool is_row_major(const TensorRef& t) {
  std::int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.sizes[d] != 1 && t.strides[d] != stride) return false;
    stride *= t.sizes[d];
  }
  return true;
}

/// Every address between the first and the last element holds one element.
bool is_packed(const TensorRef& t) {
  std::array<int, kMaxDims> order;
  int count = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] != 1) order[count++] = d;
  }
  std::sort(order.begin(), order.begin() + count,
            [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  std::int64_t stride = 1;
  for (int i = 0; i < count; ++i) {
    if (t.strides[order[i]] != stride) return false;
    stride *= t.sizes[order[i]];
  }
  return true;
}

void make_row_major(TensorRef& layout) {
  std::int64_t stride = 1;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    layout.strides[d] = stride;
    stride *= std::max<std::int64_t>(layout.sizes[d], 1);
  }
}

/// Of a 4-dimensional tensor, as torch says channels_last.
bool is_channels_last(const TensorRef& t) {
  if (t.ndim != 4) return false;
  std::int64_t stride = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.sizes[d] != 1 && t.strides[d] != stride) return false;
    stride *= t.sizes[d];
  }
  return true;
}

/// torch's short ways for operands of one shape, which decide about dimensions of size 1 too:
/// row-major; channels_last; all alike and without gaps.
bool layout_of_one_shape(TensorRef& layout, std::span<const TensorRef> operands) {
  const auto all = [&](auto&& holds) {
    return std::all_of(operands.begin(), operands.end(), holds);
  };
  const TensorRef& first = operands[0];
  const auto begin = layout.sizes.begin(), end = begin + layout.ndim;
  if (!all([&](const TensorRef& t) {
        return t.ndim == layout.ndim && std::equal(begin, end, t.sizes.begin());
      })) {
    return false;
  }
  if (all(is_row_major)) return make_row_major(layout), true;
  if (all(is_channels_last)) {
    std::int64_t stride = 1;
    for (const int d : {1, 3, 2, 0}) {
      layout.strides[d] = stride;
      stride *= layout.sizes[d];
    }
    return true;
  }
  const auto strides_begin = first.strides.begin(), strides_end = strides_begin + first.ndim;
  if (!all([&](const TensorRef& t) {
        return std::equal(strides_begin, strides_end, t.strides.begin()) && is_packed(t);
      })) {
    return false;
  }
  layout.strides = first.strides;
  return true;
}

}  // namespace

TensorRef with_dimensions(TensorRef ref) {
  if (ref.ndim == 0) {
    ref.ndim = 1;
    ref.sizes[0] = ref.strides[0] = 1;
  }
  return ref;
}

TensorRef layout_as_torch(TensorRef layout, std::span<TensorRef> operands, bool numbers) {
  if (layout.ndim == 0) return layout;
  if (!numbers && layout_of_one_shape(layout, operands)) return layout;
  for (TensorRef& t : operands) t = with_dimensions(t);
  layout_like(layout, operands);
  return layout;
}

}  // namespace fastkern::torch_layer
