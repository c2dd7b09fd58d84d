// SPDX-License-Identifier: Apache-2.0
// Attention of 8-bit operands on CUDA, against plain double loops. Skipped without a device of
// capability 9.0. `--bench` prints rates instead, `--variants` those of other tiles.
#include "attention/attention_hopper_fp8_launch.cuh"
#include "attention_hopper_support.cuh"
#include "fastkern/attention_fp8.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

struct Fp8Problem {
  AttentionProblem p;
  Tensor q_scale, k_scale, v_scale;
};

Fp8Problem make_fp8(const AttentionCase& c) {
  Fp8Problem made{make_attention(c, DType::f8e4m3), {}, {}, {}};
  const auto scale = [&](double first, double step) {
    Tensor t(DType::f32, {c.batch, c.kv_heads});
    for (std::int64_t i = 0; i < t.numel(); ++i)
      t.set(i, first + step * static_cast<double>(i % 7));
    return t;
  };
  made.q_scale = scale(0.7, 0.11), made.k_scale = scale(1.2, -0.09), made.v_scale = scale(3.0, 0.5);
  return made;
}

AttentionOutputs forward(Fp8Problem made, int repeats = 1) {
  OnDevice place;
  AttentionOutputs out = blank_attention(made.p);
  out.out = Tensor(DType::bf16, sizes_of(made.p.dout));
  AttentionFp8Fwd call{.fwd = attention_fwd(made.p, out, place),
                       .q_scale = place(made.q_scale),
                       .k_scale = place(made.k_scale),
                       .v_scale = place(made.v_scale)};
  call.fwd.op = "test";
  const std::size_t bytes = cuda::attention_fp8_workspace(call);
  const DeviceArray<unsigned char> workspace(bytes + 256, 0x7f);  // NaN
  call.workspace = workspace.data(), call.workspace_size = bytes;
  for (int i = 0; i < repeats; ++i) cuda::attention_fp8(call, {});
  cuda_ok(cudaDeviceSynchronize());
  for (Tensor* t : {&out.out, &out.lse}) *t = place.where[t]->download();
  const std::vector<unsigned char> after = workspace.download();
  for (std::size_t i = bytes; i < after.size(); ++i) EXPECT_EQ(after[i], 0x7f) << "workspace " << i;
  return out;
}

/// The same in f32 with the scales multiplied in; values without signs if they are not wanted.
AttentionProblem as_floats(const Fp8Problem& made, bool value_signs) {
  AttentionProblem p = made.p;
  const AttentionCase& c = p.c;
  p.dtype = DType::f32;
  const auto floats = [&](const Tensor& from, const Tensor& scales, bool of_queries, bool signs) {
    Tensor to(DType::f32, sizes_of(from));
    const std::int64_t width = sizes_of(from).back(), heads = of_queries ? c.heads : c.kv_heads;
    const std::int64_t length = of_queries ? c.queries : c.keys;
    const std::vector<std::int32_t>& starts = of_queries ? c.start_q : c.start_k;
    for (std::int64_t i = 0; i < from.numel(); ++i) {
      const std::int64_t h = i / width % heads, row = i / width / heads;
      std::int64_t b = row / std::max<std::int64_t>(length, 1);
      if (c.packed()) {
        for (b = 0; b + 1 < c.batch && row >= starts[b + 1];) ++b;
      }
      const std::int64_t g = of_queries ? h / (c.heads / c.kv_heads) : h;
      const double value = from.get(i) * scales.get(b * c.kv_heads + g);
      to.set(i, signs ? value : std::abs(value));
    }
    return to;
  };
  p.q = floats(made.p.q, made.q_scale, true, true);
  p.k = floats(made.p.k, made.k_scale, false, true);
  p.v = floats(made.p.v, made.v_scale, false, value_signs);
  Tensor dout(DType::f32, sizes_of(p.dout));
  dout.copy_from(p.dout);
  p.dout = dout;
  return p;
}

/// Weights are rounded to four bits: half of the last one each, at most. Small ones lose more.
testing::AssertionResult close_fp8(const Tensor& found, const Bounded& expected,
                                   const Bounded& magnitude) {
  double error = 0.0, size = 0.0;
  for (std::int64_t i = 0; i < found.numel(); ++i) {
    const double x = found.get(i), y = expected.value[i];
    const double bound = magnitude.value[i] * (0x1p-4 + 0x1p-8) + std::abs(y) * 0x1p-8 + 1e-30;
    if (!(std::abs(x - y) <= bound)) {
      const std::int64_t columns = sizes_of(found).back();
      return testing::AssertionFailure()
             << "out " << i << " (row " << i / columns << ", column " << i % columns << ") is " << x
             << ", expected " << y << " within " << bound;
    }
    error += (x - y) * (x - y), size += y * y;
  }
  // Roundings are as often up as down: together they are off by some fiftieth.
  if (error > size * 0.06 * 0.06) {
    return testing::AssertionFailure() << "root mean square of errors " << std::sqrt(error / size);
  }
  return testing::AssertionSuccess();
}

