// SPDX-License-Identifier: Apache-2.0
// cuda::attention_fp8 in the emulator against cpu::.
#include "fastkern/attention_fp8.h"

#include <bit>
#include <cmath>
#include <sstream>

#include "fastkern/attention_mask.h"
#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;

struct Fp8Case {
  std::int64_t batch = 1, queries = 1, keys = 1, heads = 1, kv_heads = 1, d = 64, dv = 64;
  std::int64_t left = -1, right = -1;
  bool top_left = false, packed = false, used = false, sinks = false, negative = false;
  bool scales = true;
  int device = 0;
  double sink = 0.0;  // about which sinks are

  std::string text() const {
    std::ostringstream out;
    out << "attention_fp8 B" << batch << " S" << queries << " T" << keys << " H" << heads << "/"
        << kv_heads << " D" << d << "/" << dv << " window " << left << "," << right
        << (top_left ? " top-left" : "") << (packed ? " packed" : "") << (used ? " used" : "")
        << (sinks ? " sinks " + std::to_string(sink) : "") << (negative ? " negative" : "")
        << (scales ? "" : " no scales") << " device " << device;
    return out.str();
  }
};

Tensor dense_tensor(DType dtype, const Sizes& sizes) {
  Sizes strides(sizes.size());
  std::int64_t next = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) strides[i] = next, next *= sizes[i];
  return Tensor(dtype, sizes, strides);
}

struct Fp8Call {
  explicit Fp8Call(const Fp8Case& c);
  NamedTensors tensors() {
    return {{"q", &q},
            {"k", &k},
            {"v", &v},
            {"sinks", &sinks},
            {"out", &out},
            {"lse", &lse},
            {"q_scale", &q_scale},
            {"k_scale", &k_scale},
            {"v_scale", &v_scale},
            {"workspace", &workspace}};
  }
  /// NaN wherever no query of a sequence may look.
  void poison(const Fp8Case& c);

  Tensor q, k, v, sinks, out, lse, q_scale, k_scale, v_scale, workspace;
  std::vector<std::int32_t> start_q, start_k, used_q, used_k;
  AttentionFp8Fwd args;
};

Fp8Call::Fp8Call(const Fp8Case& c) {
  unsigned turn = 0;
  const auto tensor = [&](DType dtype, const Sizes& sizes, double mean = 0.0) {
    Tensor t = dense_tensor(dtype, sizes);
    t.fill(++turn, mean);
    return t;
  };
  const auto operand = [&](DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t width) {
    return tensor(
        dtype, c.packed ? Sizes{c.batch * rows, heads, width} : Sizes{c.batch, rows, heads, width});
  };
  q = operand(DType::f8e4m3, c.queries, c.heads, c.d);
  k = operand(DType::f8e4m3, c.keys, c.kv_heads, c.d);
  v = operand(DType::f8e4m3, c.keys, c.kv_heads, c.dv);
  out = operand(DType::bf16, c.queries, c.heads, c.dv);
  lse = tensor(DType::f32,
               c.packed ? Sizes{c.heads, c.batch * c.queries} : Sizes{c.batch, c.heads, c.queries});
  out.allow_writes(), lse.allow_writes();
  AttentionFwd& f = args.fwd;
  f.op = "fastkern::flash_attn_fp8";
  f.q = q.ref(), f.k = k.ref(), f.v = v.ref(), f.out = out.ref(), f.lse = lse.ref();
  f.scale = 1.0 / std::sqrt(static_cast<double>(c.d));
  f.mask.left = c.left, f.mask.right = c.right, f.mask.top_left = c.top_left;
  if (c.sinks) sinks = tensor(DType::f32, {c.heads}, c.sink), f.sinks = sinks.ref();
  if (c.scales) {
    q_scale = tensor(DType::f32, {c.batch, c.kv_heads}, c.negative ? -6.0 : 6.0);
    k_scale = tensor(DType::f32, {c.batch, c.kv_heads}, 6.0);
    v_scale = tensor(DType::f32, {c.batch, c.kv_heads}, 6.0);
    for (std::int64_t i = 0; i < k_scale.numel(); ++i) k_scale.set(i, k_scale.get(i) / 12.0f);
    args.q_scale = q_scale.ref(), args.k_scale = k_scale.ref(), args.v_scale = v_scale.ref();
  }
  // Entries of lengths from nothing to all of theirs, and a tail of no entry.
  for (std::int64_t b = 0; b <= c.batch; ++b) {
    start_q.push_back(static_cast<std::int32_t>(b < c.batch ? b * c.queries
                                                            : c.batch * c.queries - c.queries / 3));
    start_k.push_back(static_cast<std::int32_t>(b * c.keys));
    used_q.push_back(static_cast<std::int32_t>(b % 2 ? c.queries - 3 : 2 * c.queries));
    used_k.push_back(static_cast<std::int32_t>(b % 3 == 2 ? 0 : c.keys - 5 * b));
  }
  if (c.packed) {
    f.lengths.batch = c.batch;
    f.lengths.start_q = start_q.data(), f.lengths.start_k = start_k.data();
  }
  if (c.used) f.lengths.used_q = used_q.data(), f.lengths.used_k = used_k.data();
  poison(c);
  const std::size_t bytes = cuda::attention_fp8_workspace(args);
  workspace = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
  for (std::int64_t i = 0; i < workspace.numel(); ++i) {
    workspace.set(i, std::bit_cast<float>(0x7f7f7f7f));  // each byte NaN
  }
  workspace.allow_writes();
  args.workspace = workspace.ref().data, args.workspace_size = bytes;
}

