// SPDX-License-Identifier: Apache-2.0
// cpu::pointwise against plain double loops, in guarded memory; plans; triangles.
#include "pointwise_support.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

void expect_matches(const PointwiseProblem& p) {
  PointwiseTensors t(p);
  cpu::pointwise(t.call(p));
  EXPECT_TRUE(all_match(p, t)) << p.text();
}

TEST(PointwiseCpu, EveryFunctionOfEveryType) { every_function(expect_matches); }

TEST(PointwiseCpu, Layouts) {
  for (const auto& [a, b, out] : {std::array{DType::f32, DType::f32, DType::f32},
                                  {DType::bf16, DType::f32, DType::bf16},
                                  {DType::f16, DType::u8, DType::f64},
                                  {DType::i64, DType::bf16, DType::f16},
                                  {DType::c64, DType::f32, DType::c64},
                                  {DType::c128, DType::c64, DType::c128}}) {
    for (const PointwiseProblem& p : layout_problems(a, b, out)) {
      expect_matches(p);
      if (HasFailure()) return;
    }
  }
}

TEST(PointwiseCpu, ManyElements) {
  for (const Sizes& sizes : {Sizes{300, 1001}, {77777, 3}, {1, 300001}}) {
    PointwiseProblem p{.function = Pointwise::mul,
                       .out = dense_layout(sizes),
                       .out_type = DType::bf16,
                       .in = {dense_layout(sizes), dense_layout({sizes[1]})},
                       .types = {DType::bf16, DType::f32}};
    expect_matches(p);
  }
}

TEST(PointwiseCpu, IntegersAreExact) {
  const std::int64_t big = (std::int64_t{1} << 62) + 1;
  std::vector<std::int64_t> a{big, -big, 3}, b{big, 1, -7}, out(3);
  PointwiseCall call{.function = Pointwise::add,
                     .out = dense(out.data(), DType::i64, 3),
                     .in = {dense(a.data(), DType::i64, 3), dense(b.data(), DType::i64, 3)},
                     .compute = DType::i64};
  cpu::pointwise(call);
  const auto twice = static_cast<std::int64_t>(2 * static_cast<std::uint64_t>(big));
  EXPECT_EQ(out, (std::vector<std::int64_t>{twice, -big + 1, -4}));
  call.in[1] = Number(big);
  call.function = Pointwise::eq;
  cpu::pointwise(call);
  EXPECT_EQ(out, (std::vector<std::int64_t>{1, 0, 0}));
  // The one quotient that does not fit.
  a[0] = std::numeric_limits<std::int64_t>::min();
  call.in[1] = Number(-1);
  for (const Pointwise f : {Pointwise::div_trunc, Pointwise::div_floor}) {
    call.function = f;
    cpu::pointwise(call);
    EXPECT_EQ(out, (std::vector<std::int64_t>{a[0], big, -3}));
  }
  call.in[1] = Number(0);
  EXPECT_TRUE(contains(error_of([&] { cpu::pointwise(call); }), "divisor must not be 0"));
}

TEST(PointwiseCpu, Conversions) {
  std::vector<float> x{1.9f, -1.9f, 300.0f, 0.0f, std::nanf("")};
  std::vector<std::uint8_t> u(5);
  PointwiseCall call{.out = dense(u.data(), DType::u8, 5), .in = {dense(x.data(), DType::f32, 5)}};
  cpu::pointwise(call);
  EXPECT_EQ(u[0], 1);
  EXPECT_EQ(u[1], 255);
  EXPECT_EQ(u[2], 44);
  call.out.dtype = DType::boolean;
  cpu::pointwise(call);
  EXPECT_EQ(u, (std::vector<std::uint8_t>{1, 1, 1, 0, 1}));
  std::vector<std::int32_t> i(5);
  call.out = dense(i.data(), DType::i32, 5);
  cpu::pointwise(call);
  EXPECT_EQ(i[0], 1);
  EXPECT_EQ(i[1], -1);
  EXPECT_EQ(i[2], 300);
}

TEST(PointwiseCpu, PowersThatAreSomethingElse) {
  for (const double exponent : {2.0, 1.0, 0.5, -0.5, -1.0, 3.0, 0.0, -2.0}) {
    std::vector<float> x{0.3f, 2.0f, 7.0f, 1e-3f}, out(4);
    PointwiseCall call{.function = Pointwise::pow,
                       .out = dense(out.data(), DType::f32, 4),
                       .in = {dense(x.data(), DType::f32, 4), Number(exponent)}};
    cpu::pointwise(call);
    for (int i = 0; i < 4; ++i)
      EXPECT_NEAR(out[i] / std::pow(static_cast<double>(x[i]), exponent), 1.0, 2e-7) << exponent;
  }
}

