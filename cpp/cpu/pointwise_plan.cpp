// SPDX-License-Identifier: Apache-2.0
// The plan of a pointwise call.
#include "fastkern/pointwise_plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fastkern {
namespace {

// ---- memory that is shared
// -----------------------------------------------------------------------

/// i * step, `least` <= i <= `most`.
struct Term {
  std::int64_t step, least, most;
};

/// Terms of which one each is added.
struct Sum {
  std::array<Term, 2 * kMaxDims> terms;
  int count = 0;

  void add(std::int64_t step, std::int64_t least, std::int64_t most) {
    if (step < 0) std::swap(least, most), step = -step, least = -least, most = -most;
    if (step != 0 && (least != 0 || most != 0)) terms[count++] = {step, least, most};
  }
};

/// Whether a sum can lie between `low` and `high`. Largest steps first, only those multiples that
/// the remaining terms can make up for; layouts that come out of views need a handful. After
/// `patience` of them: yes, to be on the safe side.
bool reaches(const Sum& sum, int from, std::int64_t low, std::int64_t high, int& patience) {
  if (low > high) return false;
  if (from == sum.count) return low <= 0 && 0 <= high;
  if (--patience < 0) return true;
  std::int64_t least = 0, most = 0;  // of the terms behind this one
  for (int t = from + 1; t < sum.count; ++t) {
    least += sum.terms[t].step * sum.terms[t].least;
    most += sum.terms[t].step * sum.terms[t].most;
  }
  const Term& term = sum.terms[from];
  const auto floor_div = [](std::int64_t a, std::int64_t b) { return a / b - (a % b < 0); };
  const std::int64_t first = std::max(term.least, -floor_div(-(low - most), term.step));
  const std::int64_t last = std::min(term.most, floor_div(high - least, term.step));
  for (std::int64_t i = first; i <= last; ++i) {
    if (reaches(sum, from + 1, low - i * term.step, high - i * term.step, patience)) return true;
  }
  return false;
}

bool reaches(Sum sum, std::int64_t low, std::int64_t high) {
  std::sort(sum.terms.begin(), sum.terms.begin() + sum.count,
            [](const Term& a, const Term& b) { return a.step > b.step; });
  int patience = 4096;
  return reaches(sum, 0, low, high, patience);
}

/// Two elements of `t` share a byte.
bool overlaps_itself(const TensorRef& t) {
  const std::int64_t size = size_of(t.dtype);
  // Dense and permuted tensors do not: each stride is beyond what the smaller ones reach.
  std::array<int, kMaxDims> order;
  std::iota(order.begin(), order.begin() + t.ndim, 0);
  std::sort(order.begin(), order.begin() + t.ndim,
            [&](int a, int b) { return std::abs(t.strides[a]) < std::abs(t.strides[b]); });
  std::int64_t reach = 0;
  bool nested = true;
  for (int i = 0; i < t.ndim; ++i) {
    const int d = order[i];
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] == 0) return true;
    nested &= std::abs(t.strides[d]) > reach;
    reach += (t.sizes[d] - 1) * std::abs(t.strides[d]);
  }
  if (nested) return false;
  // Different elements whose offsets are the same: dimension `positive` is where they differ.
  for (int positive = 0; positive < t.ndim; ++positive) {
    if (t.sizes[positive] == 1) continue;
    Sum sum;
    for (int d = 0; d < t.ndim; ++d) {
      const std::int64_t most = t.sizes[d] - 1;
      sum.add(t.strides[d] * size, d == positive ? 1 : -most, most);
    }
    if (reaches(sum, 1 - size, size - 1)) return true;
  }
  return false;
}

struct Range {
  std::int64_t begin, end;
};

Range range_of(const TensorRef& t) {
  const std::int64_t size = size_of(t.dtype);
  Range range{static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)), 0};
  range.end = range.begin + size;
  for (int d = 0; d < t.ndim; ++d) {
    const std::int64_t span = (t.sizes[d] - 1) * t.strides[d] * size;
    (span < 0 ? range.begin : range.end) += span;
  }
  return range;
}

/// The stride of dimension d of `out` in `t`, which is broadcast to it.
std::int64_t stride_in(const TensorRef& t, const TensorRef& out, int d) {
  const int own = d - (out.ndim - t.ndim);
  return own < 0 || t.sizes[own] == 1 ? 0 : t.strides[own];
}

