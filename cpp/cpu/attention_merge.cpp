// SPDX-License-Identifier: Apache-2.0
// Attention over parts of the keys, put together, on the CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "fastkern/attention.h"
#include "rowwise.h"

namespace fastkern::cpu {

void merge_attention(const MergeFwd& args) {
  const TensorRef &outs = args.outs, &lses = args.lses;
  FK_CHECK(outs.ndim == 5, args.op, ": outs must have 5 dimensions, got ", outs.ndim);
  FK_CHECK(lses.ndim == 4, args.op, ": lses must have 4 dimensions, got ", lses.ndim);
  const std::int64_t parts = outs.sizes[0], queries = outs.sizes[2], heads = outs.sizes[3];
  const std::int64_t width = outs.sizes[4];
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  dispatch(outs.dtype, [&]<class T>() {
    parallel_for(
        outs.sizes[1] * queries * heads, row_grain(width),
        [&](std::int64_t begin, std::int64_t end) {
          Scratch scratch(1, width);
          float* const sum = scratch.row(0);
          for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t h = r % heads, i = r / heads % queries, b = r / heads / queries;
            const auto lse = [&](std::int64_t k) {
              return static_cast<const float*>(
                  lses.data)[k * lses.strides[0] + b * lses.strides[1] + h * lses.strides[2] +
                             i * lses.strides[3]];
            };
            float top = -kInfinity, total = 0.0f;
            for (std::int64_t k = 0; k < parts; ++k) top = lse(k) > top ? lse(k) : top;
            const float base = top == -kInfinity ? 0.0f : top;
            std::fill_n(sum, width, 0.0f);
            for (std::int64_t k = 0; k < parts; ++k) {
              if (lse(k) == -kInfinity) continue;  // saw nothing: what its out is does not matter
              const float weight = std::exp(lse(k) - base);
              const T* const in = static_cast<const T*>(outs.data) + k * outs.strides[0] +
                                  b * outs.strides[1] + i * outs.strides[2] + h * outs.strides[3];
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
            static_cast<float*>(args.lse.data)[(b * heads + h) * queries + i] =
                total == 0.0f ? -kInfinity : base + std::log(total);
          }
        });
  });
}

/// With w[k] = exp(lses[k] - lse): douts[k] = w[k] dout,
/// dlses[k] = w[k] (dout . outs[k] - sum of w dout . outs + dlse).
void merge_attention_bwd(const MergeBwd& args) {
  const TensorRef &outs = args.outs, &lses = args.lses, &dout = args.dout, &dlse = args.dlse;
  FK_CHECK(outs.ndim == 5, args.op, ": outs must have 5 dimensions, got ", outs.ndim);
  FK_CHECK(lses.ndim == 4, args.op, ": lses must have 4 dimensions, got ", lses.ndim);
  FK_CHECK(dout.ndim == 4, args.op, ": dout must have 4 dimensions, got ", dout.ndim);
  const std::int64_t parts = outs.sizes[0], batch = outs.sizes[1], queries = outs.sizes[2];
  const std::int64_t heads = outs.sizes[3], width = outs.sizes[4];
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  dispatch(outs.dtype, [&]<class T>() {
    parallel_for(
        batch * queries * heads, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
          Floats memory(2 * parts);
          float *const weight = memory.data(), *const product = weight + parts;
          for (std::int64_t r = begin; r < end; ++r) {
            const std::int64_t h = r % heads, i = r / heads % queries, b = r / heads / queries;
            const auto lse = [&](std::int64_t k) {
              return static_cast<const float*>(
                  lses.data)[k * lses.strides[0] + b * lses.strides[1] + h * lses.strides[2] +
                             i * lses.strides[3]];
            };
            const T* const g = static_cast<const T*>(dout.data) + b * dout.strides[0] +
                               i * dout.strides[1] + h * dout.strides[2];
            float top = -kInfinity, total = 0.0f, all = 0.0f;
            for (std::int64_t k = 0; k < parts; ++k) top = lse(k) > top ? lse(k) : top;
            const float base = top == -kInfinity ? 0.0f : top;
            for (std::int64_t k = 0; k < parts; ++k) {
              weight[k] = lse(k) == -kInfinity ? 0.0f : std::exp(lse(k) - base);
              total += weight[k];
            }
            for (std::int64_t k = 0; k < parts; ++k) {
              product[k] = 0.0f;
              const bool nothing = lse(k) == -kInfinity;
              weight[k] = nothing ? 0.0f : weight[k] / total;
              if (args.douts.given()) {
                T* const to = static_cast<T*>(args.douts.data) +
                              (((k * batch + b) * queries + i) * heads + h) * width;
                const float w = weight[k];
                for_columns(width, [=](std::int64_t c) __attribute__((always_inline)) {
                  to[c] = from_float<T>(nothing ? 0.0f : w * to_float(g[c]));
                });
              }
              if (!args.dlses.given() || nothing) continue;
              const T* const in = static_cast<const T*>(outs.data) + k * outs.strides[0] +
                                  b * outs.strides[1] + i * outs.strides[2] + h * outs.strides[3];
              float* const sum = product + k;
              with_best_isa([=]() __attribute__((always_inline)) {
                *sum = lane_sums<1>(width, [=](std::int64_t c) __attribute__((always_inline)) {
                  return std::array{to_float(in[c]) * to_float(g[c])};
                })[0];
              });
              all += weight[k] * product[k];
            }
            if (!args.dlses.given()) continue;
            float of_lse = 0.0f;
            if (dlse.given() && top != -kInfinity) {
              of_lse = static_cast<const float*>(
                  dlse.data)[b * dlse.strides[0] + h * dlse.strides[1] + i * dlse.strides[2]];
            }
            for (std::int64_t k = 0; k < parts; ++k) {
              static_cast<float*>(args.dlses.data)[((k * batch + b) * heads + h) * queries + i] =
                  top == -kInfinity ? 0.0f : weight[k] * (product[k] - all + of_lse);
            }
          }
        });
  });
}

}  // namespace fastkern::cpu