class AttentionFp8 : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped() && cuda::capability(0, "test") != 90) {
      GTEST_SKIP() << "no device of capability 9.0";
    }
  }
  static void expect_right(const AttentionCase& c) { expect_right(make_fp8(c), 0.01); }
  static void expect_right(const Fp8Problem& clean, double lse_error) {
    const AttentionCase& c = clean.p.c;
    Fp8Problem made = clean;
    poison(made.p);
    std::printf("  %s left %lld right %lld%s\n", made.p.text().c_str(),
                static_cast<long long>(c.left), static_cast<long long>(c.right),
                c.top_left ? " top left" : "");
    std::fflush(stdout);
    SCOPED_TRACE(made.p.text());
    const AttentionOutputs found = forward(made);
    const ExpectedAttention expected = attention_reference(as_floats(clean, true));
    const ExpectedAttention magnitude = attention_reference(as_floats(clean, false));
    EXPECT_TRUE(close_fp8(found.out, expected.out, magnitude.out));
    for (std::int64_t i = 0; i < found.lse.numel(); ++i) {
      // Sums of the tensor cores have some 14 bits.
      const double x = found.lse.get(i), y = expected.lse.value[i];
      ASSERT_TRUE(x == y || std::abs(x - y) <= lse_error) << "lse " << i << ": " << x << ", " << y;
    }
    EXPECT_TRUE(found.out.gaps_intact()) << "out";
    EXPECT_TRUE(found.lse.gaps_intact()) << "lse";
    expect_same(forward(made, 3), found, {"out", "lse"});
  }
};

constexpr std::int64_t kColumns[] = {128, 64, 256};

AttentionCase sized(std::int64_t queries, std::int64_t keys, std::int64_t d) {
  return {.name = "sized",
          .batch = 1,
          .heads = 2,
          .kv_heads = 1,
          .queries = queries,
          .keys = keys,
          .d = d,
          .dv = d,
          .dlse = false};
}

/// From the least that can go wrong upwards.
TEST_F(AttentionFp8, OneBlock) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(64, 128, d);
    c.heads = 1;
    expect_right(c);
    if (HasFailure()) return;
    expect_right(sized(128, 100, d));
    expect_right(sized(200, 700, d));
    if (HasFailure()) return;
  }
}

TEST_F(AttentionFp8, Columns) {
  for (const std::int64_t d : {16, 48, 80, 96, 144, 192, 240}) {
    AttentionCase c = sized(131, 197, d);
    expect_right(c);
    c.dv = 48, c.right = 0;
    expect_right(c);
    c.d = 32, c.dv = d, c.right = -1;
    expect_right(c);
    if (HasFailure()) return;
  }
}

TEST_F(AttentionFp8, Masks) {
  int n = 0;
  for (const std::int64_t queries : {1, 65, 129, 300}) {
    for (const std::int64_t keys : {1, 127, 129, 400}) {
      AttentionCase c = sized(queries, keys, kColumns[n++ % 3]);
      c.right = 0;
      expect_right(c);
      c.top_left = true, c.sinks = DType::f32;
      expect_right(c);
      c.top_left = false, c.left = queries / 3, c.right = n % 2 ? 0 : 40;
      expect_right(c);
      if (HasFailure()) return;
    }
  }
}

/// More tiles than multiprocessors give what the entries of the batch give alone.
TEST_F(AttentionFp8, ManyTiles) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(700, 1900, d);
    c.batch = 3, c.heads = 36, c.kv_heads = 12;
    c.right = d == 64 ? -1 : 0;
    const Fp8Problem all = make_fp8(c);
    std::printf("  %s\n", all.p.text().c_str());
    std::fflush(stdout);
    const AttentionOutputs found = forward(all, 2);
    c.batch = 1;
    for (std::int64_t b = 0; b < 3; ++b) {
      Fp8Problem one = make_fp8(c);
      const auto entry = [&](const Tensor& from, const Tensor& like) {
        return part_of(from, sizes_of(like), b * like.numel());
      };
      one.p.q = entry(all.p.q, one.p.q), one.p.k = entry(all.p.k, one.p.k);
      one.p.v = entry(all.p.v, one.p.v);
      one.q_scale = entry(all.q_scale, one.q_scale), one.k_scale = entry(all.k_scale, one.k_scale);
      one.v_scale = entry(all.v_scale, one.v_scale);
      const AttentionOutputs alone = forward(one);
      EXPECT_TRUE(entry(found.out, alone.out).same_bits(alone.out)) << "entry " << b;
      EXPECT_TRUE(entry(found.lse, alone.lse).same_bits(alone.lse)) << "entry " << b;
    }
    if (HasFailure()) return;
  }
}

