// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU, forward: fallback for CPU tensors and oracle of the CUDA tests. Blocks and
// their layout: attention_blocks.h. The maximum and the sum of a query go along with the keys
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), so that nothing of
// S x T is kept.
#include "fastkern/attention.h"

#include "attention_blocks.h"
#include "fastkern/attention_fp8.h"

namespace fastkern::cpu {
namespace {

using namespace attention_detail;

/// What a thread works in.
struct Workspace {
  Workspace(std::int64_t d, std::int64_t dv)
      : qt(d * kBlock),
        rows(kBlock * std::max(padded(d), padded(dv))),
        s(kBlock * kBlock),
        factors(kBlock * kBlock),
        o(kBlock * padded(dv)),
        of_query(4 * kBlock) {}

  Floats qt, rows, s, factors, o, of_query;
};

/// Scores become exp(s - max), and what was summed before is brought to the new maximum: `alpha` is
/// what it has to be multiplied with. Whether any alpha is not 1.
bool soften(std::int64_t keys, std::int64_t columns, float* s, float* max, float* sum,
            float* alpha) {
  with_best_isa([=]() __attribute__((always_inline)) {
    float top[kBlock], block_sum[kBlock];
    for (std::int64_t i = 0; i < columns; ++i) top[i] = max[i];
    for (std::int64_t j = 0; j < keys; ++j) {
#pragma GCC ivdep
      for (std::int64_t i = 0; i < columns; ++i) {
        top[i] = s[j * kBlock + i] > top[i] ? s[j * kBlock + i] : top[i];
      }
    }
#pragma GCC ivdep
    for (std::int64_t i = 0; i < columns; ++i) {
      const float base = top[i] == -kInfinity ? 0.0f : top[i];
      alpha[i] = exp_to_zero(max[i] - base);
      max[i] = top[i];
      top[i] = base;
      block_sum[i] = 0.0f;
    }
    for (std::int64_t j = 0; j < keys; ++j) {
#pragma GCC ivdep
      for (std::int64_t i = 0; i < columns; ++i) {
        const float p = exp_to_zero(s[j * kBlock + i] - top[i]);
        s[j * kBlock + i] = p;
        block_sum[i] += p;
      }
    }
    for (std::int64_t i = 0; i < columns; ++i) sum[i] = sum[i] * alpha[i] + block_sum[i];
  });
  bool changed = false;
  for (std::int64_t i = 0; i < columns; ++i) changed = changed || alpha[i] != 1.0f;
  return changed;
}

void multiply(std::int64_t count, const float* by, float* to) {
  with_best_isa([=]() __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < count; ++i) to[i] *= by[i];
  });
}

void multiply_rows(std::int64_t rows, std::int64_t width, const float* by, float* to) {
  with_best_isa([=]() __attribute__((always_inline)) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const float factor = by[r];
#pragma GCC ivdep
      for (std::int64_t c = 0; c < width; ++c) to[r * width + c] *= factor;
    }
  });
}

/// What operands of 8 bits are multiplied with.
struct Scales {
  static float at(const TensorRef& t, std::int64_t b, std::int64_t g) {
    return t.given() ? static_cast<const float*>(t.data)[b * t.strides[0] + g * t.strides[1]]
                     : 1.0f;
  }
  float of_scores(std::int64_t b, std::int64_t g) const { return at(q, b, g) * at(k, b, g); }
  float of_values(std::int64_t b, std::int64_t g) const { return at(v, b, g); }

  TensorRef q, k, v;
};

