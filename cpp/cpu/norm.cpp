// SPDX-License-Identifier: Apache-2.0
// Norms on the CPU: fallback for CPU tensors and oracle of the CUDA tests. f32 arithmetic, lanes
// summed in fixed order.
#include "fastkern/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "fastkern/rows.h"
#include "fastkern/scalar.h"
#include "parallel.h"

namespace fastkern::cpu {
namespace {

// Independent partial sums: they hide the latency of an add, in two AVX-512 registers.
constexpr int kLanes = 32;

// Two levels, lanes of a stretch and then totals of the stretches: the rounding error of a long row
// grows with the stretch and the number of stretches, not with their product.
template <class Term>
FASTKERN_INLINE float lane_sum(std::int64_t n, const Term& term) {
  constexpr std::int64_t kStretch = 64 * kLanes;
  float totals[kLanes] = {};
  std::int64_t i = 0;
  while (i < n) {
    float lanes[kLanes] = {};
    const std::int64_t end = std::min(n, i + kStretch);
    for (; i + kLanes <= end; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
    }
    for (int l = 0; i < end; ++i, ++l) lanes[l] += term(i);
    for (int l = 0; l < kLanes; ++l) totals[l] += lanes[l];
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) totals[l] += totals[l + width];
  }
  return totals[0];
}

template <class T>
const T* row_of(const TensorRef& t, const Rows& rows, std::int64_t row) {
  return static_cast<const T*>(t.data) + rows.start(row);
}

template <class T>
T* mutable_row_of(const TensorRef& t, const Rows& rows, std::int64_t row) {
  return static_cast<T*>(t.data) + rows.start(row);
}

std::vector<float> weight_as_f32(const TensorRef& weight, std::int64_t n) {
  std::vector<float> out(n, 1.0f);
  if (weight.given()) {
    dispatch(weight.dtype, [&]<class W>() {
      const W* w = static_cast<const W*>(weight.data);
      for (std::int64_t c = 0; c < n; ++c) out[c] = to_float(w[c * weight.strides[0]]);
    });
  }
  return out;
}

FASTKERN_INLINE float rstd_of(float sum_of_squares, std::int64_t n, double eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(n) + static_cast<float>(eps));
}

// Weight gradients are summed over fixed groups of rows, then over the groups: the split depends on
// M alone, so the result does not depend on the number of threads.
constexpr std::int64_t kRowGroups = 64;

}  // namespace

void rms_norm(const RmsNormFwd& args) {
  constexpr const char* kOp = "fastkern::rms_norm";
  const Rows x = rows_of(args.x, kOp, "x"), y = rows_of(args.y, kOp, "y");
  const std::int64_t n = x.length;
  const std::vector<float> weight = weight_as_f32(args.weight, n);
  dispatch(args.x.dtype, [&]<class T>() {
    parallel_for(x.count, row_grain(n), [&](std::int64_t begin, std::int64_t end) {
      with_best_isa([&]() __attribute__((always_inline)) {
        for (std::int64_t row = begin; row < end; ++row) {
          const T* __restrict in = row_of<T>(args.x, x, row);
          T* __restrict out = mutable_row_of<T>(args.y, y, row);
          const float* __restrict w = weight.data();
          const float square = lane_sum(n, [&](std::int64_t c) __attribute__((always_inline)) {
            const float v = to_float(in[c]);
            return v * v;
          });
          const float rstd = rstd_of(square, n, args.eps);
          for (std::int64_t c = 0; c < n; ++c)
            out[c] = from_float<T>(to_float(in[c]) * rstd * w[c]);
        }
      });
    });
  });
}

// dx = rstd * (g - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat,
// where xhat = x * rstd and g = dy * weight.
void rms_norm_bwd(const RmsNormBwd& args) {
  constexpr const char* kOp = "fastkern::rms_norm_bwd";
  const Rows x = rows_of(args.x, kOp, "x"), dy = rows_of(args.dy, kOp, "dy");
  const bool want_dx = args.dx.given(), want_dweight = args.dweight.given();
  const Rows dx = want_dx ? rows_of(args.dx, kOp, "dx") : x;
  const std::int64_t m = x.count, n = x.length;
  const std::vector<float> weight = weight_as_f32(args.weight, n);
  const std::int64_t groups = std::min(m, kRowGroups);
  std::vector<float> partials(want_dweight ? groups * n : 0, 0.0f);

  dispatch(args.x.dtype, [&]<class T>() {
    parallel_for(
        groups, 1 + groups * row_grain(n) / std::max<std::int64_t>(m, 1),
        [&](std::int64_t begin, std::int64_t end) {
          with_best_isa([&]() __attribute__((always_inline)) {
            for (std::int64_t group = begin; group < end; ++group) {
              float* __restrict partial = partials.data() + (want_dweight ? group * n : 0);
              for (std::int64_t row = m * group / groups; row < m * (group + 1) / groups; ++row) {
                const T* __restrict in = row_of<T>(args.x, x, row);
                const T* __restrict grad = row_of<T>(args.dy, dy, row);
                const float* __restrict w = weight.data();
                const float square =
                    lane_sum(n, [&](std::int64_t c) __attribute__((always_inline)) {
                      const float v = to_float(in[c]);
                      return v * v;
                    });
                const float rstd = rstd_of(square, n, args.eps);
                if (want_dx) {
                  const float dot = lane_sum(n, [&](std::int64_t c) __attribute__((always_inline)) {
                    return to_float(grad[c]) * w[c] * (to_float(in[c]) * rstd);
                  });
                  const float mean = dot / static_cast<float>(n);
                  T* __restrict out = mutable_row_of<T>(args.dx, dx, row);
                  for (std::int64_t c = 0; c < n; ++c) {
                    const float xhat = to_float(in[c]) * rstd;
                    out[c] = from_float<T>(rstd * (to_float(grad[c]) * w[c] - xhat * mean));
                  }
                }
                if (want_dweight) {
                  for (std::int64_t c = 0; c < n; ++c)
                    partial[c] += to_float(grad[c]) * (to_float(in[c]) * rstd);
                }
              }
            }
          });
        });
  });

  if (!want_dweight) return;
  dispatch(args.dweight.dtype, [&]<class W>() {
    parallel_for(n, 1024, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        float sum = 0.0f;
        for (std::int64_t group = 0; group < groups; ++group) sum += partials[group * n + c];
        static_cast<W*>(args.dweight.data)[c] = from_float<W>(sum);
      }
    });
  });
}

}  // namespace fastkern::cpu