/// An element of `in` shares memory with another element of `out`.
bool overlaps(const TensorRef& out, const TensorRef& in) {
  const Range a = range_of(out), b = range_of(in);
  if (a.end <= b.begin || b.end <= a.begin) return false;
  const std::int64_t out_size = size_of(out.dtype), in_size = size_of(in.dtype);
  bool same = out.data == in.data && out_size == in_size;
  for (int d = 0; d < out.ndim && same; ++d)
    same = out.sizes[d] == 1 || stride_in(in, out, d) == out.strides[d];
  if (same) return false;
  Sum sum;  // address in `out` less address in `in`
  for (int d = 0; d < out.ndim; ++d) sum.add(out.strides[d] * out_size, 0, out.sizes[d] - 1);
  for (int d = 0; d < in.ndim; ++d) sum.add(-in.strides[d] * in_size, 0, in.sizes[d] - 1);
  const std::int64_t between =
      static_cast<const char*>(in.data) - static_cast<const char*>(out.data);
  return reaches(sum, between + 1 - out_size, between + in_size - 1);
}

// ---- dimensions
// ----------------------------------------------------------------------------------

void check_shapes(const char* op, const TensorRef& out, std::span<const Operand> in) {
  FK_CHECK(out.given(), op, ": out must be given");
  FK_CHECK(out.dtype != DType::f8e4m3, op, ": out must not be f8e4m3");
  FK_CHECK(in.size() <= kMaxInputs, op, ": at most ", kMaxInputs, " inputs, got ", in.size());
  for (std::size_t i = 0; i < in.size(); ++i) {
    const TensorRef& t = in[i].tensor;
    if (!t.given()) continue;
    FK_CHECK(t.dtype != DType::f8e4m3, op, ": input ", i, " must not be f8e4m3");
    bool fits = t.ndim <= out.ndim;
    for (int d = 0; d < t.ndim && fits; ++d) {
      const std::int64_t size = out.sizes[d + out.ndim - t.ndim];
      fits = t.sizes[d] == size || t.sizes[d] == 1;
    }
    FK_CHECK(fits, op, ": input ", i, " must have a shape that broadcasts to that of out, ",
             out.shape(), ", got ", t.shape());
  }
}

/// Every operand of a plan, `out` first.
template <class F>
bool all_views(const PointwisePlan& plan, const F& holds) {
  if (!holds(plan.out)) return false;
  for (int i = 0; i < plan.inputs; ++i)
    if (plan.in[i].data && !holds(plan.in[i])) return false;
  return true;
}
template <class F>
void each_view(PointwisePlan& plan, const F& f) {
  f(plan.out);
  for (int i = 0; i < plan.inputs; ++i) f(plan.in[i]);
}

/// Dimension a goes before b: the stride of `out` is smaller, or that of the first input that
/// tells.
bool goes_before(const PointwisePlan& plan, int a, int b) {
  if (plan.out.strides[a] != plan.out.strides[b])
    return std::abs(plan.out.strides[a]) < std::abs(plan.out.strides[b]);
  for (int i = 0; i < plan.inputs; ++i) {
    if (plan.in[i].strides[a] != plan.in[i].strides[b])
      return std::abs(plan.in[i].strides[a]) < std::abs(plan.in[i].strides[b]);
  }
  return plan.sizes[a] < plan.sizes[b];
}

void reorder(PointwisePlan& plan) {
  for (int i = 1; i < plan.ndim; ++i) {
    for (int d = i; d > 0 && goes_before(plan, d, d - 1); --d) {
      std::swap(plan.sizes[d], plan.sizes[d - 1]);
      each_view(plan, [&](PointwiseView& v) { std::swap(v.strides[d], v.strides[d - 1]); });
    }
  }
}

void coalesce(PointwisePlan& plan) {
  int last = 0;
  for (int d = 1; d < plan.ndim; ++d) {
    if (all_views(plan, [&](const PointwiseView& v) {
          return v.strides[d] == v.strides[last] * plan.sizes[last];
        })) {
      plan.sizes[last] *= plan.sizes[d];
      continue;
    }
    ++last;
    plan.sizes[last] = plan.sizes[d];
    each_view(plan, [&](PointwiseView& v) { v.strides[last] = v.strides[d]; });
  }
  plan.ndim = last + 1;
}