/// out and lse of queries i0 to i1 of one head.
void query_block(const Problem& p, const Scales& scales, const Sequence& at, const Sight& sight,
                 std::int64_t h, std::int64_t i0, std::int64_t i1, Workspace& work) {
  const std::int64_t rows = i1 - i0, columns = padded(rows), dv = padded(p.dv);
  float *const qt = work.qt.data(), *const s = work.s.data(), *const o = work.o.data();
  float* const max = work.of_query.data();
  float *const sum = max + kBlock, *const alpha = sum + kBlock;
  const std::int64_t g = p.kv_head(h);
  load_rows(p.q, at.batch, at.first_q + i0, rows, h, work.rows.data());
  transpose(rows, p.d, work.rows.data(), padded(p.d), p.scale * scales.of_scores(at.entry, g), qt);
  const float sink = p.sink(h);
  std::fill_n(max, columns, sink);
  std::fill_n(sum, columns, sink == -kInfinity ? 0.0f : 1.0f);
  std::fill_n(o, rows * dv, 0.0f);

  each_key_block(p, sight, h, i0, i1, [&](std::int64_t j0, std::int64_t j1) {
    load_rows(p.k, at.batch, at.first_k + j0, j1 - j0, g, work.rows.data());
    block_scores(p, at, sight, h, i0, i1, j0, j1, qt, work.rows.data(), s, nullptr);
    if (soften(j1 - j0, columns, s, max, sum, alpha)) multiply_rows(rows, dv, alpha, o);
    if (p.threshold > 0) {
      block_dropout(p, at, h, i0, i1, j0, j1, work.factors.data());
      multiply((j1 - j0) * kBlock, work.factors.data(), s);
    }
    load_rows(p.v, at.batch, at.first_k + j0, j1 - j0, g, work.rows.data());
    matmul<true>(rows, dv, j1 - j0, s, 1, kBlock, work.rows.data(), dv, o, dv);
  });

  float* const lse = static_cast<float*>(p.args.lse.data);
  const float value = scales.of_values(at.entry, g);
  for (std::int64_t i = 0; i < rows; ++i) {
    alpha[i] = sum[i] == 0.0f ? 0.0f : value / sum[i];
    lse[p.lse_at(at, h, i0 + i)] = sum[i] == 0.0f ? -kInfinity : max[i] + std::log(sum[i]);
  }
  store_rows(p.out, at.batch, at.first_q + i0, rows, h, o, dv, alpha);
}

void all_blocks(const AttentionFwd& args, const Scales& scales) {
  const Problem p(args);
  if (p.heads == 0 || p.total_q == 0) return;
  if (p.ragged()) {
    clear(args.out);
    std::fill_n(static_cast<float*>(args.lse.data), args.lse.numel(), -kInfinity);
  }
  const std::vector<QueryBlock> blocks = p.query_blocks();
  const auto count = static_cast<std::int64_t>(blocks.size());
  parallel_for(count * p.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    Workspace work(p.d, p.dv);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const auto [entry, i0] = blocks[unit % count];
      const Sequence at = p.sequence(entry);
      query_block(p, scales, at, p.sight(at), unit / count, i0, std::min(at.queries, i0 + kBlock),
                  work);
    }
  });
}

}  // namespace

void attention(const AttentionFwd& args) { all_blocks(args, {}); }

void attention_fp8(const AttentionFp8Fwd& args) {
  const AttentionFwd& a = args.fwd;
  FK_CHECK(a.q.dtype == DType::f8e4m3 && a.k.dtype == DType::f8e4m3 && a.v.dtype == DType::f8e4m3,
           a.op, ": q, k and v must be f8e4m3");
  all_blocks(a, {args.q_scale, args.k_scale, args.v_scale});
}

void attention_dropout_mask(const TensorRef& mask, const AttentionDropout& dropout,
                            const char* op) {
  FK_CHECK(mask.ndim == 4, op, ": mask must have 4 dimensions, got ", mask.ndim);
  const std::uint32_t threshold = dropout_threshold(dropout.p);
  const auto seed = static_cast<std::uint64_t>(*dropout.seed);
  const auto first = dropout.offset ? static_cast<std::uint64_t>(*dropout.offset) : 0;
  const std::int64_t rows = mask.sizes[2], columns = mask.sizes[3];
  parallel_for(mask.sizes[0] * mask.sizes[1] * rows, row_grain(columns),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t r = begin; r < end; ++r) {
                   const auto head = static_cast<std::uint64_t>(r / rows);
                   const std::uint64_t row = static_cast<std::uint64_t>(r % rows) << 30;
                   auto* const out = static_cast<std::int8_t*>(mask.data) + r * columns;
                   for (std::int64_t j = 0; j < columns; ++j) {
                     const PhiloxWords words = philox(seed, first + (head << 32), row + j / 4);
                     out[j] = words.word[j % 4] >= threshold;
                   }
                 }
               });
}

}  // namespace fastkern::cpu
