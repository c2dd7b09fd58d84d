// SPDX-License-Identifier: Apache-2.0
// Problems of attention that the CPU and the CUDA tests share, and how they become calls. What must
// come out: attention_reference.h. The problems: attention_cases.h.
#pragma once

#include <map>
#include <optional>

#include "fastkern/attention.h"
#include "support.h"

namespace fastkern::test {

/// One call. Packed, where `start_q` says so: `queries` and `keys` then are totals.
struct AttentionCase {
  std::string name = {};
  std::int64_t batch = 2, heads = 4, kv_heads = 2, queries = 70, keys = 150, d = 24, dv = 40;
  double scale = 0.0;  // 0: 1 / sqrt(d)
  double softcap = 0.0;
  std::int64_t left = -1, right = -1;
  bool top_left = false;
  std::vector<std::int32_t> prefix = {}, start_q = {}, start_k = {}, used_q = {}, used_k = {};
  std::optional<DType> bias = {};  // i8: a mask
  std::string bias_dims = "bhs";   // those that are not 1: entries, heads, queries
  int slope_dims = 0;
  std::optional<DType> sinks = {};
  std::int64_t block_size = 0;  // 0: no block mask
  bool block_heads = false;     // one for each head
  double dropout = 0.0;
  bool dlse = true;

  bool packed() const { return !start_q.empty(); }
  bool bias_gradient() const { return bias && *bias != DType::i8; }
};

inline Sizes attention_sizes(const AttentionCase& c, std::int64_t length, std::int64_t heads,
                             std::int64_t width) {
  return c.packed() ? Sizes{length, heads, width} : Sizes{c.batch, length, heads, width};
}

/// `sizes` with the dimensions in another order in memory, outermost first, and `padding` elements
/// after each row of the innermost.
inline Layout permuted_layout(const Sizes& sizes, const std::vector<int>& order,
                              std::int64_t padding = 0, std::int64_t offset = 0) {
  Layout layout{"permuted", sizes, Sizes(sizes.size()), offset};
  std::int64_t stride = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    layout.strides[*d] = stride;
    stride = stride * std::max<std::int64_t>(sizes[*d], 1) + (d == order.rbegin() ? padding : 0);
  }
  return layout;
}

/// A copy of `t` that lies in memory full of NaN.
inline Tensor among_nans(const Tensor& t, const Layout& layout) {
  if (!t.given()) return t;
  Tensor out(t.dtype(), layout);
  std::fill(out.bytes().begin(), out.bytes().end(), static_cast<unsigned char>(0xff));
  return out.copy_from(t);
}

inline Sizes sizes_of(const Tensor& t) {
  Tensor copy = t;
  const TensorRef ref = copy.ref();
  return Sizes(ref.sizes.begin(), ref.sizes.begin() + ref.ndim);
}

/// A copy of `t` with another order of the dimensions in memory.
inline Tensor permuted(const Tensor& t, const std::vector<int>& order, std::int64_t padding = 0,
                       std::int64_t offset = 0) {
  return t.given() ? among_nans(t, permuted_layout(sizes_of(t), order, padding, offset)) : t;
}

/// A dense tensor of what `from` has from element `first` on.
inline Tensor part_of(const Tensor& from, const Sizes& sizes, std::int64_t first) {
  Tensor out(from.dtype(), sizes);
  for (std::int64_t i = 0; i < out.numel(); ++i) out.set(i, from.get(first + i));
  return out;
}

struct AttentionProblem {
  AttentionCase c;
  DType dtype;
  Tensor q, k, v, dout, dlse, bias, slopes, sinks, blocks;
  std::vector<std::int64_t> seed = {0x123456789abcdef0}, offset = {-3};

  double scale() const {
    return c.scale != 0.0 ? c.scale : 1.0 / std::sqrt(static_cast<double>(c.d));
  }
  std::string text() const {
    return c.name + " " + name_of(dtype) + ", B " + std::to_string(c.batch) + ", H " +
           std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + ", S " +
           std::to_string(c.queries) + ", T " + std::to_string(c.keys) + ", D " +
           std::to_string(c.d) + "/" + std::to_string(c.dv);
  }
  std::vector<Tensor*> operands() { return {&q, &k, &v, &dout}; }
};

/// `share` of the elements are 1.
inline Tensor random_flags(const Sizes& sizes, unsigned seed, double share) {
  Tensor t(DType::i8, sizes);
  std::mt19937 random(seed);
  for (std::int64_t i = 0; i < t.numel(); ++i) t.set(i, random() < share * 4294967296.0 ? 1 : 0);
  return t;
}

