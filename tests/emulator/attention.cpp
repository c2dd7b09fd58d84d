// SPDX-License-Identifier: Apache-2.0
// cuda::attention in the emulator against cpu::.
#include "fastkern/attention.h"
#include "fastkern/attention_mask.h"

#include <cmath>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;

struct AttentionCase {
  DType dtype = DType::bf16;
  std::int64_t batch = 1, queries = 1, keys = 1, heads = 1, kv_heads = 1, d = 64, dv = 64;
  std::int64_t left = -1, right = -1;
  bool top_left = false, packed = false, used = false, prefix = false;
  bool slopes = false, sinks = false;
  int bias = 0;    // 1: full, 2: broadcast over entries and heads, 3: over queries, 4: a mask
  int blocks = 0;  // size of a block mask
  double softcap = 0.0, dropout = 0.0;
  double scale = 0.0;     // 0: 1 / sqrt(d)
  bool negative = false;  // all scores
  int shift = 0;          // elements off a boundary
  int device = 0;
  bool gradients = true;
  bool little = false;  // memory for gradients as where there is no kernel for Hopper
  bool lends = false;   // memory, by which tiles are given out as they are asked for

  std::string text() const;
};

std::string AttentionCase::text() const {
  std::ostringstream out;
  out << "attention " << name_of(dtype) << " B" << batch << " S" << queries << " T" << keys << " H"
      << heads << "/" << kv_heads << " D" << d << "/" << dv << " window " << left << "," << right
      << (top_left ? " top-left" : "") << (packed ? " packed" : "") << (used ? " used" : "")
      << (prefix ? " prefix" : "") << (slopes ? " slopes" : "") << (sinks ? " sinks" : "")
      << " bias " << bias << " blocks " << blocks << " softcap " << softcap << " dropout "
      << dropout << " scale " << scale << (negative ? " negative" : "") << " shift " << shift
      << " device " << device << (lends ? " lends" : "");
  return out.str();
}

struct AttentionCall {
  AttentionCall(const AttentionCase& c, int shift);
  NamedTensors tensors() {
    return {{"q", &q},           {"k", &k},
            {"v", &v},           {"bias", &bias},
            {"slopes", &slopes}, {"sinks", &sinks},
            {"blocks", &blocks}, {"out", &out},
            {"lse", &lse},       {"counter", &counter},
            {"dout", &dout},     {"dlse", &dlse},
            {"dq", &dq},         {"dk", &dk},
            {"dv", &dv},         {"dbias", &dbias},
            {"dsinks", &dsinks}, {"workspace", &workspace}};
  }

  /// NaN wherever no query of a sequence may look.
  void poison(const AttentionCase& c);

  Tensor q, k, v, bias, slopes, sinks, blocks, out, lse, counter;
  Tensor dout, dlse, dq, dk, dv, dbias, dsinks, workspace;
  std::vector<std::int32_t> start_q, start_k, used_q, used_k, prefix;
  std::int64_t seed = 1234567, offset = 89;
  AttentionFwd forward;
  AttentionBwd backward;
};

Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  std::int64_t next = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    next *= sizes[i];
  }
  return strides;
}

/// The tensor holds 0 and 1: f32 for the driver, i8 for the kernels.
TensorRef as_mask(Tensor& mask) {
  TensorRef ref = mask.ref();
  auto* const bytes = static_cast<std::int8_t*>(ref.data);
  std::vector<std::int8_t> values;
  for (std::int64_t i = 0; i < mask.numel(); ++i) values.push_back(mask.get(i) > -0.5f);
  std::copy(values.begin(), values.end(), bytes);
  ref.dtype = DType::i8;
  return ref;
}

