// SPDX-License-Identifier: Apache-2.0
// Gradients of attention on Hopper: against plain double loops, and against the kernel that runs on
// every GPU, which a prefix of 0 asks for. out and lse are those of that kernel. Skipped elsewhere.
// `--bench` prints rates instead.
#include <array>
#include <span>

#include "attention_cases.h"
#include "attention_hopper_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

AttentionOutputs backward(AttentionProblem p, bool portable, int repeats = 1) {
  OnDevice place;
  AttentionOutputs out = blank_attention(p);
  const std::vector<std::int32_t> zeros(p.c.batch, 0);
  p.c.prefix = zeros;
  const AttentionBwd other = attention_bwd(p, out, place);
  cuda::attention(other.fwd, {});
  cuda_ok(cudaDeviceSynchronize());
  AttentionBwd call = other;
  if (!portable) call.fwd.mask.prefix = nullptr;
  call.workspace_size = cuda::attention_bwd_workspace(call, {});
  DeviceTensor workspace(Tensor(DType::f32, {static_cast<std::int64_t>(call.workspace_size / 4)}));
  call.workspace = workspace.ref().data;
  const char* const why = cuda::attention_bwd_portable_because(call, {});
  EXPECT_EQ(why == nullptr, !portable) << (why ? why : "");
  for (int i = 0; i < repeats; ++i) cuda::attention_bwd(call, {});
  cuda_ok(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.download().gaps_intact()) << "workspace";
  for (const auto& [name, t] : out.named()) {
    if (place.where.count(t)) *t = place.where[t]->download();
  }
  return out;
}

/// The same to within what rounding of p and ds may do to sums of as many terms as these.
testing::AssertionResult agree(const char* name, const Tensor& a, const Tensor& b) {
  const std::int64_t columns = sizes_of(a).back();
  const double unit = rounding_of(a.dtype());
  double all = 0.0;
  for (std::int64_t i = 0; i < b.numel(); ++i) all += b.get(i) * b.get(i);
  all = std::sqrt(all / std::max<std::int64_t>(b.numel(), 1));
  for (std::int64_t first = 0; first < a.numel(); first += columns) {
    double row = 0.0;
    for (std::int64_t c = 0; c < columns; ++c) row += b.get(first + c) * b.get(first + c);
    row = std::sqrt(row / columns);
    for (std::int64_t c = 0; c < columns; ++c) {
      const double x = a.get(first + c), y = b.get(first + c);
      const double bound = unit * (2.0 * std::abs(y) + 6.0 * row + all) + 1e-6;
      if (!(std::abs(x - y) <= bound)) {
        return testing::AssertionFailure()
               << name << " row " << first / columns << " column " << c << " is " << x
               << ", portable " << y << " within " << bound;
      }
    }
  }
  return testing::AssertionSuccess();
}

class AttentionHopperBwd : public HopperAttentionTest {
 protected:
  /// Against double loops.
  void expect_right(const AttentionCase& c) {
    const AttentionProblem p = announced(c);
    SCOPED_TRACE(p.text());
    const AttentionOutputs found = backward(p, false);
    const AttentionProblem clean = make_attention(c, GetParam());
    expect_attention(found, attention_reference(clean), {.noise = 6e-6, .tiles = true});
    expect_guards(found);
  }
  /// Against the portable kernel, and again against itself.
  void expect_agrees(const AttentionCase& c) {
    const AttentionProblem p = announced(c);
    SCOPED_TRACE(p.text());
    const AttentionOutputs found = backward(p, false);
    const AttentionOutputs expected = backward(p, true);
    expect_guards(found);
    expect_same(backward(p, false, 3), found);
    EXPECT_TRUE(agree("dq", found.dq, expected.dq));
    EXPECT_TRUE(agree("dk", found.dk, expected.dk));
    EXPECT_TRUE(agree("dv", found.dv, expected.dv));
    expect_same(found, expected, {"dsinks"});
  }