void Fp8Call::poison(const Fp8Case& c) {
  const std::int64_t rows_q = c.batch * c.queries, rows_k = c.batch * c.keys;
  std::vector<bool> of_q(rows_q), of_k(rows_k);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const auto at = attention_sequence<std::int64_t>(
        args.fwd.lengths, b, c.packed ? rows_q : c.queries, c.packed ? rows_k : c.keys);
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
  spoil(q, of_q), spoil(k, of_k), spoil(v, of_k);
}

void check_fp8(const Fp8Case& c) {
  Fp8Call found(c), expected(c), sizes(c);
  if (!run_guarded(found.tensors(), [&] { cuda::attention_fp8(found.args, {nullptr, c.device}); }))
    return;
  cpu::attention_fp8(expected.args);
  // Of values without signs: what a share of every weight may make.
  for (std::int64_t i = 0; i < sizes.v.numel(); ++i) sizes.v.set(i, std::abs(sizes.v.get(i)));
  cpu::attention_fp8(sizes.args);
  const auto fail = [](const char* name, std::int64_t i, double is, double should) {
    std::ostringstream why;
    why << "element " << i << ": " << is << ", expected " << should;
    fail_case(name, why.str());
  };
  for (std::int64_t i = 0; i < found.out.numel(); ++i) {
    const double a = found.out.get(i), b = expected.out.get(i);
    // Weights are rounded to four bits, half of the last one at most is lost, the small ones more.
    if (!(std::abs(a - b) <= std::abs(sizes.out.get(i)) * (1.0 / 16 + 1.0 / 64))) {
      return fail("out", i, a, b);
    }
  }
  for (std::int64_t i = 0; i < found.lse.numel(); ++i) {
    const double a = found.lse.get(i), b = expected.lse.get(i);
    if (!(a == b || std::abs(a - b) <= 1e-4 + 1e-5 * std::abs(b))) return fail("lse", i, a, b);
  }
}

}  // namespace

std::vector<Case> attention_fp8_cases(const Options& options) {
  if (!options.wants("fp8", {"fwd", "bwd", "quant", "group", "attention", "fp8", "rms", "layer"}))
    return {};
  const Fp8Case kCases[] = {
      {.queries = 1, .keys = 1},
      {.queries = 64, .keys = 128, .d = 128, .dv = 128, .scales = false},
      {.queries = 130, .keys = 200, .heads = 2, .d = 128, .dv = 128},
      {.queries = 130, .keys = 200, .heads = 2, .negative = true},
      {.queries = 200, .keys = 130, .d = 256, .dv = 256, .right = 0},
      {.queries = 64, .keys = 300, .d = 48, .dv = 80, .left = 40, .right = 0},
      {.queries = 150, .keys = 140, .d = 16, .dv = 160, .left = 30, .right = 17},
      {.queries = 70, .keys = 0, .sinks = true},
      {.queries = 70, .keys = 90, .heads = 2, .right = 0, .sinks = true},
      {.queries = 70, .keys = 90, .left = 9, .right = 0, .sinks = true, .sink = 500.0},
      {.queries = 70, .keys = 90, .right = 0, .sinks = true, .sink = -1e30},
      // several blocks of keys and tiles a block of threads
      {.queries = 300, .keys = 700, .heads = 2, .d = 128, .dv = 128, .device = 1},
      {.queries = 300, .keys = 900, .heads = 2, .device = 1},
      {.queries = 200, .keys = 500, .d = 256, .dv = 256, .device = 1},
      {.batch = 2,
       .queries = 260,
       .keys = 400,
       .heads = 6,
       .kv_heads = 2,
       .d = 128,
       .dv = 128,
       .right = 0,
       .device = 2},
      {.queries = 420, .keys = 700, .heads = 2, .left = 200, .right = 30, .sinks = true},
      {.queries = 129, .keys = 127, .right = 0, .top_left = true},
      {.batch = 3, .queries = 70, .keys = 290, .heads = 2, .used = true, .device = 1},
      // keys whose blocks of 96 reach beyond a multiple of 128
      {.batch = 2, .queries = 70, .keys = 133, .d = 128, .dv = 128, .used = true},
      {.batch = 3, .queries = 70, .keys = 127, .d = 96, .dv = 128, .packed = true, .used = true},
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
       .queries = 90,
       .keys = 170,
       .heads = 2,
       .d = 256,
       .dv = 240,
       .left = 100,
       .packed = true,
       .device = 1},
  };
  std::vector<Case> cases;
  for (const Fp8Case& c : kCases) cases.push_back({c.text(), [c] { check_fp8(c); }});
  return cases;
}

}  // namespace emulator