TEST_F(AttentionFp8, Packed) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(0, 0, d);
    c.heads = 6, c.kv_heads = 2, c.batch = 20;
    c.start_q = {3}, c.start_k = {0};
    for (int b = 0; b < 20; ++b) {
      c.start_q.push_back(c.start_q.back() + b * 37 % 11 * (b % 5 ? 9 : 32));
      c.start_k.push_back(c.start_k.back() + b * 29 % 7 * (b % 3 ? 25 : 60));
      c.used_k.push_back(b % 4 ? 100000 : b * 13);
    }
    c.queries = c.start_q.back() + 5, c.keys = c.start_k.back() + 2;
    expect_right(c);
    c.used_k.clear(), c.right = 0;
    expect_right(c);
    if (HasFailure()) return;
  }
}

/// Where sums of the tensor cores alone would be off.
TEST_F(AttentionFp8, ManyKeys) {
  AttentionCase c = sized(70, 16384, 128);
  c.heads = 1, c.scale = 0.02;
  expect_right(c);
}

/// The largest score of a row is in a later block again and again, as they are gone through, or all
/// are below 0.
TEST_F(AttentionFp8, LargestLater) {
  for (const std::int64_t d : kColumns) {
    AttentionCase c = sized(70, 1000, d);
    c.heads = 1, c.scale = 1.0;
    expect_right(make_fp8(c), 0.06);  // scores up to 40, of which the tensor cores have 14 bits
    c.scale = 0.05;
    for (const double sign : {1.0, -1.0}) {
      Fp8Problem made = make_fp8(c);
      Tensor &q = made.p.q, &k = made.p.k;
      for (std::int64_t i = 0; i < q.numel(); ++i) q.set(i, std::abs(q.get(i)));
      for (std::int64_t i = 0; i < k.numel(); ++i) {
        const double rise = 2.0 - static_cast<double>(i) / static_cast<double>(k.numel());
        k.set(i, sign * std::abs(k.get(i)) * (sign > 0.0 ? rise : 3.0 - rise));
      }
      expect_right(made, 0.06);
    }
    if (HasFailure()) return;
  }
}

// ---- rates
// ---------------------------------------------------------------------------------------------------------

static __global__ void fill_e4m3(unsigned char* to, std::int64_t count, unsigned seed) {
  for (std::int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    // Signs and magnitudes around 1: exponents -3 to 0, any of three bits.
    to[i] = static_cast<unsigned char>((h >> 8 & 0x80) | (32 + (h & 31)));
  }
}

/// Operands of 16384 tokens and 2048 columns in all.
struct Bench {
  static constexpr std::int64_t kTokens = 16384, kWidth = 2048, kCount = kTokens * kWidth;
  DeviceArray<unsigned char> operands[3] = {DeviceArray<unsigned char>(kCount),
                                            DeviceArray<unsigned char>(kCount),
                                            DeviceArray<unsigned char>(kCount)};
  DeviceArray<unsigned char> workspace{2 * kCount};
  DeviceArray<std::uint16_t> out{kCount};
  DeviceArray<float> lse{kCount / 32};