TEST(PointwiseCpu, InPlace) {
  for (const DType type : {DType::f32, DType::bf16, DType::i32}) {
    PointwiseProblem p = dense_problem(Pointwise::sub, type, 4099);
    PointwiseTensors apart(p), same(p);
    cpu::pointwise(apart.call(p));
    PointwiseCall call = same.call(p);
    call.in[0] = call.out;
    for (std::int64_t i = 0; i < 4099; ++i) same.out.set(i, same.in[0].get(i));
    cpu::pointwise(call);
    EXPECT_TRUE(same.out.same_bits(apart.out));
  }
}

TEST(PointwiseCpu, RefusesSharedMemory) {
  std::vector<float> memory(1000);
  const auto call = [&](TensorRef out, TensorRef in) {
    cpu::pointwise({.op = "fastkern::copy", .out = out, .in = {in}});
  };
  const auto view = [&](Sizes sizes, Sizes strides, std::int64_t offset) {
    TensorRef t = dense(memory.data() + offset, DType::f32, 1);
    t.ndim = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), t.sizes.begin());
    std::copy(strides.begin(), strides.end(), t.strides.begin());
    return t;
  };
  const char* with_input = "input 0 must share no memory with out";
  const char* twice = "out must not hold an element twice";
  EXPECT_TRUE(
      contains(error_of([&] { call(view({10}, {1}, 1), view({10}, {1}, 0)); }), with_input));
  EXPECT_TRUE(contains(error_of([&] { call(view({4, 4}, {1, 4}, 0), view({4, 4}, {4, 1}, 0)); }),
                       with_input));
  EXPECT_TRUE(
      contains(error_of([&] { call(view({4, 4}, {4, 1}, 0), view({4}, {1}, 0)); }), with_input));
  EXPECT_TRUE(
      contains(error_of([&] { call(view({4, 4}, {0, 1}, 0), view({4}, {1}, 500)); }), twice));
  EXPECT_TRUE(
      contains(error_of([&] { call(view({9, 4}, {2, 1}, 0), view({4}, {1}, 500)); }), twice));
  EXPECT_TRUE(
      contains(error_of([&] { call(view({4, 4}, {3, 1}, 0), view({4}, {1}, 500)); }), twice));
  EXPECT_TRUE(
      contains(error_of([&] { call(view({2, 4, 2}, {7, 3, 9}, 0), view({1}, {1}, 500)); }), twice));
  // Views of one memory that only lie between each other.
  call(view({10}, {2}, 0), view({10}, {2}, 1));
  call(view({4, 4}, {8, 1}, 4), view({4, 4}, {8, 1}, 0));
  call(view({2, 3}, {3, 2}, 0), view({2, 3}, {1, 2}, 500));
  call(view({10}, {1}, 0), view({10}, {1}, 10));
  // A tensor of other elements in the same place.
  TensorRef wide = view({5}, {1}, 0);
  wide.dtype = DType::f64;
  EXPECT_TRUE(contains(error_of([&] { call(wide, view({5}, {1}, 0)); }), with_input));
}

TEST(PointwiseCpu, RefusesWrongCalls) {
  float x[6] = {};
  PointwiseCall call{.op = "fastkern::add",
                     .function = Pointwise::add,
                     .out = dense(x, DType::f32, 2, 3),
                     .in = {Number(1), dense(x, DType::f32, 2)}};
  EXPECT_TRUE(contains(error_of([&] { cpu::pointwise(call); }),
                       "fastkern::add: input 1 must have a shape that broadcasts to that of out, "
                       "(2, 3), got (2,)"));
  call.in[1] = dense(x, DType::f32, 1, 2, 3);
  EXPECT_TRUE(contains(error_of([&] { cpu::pointwise(call); }), "got (1, 2, 3)"));
  call.in[1] = Number(2);
  call.compute = DType::f16;
  EXPECT_TRUE(contains(error_of([&] { cpu::pointwise(call); }), "compute must be"));
  call.compute = DType::f32, call.function = Pointwise::bitwise_and;
  EXPECT_TRUE(
      contains(error_of([&] { cpu::pointwise(call); }), "bitwise_and is not computed in f32"));
  call.function = Pointwise::add, call.out = dense(x, DType::f8e4m3, 6);
  EXPECT_TRUE(contains(error_of([&] { cpu::pointwise(call); }), "out must not be f8e4m3"));
}