  void one_block(std::span<const std::int64_t> columns);
  void columns(std::span<const std::int64_t> columns, std::int64_t other);
  void options(std::span<const std::pair<std::int64_t, std::int64_t>> columns);
  void sizes(std::span<const std::int64_t> columns);
  void many_blocks(std::span<const std::int64_t> columns);
  void packed(std::span<const std::int64_t> columns);
  void same_bits_again(std::span<const std::int64_t> columns);
};

INSTANTIATE_TEST_SUITE_P(Types, AttentionHopperBwd, testing::Values(DType::bf16, DType::f16),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

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

/// Head dimensions that dq is added up for in memory, and those that have a kernel for it.
constexpr std::int64_t kNarrow[] = {128, 64}, kWide[] = {256, 192};
using Columns = std::span<const std::int64_t>;

/// From the least that can go wrong upwards: a block, several of queries, several of keys.
void AttentionHopperBwd::one_block(Columns columns) {
  for (const std::int64_t d : columns) {
    AttentionCase c = sized(64, 64, d);
    c.heads = 1;
    expect_right(c);
    if (HasFailure()) return;
    c.queries = 400;
    expect_right(c);
    if (HasFailure()) return;
    c.queries = 64, c.keys = 300;
    expect_right(c);
    if (HasFailure()) return;
    expect_right(sized(200, 300, d));
    if (HasFailure()) return;
  }
}
TEST_P(AttentionHopperBwd, OneBlock) { one_block(kNarrow); }
TEST_P(AttentionHopperBwd, WideOneBlock) { one_block(kWide); }

void AttentionHopperBwd::columns(Columns columns, std::int64_t other) {
  for (const std::int64_t d : columns) {
    AttentionCase c = sized(131, 197, d);
    expect_right(c);
    c.dv = other, c.right = 0;
    expect_right(c);
    c.d = other - 16, c.dv = d, c.right = -1;
    expect_right(c);
  }
}
TEST_P(AttentionHopperBwd, Columns) {
  columns(std::to_array<std::int64_t>({8, 24, 40, 64, 72, 96, 104, 128}), 40);
}
TEST_P(AttentionHopperBwd, WideColumns) {
  columns(std::to_array<std::int64_t>({136, 192, 200, 256}), 40);
  columns(std::to_array<std::int64_t>({168, 192}), 128);
}

/// Those of the portable kernel's cases that this one takes.
void AttentionHopperBwd::options(std::span<const std::pair<std::int64_t, std::int64_t>> columns) {
  for (AttentionCase c : attention_cases()) {
    const bool taken =
        c.scale >= 0.0 && c.prefix.empty() && !c.bias && c.block_size == 0 && c.dropout == 0.0;
    if (!taken) continue;
    for (const auto& [d, dv] : columns) {
      if (d > 0) c.d = d, c.dv = dv;
      expect_right(c);
    }
  }
}
TEST_P(AttentionHopperBwd, Options) {
  options(std::to_array<std::pair<std::int64_t, std::int64_t>>({{0, 0}, {72, 104}}));
}
TEST_P(AttentionHopperBwd, WideOptions) {
  options(std::to_array<std::pair<std::int64_t, std::int64_t>>({{192, 128}, {184, 240}}));
}

void AttentionHopperBwd::sizes(Columns columns) {
  const std::int64_t sizes[] = {1, 63, 64, 65, 127, 129, 191, 193, 1000};
  std::size_t n = 0;
  for (const std::int64_t queries : sizes) {
    for (const std::int64_t keys : sizes) {
      AttentionCase c = sized(queries, keys, columns[n++ % columns.size()]);
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
TEST_P(AttentionHopperBwd, Sizes) { sizes(kNarrow); }
TEST_P(AttentionHopperBwd, WideSizes) { sizes(kWide); }

/// More blocks than multiprocessors, which wait for each other's turns.
void AttentionHopperBwd::many_blocks(Columns columns) {
  for (const std::int64_t d : columns) {
    AttentionCase c = sized(500, 900, d);
    c.batch = 2, c.heads = 24, c.kv_heads = 12;
    expect_agrees(c);
    c.right = 0;
    expect_agrees(c);
    c.scale = 0.6, c.sinks = DType::f32;
    expect_agrees(c);
    c.left = 130;
    expect_agrees(c);
    c = sized(4096, 4096, d);
    c.right = 0;
    expect_agrees(c);
    if (HasFailure()) return;
  }
}
TEST_P(AttentionHopperBwd, ManyBlocks) { many_blocks(kNarrow); }
TEST_P(AttentionHopperBwd, WideManyBlocks) { many_blocks(kWide); }

void AttentionHopperBwd::packed(Columns columns) {
  for (const std::int64_t d : columns) {
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
TEST_P(AttentionHopperBwd, Packed) { packed(std::to_array<std::int64_t>({128, 64, 96})); }
TEST_P(AttentionHopperBwd, WidePacked) { packed(kWide); }

/// A race would show in the bits, sooner or later.
void AttentionHopperBwd::same_bits_again(Columns columns) {
  for (const std::int64_t d : columns) {
    AttentionCase c = sized(1500, 1500, d);
    c.batch = 2, c.heads = 8, c.kv_heads = 4, c.right = 0;
    const AttentionProblem p = announced(c);
    const AttentionOutputs first = backward(p, false);
    for (int i = 0; i < 20; ++i) {
      expect_same(backward(p, false, 50), first);
      if (HasFailure()) return;
    }
  }
}
TEST_P(AttentionHopperBwd, SameBitsAgain) { same_bits_again(kNarrow); }
TEST_P(AttentionHopperBwd, WideSameBitsAgain) { same_bits_again(kWide); }

double bench_case(std::int64_t d, std::int64_t s, bool causal, bool portable) {
  constexpr std::int64_t kTokens = 16384, kWidth = 2048, kCount = kTokens * kWidth;
  constexpr std::size_t kMemory = kCount * 5 + (std::size_t{1} << 30);
  const std::int64_t b = kTokens / s, h = kWidth / d;
  static DeviceArray<std::uint16_t>* memory[8] = {};
  static DeviceArray<float>* lse = nullptr;
  static DeviceArray<std::int32_t>* zeros = nullptr;
  static DeviceArray<char>* workspace = nullptr;
  if (!lse) {
    lse = new DeviceArray<float>(kCount / 8);
    zeros = new DeviceArray<std::int32_t>(kTokens);
    workspace = new DeviceArray<char>(kMemory);
    for (int i = 0; i < 8; ++i) {
      memory[i] = new DeviceArray<std::uint16_t>(static_cast<std::size_t>(kCount));
      fill_normal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(memory[i]->data()), kCount, i);
    }
  }
  const auto ref = [&](int i) {
    return TensorRef{memory[i]->data(), DType::bf16, 4, {b, s, h, d}, {s * h * d, h * d, d, 1}};
  };
  AttentionBwd call{.fwd = {.q = ref(0),
                            .k = ref(1),
                            .v = ref(2),
                            .out = ref(3),
                            .lse = {lse->data(), DType::f32, 3, {b, h, s}, {h * s, s, 1}},
                            .scale = 1.0 / std::sqrt(static_cast<double>(d)),
                            .mask = {.right = causal ? 0 : -1, .prefix = zeros->data()}},
                    .dout = ref(4),
                    .dq = ref(5),
                    .dk = ref(6),
                    .dv = ref(7)};
  cuda::attention(call.fwd, {});
  if (!portable) call.fwd.mask.prefix = nullptr;
  call.workspace = workspace->data();
  call.workspace_size = cuda::attention_bwd_workspace(call, {});
  if (call.workspace_size > kMemory) return 0.0;
  const double ms = median_ms([&] { cuda::attention_bwd(call, {}); });
  return 10.0 * b * h * s * s * d * (causal ? 0.5 : 1.0) / (ms * 1e9);
}

}  // namespace
}  // namespace fastkern

int main(int argc, char** argv) {
  return fastkern::test::tests_or_rates(argc, argv, {64, 128, 192, 256}, ", backward",
                                        fastkern::bench_case);
}
