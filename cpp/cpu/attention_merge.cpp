// SPDX-License-Identifier: Apache-2.0
// Attention over parts of the keys, put together, on the CPU.
#include <algorithm>
#include <cmath>

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

}  // namespace fastkern::cpu
