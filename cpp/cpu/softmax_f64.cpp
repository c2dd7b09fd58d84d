// SPDX-License-Identifier: Apache-2.0
// Softmax, log_softmax and logsumexp in f64, plain loops: for gradient checks and for references,
// not for speed. Any operand may be narrower.
#include "softmax_f64.h"

#include <cmath>
#include <limits>
#include <vector>

#include "fastkern/rows.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu {
namespace {

double load(const TensorRef& t, std::int64_t at) {
  if (t.dtype == DType::f64) return static_cast<const double*>(t.data)[at];
  float v = 0.0f;
  dispatch(t.dtype, [&]<class T>() { v = to_float(static_cast<const T*>(t.data)[at]); });
  return v;
}

void store(const TensorRef& t, std::int64_t at, double v) {
  if (t.dtype == DType::f64) {
    static_cast<double*>(t.data)[at] = v;
  } else {
    dispatch(t.dtype, [&]<class T>() {
      static_cast<T*>(t.data)[at] = from_float<T>(static_cast<float>(v));
    });
  }
}

/// v as a number of this type.
double rounded(DType dtype, double v) {
  if (dtype == DType::f64) return v;
  dispatch(dtype, [&]<class T>() { v = to_float(from_float<T>(static_cast<float>(v))); });
  return v;
}

/// The lines of a tensor: rows of its last dimension, or columns of a dense (A, N, C).
struct Lines {
  Lines(const TensorRef& t, bool middle, const char* op, const char* argument) : ref(t) {
    if (middle) {
      length = t.sizes[1], step = t.sizes[2], count = t.sizes[0] * step;
    } else {
      rows = rows_of(t, op, argument);
      length = rows.length, count = rows.count;
    }
  }
  std::int64_t at(std::int64_t line, std::int64_t i) const {
    return step == 0 ? rows.start(line) + i : line / step * length * step + line % step + i * step;
  }
  double get(std::int64_t line, std::int64_t i) const { return load(ref, at(line, i)); }
  void set(std::int64_t line, std::int64_t i, double v) const { store(ref, at(line, i), v); }

  TensorRef ref;
  Rows rows;
  std::int64_t length = 0, count = 0;
  std::int64_t step = 0;  // 0: rows
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

void softmax_f64(const SoftmaxFwd& args) {
  FK_CHECK(!args.masked, args.op, ": f64 has no masks");
  const bool lse = args.kind == SoftmaxKind::logsumexp;
  const Lines x(args.x, args.middle, args.op, "x");
  const Lines y(lse ? args.x : args.y, args.middle, args.op, "y");
  parallel_for(x.count, 1 + 1024 / (1 + x.length), [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> z(x.length);
    for (std::int64_t r = begin; r < end; ++r) {
      double max = -kInfinity, sum = 0.0;
      for (std::int64_t i = 0; i < x.length; ++i) {
        z[i] = lse ? x.get(r, i) : rounded(args.y.dtype, x.get(r, i));
        if (!(z[i] <= max)) max = z[i];  // NaN stays
      }
      const double shift = std::isinf(max) ? 0.0 : max;
      for (const double v : z) sum += std::exp(v - shift);
      if (lse) {
        store(args.y, r, std::isinf(max) ? max : shift + std::log(sum));
      } else if (args.kind == SoftmaxKind::log_softmax) {
        const double log_sum = max == kInfinity ? std::nan("") : std::log(sum);
        for (std::int64_t i = 0; i < x.length; ++i) y.set(r, i, (z[i] - shift) - log_sum);
      } else {
        for (std::int64_t i = 0; i < x.length; ++i) {
          y.set(r, i, max == kInfinity ? std::nan("") : std::exp(z[i] - shift) / sum);
        }
      }
    }
  });
}

void softmax_f64_bwd(const SoftmaxBwd& args) {
  FK_CHECK(!args.causal, args.op, ": f64 has no masks");
  const bool lse = args.kind == SoftmaxKind::logsumexp;
  const Lines y(args.y, args.middle, args.op, "y");
  const Lines dy(lse ? args.y : args.dy, args.middle, args.op, "dy");
  const Lines dx(args.dx, args.middle, args.op, "dx");
  parallel_for(y.count, 1 + 1024 / (1 + y.length), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      if (lse) {
        const double g = load(args.dy, r), of_row = load(args.lse, r);
        for (std::int64_t i = 0; i < y.length; ++i) {
          dx.set(r, i, g * std::exp(y.get(r, i) - of_row));
        }
        continue;
      }
      const bool log = args.kind == SoftmaxKind::log_softmax;
      double sum = 0.0;
      for (std::int64_t i = 0; i < y.length; ++i) {
        sum += log ? dy.get(r, i) : dy.get(r, i) * y.get(r, i);
      }
      for (std::int64_t i = 0; i < y.length; ++i) {
        const double v = y.get(r, i), g = dy.get(r, i);
        dx.set(r, i, log ? g - std::exp(v) * sum : args.scale * v * (g - sum));
      }
    }
  });
}

}  // namespace fastkern::cpu
