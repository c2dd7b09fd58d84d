// SPDX-License-Identifier: Apache-2.0
// cuda::norm with f8e4m3 and i8 results against cpu::norm.
#include "norm_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

/// M rows of codes with canaries around them and in the gaps.
struct Codes {
  static constexpr std::int64_t kGuard = 1024;
  Codes(DType type, std::int64_t rows, std::int64_t columns, std::int64_t padding = 0,
        std::int64_t start = 0)
      : dtype(type),
        m(rows),
        n(columns),
        stride(columns + padding),
        offset(kGuard + start),
        bytes(2 * kGuard + start + m * stride, Tensor::kCanary) {}

  TensorRef ref(void* base) const {
    TensorRef t = dense(static_cast<char*>(base) + offset, dtype, m, n);
    t.strides[0] = stride;
    return t;
  }
  std::uint8_t at(std::int64_t e) const { return bytes[offset + e / n * stride + e % n]; }
  /// The number that a code stands for.
  double value(std::int64_t e) const {
    return dtype == DType::i8 ? to_float(static_cast<i8>(at(e))) : to_float(f8e4m3{at(e)});
  }
  bool gaps_intact() const {
    for (std::int64_t b = 0; b < static_cast<std::int64_t>(bytes.size()); ++b) {
      const std::int64_t from = b - offset;
      const bool element = from >= 0 && from < m * stride && from % stride < n;
      if (!element && bytes[b] != Tensor::kCanary) return false;
    }
    return true;
  }

  DType dtype;
  std::int64_t m, n, stride, offset;
  std::vector<std::uint8_t> bytes;
};

struct Quantised {
  Codes codes;
  std::vector<float> scale;  // one a row; of a static scale just that
};

constexpr std::size_t kMore = 16;  // floats behind the scales, not to be written

/// The call of `call` with `codes` in place of y. `scale`: static if above 0.
Quantised on_cuda(ForwardCall& call, Codes codes, float scale = 0.0f) {
  OnDevice device;
  NormFwd args = call.args(device);
  const DeviceArray<std::uint8_t> y(codes.bytes);
  const bool is_static = scale > 0.0f;
  const std::size_t count = is_static ? 1 : call.c.m;
  const DeviceArray<float> scales(count + kMore, is_static ? scale : -7.0f);
  args.y = codes.ref(y.data());
  args.scale =
      is_static ? dense(scales.data(), DType::f32, 1) : dense(scales.data(), DType::f32, call.c.m);
  args.static_scale = is_static;
  cuda::norm(args, {});
  device.finish();
  codes.bytes = y.download();
  EXPECT_TRUE(codes.gaps_intact());
  std::vector<float> found = scales.download();
  for (std::size_t i = count; i < found.size(); ++i) {
    EXPECT_EQ(found[i], is_static ? scale : -7.0f) << "behind the scales";
  }
  found.resize(count);
  return {codes, found};
}

Quantised on_cpu(ForwardCall& call, Codes codes, float scale = 0.0f) {
  OnHost host;
  NormFwd args = call.args(host);
  const bool is_static = scale > 0.0f;
  std::vector<float> scales(is_static ? 1 : call.c.m, scale);
  args.y = codes.ref(codes.bytes.data());
  args.scale = dense(scales.data(), DType::f32, scales.size());
  args.static_scale = is_static;
  cpu::norm(args);
  return {codes, scales};
}

/// Scales equal but for noise; codes equal but for values that lie on the border of two.
void expect_quantised(const Case& c, DType dtype, float static_scale) {
  SCOPED_TRACE(c.text() + ", " + name_of(dtype) + ", scale " + std::to_string(static_scale));
  Case in_f32 = c;
  in_f32.types.y = DType::f32;
  ForwardCall found(in_f32), expected(in_f32), values(in_f32);
  const Quantised cuda = on_cuda(found, Codes(dtype, c.m, c.n), static_scale);
  const Quantised cpu = on_cpu(expected, Codes(dtype, c.m, c.n), static_scale);
  values.on_cpu();
  if (c.stream) {
    EXPECT_TRUE(found.stream().same_bits(expected.stream())) << "h";
  }
  const std::vector<double> noise = norm_scale(
      c, (c.stream ? expected.stream() : expected.x).values(), values.weight, values.bias);
  for (std::size_t i = 0; i < cpu.scale.size(); ++i) {
    const double terms = *std::max_element(&noise[i * c.n], &noise[i * c.n] + c.n);
    ASSERT_NEAR(cuda.scale[i], cpu.scale[i],
                1e-6 * cpu.scale[i] + 1e-6 * terms / (dtype == DType::i8 ? 127 : 448))
        << "scale " << i;
  }
  std::int64_t different = 0;
  const std::int64_t count = c.m * c.n;
  for (std::int64_t e = 0; e < count; ++e) {
    if (cuda.codes.at(e) == cpu.codes.at(e)) continue;
    const double a = cuda.codes.value(e), b = cpu.codes.value(e);
    const double scale = cpu.scale[static_scale > 0.0f ? 0 : e / c.n];
    const double value = values.y.get(e) / scale, border = (a + b) / 2;
    if (a == b) continue;  // -0
    ASSERT_NEAR(value, border, 1e-5 * std::abs(border) + kNoise * noise[e] / scale)
        << "element " << e << ": " << a << ", expected " << b;
    ++different;
  }
  // Values are fractions of the largest one: exact ties are rare, without weights common.
  EXPECT_LE(different, 2 + count / (c.weight ? 200 : 10));
}

