// SPDX-License-Identifier: Apache-2.0
#include "attention_blocks.h"

namespace fastkern::cpu::attention_detail {
namespace {

/// Before any size is read.
const AttentionFwd& with_dimensions(const AttentionFwd& a) {
  FK_CHECK(a.q.ndim == 3 || a.q.ndim == 4, a.op, ": q must have 3 or 4 dimensions, got ", a.q.ndim);
  const auto like_q = [&](const TensorRef& t, const char* name) {
    FK_CHECK(t.ndim == a.q.ndim, a.op, ": ", name, " must have ", a.q.ndim,
             " dimensions like q, got ", t.ndim);
  };
  like_q(a.k, "k");
  like_q(a.v, "v");
  return a;
}

void check_heads(const AttentionFwd& a, const TensorRef& t, const char* name, std::int64_t heads) {
  FK_CHECK(t.sizes[t.ndim - 2] == heads, a.op, ": ", name, " must have ", heads, " heads, got ",
           t.sizes[t.ndim - 2]);
}

/// f(bias) for each element of the block, by its own strides.
template <class T, class F>
void each_bias(const Problem& p, const Sequence& at, std::int64_t h, std::int64_t i0,
               std::int64_t i1, std::int64_t j0, std::int64_t j1, const F& f) {
  const TensorRef& t = p.args.bias;
  const auto stride = [&](int d) { return t.sizes[d] == 1 ? 0 : t.strides[d]; };
  const T* const base =
      static_cast<const T*>(t.data) + (at.entry * stride(0) + h * stride(1) + i0 * stride(2));
  for (std::int64_t i = i0; i < i1; ++i) {
    const T* const row = base + (i - i0) * stride(2);
    for (std::int64_t j = j0; j < j1; ++j) f(i - i0, j - j0, row[j * stride(3)]);
  }
}

void add_bias(const Problem& p, const Sequence& at, std::int64_t h, std::int64_t i0,
              std::int64_t i1, std::int64_t j0, std::int64_t j1, float* s) {
  if (p.args.bias.dtype == DType::i8) {
    return each_bias<std::int8_t>(p, at, h, i0, i1, j0, j1, [=](auto i, auto j, std::int8_t seen) {
      if (!seen) s[j * kBlock + i] = -kInfinity;
    });
  }
  dispatch(p.args.bias.dtype, [&]<class T>() {
    each_bias<T>(p, at, h, i0, i1, j0, j1,
                 [=](auto i, auto j, T bias) { s[j * kBlock + i] += to_float(bias); });
  });
}

}  // namespace

Problem::Problem(const AttentionFwd& a)
    : args(with_dimensions(a)),
      q(a.q),
      k(a.k),
      v(a.v),
      out(a.out),
      packed(a.q.ndim == 3),
      batch(packed ? a.lengths.batch : a.q.sizes[0]),
      heads(a.q.sizes[a.q.ndim - 2]),
      kv_heads(a.k.sizes[a.k.ndim - 2]),
      total_q(a.q.sizes[a.q.ndim - 3]),
      total_k(a.k.sizes[a.k.ndim - 3]),
      d(a.q.sizes[a.q.ndim - 1]),
      dv(a.v.sizes[a.v.ndim - 1]),
      scale(static_cast<float>(a.scale)),
      softcap(static_cast<float>(a.softcap)) {
  FK_CHECK(packed == (a.lengths.start_q != nullptr) && packed == (a.lengths.start_k != nullptr),
           a.op, ": start_q and start_k must be given if and only if q is packed");
  check_heads(a, a.k, "k", kv_heads);
  check_heads(a, a.v, "v", kv_heads);
  FK_CHECK(heads == 0 || (kv_heads > 0 && heads % kv_heads == 0), a.op,
           ": q must have a multiple of ", kv_heads, " heads, got ", heads);
  FK_CHECK(a.k.sizes[a.k.ndim - 1] == d, a.op, ": k must have head dimension ", d, ", got ",
           a.k.sizes[a.k.ndim - 1]);
  FK_CHECK(!a.mask.blocks.given() || (a.mask.block_size > 0 && a.mask.block_size % kBlock == 0),
           a.op, ": block_size must be a multiple of ", kBlock, ", got ", a.mask.block_size);
  FK_CHECK(!packed || (!a.bias.given() && !a.mask.blocks.given()), a.op,
           ": bias and blocks must not be given with packed tensors");
  if (a.dropout.p > 0.0) {
    threshold = dropout_threshold(a.dropout.p);
    keep_scale = dropout_scale(a.dropout.p);
    seed = static_cast<std::uint64_t>(*a.dropout.seed);
    offset = a.dropout.offset ? static_cast<std::uint64_t>(*a.dropout.offset) : 0;
  }
}

std::vector<QueryBlock> Problem::query_blocks() const {
  std::vector<QueryBlock> blocks;
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t count = blocks_of(sequence(b).queries);
    for (std::int64_t turn = 0; turn < count; ++turn) {
      blocks.push_back({b, kBlock * (turn % 2 ? count - 1 - turn / 2 : turn / 2)});
    }
  }
  return blocks;
}