AttentionCall::AttentionCall(const AttentionCase& c, int shift) {
  unsigned turn = 0;
  const auto tensor = [&](DType dtype, const Sizes& sizes) {
    Tensor t(dtype, sizes, dense_strides(sizes), dtype == DType::f32 ? 0 : shift);
    t.fill(++turn, 0.0);
    return t;
  };
  const auto operand = [&](std::int64_t rows, std::int64_t heads, std::int64_t width) {
    return tensor(c.dtype, c.packed ? Sizes{c.batch * rows, heads, width}
                                    : Sizes{c.batch, rows, heads, width});
  };
  q = operand(c.queries, c.heads, c.d), k = operand(c.keys, c.kv_heads, c.d);
  if (c.negative) {
    for (std::int64_t i = 0; i < q.numel(); ++i) q.set(i, std::abs(q.get(i)));
    for (std::int64_t i = 0; i < k.numel(); ++i) k.set(i, -std::abs(k.get(i)));
  }
  v = operand(c.keys, c.kv_heads, c.dv), out = operand(c.queries, c.heads, c.dv);
  lse = tensor(DType::f32,
               c.packed ? Sizes{c.heads, c.batch * c.queries} : Sizes{c.batch, c.heads, c.queries});
  out.allow_writes(), lse.allow_writes();
  forward.q = q.ref(), forward.k = k.ref(), forward.v = v.ref();
  forward.out = out.ref(), forward.lse = lse.ref();
  forward.scale = c.scale > 0.0 ? c.scale : 1.0 / std::sqrt(static_cast<double>(c.d));
  forward.softcap = c.softcap;
  forward.mask.left = c.left, forward.mask.right = c.right, forward.mask.top_left = c.top_left;
  if (c.bias == 4) {
    bias = tensor(DType::f32, {c.batch, 1, c.queries, c.keys});
    forward.bias = as_mask(bias);
  } else if (c.bias) {
    bias = tensor(c.bias == 2 ? DType::f32 : c.dtype,
                  {c.bias == 2 ? 1 : c.batch, c.bias == 2 ? 1 : c.heads,
                   c.bias == 3 ? 1 : c.queries, c.keys});
    forward.bias = bias.ref();
  }
  if (c.slopes) slopes = tensor(DType::f32, {c.batch, c.heads}), forward.slopes = slopes.ref();
  if (c.sinks) sinks = tensor(c.dtype, {c.heads}), forward.sinks = sinks.ref();
  if (c.blocks) {
    const auto count = [&](std::int64_t n) { return (n + c.blocks - 1) / c.blocks; };
    blocks = tensor(DType::f32, {c.heads, count(c.queries), count(c.keys)});
    forward.mask.blocks = as_mask(blocks), forward.mask.block_size = c.blocks;
  }
  // Entries of lengths from nothing to all of theirs, and a tail of no entry.
  for (std::int64_t b = 0; b <= c.batch; ++b) {
    start_q.push_back(static_cast<std::int32_t>(b < c.batch ? b * c.queries
                                                            : c.batch * c.queries - c.queries / 3));
    start_k.push_back(static_cast<std::int32_t>(b * c.keys));
    used_q.push_back(static_cast<std::int32_t>(b % 2 ? c.queries - 3 : 2 * c.queries));
    used_k.push_back(static_cast<std::int32_t>(b % 3 == 2 ? 0 : c.keys - 5 * b));
    prefix.push_back(static_cast<std::int32_t>(c.keys / 2 + b));
  }
  if (c.packed) {
    forward.lengths.batch = c.batch;
    forward.lengths.start_q = start_q.data(), forward.lengths.start_k = start_k.data();
  }
  if (c.used) forward.lengths.used_q = used_q.data(), forward.lengths.used_k = used_k.data();
  if (c.prefix) forward.mask.prefix = prefix.data();
  forward.dropout = {c.dropout, &seed, &offset};

  dout = operand(c.queries, c.heads, c.dv), dq = operand(c.queries, c.heads, c.d);
  dk = operand(c.keys, c.kv_heads, c.d), dv = operand(c.keys, c.kv_heads, c.dv);
  dlse = tensor(DType::f32, c.packed ? Sizes{c.heads, c.batch * c.queries}
                                     : Sizes{c.batch, c.heads, c.queries});
  if (c.bias && c.bias < 4) {
    const TensorRef& like = bias.ref();
    dbias = tensor(like.dtype, Sizes(like.sizes.begin(), like.sizes.begin() + 4));
  }
  if (c.sinks) dsinks = tensor(c.dtype, {c.heads});
  for (Tensor* t : {&dq, &dk, &dv, &dbias, &dsinks}) t->allow_writes();
  backward.fwd = forward;
  backward.dout = dout.ref(), backward.dlse = dlse.ref();
  backward.dq = dq.ref(), backward.dk = dk.ref(), backward.dv = dv.ref();
  if (dbias.given()) backward.dbias = dbias.ref();
  if (dsinks.given()) backward.dsinks = dsinks.ref();
  poison(c);
  if (c.lends) {
    counter = Tensor(DType::f32, {1}, {1});
    counter.set(0, 1.0);  // a large number of tiles, if nobody sets it to 0
    counter.allow_writes();
    forward.workspace = counter.ref().data, forward.workspace_size = sizeof(int);
  }
  if (!c.gradients) return;
  const std::size_t bytes =
      cuda::attention_bwd_workspace(backward, {nullptr, c.little ? 4 : c.device});
  workspace = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
  workspace.allow_writes();
  backward.workspace = workspace.ref().data, backward.workspace_size = bytes;
}

