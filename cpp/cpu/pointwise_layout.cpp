// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernel of the pointwise functions is told.
#include "fastkern/pointwise_layout.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>

namespace fastkern {
namespace {

std::int64_t bytes_of(const PointwiseAccess& a) { return std::int64_t{1} << a.log_size; }

bool aligned(const char* p, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

struct Maker {
  const PointwisePlan& plan;
  const PointwiseShape& shape;
  PointwiseLayout& to;

  template <class F>
  void each_input(const F& f) {
    for (int i = 0; i < plan.inputs; ++i)
      if (to.in[i].data) f(to.in[i]);
  }

  /// Strides other than the innermost keep packs of `elements` aligned.
  bool rows_aligned(const PointwiseAccess& a, int elements) const {
    bool good = aligned(a.data, elements * bytes_of(a));
    for (int d = 1; d < plan.ndim; ++d) good &= a.strides[d] % elements == 0;
    return good;
  }
  bool inner_dense(const PointwiseAccess& a) const { return a.strides[0] == 1; }
  bool constant(const PointwiseAccess& a) const {
    return std::all_of(a.strides, a.strides + plan.ndim, [](std::int32_t s) { return s == 0; });
  }
  /// Element i of the result's order is i elements behind the first.
  bool flat_dense(const PointwiseAccess& a) const {
    std::int64_t stride = 1;
    for (int d = 0; d < plan.ndim; ++d) {
      if (a.strides[d] != stride) return false;
      stride *= plan.sizes[d];
    }
    return true;
  }
  bool half_as_wide(const PointwiseAccess& a) const {
    return 2 * bytes_of(a) == shape.compute_size;
  }

  /// A result as wide as the compute type would leave in halves of sectors, every other one first.
  bool may_pair() const { return shape.groups % 2 == 0 && bytes_of(to.out) < shape.compute_size; }

  /// Groups of whole rows.
  bool rows() {
    if (plan.ndim == 1 || !inner_dense(to.out) || plan.sizes[0] % shape.vector != 0 ||
        !rows_aligned(to.out, shape.vector))
      return false;
    const bool pairs = plan.sizes[0] % (2 * shape.vector) == 0;
    const auto in_pairs = [&](const PointwiseAccess& a) {
      return !half_as_wide(a) || rows_aligned(a, 2 * shape.vector);
    };
    bool narrow = half_as_wide(to.out), good = in_pairs(to.out);
    each_input([&](PointwiseAccess& a) {
      if (a.strides[0] == 0) {
        a.access = Access::repeated;
      } else if (inner_dense(a) && rows_aligned(a, shape.vector)) {
        a.access = Access::packs;
        narrow |= half_as_wide(a);
        good &= in_pairs(a);
      } else {
        a.access = Access::each;
      }
    });
    to.paired = pairs && narrow && good && may_pair();
    to.groups = static_cast<std::uint32_t>(plan.numel / shape.vector);
    return true;
  }

  /// Operands that are dense along another dimension than the result, through tiles.
  bool tiles() {
    constexpr std::int64_t kLeast = 16;  // of a tile's elements in either direction
    if (!shape.stages || plan.ndim < 2 || !inner_dense(to.out) || plan.sizes[0] < kLeast)
      return false;
    const auto along = [&](const PointwiseAccess& a) {
      if (a.strides[0] == 0 || a.strides[0] == 1 || bytes_of(a) > 4) return 0;
      for (int d = 1; d < plan.ndim; ++d)
        if (a.strides[d] == 1 && plan.sizes[d] >= kLeast) return d;
      return 0;
    };
    int other = 0;
    each_input([&](PointwiseAccess& a) {
      if (other == 0) other = along(a);
    });
    if (other == 0) return false;
    each_input([&](PointwiseAccess& a) {
      if (along(a) != other) return;
      a.access = Access::staged;
      ++to.staged;
    });
    std::swap(to.dims[1], to.dims[other]);
    std::swap(to.out.strides[1], to.out.strides[other]);
    each_input([&](PointwiseAccess& a) { std::swap(a.strides[1], a.strides[other]); });
    std::int64_t count = 1;
    for (int d = 0; d < plan.ndim; ++d) {
      const std::int64_t size = to.dims[d].size, in_tiles = (size + kTile - 1) / kTile;
      if (d < 2) to.tiles[d] = divider(in_tiles);
      count *= d < 2 ? in_tiles : size;
    }
    to.tile_count = static_cast<std::uint32_t>(count);
    return true;
  }

  /// Groups counted through a dense result from the first that is aligned.
  bool flat() {
    if (!flat_dense(to.out)) return false;
    const auto at = [&](const PointwiseAccess& a, std::int64_t head, int elements) {
      return aligned(a.data + head * bytes_of(a), elements * bytes_of(a));
    };
    // As many bytes as possible in packs; those of a pair count double.
    std::int64_t best = -1;
    for (int head = 0; head < 2 * shape.vector && head < plan.numel; ++head) {
      if (!at(to.out, head, shape.vector)) continue;
      std::int64_t score = 0;
      const auto count = [&](const PointwiseAccess& a) {
        score += bytes_of(a) * at(a, head, shape.vector);
        if (half_as_wide(a)) score += bytes_of(a) * at(a, head, 2 * shape.vector);
      };
      count(to.out);
      each_input([&](PointwiseAccess& a) {
        if (flat_dense(a)) count(a);
      });
      if (score > best) best = score, to.head = head;
    }
    if (best < 0) return false;
    bool narrow = half_as_wide(to.out);
    bool pairs = !narrow || at(to.out, to.head, 2 * shape.vector);
    each_input([&](PointwiseAccess& a) {
      if (constant(a)) {
        a.access = Access::repeated;
      } else if (!flat_dense(a)) {
        a.access = plan.ndim == 1 ? Access::each : Access::gathered;
      } else if (at(a, to.head, shape.vector)) {
        a.access = Access::packs;
        narrow |= half_as_wide(a);
        pairs &= !half_as_wide(a) || at(a, to.head, 2 * shape.vector);
      } else {
        a.access = Access::each;
      }
    });
    to.flat = true;
    to.paired = narrow && pairs && may_pair();
    to.groups = static_cast<std::uint32_t>((plan.numel - to.head) / shape.vector);
    if (to.paired) to.groups &= ~1u;
    return to.groups > 0;
  }
};

}  // namespace

int dimension_to_split(const PointwisePlan& plan, std::int64_t most) {
  if (plan.numel > most) {
    for (int d = plan.ndim - 1; d >= 0; --d)
      if (plan.sizes[d] > 1) return d;
  }
  const auto widest = [&](const PointwiseView& v) {
    std::int64_t reach = 0, largest = 0;
    int dimension = -1;
    for (int d = 0; d < plan.ndim; ++d) {
      const std::int64_t span = (plan.sizes[d] - 1) * (std::abs(v.strides[d]) / size_of(v.dtype));
      reach += span;
      if (span > largest) largest = span, dimension = d;
    }
    return reach > most ? dimension : -1;
  };
  int d = widest(plan.out);
  for (int i = 0; i < plan.inputs && d < 0; ++i)
    if (plan.in[i].data) d = widest(plan.in[i]);
  return d;
}

PointwiseLayout pointwise_layout(const char* op, const PointwisePlan& plan,
                                 const PointwiseShape& shape) {
  PointwiseLayout layout;
  layout.ndim = plan.ndim;
  const auto view = [&](PointwiseAccess& a, const PointwiseView& v) {
    a.data = v.data;
    a.dtype = v.dtype;
    a.access = v.data ? Access::each : Access::number;
    a.log_size =
        static_cast<std::uint8_t>(std::countr_zero(static_cast<unsigned>(size_of(v.dtype))));
    bool natural = !v.data || aligned(v.data, bytes_of(a));
    for (int d = 0; d < plan.ndim; ++d) {
      natural &= v.strides[d] % bytes_of(a) == 0;
      a.strides[d] = static_cast<std::int32_t>(v.strides[d] / bytes_of(a));
    }
    FK_CHECK(natural, op, ": elements of ", name_of(v.dtype),
             " must lie at multiples of their size in memory");
  };
  view(layout.out, plan.out);
  for (int i = 0; i < plan.inputs; ++i) view(layout.in[i], plan.in[i]);
  for (int d = 0; d < plan.ndim; ++d) layout.dims[d] = divider(plan.sizes[d]);

  Maker maker{plan, shape, layout};
  if (maker.tiles()) return layout;
  bool served = (shape.outputs & types_of(plan.out.dtype)) != 0;
  for (int i = 0; i < plan.inputs; ++i)
    served &= !plan.in[i].data || (shape.inputs & types_of(plan.in[i].dtype)) != 0;
  const bool grouped = served && (maker.rows() || maker.flat());
  if (!grouped) layout.groups = layout.head = 0, layout.paired = layout.flat = false;
  layout.out.access = Access::packs;
  const std::int64_t in_groups = std::int64_t{layout.groups} * shape.vector;
  layout.elements = static_cast<std::uint32_t>(plan.numel - in_groups);
  if (!grouped) layout.head = layout.elements;
  layout.tail = static_cast<std::uint32_t>(layout.head + in_groups);
  layout.inner_groups =
      divider(layout.flat ? std::max<std::int64_t>(layout.groups, 1)
                          : std::max<std::int64_t>(plan.sizes[0] / shape.vector, 1));
  const auto group_stride = [&](PointwiseAccess& a) {
    const bool dense = layout.flat && plan.ndim > 1 && a.access != Access::repeated && a.data;
    a.group_stride = shape.vector * (dense ? 1 : a.strides[0]);
  };
  group_stride(layout.out);
  for (int i = 0; i < plan.inputs; ++i) group_stride(layout.in[i]);
  return layout;
}

}  // namespace fastkern