PointwisePath path_of(const PointwisePlan& plan) {
  const auto dense = [](const PointwiseView& v) { return v.strides[0] == size_of(v.dtype); };
  if (!dense(plan.out)) return PointwisePath::strided;
  if (plan.ndim == 1 && all_views(plan, dense)) {
    const auto off = [](const PointwiseView& v) {
      return reinterpret_cast<std::uintptr_t>(v.data) % 16;
    };
    const bool alike = all_views(plan, [&](const PointwiseView& v) {
      return v.dtype == plan.out.dtype && off(v) == off(plan.out);
    });
    return alike ? PointwisePath::dense : PointwisePath::mixed;
  }
  if (all_views(plan, [&](const PointwiseView& v) { return dense(v) || v.strides[0] == 0; }))
    return PointwisePath::rows;
  const bool rows_or_columns = all_views(plan, [&](const PointwiseView& v) {
    bool along = dense(v) || v.strides[0] == 0;
    for (int d = 1; d < plan.ndim; ++d) along |= v.strides[d] == size_of(v.dtype);
    return along;
  });
  return rows_or_columns ? PointwisePath::transposed : PointwisePath::strided;
}

}  // namespace

PointwisePlan pointwise_plan(const char* op, const TensorRef& out, std::span<const Operand> in) {
  check_shapes(op, out, in);
  PointwisePlan plan;
  plan.numel = out.numel();
  plan.inputs = static_cast<int>(in.size());
  if (plan.numel == 0) return plan;
  FK_CHECK(!overlaps_itself(out), op,
           ": out must not hold an element twice, got strides that do for shape ", out.shape());
  for (std::size_t i = 0; i < in.size(); ++i) {
    FK_CHECK(!in[i].tensor.given() || !overlaps(out, in[i].tensor), op, ": input ", i,
             " must share no memory with out, or each element with its own; got a part of it");
  }
  const auto view_of = [&](const TensorRef& t, PointwiseView& view) {
    view.data = static_cast<char*>(t.data), view.dtype = t.dtype;
  };
  view_of(out, plan.out);
  for (int i = 0; i < plan.inputs; ++i) {
    plan.in[i].number = in[i].number;
    if (in[i].tensor.given()) view_of(in[i].tensor, plan.in[i]);
  }
  for (int d = out.ndim - 1; d >= 0; --d) {  // innermost first
    if (out.sizes[d] == 1) continue;
    const int to = plan.ndim++;
    plan.sizes[to] = out.sizes[d];
    plan.out.strides[to] = out.strides[d] * size_of(out.dtype);
    for (int i = 0; i < plan.inputs; ++i) {
      const TensorRef& t = in[i].tensor;
      plan.in[i].strides[to] = t.given() ? stride_in(t, out, d) * size_of(t.dtype) : 0;
    }
  }
  if (plan.ndim == 0) {  // one element
    plan.ndim = 1, plan.sizes[0] = 1;
    each_view(plan, [&](PointwiseView& v) {
      if (v.data) v.strides[0] = size_of(v.dtype);
    });
  }
  reorder(plan);
  coalesce(plan);
  plan.path = path_of(plan);
  return plan;
}

void check_triangle(const Triangle& args) {
  const TensorRef &x = args.x, &out = args.out;
  FK_CHECK(x.ndim >= 2, args.op, ": x must have at least two dimensions, got shape ", x.shape());
  FK_CHECK(x.ndim == out.ndim && x.dtype == out.dtype &&
               std::equal(x.sizes.begin(), x.sizes.begin() + x.ndim, out.sizes.begin()),
           args.op, ": out must have the shape and type of x, ", x.shape(), " and ",
           name_of(x.dtype), ", got ", out.shape(), " and ", name_of(out.dtype));
  if (out.numel() == 0) return;
  FK_CHECK(!overlaps_itself(out) && !overlaps(out, x), args.op,
           ": out must not hold an element twice nor share memory with x other than element by "
           "element");
}

std::string PointwisePlan::describe() const {
  std::string text = std::string(name_of(path)) + " (";
  for (int d = ndim - 1; d >= 0; --d) text += std::to_string(sizes[d]) + (d > 0 ? ", " : ")");
  const auto operand = [&](const PointwiseView& v) {
    if (!v.data) return std::string(" number");
    std::string strides = std::string(" ") + fastkern::name_of(v.dtype) + " (";
    for (int d = ndim - 1; d >= 0; --d)
      strides += std::to_string(v.strides[d]) + (d > 0 ? ", " : ")");
    return strides;
  };
  for (int i = 0; i < inputs; ++i) text += operand(in[i]);
  return text + " ->" + operand(out);
}