void AttentionCall::poison(const AttentionCase& c) {
  const std::int64_t rows_q = c.batch * c.queries, rows_k = c.batch * c.keys;
  std::vector<bool> of_q(rows_q), of_k(rows_k);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const auto at = attention_sequence<std::int64_t>(
        forward.lengths, b, c.packed ? rows_q : c.queries, c.packed ? rows_k : c.keys);
    const std::int64_t first_q = c.packed ? at.first_q : b * c.queries;
    const std::int64_t first_k = c.packed ? at.first_k : b * c.keys;
    for (std::int64_t i = 0; i < at.queries; ++i) of_q[first_q + i] = true;
    for (std::int64_t j = 0; j < at.keys; ++j) of_k[first_k + j] = true;
  }
  const auto spoil = [](Tensor& t, const std::vector<bool>& used) {
    const std::int64_t row = used.empty() ? 0 : t.numel() / static_cast<std::int64_t>(used.size());
    for (std::size_t r = 0; r < used.size(); ++r) {
      for (std::int64_t e = 0; !used[r] && e < row; ++e) t.set(r * row + e, std::nanf(""));
    }
  };
  spoil(q, of_q), spoil(dout, of_q), spoil(k, of_k), spoil(v, of_k);
}

void compare(const char* name, const Tensor& found, const Tensor& expected, double absolute,
             double relative) {
  const std::vector<double> a = found.values(), b = expected.values();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || std::abs(a[i] - b[i]) <= absolute + std::abs(b[i]) * relative) continue;
    std::ostringstream why;
    why << "element " << i << ": " << a[i] << ", expected " << b[i];
    return fail_case(name, why.str());
  }
}

void check_attention(const AttentionCase& c) {
  AttentionCall found(c, c.shift), expected(c, 0);
  const auto run = [&] {
    cuda::attention(found.forward, {nullptr, c.device});
    if (c.gradients) cuda::attention_bwd(found.backward, {nullptr, c.device});
  };
  if (!run_guarded(found.tensors(), run)) return;
  if (c.lends && found.counter.get(0) == 1.0) fail_case("counter", "was not used");
  cpu::attention(expected.forward);
  if (c.gradients) cpu::attention_bwd(expected.backward);
  const bool exact = c.dtype == DType::f32;
  const auto check = [&](const char* name, const Tensor& a, const Tensor& b, double absolute) {
    compare(name, a, b, exact ? absolute / 4096 : absolute, exact ? 1e-5 : 1.0 / 128);
  };
  check("out", found.out, expected.out, 0.01);
  compare("lse", found.lse, expected.lse, exact ? 1e-5 : 1e-4, 1e-5);
  if (!c.gradients) return;
  check("dq", found.dq, expected.dq, 0.03);
  check("dk", found.dk, expected.dk, 0.05);
  check("dv", found.dv, expected.dv, 0.05);
  if (c.bias && c.bias < 4) check("dbias", found.dbias, expected.dbias, 0.03);
  if (c.sinks) check("dsinks", found.dsinks, expected.dsinks, 0.1);
}

}  // namespace

