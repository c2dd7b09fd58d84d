// SPDX-License-Identifier: Apache-2.0
// Attention on Hopper: against plain double loops, and against the kernel that runs on every GPU,
// which a prefix of 0 asks for. Skipped elsewhere. `--bench` prints rates instead.
#include "attention_cases.h"
#include "attention_hopper_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

/// `lends`: memory, by which tiles are given out as they are asked for.
AttentionOutputs forward(AttentionProblem p, bool portable, int repeats = 1, bool lends = false) {
  OnDevice place;
  AttentionOutputs out = blank_attention(p);
  if (portable) p.c.prefix.assign(p.c.batch, 0);
  AttentionFwd call = attention_fwd(p, out, place);
  DeviceTensor counter(Tensor(DType::f32, {1}));
  if (lends) call.workspace = counter.ref().data, call.workspace_size = sizeof(int);
  const char* const why = cuda::attention_portable_because(call, {});
  EXPECT_EQ(why == nullptr, !portable) << (why ? why : "");
  for (int i = 0; i < repeats; ++i) cuda::attention(call, {});
  cuda_ok(cudaDeviceSynchronize());
  EXPECT_TRUE(counter.download().gaps_intact()) << "workspace";
  for (Tensor* t : {&out.out, &out.lse}) *t = place.where[t]->download();
  return out;
}

Tensor magnitudes(const Tensor& t) {
  Tensor out(t.dtype(), sizes_of(t));
  for (std::int64_t i = 0; i < t.numel(); ++i) out.set(i, std::abs(t.get(i)));
  return out;
}

/// The same to within what rounding of probabilities and of results may do to either. `of`: results
/// for values without signs.
testing::AssertionResult agree(const AttentionOutputs& a, const AttentionOutputs& b,
                               const AttentionOutputs& of, DType dtype) {
  const double unit = rounding_of(dtype), smallest = dtype == DType::f16 ? 0x1p-22 : 1e-30;
  for (std::int64_t i = 0; i < a.out.numel(); ++i) {
    const double x = a.out.get(i), y = b.out.get(i);
    const double bound = 2.0 * unit * (std::abs(y) + of.out.get(i)) + smallest;
    if (!(std::abs(x - y) <= bound)) {
      return testing::AssertionFailure() << "out " << i << " (row " << i / sizes_of(a.out).back()
                                         << ", column " << i % sizes_of(a.out).back() << ") is "
                                         << x << ", portable " << y << " within " << bound;
    }
  }
  for (std::int64_t i = 0; i < a.lse.numel(); ++i) {
    const double x = a.lse.get(i), y = b.lse.get(i);
    if (!(x == y || std::abs(x - y) <= 1e-5 * (4.0 + std::abs(y)))) {
      return testing::AssertionFailure() << "lse " << i << " is " << x << ", portable " << y;
    }
  }
  return testing::AssertionSuccess();
}

class AttentionHopper : public HopperAttentionTest {
 protected:
  /// Against double loops.
  void expect_right(const AttentionCase& c) {
    const AttentionProblem p = announced(c);
    SCOPED_TRACE(p.text());
    const AttentionOutputs found = forward(p, false);
    AttentionProblem clean = make_attention(c, GetParam());
    expect_forward(found, attention_reference(clean), {.noise = 6e-6, .tiles = true});
    EXPECT_TRUE(found.out.gaps_intact()) << "out";
    EXPECT_TRUE(found.lse.gaps_intact()) << "lse";
  }
  /// Against the portable kernel, and again against itself.
  void expect_agrees(const AttentionCase& c) {
    AttentionProblem p = announced(c);
    SCOPED_TRACE(p.text());
    const AttentionOutputs found = forward(p, false);
    const AttentionOutputs expected = forward(p, true);
    EXPECT_TRUE(found.out.gaps_intact()) << "out";
    EXPECT_TRUE(found.lse.gaps_intact()) << "lse";
    expect_same(forward(p, false, 2), found, {"out", "lse"});
    expect_same(forward(p, false, 2, true), found, {"out", "lse"});
    p.v = magnitudes(p.v);
    EXPECT_TRUE(agree(found, expected, forward(p, true), GetParam()));
  }
};

