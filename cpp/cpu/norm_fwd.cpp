// SPDX-License-Identifier: Apache-2.0
// Norms on the CPU, forward: fallback for CPU tensors and oracle of the CUDA tests. f32 arithmetic,
// sums in fixed order. A row goes through the loops one after the other while it is in the nearest
// cache: h, the sums, y; or the values, then their quantisation.
#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <type_traits>

#include "fastkern/norm.h"
#include "parallel.h"
#include "rowwise.h"

namespace fastkern::cpu {
namespace {

struct Forward {
  explicit Forward(const NormFwd& a)
      : kind(a.kind),
        eps(a.eps),
        x(a.x, a.op, "x", RowTensor::required),
        y(a.y, a.op, "y", RowTensor::required),
        residual(a.residual, a.op, "residual"),
        h(a.h, a.op, "h"),
        y2(a.y2, a.op, "y2"),
        n(x.rows.length),
        weight(a.weight, n, static_cast<float>(a.weight_offset), 1.0f),
        bias(a.bias, n, 0.0f, 0.0f),
        weight2(a.weight2, n, static_cast<float>(a.weight_offset), 1.0f),
        bias2(a.bias2, n, 0.0f, 0.0f),
        rowscale{a.rowscale},
        dropout(a.dropout.p, a.dropout.seed, a.dropout.offset),
        scale(a.scale.given() ? static_cast<float*>(a.scale.data) : nullptr),
        static_scale(a.static_scale) {}

  NormKind kind;
  double eps;
  RowTensor x, y, residual, h, y2;
  std::int64_t n;
  Parameters weight, bias, weight2, bias2;
  RowScale rowscale;
  DropoutRows dropout;
  float* scale;
  bool static_scale;
};

/// dropout(x) * rowscale of row r in f32.
const float* branch_row(const Forward& f, std::int64_t r, Scratch& scratch) {
  const float* x = load_row(f.x, r, scratch.row(0));
  if (!f.dropout.active && !f.rowscale.given()) return x;
  const float scale = f.rowscale.at(r);
  float* out = scratch.row(1);
  if (f.dropout.active) {
    out = f.dropout.factors(r, f.n, out);
    for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
      out[c] = dropped(x[c], out[c]) * scale;
    });
  } else {
    for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) { out[c] = x[c] * scale; });
  }
  return out;
}

/// Writes row r of h.
void stream_row(const Forward& f, std::int64_t r, Scratch& scratch) {
  const DType dtype = f.h.dtype();
  const bool plain = !f.dropout.active && !f.rowscale.given();
  if (plain && f.residual.given() && f.residual.dtype() == dtype && f.x.dtype() == dtype) {
    return dispatch(dtype, [&]<class T>() {
      const T *x = f.x.row<const T>(r), *residual = f.residual.row<const T>(r);
      T* h = f.h.row<T>(r);
      for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
        h[c] = from_float<T>(to_float(residual[c]) + to_float(x[c]));
      });
    });
  }
  const float* branch = branch_row(f, r, scratch);
  if (f.residual.given()) {
    const float* residual = load_row(f.residual, r, scratch.row(2));
    store_row(f.h, r, [=](std::int64_t c) __attribute__((always_inline)) {
      return residual[c] + branch[c];
    });
  } else {
    store_row(f.h, r, [=](std::int64_t c) __attribute__((always_inline)) { return branch[c]; });
  }
}

/// xhat = (v - pivot - shift) * rstd.
struct Statistics {
  float pivot = 0.0f, shift = 0.0f, rstd = 0.0f;
};

template <class T>
FASTKERN_INLINE Statistics statistics_of(const Forward& f, const T* in) {
  if (f.kind == NormKind::rms) {
    const auto [squares] = lane_sums<1>(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float v = to_float(in[c]);
      return std::array{v * v};
    });
    return {.rstd = rstd_of(squares / static_cast<float>(f.n), f.eps)};
  }
  const auto value = [=](std::int64_t c) __attribute__((always_inline)) { return to_float(in[c]); };
  const Moments m = moments_of(f.n, value, [&](float pivot) __attribute__((always_inline)) {
    return lane_sums<2>(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float d = value(c) - pivot;
      return std::array{d, d * d};
    });
  });
  return {m.pivot, m.shift, rstd_of(m.var, f.eps)};
}