TEST(PointwisePlan, Paths) {
  alignas(16) static float a[4096], b[4096], c[4096];
  const auto path = [&](TensorRef out, std::initializer_list<Operand> in) {
    const std::vector<Operand> operands(in);
    return pointwise_plan("test", out, operands);
  };
  EXPECT_EQ(path(dense(a, DType::f32, 8, 4), {dense(b, DType::f32, 8, 4)}).describe(),
            "dense (32) f32 (4) -> f32 (4)");
  EXPECT_EQ(path(dense(a, DType::f32, 8, 4), {dense(b, DType::bf16, 8, 4), Number(2)}).describe(),
            "mixed (32) bf16 (2) number -> f32 (4)");
  EXPECT_EQ(path(dense(a, DType::f32, 32), {dense(b + 1, DType::f32, 32)}).path,
            PointwisePath::mixed);
  EXPECT_EQ(path(dense(a + 1, DType::f32, 32), {dense(b + 5, DType::f32, 32)}).path,
            PointwisePath::dense);
  EXPECT_EQ(
      path(dense(a, DType::f32, 3, 8, 4), {dense(b, DType::f32, 3, 8, 4), dense(c, DType::f32, 4)})
          .describe(),
      "rows (24, 4) f32 (16, 4) f32 (0, 4) -> f32 (16, 4)");
  EXPECT_EQ(path(dense(a, DType::f32, 3, 8, 4), {dense(b, DType::f32, 8, 1)}).describe(),
            "rows (3, 8, 4) f32 (0, 4, 0) -> f32 (128, 16, 4)");
  TensorRef t = dense(b, DType::f32, 8, 4);
  t.strides = {1, 8};
  EXPECT_EQ(path(dense(a, DType::f32, 8, 4), {t}).path, PointwisePath::transposed);
  TensorRef out = dense(a, DType::f32, 8, 4);
  out.strides = {1, 8};
  EXPECT_EQ(path(out, {t}).describe(), "dense (32) f32 (4) -> f32 (4)");
  t.strides = {10, 2};
  EXPECT_EQ(path(dense(a, DType::f32, 8, 4), {t}).path, PointwisePath::strided);
  EXPECT_EQ(path(dense(a, DType::f32, 8, 0), {dense(b, DType::f32, 1)}).path, PointwisePath::empty);
  EXPECT_EQ(path(dense(a, DType::f32, 1, 1), {dense(b, DType::f32, 1)}).describe(),
            "dense (1) f32 (4) -> f32 (4)");
}

TEST(PointwisePlan, LayoutOfResults) {
  float memory[1];
  const auto strides = [&](std::vector<TensorRef> inputs) {
    TensorRef out = broadcast_shape("test", inputs);
    layout_like(out, inputs);
    return Sizes(out.strides.begin(), out.strides.begin() + out.ndim);
  };
  TensorRef x = dense(memory, DType::f32, 2, 3, 4, 5), y = x;
  EXPECT_EQ(strides({x}), (Sizes{60, 20, 5, 1}));
  x.strides = {60, 1, 15, 3};  // channels last
  EXPECT_EQ(strides({x}), (Sizes{60, 1, 15, 3}));
  EXPECT_EQ(strides({x, y}), (Sizes{60, 1, 15, 3}));
  EXPECT_EQ(strides({y, x}), (Sizes{60, 20, 5, 1}));
  EXPECT_EQ(strides({dense(memory, DType::f32, 3, 1, 1), x}), (Sizes{60, 1, 15, 3}));
  x.strides = {120, 2, 30, 6};  // gaps close
  EXPECT_EQ(strides({x}), (Sizes{60, 1, 15, 3}));
  EXPECT_EQ(strides({dense(memory, DType::f32, 7, 1), dense(memory, DType::f32, 5)}),
            (Sizes{5, 1}));
  EXPECT_TRUE(contains(error_of([&] { strides({x, dense(memory, DType::f32, 7)}); }), "broadcast"));
}

TEST(Triu, EveryDiagonal) {
  for (const DType type : {DType::f32, DType::bf16, DType::u8, DType::f64, DType::c128}) {
    for (const auto& [m, n] :
         {std::pair<std::int64_t, std::int64_t>{5, 5}, {1, 9}, {7, 3}, {64, 65}}) {
      for (const std::int64_t diagonal :
           {std::int64_t{0}, std::int64_t{1}, std::int64_t{-1}, std::int64_t{4}, std::int64_t{-70},
            std::int64_t{70}, std::numeric_limits<std::int64_t>::min(),
            std::numeric_limits<std::int64_t>::max()}) {
        Tensor x(type, dense_layout({3, m, n}, 1));
        Tensor out(type, {"padded", {3, m, n}, {m * n + 7, n, 1}, 0});
        for (std::int64_t i = 0; i < x.numel(); ++i) x.set(i, i % 100 + 1);
        cpu::triu({.x = x.ref(), .out = out.ref(), .diagonal = diagonal});
        for (std::int64_t i = 0; i < x.numel(); ++i) {
          const std::int64_t row = i / n % m, column = i % n;
          const bool kept = diagonal < -1000 || (diagonal < 1000 && column - row >= diagonal);
          ASSERT_EQ(out.get(i), kept ? x.get(i) : 0.0) << diagonal << ' ' << i;
        }
        EXPECT_TRUE(out.gaps_intact());
        cpu::triu({.x = x.ref(), .out = x.ref(), .diagonal = diagonal});
        for (std::int64_t i = 0; i < x.numel(); ++i) ASSERT_EQ(out.get(i), x.get(i));
      }
    }
  }
}

}  // namespace
}  // namespace fastkern