bool Problem::listed(std::int64_t h, std::int64_t i0, std::int64_t j0) const {
  const TensorRef& t = args.mask.blocks;
  if (!t.given()) return true;
  const std::int64_t head = t.sizes[0] == 1 ? 0 : h, size = args.mask.block_size;
  return static_cast<const std::int8_t*>(
             t.data)[head * t.strides[0] + i0 / size * t.strides[1] + j0 / size * t.strides[2]] !=
         0;
}

float Problem::sink(std::int64_t h) const {
  float value = -kInfinity;
  if (args.sinks.given()) {
    dispatch(args.sinks.dtype,
             [&]<class T>() { value = to_float(static_cast<const T*>(args.sinks.data)[h]); });
  }
  return value;
}

void block_scores(const Problem& p, const Sequence& at, const Sight& sight, std::int64_t h,
                  std::int64_t i0, std::int64_t i1, std::int64_t j0, std::int64_t j1,
                  const float* qt, const float* k, float* s, float* capped) {
  const std::int64_t rows = j1 - j0, columns = padded(i1 - i0), dp = padded(p.d);
  matmul<false>(rows, columns, p.d, k, dp, 1, qt, kBlock, s, kBlock);
  if (p.softcap > 0.0f) {
    const float cap = p.softcap, inverse = 1.0f / cap;
    with_best_isa([=]() __attribute__((always_inline)) {
      for (std::int64_t j = 0; j < rows; ++j) {
#pragma GCC ivdep
        for (std::int64_t i = 0; i < columns; ++i) {
          s[j * kBlock + i] = cap * tanh_of(s[j * kBlock + i] * inverse);
        }
      }
    });
    if (capped) std::memcpy(capped, s, sizeof(float) * kBlock * rows);
  }
  if (p.args.bias.given()) add_bias(p, at, h, i0, i1, j0, j1, s);
  if (p.args.slopes.given()) {
    const float* const slopes = static_cast<const float*>(p.args.slopes.data);
    const float slope = slopes[p.args.slopes.ndim == 2 ? at.entry * p.heads + h : h];
    const std::int64_t first = i0 + sight.shift - j0;
    with_best_isa([=]() __attribute__((always_inline)) {
      for (std::int64_t j = 0; j < rows; ++j) {
        const int distance = static_cast<int>(first - j);
#pragma GCC ivdep
        for (int i = 0; i < static_cast<int>(columns); ++i) {
          const int apart = distance + i;
          s[j * kBlock + i] -= slope * static_cast<float>(apart < 0 ? -apart : apart);
        }
      }
    });
  }
  if (sight.all(i0, i1, j0, j1)) return;
  for (std::int64_t j = 0; j < rows; ++j) {
    if (j0 + j < sight.prefix) continue;
    // Query i0 + i sees key j0 + j from `from` to `to`.
    const std::int64_t from = j0 + j - i0 + 1 - sight.window_end;
    const std::int64_t to = j0 + j - i0 + 1 - sight.window_begin;
    float* const row = s + j * kBlock;
    for (std::int64_t i = 0; i < std::min(from, columns); ++i) row[i] = -kInfinity;
    for (std::int64_t i = std::max<std::int64_t>(to, 0); i < columns; ++i) row[i] = -kInfinity;
  }
}

void block_dropout(const Problem& p, const Sequence& at, std::int64_t h, std::int64_t i0,
                   std::int64_t i1, std::int64_t j0, std::int64_t j1, float* factors) {
  const std::uint64_t offset =
      p.offset + (static_cast<std::uint64_t>(at.entry * p.heads + h) << 32);
  for (std::int64_t i = i0; i < i1; ++i) {
    for (std::int64_t j = j0; j < j1; j += 4) {
      const PhiloxWords words =
          philox(p.seed, offset, (static_cast<std::uint64_t>(i) << 30) + j / 4);
      for (std::int64_t w = 0; w < std::min<std::int64_t>(4, j1 - j); ++w) {
        factors[(j - j0 + w) * kBlock + i - i0] =
            words.word[w] >= p.threshold ? p.keep_scale : 0.0f;
      }
    }
  }
}

}  // namespace fastkern::cpu::attention_detail
