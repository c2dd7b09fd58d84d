// SPDX-License-Identifier: Apache-2.0
// Group normalisation (Wu and He, "Group Normalization", 2018) with an optional SiLU behind it.
//
//   z = (x - mean) * rstd * weight[c] + bias[c],   rstd = rsqrt(var + eps)
//   y = z  or  z * sigmoid(z)
//
// mean and var are those of one sample's C / G adjacent channels at all positions. x is (N, C, *),
// row-major or channels-last; the two are read in place, each with an order of summation of its
// own.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "fastkern/core.h"

namespace fastkern {

enum class Activation : std::uint8_t { none, silu };

struct GroupNormFwd {
  TensorRef x;             // (N, C, *) f32 | f16 | bf16, row-major or channels-last
  TensorRef weight, bias;  // (C) f32 | f16 | bf16, each on its own, dense; not given: 1 and 0
  TensorRef y;             // dtype, shape and layout of x; not given: only stats are wanted
  TensorRef stats;         // (N, G, 2) f32, dense: mean and rstd; not given: not wanted
  std::int64_t num_groups = 1;
  double eps = 1e-5;
  Activation activation = Activation::none;
  void* workspace = nullptr;       // cuda: group_norm_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

struct GroupNormBwd {
  TensorRef dy;            // dtype, shape and layout of x
  TensorRef x;             // as in GroupNormFwd
  TensorRef weight, bias;  // as in GroupNormFwd; bias is read only if there is an activation
  TensorRef stats;         // what forward saved; not given: computed again from x, the same bits
  TensorRef dx;            // dtype, shape and layout of x; not given: not wanted
  TensorRef dweight;       // (C) any, dense; not given: not wanted
  TensorRef dbias;         // (C) any, dense; not given: not wanted
  std::int64_t num_groups = 1;
  double eps = 1e-5;
  Activation activation = Activation::none;
  void* workspace = nullptr;       // cuda: group_norm_bwd_workspace() bytes, 16-byte aligned
  std::size_t workspace_size = 0;  // bytes
};

enum class ImageLayout : std::uint8_t { channels_first, channels_last, other };

namespace detail {
/// Whether the dimensions, outermost first as `order` names them, lie densely one in another.
inline bool dense_in_order(const TensorRef& t, const int* order) {
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const int d = order[i];
    if (t.sizes[d] != 1 && t.strides[d] != stride) return false;
    stride *= t.sizes[d];
  }
  return true;
}
}  // namespace detail

/// The layout of a (N, C, *); channels_first where it is both.
inline ImageLayout image_layout(const TensorRef& t) {
  std::array<int, kMaxDims> order{};
  std::iota(order.begin(), order.end(), 0);
  if (t.numel() == 0 || detail::dense_in_order(t, order.data())) return ImageLayout::channels_first;
  if (t.ndim < 3) return ImageLayout::other;
  std::rotate(order.begin() + 1, order.begin() + 2, order.begin() + t.ndim);
  return detail::dense_in_order(t, order.data()) ? ImageLayout::channels_last : ImageLayout::other;
}

/// A (N, C, *) tensor cut into groups.
struct GroupShape {
  std::int64_t batch = 0;     // N
  std::int64_t channels = 0;  // C
  std::int64_t groups = 1;    // G
  std::int64_t positions = 0;
  bool channels_last = false;

  std::int64_t group_channels() const { return channels / groups; }
  std::int64_t group_size() const { return channels / groups * positions; }
  std::int64_t group_count() const { return batch * groups; }
  std::int64_t numel() const { return batch * channels * positions; }
};

inline GroupShape group_shape(const TensorRef& x, std::int64_t num_groups, const char* op) {
  FK_CHECK(x.ndim >= 2, op, ": x must have at least two dimensions, got shape ", x.shape());
  FK_CHECK(num_groups >= 1 && x.sizes[1] % num_groups == 0, op,
           ": num_groups must be at least 1 and divide the ", x.sizes[1], " channels of x, got ",
           num_groups);
  const ImageLayout layout = image_layout(x);
  FK_CHECK(layout != ImageLayout::other, op,
           ": x must be row-major or channels-last, got other strides for shape ", x.shape());
  GroupShape shape{x.sizes[0], x.sizes[1], num_groups, 1, layout == ImageLayout::channels_last};
  for (int d = 2; d < x.ndim; ++d) shape.positions *= x.sizes[d];
  return shape;
}

/// fail() unless `t` has the sizes and the layout of x.
inline void check_group_layout(const TensorRef& t, const TensorRef& x, const char* op,
                               const char* argument) {
  bool same = t.ndim == x.ndim && t.dtype == x.dtype;
  for (int d = 0; d < x.ndim && same; ++d) same = t.sizes[d] == x.sizes[d];
  FK_CHECK(same && image_layout(t) == image_layout(x), op, ": ", argument,
           " must have the dtype, shape and layout of x, ", x.shape(), ", got ", t.shape());
}

namespace cpu {
FASTKERN_API void group_norm(const GroupNormFwd& args);
FASTKERN_API void group_norm_bwd(const GroupNormBwd& args);
}  // namespace cpu

namespace cuda {
FASTKERN_API void group_norm(const GroupNormFwd& args, Stream stream);
FASTKERN_API std::size_t group_norm_workspace(const GroupNormFwd& args, int device);
FASTKERN_API void group_norm_bwd(const GroupNormBwd& args, Stream stream);
FASTKERN_API std::size_t group_norm_bwd_workspace(const GroupNormBwd& args, int device);
}  // namespace cuda
}  // namespace fastkern