/// q = value(c) / scale, where `scale` is that of the row. `values` is scratch.
template <class Q, class Value>
FASTKERN_INLINE void quantise_row(const Forward& f, std::int64_t n, Q* q, float* scale,
                                  float* values, const Value& value) {
  constexpr float kLargest = std::is_same_v<Q, f8e4m3> ? 448.0f : 127.0f;
  std::int32_t bits = 0;  // of |value|: ordered as |value| is, and NaN above all
#pragma GCC ivdep
  for (std::int64_t c = 0; c < n; ++c) {
    const float v = value(c);
    values[c] = v;
    bits = std::max(bits, std::bit_cast<std::int32_t>(v) & 0x7fffffff);
  }
  float inverse;
  if (f.static_scale) {
    inverse = 1.0f / *scale;
  } else {
    const float max = std::bit_cast<float>(bits);
    *scale = max / kLargest;
    inverse = max == 0.0f ? 0.0f : std::min(kLargest / max, std::numeric_limits<float>::max());
  }
  columns(n, [=](std::int64_t c)
                 __attribute__((always_inline)) { q[c] = from_float<Q>(values[c] * inverse); });
}

/// Rows are read as In and written as Out. Without kAffine there are a mean and a bias of zero.
template <class In, class Out, bool kAffine>
FASTKERN_INLINE void norm_rows(const Forward& f, std::int64_t begin, std::int64_t end,
                               Scratch& scratch) {
  const RowTensor& source = f.h.given() ? f.h : f.x;
  const std::int64_t n = f.n;
  for (std::int64_t r = begin; r < end; ++r) {
    f.y.prefetch<true>(r);
    if (f.h.given()) stream_row(f, r, scratch);
    const In* in = typed_row<In>(source, r, scratch.row(0));
    const Statistics s = statistics_of(f, in);
    for (const RowTensor* t : {&f.x, &f.residual}) t->prefetch<false>(r + 1);
    for (const bool second : {false, true}) {
      const RowTensor& y = second ? f.y2 : f.y;
      if (!y.given()) continue;
      Out* out = y.row<Out>(r);
      const float* w = (second ? f.weight2 : f.weight).row(r);
      const float* b = (second ? f.bias2 : f.bias).row(r);
      const auto value = [=](std::int64_t c) __attribute__((always_inline)) {
        const float v = to_float(in[c]);
        return kAffine ? (v - s.pivot - s.shift) * s.rstd * w[c] + b[c] : v * s.rstd * w[c];
      };
      if constexpr (std::is_same_v<Out, f8e4m3> || std::is_same_v<Out, i8>) {
        quantise_row(f, n, out, f.scale + (f.static_scale ? 0 : r), scratch.row(1), value);
      } else {
        columns(n, [=](std::int64_t c)
                       __attribute__((always_inline)) { out[c] = from_float<Out>(value(c)); });
      }
    }
  }
}

}  // namespace

void norm(const NormFwd& args) {
  const Forward f(args);
  FK_CHECK(args.scale.given() == !is_float(args.y.dtype), args.op,
           ": scale must be given if and only if y is quantised, y is ", name_of(args.y.dtype));
  FK_CHECK(!args.scale.given() || !args.y2.given(), args.op, ": y2 must not be given with scale");
  FK_CHECK(!args.y2.given() || args.y2.dtype == args.y.dtype, args.op, ": y2 must be ",
           name_of(args.y.dtype), " as y, got ", name_of(args.y2.dtype));
  if (f.n == 0) return;
  const bool affine = f.kind == NormKind::layer || args.bias.given() || args.bias2.given();
  const bool bf16_in = (f.h.given() ? f.h : f.x).dtype() == DType::bf16;
  parallel_for(f.x.rows.count, row_grain(f.n), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(3, f.n);
    const auto run = [&]<class In, class Out, bool kAffine>() {
      with_best_isa([&]() __attribute__((always_inline)) {
        norm_rows<In, Out, kAffine>(f, begin, end, scratch);
      });
    };
    dispatch_stored(f.y.dtype(), [&]<class Out>() {
      if (bf16_in) {
        affine ? run.template operator()<bf16, Out, true>()
               : run.template operator()<bf16, Out, false>();
      } else {
        affine ? run.template operator()<float, Out, true>()
               : run.template operator()<float, Out, false>();
      }
    });
  });
}

}  // namespace fastkern::cpu