PointwiseCall pointwise_simplified(const PointwiseCall& call) {
  PointwiseCall other = call;
  if (call.compute == DType::boolean) {
    other.compute = DType::i64;
    if (call.function == Pointwise::bitwise_not) other.function = Pointwise::logical_not;
  }
  const auto swapped = [&](Pointwise f) {
    other.function = f;
    std::swap(other.in[0], other.in[1]);
  };
  if (call.function == Pointwise::rsub) swapped(Pointwise::sub);
  if (call.function == Pointwise::gt) swapped(Pointwise::lt);
  if (call.function == Pointwise::ge) swapped(Pointwise::le);
  if (call.function == Pointwise::clamp_min) other.function = Pointwise::maximum;
  if (call.function == Pointwise::clamp_max) other.function = Pointwise::minimum;
  const bool floats = call.compute == DType::f32 || call.compute == DType::f64;
  if (call.function == Pointwise::pow && floats && !call.in[1].tensor.given()) {
    const double exponent = call.in[1].number.real;
    if (exponent == 2.0) other.function = Pointwise::mul, other.in[1] = call.in[0];
    if (exponent == 1.0) other.function = Pointwise::copy;
    if (exponent == 0.5) other.function = Pointwise::sqrt;
    if (exponent == -0.5) other.function = Pointwise::rsqrt;
    if (exponent == -1.0) other.function = Pointwise::reciprocal;
  }
  return other;
}

TensorRef broadcast_shape(const char* op, std::span<const TensorRef> inputs) {
  TensorRef shape;
  for (const TensorRef& t : inputs) shape.ndim = std::max(shape.ndim, t.ndim);
  std::fill_n(shape.sizes.begin(), shape.ndim, 1);
  for (const TensorRef& t : inputs) {
    for (int d = 0; d < t.ndim; ++d) {
      std::int64_t& size = shape.sizes[d + shape.ndim - t.ndim];
      FK_CHECK(size == 1 || t.sizes[d] == 1 || size == t.sizes[d], op,
               ": inputs must have shapes that broadcast, got sizes ", size, " and ", t.sizes[d]);
      if (size == 1) size = t.sizes[d];
    }
  }
  std::int64_t stride = 1;
  for (int d = shape.ndim - 1; d >= 0; --d) {
    shape.strides[d] = stride;
    stride *= std::max<std::int64_t>(shape.sizes[d], 1);
  }
  return shape;
}

void layout_like(TensorRef& out, std::span<const TensorRef> inputs) {
  const int n = out.ndim;
  // Only what is repeated has no say; a dimension that is 1 in all operands has its stride.
  const auto stride_of = [&](const TensorRef& t, int d) {
    const int own = d - (n - t.ndim);
    return own < 0 || (t.sizes[own] == 1 && out.sizes[d] != 1) ? 0 : t.strides[own];
  };
  // Whether dimension a belongs inside of b: 1; outside: -1; 0: the inputs do not say.
  const auto compare = [&](int a, int b) {
    for (const TensorRef& t : inputs) {
      if (!t.given()) continue;
      const std::int64_t of_a = stride_of(t, a), of_b = stride_of(t, b);
      if (of_a == 0 || of_b == 0) continue;
      if (of_a != of_b) return of_a < of_b ? 1 : -1;
      if (out.sizes[b] > out.sizes[a]) return 1;
    }
    return 0;
  };
  std::array<int, kMaxDims> order{};  // innermost first; the last dimension if nothing is said
  for (int i = 0; i < n; ++i) order[i] = n - 1 - i;
  for (int i = 1; i < n; ++i) {
    int at = i;
    for (int inner = i - 1; inner >= 0; --inner) {
      const int inside = compare(order[at], order[inner]);
      if (inside > 0) {
        std::swap(order[at], order[inner]);
        at = inner;
      } else if (inside < 0) {
        break;
      }
    }
  }
  std::int64_t stride = 1;
  for (int i = 0; i < n; ++i) {
    out.strides[order[i]] = stride;
    stride *= std::max<std::int64_t>(out.sizes[order[i]], 1);
  }
}

}  // namespace fastkern