std::vector<Case> attention_cases(const Options& options) {
  if (!options.names.count("attention") &&
      !options.wants("attention", {"fwd", "bwd", "quant", "group", "attention", "rms", "layer"}))
    return {};
  const AttentionCase kCases[] = {
      {.queries = 1, .keys = 1},
      {.queries = 130, .keys = 200, .heads = 2},
      {.queries = 130, .keys = 200, .right = 0},
      {.queries = 200, .keys = 130, .right = 0},
      {.queries = 129, .keys = 127, .right = 0, .top_left = true},
      {.queries = 64, .keys = 300, .left = 40, .right = 0},
      {.queries = 150, .keys = 140, .left = 30, .right = 17},
      {.queries = 33, .keys = 65, .heads = 6, .kv_heads = 2, .d = 128, .dv = 128, .right = 0},
      {.queries = 33, .keys = 65, .d = 32, .dv = 32},
      {.queries = 17, .keys = 70, .d = 80, .dv = 96},
      {.queries = 70, .keys = 70, .d = 192, .dv = 128, .right = 0},
      {.queries = 70, .keys = 70, .d = 256, .dv = 256, .right = 0},
      {.queries = 20, .keys = 70, .d = 41, .dv = 23, .shift = 1},
      {.queries = 20, .keys = 70, .d = 64, .dv = 64, .shift = 3},
      {.batch = 4, .queries = 70, .keys = 90, .heads = 2, .right = 0, .packed = true},
      {.batch = 4, .queries = 70, .keys = 90, .right = 0, .packed = true, .used = true},
      {.batch = 3, .queries = 70, .keys = 90, .used = true},
      {.batch = 2, .queries = 70, .keys = 90, .right = 0, .prefix = true},
      {.batch = 2, .queries = 70, .keys = 90, .left = 5, .right = 0, .prefix = true},
      {.batch = 2, .queries = 70, .keys = 90, .heads = 2, .slopes = true},
      {.queries = 70, .keys = 90, .heads = 2, .right = 0, .sinks = true},
      {.queries = 70, .keys = 90, .heads = 2, .right = 0, .slopes = true, .sinks = true},
      {.batch = 2, .queries = 70, .keys = 90, .heads = 2, .bias = 1},
      {.batch = 2, .queries = 70, .keys = 90, .heads = 2, .bias = 2},
      {.batch = 2, .queries = 70, .keys = 91, .heads = 2, .d = 128, .dv = 128, .bias = 3},
      {.batch = 2, .queries = 70, .keys = 91, .right = 0, .bias = 4},
      {.queries = 300, .keys = 260, .heads = 2, .blocks = 64},
      {.queries = 300, .keys = 260, .heads = 2, .right = 0, .blocks = 128},
      {.queries = 70, .keys = 90, .heads = 2, .right = 0, .softcap = 3.0},
      {.batch = 2, .queries = 70, .keys = 90, .heads = 2, .right = 0, .dropout = 0.3},
      {.queries = 70, .keys = 0, .sinks = true},
      {.dtype = DType::f16, .queries = 70, .keys = 90, .heads = 2, .right = 0},
      // several blocks of keys and tiles a block of threads, as the kernel for Hopper takes them
      {.queries = 300, .keys = 500, .heads = 2, .d = 128, .dv = 128, .device = 1},
      {.batch = 2,
       .queries = 260,
       .keys = 400,
       .heads = 6,
       .kv_heads = 2,
       .d = 128,
       .dv = 128,
       .right = 0,
       .device = 2},
      {.queries = 500, .keys = 450, .heads = 2, .right = 0, .device = 1},
      {.queries = 370, .keys = 2050, .d = 128, .dv = 128, .device = 1},
      {.queries = 420, .keys = 700, .heads = 2, .left = 200, .right = 30, .sinks = true},
      {.queries = 300, .keys = 400, .d = 96, .dv = 96, .left = 140, .right = 0, .device = 1},
      {.queries = 200,
       .keys = 330,
       .heads = 2,
       .d = 128,
       .dv = 128,
       .right = 0,
       .slopes = true,
       .softcap = 3.0,
       .device = 1},
      {.queries = 300, .keys = 200, .heads = 2, .left = 90, .slopes = true, .device = 1},
      {.queries = 200, .keys = 400, .heads = 2, .d = 192, .dv = 192, .right = 0, .device = 1},
      {.queries = 200, .keys = 300, .heads = 2, .d = 192, .dv = 128, .top_left = true, .device = 1},
      {.queries = 260, .keys = 330, .heads = 2, .d = 256, .dv = 256, .right = 0, .device = 1},
      // tiles that see nothing among others
      {.queries = 500,
       .keys = 130,
       .heads = 2,
       .d = 192,
       .dv = 192,
       .right = 0,
       .sinks = true,
       .device = 1,
       .gradients = false},
      {.batch = 5,
       .queries = 150,
       .keys = 300,
       .heads = 2,
       .d = 128,
       .dv = 128,
       .right = 0,
       .packed = true,
       .used = true,
       .device = 2},
      {.batch = 5,
       .queries = 150,
       .keys = 300,
       .heads = 2,
       .d = 64,
       .dv = 64,
       .left = 100,
       .packed = true,
       .used = true,
       .device = 2},
      {.batch = 3,
       .queries = 130,
       .keys = 170,
       .d = 256,
       .dv = 256,
       .right = 0,
       .packed = true,
       .device = 1},
      // the same, given out by a counter
      {.queries = 500,
       .keys = 450,
       .heads = 2,
       .right = 0,
       .device = 1,
       .gradients = false,
       .lends = true},
      {.batch = 2,
       .queries = 260,
       .keys = 1200,
       .heads = 3,
       .d = 128,
       .dv = 128,
       .right = 0,
       .device = 2,
       .gradients = false,
       .lends = true},
      {.queries = 260,
       .keys = 1000,
       .heads = 2,
       .d = 256,
       .dv = 256,
       .right = 0,
       .device = 2,
       .gradients = false,
       .lends = true},
      {.batch = 5,
       .queries = 150,
       .keys = 300,
       .heads = 2,
       .d = 64,
       .dv = 64,
       .right = 0,
       .packed = true,
       .used = true,
       .device = 2,
       .gradients = false,
       .lends = true},
      // gradients of scores in memory, of one head at a time
      {.queries = 130,
       .keys = 700,
       .heads = 2,
       .kv_heads = 2,
       .d = 192,
       .dv = 192,
       .right = 0,
       .device = 1,
       .little = true},
      // queries of several heads in a tile
      {.batch = 2,
       .queries = 17,
       .keys = 300,
       .heads = 16,
       .kv_heads = 2,
       .right = 0,
       .sinks = true,
       .device = 1,
       .gradients = false},
      {.queries = 40,
       .keys = 300,
       .heads = 8,
       .kv_heads = 1,
       .d = 128,
       .dv = 128,
       .left = 100,
       .right = 0,
       .device = 1,
       .gradients = false},
      {.batch = 2,
       .queries = 9,
       .keys = 200,
       .heads = 6,
       .kv_heads = 1,
       .d = 256,
       .dv = 256,
       .right = 0,
       .slopes = true,
       .device = 1,
       .gradients = false},
      {.batch = 4,
       .queries = 30,
       .keys = 200,
       .heads = 8,
       .kv_heads = 2,
       .d = 128,
       .dv = 128,
       .right = 0,
       .packed = true,
       .used = true,
       .softcap = 3.0,
       .device = 2,
       .gradients = false},
      {.queries = 300,
       .keys = 400,
       .heads = 2,
       .right = 0,
       .slopes = true,
       .softcap = 3.0,
       .device = 1,
       .gradients = false},
      // scores that grow by many powers of two, block after block
      {.queries = 200,
       .keys = 700,
       .heads = 2,
       .right = 0,
       .scale = 1.5,
       .device = 1,
       .gradients = false},
      {.queries = 130,
       .keys = 600,
       .d = 96,
       .dv = 96,
       .sinks = true,
       .scale = 1.5,
       .device = 1,
       .gradients = false},
      // scores that are all negative, of queries that see nothing of a warpgroup's first block
      {.queries = 250,
       .keys = 333,
       .heads = 2,
       .right = 0,
       .scale = 1.0,
       .negative = true,
       .device = 1,
       .gradients = false},
      // tiles by head dimensions and shared memory
      {.queries = 70, .keys = 40, .d = 192, .dv = 100, .device = 6, .gradients = false},
      {.queries = 70, .keys = 70, .d = 180, .dv = 190, .device = 6, .gradients = false},
      {.queries = 70, .keys = 70, .d = 128, .dv = 128, .device = 6, .gradients = false},
      {.queries = 70, .keys = 40, .d = 250, .dv = 256, .device = 6, .gradients = false},
      {.queries = 70, .keys = 40, .d = 256, .dv = 200, .right = 0, .device = 4, .gradients = false},
      {.queries = 70, .keys = 40, .d = 300, .dv = 512, .right = 0, .device = 4, .gradients = false},
      {.queries = 70, .keys = 70, .heads = 2, .d = 512, .dv = 512, .right = 0, .gradients = false},
      {.queries = 20,
       .keys = 70,
       .d = 290,
       .dv = 301,
       .sinks = true,
       .shift = 1,
       .gradients = false},
      {.batch = 2,
       .queries = 40,
       .keys = 70,
       .d = 400,
       .dv = 64,
       .packed = true,
       .softcap = 3.0,
       .gradients = false},
      {.queries = 40, .keys = 70, .heads = 2, .d = 64, .dv = 320, .device = 6, .gradients = false},
      {.queries = 70,
       .keys = 70,
       .heads = 2,
       .d = 512,
       .dv = 512,
       .bias = 1,
       .device = 4,
       .gradients = false},
      {.dtype = DType::f16,
       .queries = 40,
       .keys = 50,
       .d = 512,
       .dv = 512,
       .right = 0,
       .device = 6,
       .gradients = false},
      {.dtype = DType::f32, .queries = 1, .keys = 1},
      {.dtype = DType::f32, .queries = 150, .keys = 200, .heads = 2, .right = 0},
      {.dtype = DType::f32,
       .queries = 150,
       .keys = 140,
       .d = 40,
       .dv = 24,
       .left = 30,
       .right = 17},
      {.dtype = DType::f32,
       .queries = 33,
       .keys = 65,
       .heads = 6,
       .kv_heads = 2,
       .d = 96,
       .dv = 128},
      {.dtype = DType::f32, .queries = 20, .keys = 70, .d = 41, .dv = 23, .shift = 1},
      {.dtype = DType::f32, .queries = 30, .keys = 40, .d = 192, .dv = 256, .right = 0},
      {.dtype = DType::f32, .queries = 30, .keys = 40, .d = 320, .dv = 290, .right = 0},
      {.dtype = DType::f32,
       .batch = 4,
       .queries = 70,
       .keys = 90,
       .right = 0,
       .packed = true,
       .used = true},
      {.dtype = DType::f32, .batch = 3, .queries = 70, .keys = 90, .d = 32, .used = true},
      {.dtype = DType::f32,
       .batch = 2,
       .queries = 70,
       .keys = 90,
       .heads = 2,
       .d = 32,
       .left = 5,
       .right = 0,
       .prefix = true,
       .slopes = true},
      {.dtype = DType::f32, .batch = 2, .queries = 70, .keys = 140, .heads = 2, .d = 32, .bias = 1},
      {.dtype = DType::f32, .batch = 2, .queries = 70, .keys = 91, .heads = 2, .d = 32, .bias = 2},
      {.dtype = DType::f32,
       .batch = 2,
       .queries = 70,
       .keys = 91,
       .heads = 2,
       .d = 32,
       .bias = 3,
       .softcap = 3.0},
      {.dtype = DType::f32, .batch = 2, .queries = 70, .keys = 91, .d = 32, .right = 0, .bias = 4},
      {.dtype = DType::f32,
       .queries = 300,
       .keys = 260,
       .heads = 2,
       .d = 32,
       .dv = 32,
       .blocks = 64},
      {.dtype = DType::f32,
       .queries = 70,
       .keys = 90,
       .heads = 2,
       .d = 32,
       .sinks = true,
       .softcap = 3.0,
       .dropout = 0.3},
      {.dtype = DType::f32, .queries = 70, .keys = 0, .sinks = true},
  };
  std::vector<Case> cases;
  for (const AttentionCase& c : kCases) {
    if (!FASTKERN_EMULATE_F16 && c.dtype == DType::f16) continue;
    if (!options.wants(name_of(c.dtype), {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
      continue;
    cases.push_back({c.text(), [c] { check_attention(c); }});
  }
  return cases;
}

}  // namespace emulator