inline AttentionProblem make_attention(const AttentionCase& c, DType dtype) {
  AttentionProblem p;
  p.c = c, p.dtype = dtype;
  p.q = Tensor(dtype, attention_sizes(c, c.queries, c.heads, c.d)).fill(1);
  p.k = Tensor(dtype, attention_sizes(c, c.keys, c.kv_heads, c.d)).fill(2);
  p.v = Tensor(dtype, attention_sizes(c, c.keys, c.kv_heads, c.dv)).fill(3, 0.2);
  p.dout = Tensor(dtype, attention_sizes(c, c.queries, c.heads, c.dv)).fill(4);
  if (c.dlse) {
    p.dlse = Tensor(DType::f32,
                    c.packed() ? Sizes{c.heads, c.queries} : Sizes{c.batch, c.heads, c.queries})
                 .fill(5);
  }
  if (c.bias) {
    const auto size = [&](char dimension, std::int64_t n) {
      return contains(c.bias_dims, std::string(1, dimension)) ? n : 1;
    };
    const Sizes sizes{size('b', c.batch), size('h', c.heads), size('s', c.queries), c.keys};
    p.bias = *c.bias == DType::i8 ? random_flags(sizes, 6, 0.7) : Tensor(*c.bias, sizes).fill(6);
  }
  if (c.slope_dims > 0) {
    p.slopes = Tensor(DType::f32, c.slope_dims == 2 ? Sizes{c.batch, c.heads} : Sizes{c.heads});
    for (std::int64_t i = 0; i < p.slopes.numel(); ++i) p.slopes.set(i, 0.01 + 0.03 * i);
  }
  if (c.sinks) p.sinks = Tensor(*c.sinks, {c.heads}).fill(7);
  if (c.block_size > 0) {
    const auto count = [&](std::int64_t n) { return (n + c.block_size - 1) / c.block_size; };
    p.blocks = random_flags({c.block_heads ? c.heads : 1, count(c.queries), count(c.keys)}, 8, 0.6);
  }
  return p;
}

/// What a forward and a backward give; NaN before, in guarded memory.
struct AttentionOutputs {
  Tensor out, lse, dq, dk, dv, dbias, dsinks;

  std::map<std::string, Tensor*> named() {
    return {{"out", &out}, {"lse", &lse},     {"dq", &dq},        {"dk", &dk},
            {"dv", &dv},   {"dbias", &dbias}, {"dsinks", &dsinks}};
  }
};

inline AttentionOutputs blank_attention(const AttentionProblem& p) {
  const AttentionCase& c = p.c;
  const auto blank = [](const Tensor& like) { return Tensor(like.dtype(), sizes_of(like)); };
  return {.out = blank(p.dout),
          .lse = Tensor(DType::f32, c.packed() ? Sizes{c.heads, c.queries}
                                               : Sizes{c.batch, c.heads, c.queries}),
          .dq = blank(p.q),
          .dk = blank(p.k),
          .dv = blank(p.v),
          .dbias = c.bias_gradient() ? blank(p.bias) : Tensor(),
          .dsinks = c.sinks ? blank(p.sinks) : Tensor()};
}

/// Where a call finds its operands: place(Tensor&) is a TensorRef, place(vector) a pointer, nullptr
/// if it is empty.
struct OnHost {
  TensorRef operator()(Tensor& t) const { return t.ref(); }
  template <class T>
  const T* operator()(const std::vector<T>& values) const {
    return values.empty() ? nullptr : values.data();
  }
};

template <class Place>
AttentionFwd attention_fwd(AttentionProblem& p, AttentionOutputs& o, const Place& place) {
  const AttentionCase& c = p.c;
  return {.q = place(p.q),
          .k = place(p.k),
          .v = place(p.v),
          .out = place(o.out),
          .lse = place(o.lse),
          .scale = p.scale(),
          .softcap = c.softcap,
          .bias = place(p.bias),
          .slopes = place(p.slopes),
          .sinks = place(p.sinks),
          .mask = {.left = c.left,
                   .right = c.right,
                   .top_left = c.top_left,
                   .prefix = place(c.prefix),
                   .blocks = place(p.blocks),
                   .block_size = c.block_size},
          .lengths = {.batch = c.packed() ? c.batch : 0,
                      .start_q = place(c.start_q),
                      .start_k = place(c.start_k),
                      .used_q = place(c.used_q),
                      .used_k = place(c.used_k)},
          .dropout = {c.dropout, place(p.seed), place(p.offset)}};
}

template <class Place>
AttentionBwd attention_bwd(AttentionProblem& p, AttentionOutputs& o, const Place& place) {
  return {.fwd = attention_fwd(p, o, place),
          .dout = place(p.dout),
          .dlse = place(p.dlse),
          .dq = place(o.dq),
          .dk = place(o.dk),
          .dv = place(o.dv),
          .dbias = place(o.dbias),
          .dsinks = place(o.dsinks)};
}

inline AttentionOutputs attention_on_cpu(AttentionProblem p) {
  AttentionOutputs out = blank_attention(p);
  cpu::attention(attention_fwd(p, out, OnHost{}));
  cpu::attention_bwd(attention_bwd(p, out, OnHost{}));
  return out;
}

inline void expect_same(AttentionOutputs found, AttentionOutputs expected,
                        const std::vector<std::string>& names = {"out", "lse", "dq", "dk", "dv",
                                                                 "dbias", "dsinks"}) {
  for (const std::string& name : names) {
    const Tensor &a = *found.named()[name], &b = *expected.named()[name];
    EXPECT_TRUE(a.same_bits(b)) << name;
  }
}

inline void expect_guards(AttentionOutputs found) {
  for (const auto& [name, t] : found.named()) {
    EXPECT_TRUE(!t->given() || t->gaps_intact()) << name;
  }
}

}  // namespace fastkern::test
