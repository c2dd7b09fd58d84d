// SPDX-License-Identifier: Apache-2.0
// Attention over parts of the keys, put together, on the CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "fastkern/attention.h"
#include "rowwise.h"

namespace fastkern::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Row (b, i, h) of the parts: what each weighs against the largest of them.
struct PartsOfRow {
  PartsOfRow(const TensorRef& outs, const TensorRef& lses, std::int64_t r)
      : h(r % outs.sizes[3]),
        i(r / outs.sizes[3] % outs.sizes[2]),
        b(r / outs.sizes[3] / outs.sizes[2]),
        outs_(outs),
        lses_(lses) {
    for (std::int64_t k = 0; k < outs.sizes[0]; ++k) top = lse(k) > top ? lse(k) : top;
    base = top == -kInfinity ? 0.0f : top;
  }

  float lse(std::int64_t k) const {
    return static_cast<const float*>(lses_.data)[k * lses_.strides[0] + b * lses_.strides[1] +
                                                 h * lses_.strides[2] + i * lses_.strides[3]];
  }
  /// Whether it saw no key: what its out is does not matter.
  bool empty(std::int64_t k) const { return lse(k) == -kInfinity; }
  float weight(std::int64_t k) const { return empty(k) ? 0.0f : std::exp(lse(k) - base); }
  template <class T>
  const T* out(std::int64_t k) const {
    return static_cast<const T*>(outs_.data) + k * outs_.strides[0] + b * outs_.strides[1] +
           i * outs_.strides[2] + h * outs_.strides[3];
  }
  /// Where a dense (B, H, S) has it.
  std::int64_t of_lse() const { return (b * outs_.sizes[3] + h) * outs_.sizes[2] + i; }

  std::int64_t h, i, b;
  float top = -kInfinity, base = 0.0f;

 private:
  const TensorRef &outs_, &lses_;
};

void check_parts(const char* op, const TensorRef& outs, const TensorRef& lses) {
  FK_CHECK(outs.ndim == 5, op, ": outs must have 5 dimensions, got ", outs.ndim);
  FK_CHECK(lses.ndim == 4, op, ": lses must have 4 dimensions, got ", lses.ndim);
}

}  // namespace

void merge_attention(const MergeFwd& args) {
  const TensorRef& outs = args.outs;
  check_parts(args.op, outs, args.lses);
  const std::int64_t rows = outs.sizes[1] * outs.sizes[2] * outs.sizes[3], width = outs.sizes[4];
  dispatch(outs.dtype, [&]<class T>() {
    parallel_for(rows, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      Scratch scratch(1, width);
      float* const sum = scratch.row(0);
      for (std::int64_t r = begin; r < end; ++r) {
        const PartsOfRow parts(outs, args.lses, r);
        float total = 0.0f;
        std::fill_n(sum, width, 0.0f);
        for (std::int64_t k = 0; k < outs.sizes[0]; ++k) {
          if (parts.empty(k)) continue;
          const float weight = parts.weight(k);
          const T* const in = parts.out<T>(k);
          total += weight;
          for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
            sum[c] += weight * to_float(in[c]);
          });
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        T* const out = static_cast<T*>(args.out.data) + r * width;
        for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
          out[c] = from_float<T>(sum[c] * inverse);
        });
        static_cast<float*>(args.lse.data)[parts.of_lse()] =
            total == 0.0f ? -kInfinity : parts.base + std::log(total);
      }
    });
  });
}

/// With w[k] = exp(lses[k] - lse): douts[k] = w[k] dout,
/// dlses[k] = w[k] (dout . outs[k] - sum of w dout . outs + dlse).
void merge_attention_bwd(const MergeBwd& args) {
  const TensorRef &outs = args.outs, &dout = args.dout, &dlse = args.dlse;
  check_parts(args.op, outs, args.lses);
  FK_CHECK(dout.ndim == 4, args.op, ": dout must have 4 dimensions, got ", dout.ndim);
  const std::int64_t count = outs.sizes[0], width = outs.sizes[4];
  const std::int64_t rows = outs.sizes[1] * outs.sizes[2] * outs.sizes[3];
  dispatch(outs.dtype, [&]<class T>() {
    parallel_for(rows, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      Floats memory(2 * count);
      float *const weight = memory.data(), *const product = weight + count;
      for (std::int64_t r = begin; r < end; ++r) {
        const PartsOfRow parts(outs, args.lses, r);
        const T* const g = static_cast<const T*>(dout.data) + parts.b * dout.strides[0] +
                           parts.i * dout.strides[1] + parts.h * dout.strides[2];
        float total = 0.0f, all = 0.0f;
        for (std::int64_t k = 0; k < count; ++k) total += weight[k] = parts.weight(k);
        for (std::int64_t k = 0; k < count; ++k) {
          const bool empty = parts.empty(k);
          product[k] = 0.0f;
          weight[k] = empty ? 0.0f : weight[k] / total;
          if (args.douts.given()) {
            T* const to = static_cast<T*>(args.douts.data) + (k * rows + r) * width;
            const float w = weight[k];
            for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
              to[c] = from_float<T>(empty ? 0.0f : w * to_float(g[c]));
            });
          }
          if (!args.dlses.given() || empty) continue;
          const T* const in = parts.out<T>(k);
          float* const sum = product + k;
          with_best_isa([=]() __attribute__((always_inline)) {
            *sum = lane_sums<1>(width, [=](std::int64_t c) __attribute__((always_inline)) {
              return std::array{to_float(in[c]) * to_float(g[c])};
            })[0];
          });
          all += weight[k] * product[k];
        }
        if (!args.dlses.given()) continue;
        const bool nothing = parts.top == -kInfinity;
        float of_lse = 0.0f;
        if (dlse.given() && !nothing) {
          of_lse = static_cast<const float*>(
              dlse.data)[parts.b * dlse.strides[0] + parts.h * dlse.strides[1] +
                         parts.i * dlse.strides[2]];
        }
        float* const dlses = static_cast<float*>(args.dlses.data) + parts.of_lse();
        for (std::int64_t k = 0; k < count; ++k) {
          dlses[k * rows] = nothing ? 0.0f : weight[k] * (product[k] - all + of_lse);
        }
      }
    });
  });
}

}  // namespace fastkern::cpu