  Bench() {
    for (unsigned i = 0; i < 3; ++i) fill_e4m3<<<1024, 256>>>(operands[i].data(), kCount, i);
    fill_e4m3<<<1024, 256>>>(workspace.data(), 2 * kCount, 2);
  }
  AttentionFp8Fwd call(std::int64_t d, std::int64_t s, bool causal) const {
    const std::int64_t b = kTokens / s, h = kWidth / d;
    const auto ref = [&](void* data, DType dtype) {
      return TensorRef{data, dtype, 4, {b, s, h, d}, {s * h * d, h * d, d, 1}};
    };
    AttentionFp8Fwd call;
    call.fwd.op = "bench";
    call.fwd.q = ref(operands[0].data(), DType::f8e4m3);
    call.fwd.k = ref(operands[1].data(), DType::f8e4m3);
    call.fwd.v = ref(operands[2].data(), DType::f8e4m3);
    call.fwd.out = ref(out.data(), DType::bf16);
    call.fwd.lse = {lse.data(), DType::f32, 3, {b, h, s}, {h * s, s, 1}};
    call.fwd.scale = 1.0 / std::sqrt(static_cast<double>(d));
    call.fwd.mask.right = causal ? 0 : -1;
    call.workspace = workspace.data(), call.workspace_size = 2 * kCount;
    return call;
  }
  static double rate(std::int64_t d, std::int64_t s, bool causal, double ms) {
    return 4.0 * kTokens * kWidth * static_cast<double>(s) * (causal ? 0.5 : 1.0) / (ms * 1e9);
  }
  /// The kernel alone, of a tile of its own.
  template <class Tile>
  double alone(std::int64_t s, bool causal) const {
    using namespace cuda::attention_detail;
    const AttentionFp8Fwd a = call(Tile::kD, s, causal);
    const auto view = [](const TensorRef& t) {
      const std::int64_t size = size_of(t.dtype);
      return View{static_cast<char*>(t.data), t.strides[0] * size, t.strides[1] * size,
                  t.strides[2] * size};
    };
    Fp8Call f{};
    f.f.q = view(a.fwd.q), f.f.k = view(a.fwd.k), f.f.v = view(a.fwd.v), f.f.out = view(a.fwd.out);
    f.f.lse = static_cast<float*>(a.fwd.lse.data);
    f.f.batch = static_cast<int>(kTokens / s), f.f.heads = static_cast<int>(kWidth / Tile::kD);
    f.f.group = 1, f.f.queries = f.f.keys = f.width = static_cast<int>(s);
    f.f.d = f.f.dv = Tile::kD;
    f.f.scale = static_cast<float>(a.fwd.scale), f.f.scale_log2 = f.f.scale * kLog2e;
    f.f.mask = a.fwd.mask;
    const std::int64_t head = std::int64_t{Tile::kD} * f.width;
    f.values = {reinterpret_cast<char*>(workspace.data()), head * f.f.heads, f.width, head};
    return rate(Tile::kD, s, causal, median_ms([&] { launch_hopper_fp8<Tile>(f, {}, "bench"); }));
  }
};

template <class Tile>
void print_variant(const Bench& bench, const char* name) {
  std::printf("%-28s", name);
  std::fflush(stdout);
  for (const std::int64_t s : {1024, 4096, 16384}) {
    for (const bool causal : {false, true}) {
      std::printf(" %7.1f", bench.alone<Tile>(s, causal));
      std::fflush(stdout);
    }
  }
  std::printf("\n");
}

void print_variants() {
  using namespace cuda::attention_detail;
  const Bench bench;
  std::printf("kernels alone, TFLOP/s\n%-28s %15s %15s %15s\n", "full, causal", "1024", "4096",
              "16384");
  // Columns, warpgroups, parts, stages, overlap, blocks together, exponentials before results.
  print_variant<HopperFp8Of128>(bench, "128");
  print_variant<HopperFp8Tile<128, 3, 1, 4, false, 0, 0>>(bench, "128, three groups alone");
  print_variant<HopperFp8Of64>(bench, "64");
  print_variant<HopperFp8Of256>(bench, "256");
  print_variant<HopperFp8Of256Long>(bench, "256, long");
}

void print_rates() {
  const Bench bench;
  constexpr int kQueries[] = {512, 1024, 2048, 4096, 8192, 16384};
  std::printf("%-4s %-7s", "d", "mask");
  for (const int s : kQueries) std::printf(" %7d", s);
  std::printf("   TFLOP/s, v transposed in it\n");
  for (const int d : {64, 128, 256}) {
    for (const bool causal : {false, true}) {
      std::printf("%-4d %-7s", d, causal ? "causal" : "full");
      for (const int s : kQueries) {
        const AttentionFp8Fwd call = bench.call(d, s, causal);
        const double ms = median_ms([&] { cuda::attention_fp8(call, {}); });
        std::printf(" %7.1f", Bench::rate(d, s, causal, ms));
        std::fflush(stdout);
      }
      std::printf("\n");
    }
  }
}

}  // namespace
}  // namespace fastkern

int main(int argc, char** argv) {
  const std::string asked = argc > 1 ? argv[1] : "";
  if (asked == "--bench" || asked == "--variants") {
    asked == "--bench" ? fastkern::print_rates() : fastkern::print_variants();
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