INSTANTIATE_TEST_SUITE_P(Types, AttentionHopper, testing::Values(DType::bf16, DType::f16),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

constexpr std::int64_t kColumns[] = {64, 96, 128, 192, 256};

AttentionCase sized(std::int64_t queries, std::int64_t keys, std::int64_t d) {
  return {.name = "sized",
          .batch = 1,
          .heads = 2,
          .kv_heads = 1,
          .queries = queries,
          .keys = keys,
          .d = d,
          .dv = d};
}

/// From the least that can go wrong upwards.
TEST_P(AttentionHopper, OneBlock) {
  for (const std::int64_t d : {128, 64, 256, 96, 192}) {
    AttentionCase c = sized(64, 64, d);
    c.heads = 1;
    expect_right(c);
    if (HasFailure()) return;
    expect_right(sized(128, 128, d));
    expect_right(sized(200, 300, d));
    if (HasFailure()) return;
  }
}

TEST_P(AttentionHopper, Columns) {
  for (const std::int64_t d : {8, 24, 40, 64, 72, 96, 104, 128, 160, 192, 200, 256}) {
    AttentionCase c = sized(131, 197, d);
    expect_right(c);
    c.dv = 40, c.right = 0;
    expect_right(c);
    c.d = 24, c.dv = d, c.right = -1;
    expect_right(c);
  }
  AttentionCase mla = sized(300, 400, 192);
  mla.dv = 128;
  expect_right(mla);
}

/// Those of the portable kernel's cases that this one takes, with head dimensions of both kinds.
TEST_P(AttentionHopper, Options) {
  for (AttentionCase c : attention_cases()) {
    const bool taken =
        c.scale >= 0.0 && c.prefix.empty() && !c.bias && c.block_size == 0 && c.dropout == 0.0;
    if (taken) expect_right(c);
  }
}

TEST_P(AttentionHopper, Sizes) {
  const std::int64_t sizes[] = {1, 63, 64, 65, 127, 129, 191, 193, 1000};
  int n = 0;
  for (const std::int64_t queries : sizes) {
    for (const std::int64_t keys : sizes) {
      AttentionCase c = sized(queries, keys, kColumns[n++ % 5]);
      expect_agrees(c);
      c.right = 0;
      expect_agrees(c);
      c.top_left = true;
      expect_agrees(c);
      c.top_left = false, c.left = queries / 3, c.right = n % 2 ? 0 : 40;
      expect_agrees(c);
      if (HasFailure()) return;
    }
  }
}

/// Queries of several heads in a tile.
TEST_P(AttentionHopper, FewQueries) {
  int n = 0;
  for (const std::int64_t queries : {1, 7, 16, 33, 100}) {
    AttentionCase c = sized(queries, 333, kColumns[n++ % 5]);
    c.batch = 2, c.heads = 16, c.kv_heads = n % 2 ? 2 : 1;
    expect_right(c);
    c.right = 0, c.slope_dims = 2, c.sinks = DType::f32;
    expect_right(c);
    c.heads = 12, c.kv_heads = 2, c.left = 100, c.softcap = 5.0, c.slope_dims = 0;
    c.used_k = {333, 150};
    expect_right(c);
    if (HasFailure()) return;
  }
  AttentionCase c = sized(0, 0, 128);
  c.heads = 8, c.batch = 3, c.right = 0;
  c.start_q = {2, 3, 20, 41}, c.start_k = {0, 150, 160, 700};
  c.queries = 44, c.keys = 701;
  expect_right(c);
  c.d = c.dv = 256;
  expect_right(c);
}

/// More tiles than multiprocessors, scores that grow late, sequences of many blocks.
TEST_P(AttentionHopper, ManyTiles) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(1000, 1111, d);
    c.batch = 3, c.heads = 24, c.kv_heads = 8;
    expect_agrees(c);
    c.right = 0;
    expect_agrees(c);
    c.scale = 0.6, c.sinks = DType::f32;
    expect_agrees(c);
    c.left = 130;
    expect_agrees(c);
    if (HasFailure()) return;
  }
}

/// So many, of so many heads, that 128 columns have tiles of 192 queries. Scores that grow beyond
/// what a half holds.
TEST_P(AttentionHopper, ManyKeys) {
  AttentionCase c = sized(380, 2130, 128);
  c.heads = 64, c.kv_heads = 2;
  expect_agrees(c);
  c.scale = 1.5;
  expect_agrees(c);
  c.keys = 8300, c.right = 0, c.d = 104, c.sinks = DType::f32;
  expect_agrees(c);
  c.left = 4200, c.right = 30, c.scale = 0.1;
  expect_agrees(c);
}

TEST_P(AttentionHopper, Packed) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(0, 0, d);
    c.heads = 6, c.kv_heads = 2, c.batch = 40;
    c.start_q = {3}, c.start_k = {0};
    for (int b = 0; b < 40; ++b) {
      c.start_q.push_back(c.start_q.back() + b * 37 % 11 * (b % 5 ? 9 : 64));
      c.start_k.push_back(c.start_k.back() + b * 29 % 7 * (b % 3 ? 25 : 128));
      c.used_k.push_back(b % 4 ? 100000 : b * 13);
    }
    c.queries = c.start_q.back() + 5, c.keys = c.start_k.back() + 2;
    expect_agrees(c);
    c.right = 0;
    expect_agrees(c);
    c.used_k.clear(), c.left = 70, c.right = 10;
    expect_agrees(c);
    if (HasFailure()) return;
  }
}

// ---- rates
// ---------------------------------------------------------------------------------------------------------

double bench_case(std::int64_t d, std::int64_t s, bool causal, bool portable) {
  constexpr std::int64_t kTokens = 16384, kWidth = 2048;
  const std::int64_t b = kTokens / s, h = kWidth / d, count = kTokens * kWidth;
  static DeviceArray<std::uint16_t>* memory[4] = {};
  static DeviceArray<float>* lse = nullptr;
  static DeviceArray<std::int32_t>* zeros = nullptr;
  if (!lse) {
    lse = new DeviceArray<float>(count / 8);
    zeros = new DeviceArray<std::int32_t>(kTokens);
    for (int i = 0; i < 4; ++i) {
      memory[i] = new DeviceArray<std::uint16_t>(static_cast<std::size_t>(count));
      fill_normal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(memory[i]->data()), count, i);
    }
  }
  const auto ref = [&](int i) {
    return TensorRef{memory[i]->data(), DType::bf16, 4, {b, s, h, d}, {s * h * d, h * d, d, 1}};
  };
  const AttentionFwd call{
      .q = ref(0),
      .k = ref(1),
      .v = ref(2),
      .out = ref(3),
      .lse = {lse->data(), DType::f32, 3, {b, h, s}, {h * s, s, 1}},
      .scale = 1.0 / std::sqrt(static_cast<double>(d)),
      .mask = {.right = causal ? 0 : -1, .prefix = portable ? zeros->data() : nullptr}};
  const double ms = median_ms([&] { cuda::attention(call, {}); });
  const double flops = 4.0 * b * h * s * s * d * (causal ? 0.5 : 1.0);
  return flops / (ms * 1e9);
}

}  // namespace
}  // namespace fastkern

int main(int argc, char** argv) {
  return fastkern::test::tests_or_rates(argc, argv, {64, 128, 256}, "", fastkern::bench_case);
}
