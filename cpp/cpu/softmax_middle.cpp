// SPDX-License-Identifier: Apache-2.0
// Softmax over the middle dimension of a dense (A, N, C): strips of neighbouring columns, N steps
// from one line of a strip to the next. A column's sum has the same order whatever C is.
#include "softmax_middle.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "parallel.h"
#include "softmax_rows.h"

namespace fastkern::cpu {
namespace {

constexpr std::int64_t kStrip = 256;
using Strip = std::array<float, kStrip>;

struct Middle {
  explicit Middle(const TensorRef& t, const char* op) : n(t.sizes[1]), c(t.sizes[2]) {
    FK_CHECK(t.ndim == 3, op, ": a middle dimension is one of three, got shape ", t.shape());
    strips = (c + kStrip - 1) / kStrip;
    count = t.sizes[0] * strips;
  }
  /// Where item `i` begins, and how wide it is.
  std::int64_t start(std::int64_t i) const { return i / strips * n * c + i % strips * kStrip; }
  std::int64_t row(std::int64_t i) const { return i / strips * c + i % strips * kStrip; }
  std::int64_t width(std::int64_t i) const { return std::min(c - i % strips * kStrip, kStrip); }
  std::int64_t grain() const {
    return 1 + 16384 / std::max<std::int64_t>(n * std::min(c, kStrip), 1);
  }

  std::int64_t n, c, strips, count;
};

/// `width` elements from `at` on, in f32.
const float* load(const TensorRef& t, std::int64_t at, std::int64_t width, Strip& strip) {
  if (t.dtype == DType::f32) return static_cast<const float*>(t.data) + at;
  dispatch(t.dtype, [&]<class T>() {
    const T* const from = static_cast<const T*>(t.data) + at;
    float* const to = strip.data();
    for_columns(width,
                [=](std::int64_t c) __attribute__((always_inline)) { to[c] = to_float(from[c]); });
  });
  return strip.data();
}

template <class Value>
void store(const TensorRef& t, std::int64_t at, std::int64_t width, const Value& value) {
  dispatch(t.dtype, [&]<class T>() {
    T* const to = static_cast<T*>(t.data) + at;
    for_columns(width, [=](std::int64_t c)
                           __attribute__((always_inline)) { to[c] = from_float<T>(value(c)); });
  });
}

/// sum over the N lines of term(line, strip): every 64 of them first on their own.
template <class Term>
void sum_lines(std::int64_t n, std::int64_t width, Strip& sum, const Term& term) {
  constexpr std::int64_t kLines = 64;
  Strip part;
  sum.fill(0.0f), part.fill(0.0f);
  float* const total = sum.data();
  float* const some = part.data();
  for (std::int64_t line = 0; line < n; ++line) {
    term(line, some);
    if ((line + 1) % kLines != 0 && line + 1 < n) continue;
    for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
      total[c] += some[c];
      some[c] = 0.0f;
    });
  }
}

}  // namespace

void softmax_middle(const SoftmaxFwd& a) {
  const Middle shape(a.x, a.op);
  const bool lse = a.kind == SoftmaxKind::logsumexp;
  const bool narrow = !lse && a.y.dtype != DType::f32 && a.y.dtype != a.x.dtype;
  parallel_for(shape.count, shape.grain(), [&](std::int64_t begin, std::int64_t end) {
    Strip in, max, shift, sum;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t start = shape.start(i), width = shape.width(i);
      const auto line_of = [&](std::int64_t line) {
        const float* from = load(a.x, start + line * shape.c, width, in);
        if (!narrow) return from;
        dispatch(a.y.dtype, [&]<class T>() {
          for (std::int64_t c = 0; c < width; ++c) in[c] = to_float(from_float<T>(from[c]));
        });
        return static_cast<const float*>(in.data());
      };
      max.fill(-kInfinity);
      float *const m = max.data(), *const s = shift.data();
      for (std::int64_t line = 0; line < shape.n; ++line) {
        const float* const x = line_of(line);
        for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
          m[c] = x[c] > m[c] ? x[c] : m[c];
        });
      }
      for (std::int64_t c = 0; c < width; ++c) s[c] = shift_of(m[c]);
      sum_lines(shape.n, width, sum, [&](std::int64_t line, float* part) {
        const float* const x = line_of(line);
        for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
          part[c] += exp_to_zero(x[c] - s[c]);
        });
      });
      constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
      float* const of_column = sum.data();
      for (std::int64_t c = 0; c < width; ++c) {
        const bool infinite = m[c] == kInfinity;
        if (a.kind == SoftmaxKind::softmax) {
          of_column[c] = infinite ? kNaN : 1.0f / of_column[c];
        } else if (lse && infinite) {
          of_column[c] = std::isnan(of_column[c]) ? kNaN : kInfinity;
        } else {
          of_column[c] = infinite ? kNaN : plus_log(lse ? s[c] : 0.0f, of_column[c]);
        }
      }
      if (lse) {
        store(a.y, shape.row(i), width,
              [=](std::int64_t c) __attribute__((always_inline)) { return of_column[c]; });
        continue;
      }
      for (std::int64_t line = 0; line < shape.n; ++line) {
        const float* const x = line_of(line);
        const std::int64_t at = start + line * shape.c;
        if (a.kind == SoftmaxKind::softmax) {
          store(a.y, at, width, [=](std::int64_t c) __attribute__((always_inline)) {
            return exp_to_zero(x[c] - s[c]) * of_column[c];
          });
        } else {
          store(a.y, at, width, [=](std::int64_t c) __attribute__((always_inline)) {
            return (x[c] - s[c]) - of_column[c];
          });
        }
      }
    }
  });
}

void softmax_bwd_middle(const SoftmaxBwd& a) {
  const Middle shape(a.y, a.op);
  parallel_for(shape.count, shape.grain(), [&](std::int64_t begin, std::int64_t end) {
    Strip of_y, of_dy, sum;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t start = shape.start(i), width = shape.width(i);
      const bool softmax = a.kind == SoftmaxKind::softmax;
      const float *g = nullptr, *lse = nullptr;
      if (a.kind == SoftmaxKind::logsumexp) {
        g = load(a.dy, shape.row(i), width, of_dy);
        lse = load(a.lse, shape.row(i), width, sum);
      } else {
        sum_lines(shape.n, width, sum, [&](std::int64_t line, float* part) {
          const std::int64_t at = start + line * shape.c;
          const float* const dy = load(a.dy, at, width, of_dy);
          const float* const y = load(a.y, at, width, of_y);
          for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
            part[c] += softmax ? dy[c] * y[c] : dy[c];
          });
        });
      }
      const float* const s = sum.data();
      for (std::int64_t line = 0; line < shape.n; ++line) {
        const std::int64_t at = start + line * shape.c;
        const float* const y = load(a.y, at, width, of_y);
        if (g != nullptr) {
          store(a.dx, at, width, [=](std::int64_t c) __attribute__((always_inline)) {
            return g[c] * exp_to_zero(y[c] - lse[c]);
          });
          continue;
        }
        const float* const dy = load(a.dy, at, width, of_dy);
        const float scale = static_cast<float>(a.scale);
        store(a.dx, at, width, [=](std::int64_t c) __attribute__((always_inline)) {
          return softmax ? scale * y[c] * (dy[c] - s[c]) : dy[c] - exp_to_zero(y[c]) * s[c];
        });
      }
    }
  });
}

}  // namespace fastkern::cpu
