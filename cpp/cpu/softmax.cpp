// SPDX-License-Identifier: Apache-2.0
// Softmax and its relatives on the CPU, forward: fallback for CPU tensors and oracle of the CUDA
// tests. A row goes through the loops one after the other: the largest value; the exponentials,
// which wait in the result where that is f32, and their sum; the result.
#include "fastkern/softmax.h"

#include <cmath>
#include <type_traits>

#include "parallel.h"
#include "softmax_f64.h"
#include "softmax_middle.h"
#include "softmax_rows.h"
#include "stream.h"

namespace fastkern::cpu {
namespace {

// Longer rows the processor fetches ahead by itself; asking for all of one would push out another.
constexpr std::int64_t kAhead = 4096;

struct Forward {
  explicit Forward(const SoftmaxFwd& a)
      : kind(a.kind),
        op(a.op),
        x(a.x, a.op, "x", RowTensor::required),
        y(a.kind == SoftmaxKind::logsumexp ? a.x : a.y, a.op, "y", RowTensor::required),
        lse(a.y),
        n(x.rows.length),
        masked(a.masked),
        causal(a.causal),
        queries(queries_of(a.x)),
        scale(static_cast<float>(a.scale)),
        mask(a.mask) {
    FK_CHECK(
        !mask.given() || as_mask_rows(mask, mask_rows), op,
        ": mask must have leading dimensions that merge into at most three strides, got shape ",
        mask.shape());
    stream = kind == SoftmaxKind::log_softmax && streamed(a.y);
    narrow = kind != SoftmaxKind::logsumexp && a.y.dtype != DType::f32 && a.y.dtype != a.x.dtype;
  }

  SoftmaxKind kind;
  const char* op;
  RowTensor x, y;
  TensorRef lse;  // of logsumexp
  std::int64_t n;
  bool masked, causal;
  std::int64_t queries;
  float scale;
  TensorRef mask;
  MaskRows mask_rows;
  bool stream = false;  // y is written past the caches
  bool narrow = false;  // x is rounded to the type of y before anything else
};

/// x of row r rounded to the type of y.
const float* narrowed_row(const Forward& f, std::int64_t r, float* scratch) {
  const float* x = load_row(f.x, r, scratch);
  dispatch(f.y.dtype(), [&]<class T>() {
    for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
      scratch[c] = to_float(from_float<T>(x[c]));
    });
  });
  return scratch;
}

/// z of row r under the mask.
const float* masked_row(const Forward& f, std::int64_t r, float* scratch) {
  const float* x = f.narrow ? narrowed_row(f, r, scratch) : load_row(f.x, r, scratch);
  const float scale = f.scale;
  for_columns(f.n,
              [=](std::int64_t c) __attribute__((always_inline)) { scratch[c] = x[c] * scale; });
  if (f.mask.given()) {
    const std::int64_t start = f.mask_rows.start(r), step = f.mask_rows.column_stride;
    if (f.mask.dtype == DType::i8) {
      const i8* const keep = static_cast<const i8*>(f.mask.data) + start;
      for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
        scratch[c] = keep[c * step] != 0 ? scratch[c] : -kInfinity;
      });
    } else {
      dispatch(f.mask.dtype, [&]<class T>() {
        const T* const add = static_cast<const T*>(f.mask.data) + start;
        for_columns(f.n, [=](std::int64_t c) __attribute__((always_inline)) {
          scratch[c] += to_float(add[c * step]);
        });
      });
    }
  }
  if (f.causal) std::fill(scratch + causal_columns(r, f.queries, f.n), scratch + f.n, -kInfinity);
  return scratch;
}

void store_lse(const Forward& f, std::int64_t r, float value) {
  dispatch(f.lse.dtype, [&]<class T>() { static_cast<T*>(f.lse.data)[r] = from_float<T>(value); });
}

/// log(sum(exp)) of a row with an infinity in it is infinite, but for a NaN.
template <class In>
float infinite_lse(const In* in, std::int64_t n) {
  float result = kInfinity;
  for (std::int64_t c = 0; c < n; ++c) {
    if (std::isnan(to_float(in[c]))) result = to_float(in[c]);
  }
  return result;
}

template <class In, class Out>
FASTKERN_INLINE void softmax_rows(const Forward& f, std::int64_t begin, std::int64_t end,
                                  Scratch& scratch) {
  const std::int64_t n = f.n;
  for (std::int64_t r = begin; r < end; ++r) {
    const bool lse = f.kind == SoftmaxKind::logsumexp;
    if (!lse && n <= kAhead && !f.stream) f.y.prefetch<true>(r);
    const In* in;
    if constexpr (std::is_same_v<In, float>) {
      in = f.masked   ? masked_row(f, r, scratch.row(0))
           : f.narrow ? narrowed_row(f, r, scratch.row(0))
                      : load_row(f.x, r, scratch.row(0));
    } else {
      in = f.x.row<const In>(r);
    }
    const float max = row_max(in, n), shift = shift_of(max);
    if (n <= kAhead) f.x.prefetch<false>(r + 1);
    if (lse) {
      const float sum = exp_sum<false>(in, n, shift, scratch.row(1));
      store_lse(f, r, max == kInfinity ? infinite_lse(in, n) : plus_log(shift, sum));
      continue;
    }
    Out* const out = f.y.row<Out>(r);
    if (f.kind == SoftmaxKind::log_softmax) {
      const float sum = exp_sum<false>(in, n, shift, scratch.row(1));
      const float minus =
          max == kInfinity ? std::numeric_limits<float>::quiet_NaN() : plus_log(0.0f, sum);
      write_columns(out, n, f.stream, [=](std::int64_t c) __attribute__((always_inline)) {
        return from_float<Out>((to_float(in[c]) - shift) - minus);
      });
      continue;
    }
    float* e;
    if constexpr (std::is_same_v<Out, float>) {
      e = out;
    } else {
      e = scratch.row(1);
    }
    const float sum = exp_sum<true>(in, n, shift, e);
    const float inverse = max == kInfinity          ? std::numeric_limits<float>::quiet_NaN()
                          : f.masked && sum == 0.0f ? 0.0f
                                                    : 1.0f / sum;
    columns(n, [=](std::int64_t c)
                   __attribute__((always_inline)) { out[c] = from_float<Out>(e[c] * inverse); });
  }
}

}  // namespace

void softmax(const SoftmaxFwd& args) {
  if (args.x.dtype == DType::f64 || args.y.dtype == DType::f64) return softmax_f64(args);
  if (args.middle) return softmax_middle(args);
  const Forward f(args);
  const bool as_bf16 = f.x.dtype() == DType::bf16 && !f.masked && !f.narrow;
  // Exponentials of a row that is no f32 itself wait in scratch memory.
  const bool keep = f.kind == SoftmaxKind::softmax && f.y.dtype() != DType::f32;
  parallel_for(f.x.rows.count, row_grain(f.n), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(2, keep || !as_bf16 ? std::max(f.n, kSumStretch) : kSumStretch);
    dispatch(f.y.dtype(), [&]<class Out>() {
      const auto run = [&]<class In>() {
        with_best_isa([&]() __attribute__((always_inline)) {
          softmax_rows<In, Out>(f, begin, end, scratch);
        });
      };
      as_bf16 ? run.template operator()<bf16>() : run.template operator()<float>();
    });
    if (f.stream) stream_end();
  });
}

}  // namespace fastkern::cpu