class NormQuantCuda : public CudaTest, public testing::WithParamInterface<DType> {};

INSTANTIATE_TEST_SUITE_P(Results, NormQuantCuda, testing::Values(DType::f8e4m3, DType::i8),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_P(NormQuantCuda, MatchesAroundPlans) {
  int turn = 0;
  for (const Types& types : some_types()) {
    for (const std::int64_t n :
         {1,      7,      8,      9,      64,      100,     127,     128,
          1000,   1024,   1025,   2048,   4096,    4100,    8192,    8200,
          16'384, 20'000, 65'536, 65'544, 100'000, 131'072, 140'000, 262'152}) {
      for (const std::int64_t m : {1, 3, 133}) {
        if (m > 3 && n > 1024) continue;
        if (m == 3 && n > 20'000) continue;
        Case c{.m = m, .n = n, .types = types};
        c.stream = c.residual = ++turn % 2 == 0, c.in_place = turn % 4 == 0;
        c.weight = turn % 5 != 0, c.bias = turn % 3 == 0, c.weight_offset = turn % 7 == 0;
        for (const float scale : {0.0f, 0.02f}) {
          expect_quantised(c, GetParam(), scale);
          if (HasFailure()) return;
        }
      }
    }
  }
}

/// Several rows for each cluster.
TEST_P(NormQuantCuda, ManyLongRowsMatch) {
  for (const auto& [m, n] : {std::pair<int, int>{600, 8200}, {150, 20'000}}) {
    Case c{.m = m, .n = n, .types = all_of(DType::bf16)};
    expect_quantised(c, GetParam(), 0.0f);
    c.stream = c.residual = true;
    expect_quantised(c, GetParam(), 0.0f);
  }
}

TEST_P(NormQuantCuda, HeadsMatch) {
  for (const std::int64_t n : {100, 1024, 9000, 140'000}) {
    expect_quantised({.m = 6, .n = n, .types = all_of(DType::bf16), .heads = 3}, GetParam(), 0.0f);
  }
}

TEST_P(NormQuantCuda, AnyAlignmentGivesTheSameCodes) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {8, 61, 256, 1000, 4096, 9000, 140'000}) {
      Case c{.m = n > 10'000 ? 2 : 6, .n = n, .types = types};
      c.types.y = DType::f32, c.stream = c.residual = n % 3 != 0;
      ForwardCall dense(c);
      const Quantised expected = on_cuda(dense, Codes(GetParam(), c.m, n));
      for (const auto& [padding, start] :
           {std::pair<int, int>{0, 1}, {3, 0}, {16, 0}, {16, 8}, {16, 4}, {24, 3}}) {
        const Arrangement how{row_layouts(c.m, n), static_cast<std::size_t>(start % 3), start % 2};
        ForwardCall call(c, how);
        const Quantised found = on_cuda(call, Codes(GetParam(), c.m, n, padding, start));
        ASSERT_EQ(found.scale, expected.scale);
        for (std::int64_t e = 0; e < c.m * n; ++e) {
          ASSERT_EQ(found.codes.at(e), expected.codes.at(e))
              << c.text() << ", padding " << padding << ", start " << start << ", element " << e;
        }
      }
    }
  }
}

/// Rows of zeros have scale 0, rows with NaN are NaN, and neither changes its neighbours.
TEST_P(NormQuantCuda, ZeroAndNanRows) {
  for (const std::int64_t n : {8, 100, 1024, 9000, 20'000, 140'000}) {
    const Case c{.m = 4, .n = n, .types = all_of(DType::bf16)};
    ForwardCall clean(c), call(c);
    for (std::int64_t i = 0; i < n; ++i) call.x.set(n + i, 0.0);
    call.x.set(2 * n + n / 2, std::nan(""));
    const Quantised expected = on_cuda(clean, Codes(GetParam(), c.m, n));
    const Quantised found = on_cuda(call, Codes(GetParam(), c.m, n));
    EXPECT_EQ(found.scale[0], expected.scale[0]) << n;
    EXPECT_EQ(found.scale[1], 0.0f) << n;
    EXPECT_TRUE(std::isnan(found.scale[2])) << n;
    EXPECT_EQ(found.scale[3], expected.scale[3]) << n;
    for (std::int64_t e = 0; e < c.m * n; ++e) {
      const std::int64_t row = e / n;
      if (row == 1) {
        ASSERT_EQ(found.codes.value(e), 0.0) << n << ", element " << e;
      } else if (row == 2) {
        ASSERT_EQ(found.codes.at(e) & 0x7f, GetParam() == DType::i8 ? 0 : 0x7f) << n;
      } else {
        ASSERT_EQ(found.codes.at(e), expected.codes.at(e)) << n << ", element " << e;
      }
    }
  }
}

TEST_P(NormQuantCuda, WhatCannotBeQuantisedIsRefused) {
  const Case c{.m = 2, .n = 64, .types = all_of(DType::bf16)};
  std::vector<Case> refused(3, c);
  refused[0].kind = NormKind::layer;
  refused[1].stream = refused[1].rowscale = true;
  refused[2].stream = refused[2].two = true;
  for (const Case& each : refused) {
    ForwardCall call(each);
    const std::string message = error_of([&] { on_cuda(call, Codes(GetParam(), each.m, each.n)); });
    EXPECT_TRUE(contains(message, "fastkern::norm: y cannot be quantised")) << message;
  }
  expect_quantised(c, GetParam(), 0.0f);
}

}  // namespace
}  // namespace fastkern
