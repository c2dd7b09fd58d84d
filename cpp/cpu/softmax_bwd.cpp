// SPDX-License-Identifier: Apache-2.0
// Softmax and its relatives on the CPU, backward: a sum over the row, and the gradient.
#include <cmath>
#include <type_traits>

#include "fastkern/softmax.h"
#include "parallel.h"
#include "softmax_f64.h"
#include "softmax_middle.h"
#include "softmax_rows.h"
#include "stream.h"

namespace fastkern::cpu {
namespace {

struct Backward {
  explicit Backward(const SoftmaxBwd& a)
      : kind(a.kind),
        y(a.y, a.op, "y", RowTensor::required),
        dy(a.kind == SoftmaxKind::logsumexp ? a.y : a.dy, a.op, "dy", RowTensor::required),
        dx(a.dx, a.op, "dx", RowTensor::required),
        dlse{a.kind == SoftmaxKind::logsumexp ? a.dy : TensorRef{}},
        lse{a.lse},
        n(y.rows.length),
        causal(a.causal),
        queries(queries_of(a.y)),
        scale(static_cast<float>(a.scale)),
        stream(streamed(a.dx)) {}

  SoftmaxKind kind;
  RowTensor y, dy, dx;
  RowScale dlse, lse;  // one for each row
  std::int64_t n;
  bool causal;
  std::int64_t queries;
  float scale;
  bool stream;  // dx is written past the caches
};

template <class In, class Out>
FASTKERN_INLINE void softmax_bwd_rows(const Backward& b, std::int64_t begin, std::int64_t end,
                                      Scratch& scratch) {
  for (std::int64_t r = begin; r < end; ++r) {
    if (!b.stream) b.dx.prefetch<true>(r);
    const std::int64_t n = b.causal ? causal_columns(r, b.queries, b.n) : b.n;
    const In* const y = typed_row<In>(b.y, r, scratch.row(0));
    Out* const dx = b.dx.row<Out>(r);
    for (std::int64_t c = n; c < b.n; ++c) dx[c] = from_float<Out>(0.0f);
    if (b.kind == SoftmaxKind::logsumexp) {
      const float g = b.dlse.at(r), lse = b.lse.at(r);
      write_columns(dx, n, b.stream, [=](std::int64_t c) __attribute__((always_inline)) {
        return from_float<Out>(g * exp_to_zero(to_float(y[c]) - lse));
      });
      continue;
    }
    const In* const dy = typed_row<In>(b.dy, r, scratch.row(1));
    if (b.kind == SoftmaxKind::log_softmax) {
      const auto [sum] = lane_sums<1>(n, [=](std::int64_t c) __attribute__((always_inline)) {
        return std::array{to_float(dy[c])};
      });
      write_columns(dx, n, b.stream, [=, sum = sum](std::int64_t c) __attribute__((always_inline)) {
        return from_float<Out>(to_float(dy[c]) - exp_to_zero(to_float(y[c])) * sum);
      });
    } else {
      const float scale = b.scale;
      const auto [sum] = lane_sums<1>(n, [=](std::int64_t c) __attribute__((always_inline)) {
        return std::array{to_float(dy[c]) * to_float(y[c])};
      });
      write_columns(dx, n, b.stream, [=, sum = sum](std::int64_t c) __attribute__((always_inline)) {
        return from_float<Out>(scale * to_float(y[c]) * (to_float(dy[c]) - sum));
      });
    }
    for (const RowTensor* t : {&b.y, &b.dy}) t->prefetch<false>(r + 1);
  }
}

}  // namespace

void softmax_bwd(const SoftmaxBwd& args) {
  for (const TensorRef* t : {&args.y, &args.dy, &args.lse, &args.dx}) {
    if (t->dtype == DType::f64) return softmax_f64_bwd(args);
  }
  if (args.middle) return softmax_bwd_middle(args);
  const Backward b(args);
  const bool as_bf16 = b.y.dtype() == DType::bf16 && b.dy.dtype() == DType::bf16;
  parallel_for(b.y.rows.count, row_grain(b.n), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(2, as_bf16 ? 0 : b.n);
    dispatch(b.dx.dtype(), [&]<class Out>() {
      const auto run = [&]<class In>() {
        with_best_isa([&]() __attribute__((always_inline)) {
          softmax_bwd_rows<In, Out>(b, begin, end, scratch);
        });
      };
      as_bf16 ? run.template operator()<bf16>() : run.template operator()<float>();
    });
    if (b.stream) stream_end();
  });
}

}  // namespace fastkern::cpu
