// SPDX-License-Identifier: Apache-2.0
// cuda::pointwise and cuda::triu against plain double loops and cpu::, in guarded memory.
#include "pointwise_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class PointwiseCuda : public CudaTest {};

/// The call on the device; the result comes back in `t`.
void run_on_gpu(const PointwiseProblem& p, PointwiseTensors& t, Stream stream = {}) {
  const DeviceTensor out(t.out);
  std::vector<DeviceTensor> in;
  in.reserve(t.in.size());
  for (const Tensor& host : t.in) in.emplace_back(host.given() ? host : t.out);
  const PointwiseCall call = t.call(p, [&](Tensor& host) {
    if (&host == &t.out) return out.ref();
    return in[&host - t.in.data()].ref();
  });
  cuda::pointwise(call, stream);
  cuda_ok(cudaDeviceSynchronize());
  t.out = out.download();
}

void expect_matches(const PointwiseProblem& p) {
  PointwiseTensors t(p);
  run_on_gpu(p, t);
  EXPECT_TRUE(all_match(p, t)) << p.text();
}

TEST_F(PointwiseCuda, EveryFunctionOfEveryType) { every_function(expect_matches); }

/// What the CPU finds in dense tensors, bit by bit: a sum has one rounding.
TEST_F(PointwiseCuda, Layouts) {
  for (const auto& [a, b, out] : {std::array{DType::f32, DType::f32, DType::f32},
                                  {DType::bf16, DType::bf16, DType::bf16},
                                  {DType::bf16, DType::f32, DType::bf16},
                                  {DType::f16, DType::boolean, DType::f16},
                                  {DType::f16, DType::u8, DType::f64},
                                  {DType::i64, DType::bf16, DType::f16},
                                  {DType::c64, DType::f32, DType::c64},
                                  {DType::c128, DType::c64, DType::c128}}) {
    for (const PointwiseProblem& p : layout_problems(a, b, out)) {
      PointwiseTensors found(p), expected(p);
      run_on_gpu(p, found);
      cpu::pointwise(expected.call(p));
      EXPECT_TRUE(found.out.same_bits(expected.out)) << p.text();
      EXPECT_TRUE(found.out.gaps_intact()) << p.text();
      if (HasFailure()) return;
    }
  }
}

/// A number of blocks of every kind; long functions do the same whatever the layout.
TEST_F(PointwiseCuda, LayoutsChangeNoBit) {
  for (const Pointwise f :
       {Pointwise::gelu, Pointwise::pow, Pointwise::silu_bwd, Pointwise::where}) {
    for (const DType type : {DType::f32, DType::bf16}) {
      PointwiseProblem dense = dense_problem(f, type, 0);
      const std::size_t inputs = dense.in.size();
      dense.out = dense_layout({257, 1032});
      dense.in.assign(inputs, dense_layout({257, 1032}));
      PointwiseTensors expected(dense);
      run_on_gpu(dense, expected);
      const Layout layouts[] = {dense_layout({257, 1032}, 1),
                                {"padded", {257, 1032}, {1040, 1}, 0},
                                {"odd", {257, 1032}, {1033, 1}, 0},
                                {"transposed", {257, 1032}, {1, 257}, 0},
                                {"transposed, padded", {257, 1032}, {1, 264}, 8}};
      for (const Layout& layout : layouts) {
        for (std::size_t which = 0; which <= inputs; ++which) {
          PointwiseProblem p = dense;
          (which == inputs ? p.out : p.in[which]) = layout;
          PointwiseTensors t(p);
          for (std::size_t i = 0; i < inputs; ++i) t.in[i].copy_from(expected.in[i]);
          run_on_gpu(p, t);
          EXPECT_TRUE(t.out.same_bits(expected.out)) << p.text();
          EXPECT_TRUE(t.out.gaps_intact()) << p.text();
        }
      }
    }
  }
}

TEST_F(PointwiseCuda, InPlaceAndAgain) {
  const SideStream side;
  for (const DType type : {DType::f32, DType::bf16, DType::i32}) {
    const PointwiseProblem p = dense_problem(Pointwise::sub, type, 300007);
    PointwiseTensors apart(p);
    run_on_gpu(p, apart);
    const DeviceTensor b(apart.in[1]);
    for (int i = 0; i < 5; ++i) {
      const DeviceTensor a(apart.in[0]);
      PointwiseCall call{
          .function = p.function, .out = a.ref(), .in = {a.ref(), b.ref()}, .compute = p.compute};
      cuda::pointwise(call, side.stream());
      cuda_ok(cudaDeviceSynchronize());
      EXPECT_TRUE(a.download().same_bits(apart.out));
    }
  }
}

TEST_F(PointwiseCuda, RefusesWhatTheCpuRefuses) {
  float* const none = reinterpret_cast<float*>(4096);
  PointwiseCall call{.op = "fastkern::add",
                     .function = Pointwise::add,
                     .out = dense(none, DType::f32, 2, 3),
                     .in = {Number(1), dense(none, DType::f32, 2)}};
  EXPECT_TRUE(contains(error_of([&] { cuda::pointwise(call, {}); }), "input 1 must have a shape"));
  call.in[1] = dense(none + 1, DType::f32, 2, 3);
  EXPECT_TRUE(
      contains(error_of([&] { cuda::pointwise(call, {}); }), "must share no memory with out"));
  call.in[1] = Number(1), call.compute = DType::bf16;
  EXPECT_TRUE(contains(error_of([&] { cuda::pointwise(call, {}); }), "compute must be"));
  call.compute = DType::f32, call.out.data = reinterpret_cast<char*>(none) + 2;
  EXPECT_TRUE(contains(error_of([&] { cuda::pointwise(call, {}); }), "multiples of their size"));
  call.out = dense(none, DType::f32, 0), call.in[1] = dense(none, DType::f32, 1);
  cuda::pointwise(call, {});
}

TEST_F(PointwiseCuda, BeyondTwoToThe31) {
  const std::int64_t rows = 65537, columns = 32771, n = rows * columns, guard = 4096;
  void* memory = nullptr;
  if (cudaMalloc(&memory, 2 * (n + guard)) != cudaSuccess) {
    cudaGetLastError();
    GTEST_SKIP() << "not enough memory";
  }
  const std::unique_ptr<void, FreeDevice> owner(memory);
  cuda_ok(cudaMemset(memory, 0x55, 2 * (n + guard)));
  std::uint8_t* const out = static_cast<std::uint8_t*>(memory);
  std::vector<std::uint8_t> bias(columns);
  for (std::int64_t c = 0; c < columns; ++c) bias[c] = static_cast<std::uint8_t>(c * 7);
  const DeviceArray<std::uint8_t> device_bias(bias);
  const TensorRef flat = dense(out, DType::u8, n), matrix = dense(out, DType::u8, rows, columns);
  // A number everywhere, in one dimension; then the bias, in two; then transposed onto itself.
  cuda::pointwise({.out = flat, .in = {Number(3)}, .compute = DType::i64}, {});
  cuda::pointwise({.function = Pointwise::add,
                   .out = matrix,
                   .in = {matrix, dense(device_bias.data(), DType::u8, columns)},
                   .compute = DType::i64},
                  {});
  TensorRef turned = dense(out + n + guard, DType::u8, columns, rows);
  turned.sizes[0] = rows, turned.sizes[1] = columns, turned.strides[0] = 1,
  turned.strides[1] = rows;
  cuda::pointwise({.out = turned, .in = {matrix}, .compute = DType::i64}, {});
  cuda_ok(cudaDeviceSynchronize());
  std::vector<std::uint8_t> host(n + guard);
  for (const std::int64_t at : {std::int64_t{0}, n + guard}) {
    cuda_ok(cudaMemcpy(host.data(), out + at, n + guard, cudaMemcpyDeviceToHost));
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t column = at == 0 ? i % columns : i / rows;
      ASSERT_EQ(host[i], static_cast<std::uint8_t>(3 + column * 7)) << at << ' ' << i;
    }
    for (std::int64_t i = n; i < n + guard; ++i) ASSERT_EQ(host[i], 0x55) << i;
  }
}

TEST_F(PointwiseCuda, Triangles) {
  for (const DType type : {DType::f32, DType::bf16, DType::u8, DType::f64, DType::c128}) {
    for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{5, 5},
                               {1, 9},
                               {7, 3},
                               {64, 65},
                               {300, 128},
                               {33, 1024}}) {
      for (const std::int64_t diagonal :
           {std::int64_t{0}, std::int64_t{1}, std::int64_t{-1}, std::int64_t{4}, std::int64_t{-70},
            std::int64_t{70}, std::numeric_limits<std::int64_t>::min(),
            std::numeric_limits<std::int64_t>::max()}) {
        for (const std::int64_t offset : {0, 1}) {
          Tensor x(type, dense_layout({3, m, n}, offset));
          for (std::int64_t i = 0; i < x.numel(); ++i) x.set(i, i % 100 + 1);
          Tensor expected(type, {"padded", {3, m, n}, {m * n + 16, n, 1}, 0});
          const DeviceTensor from(x), to(expected);
          cpu::triu({.x = x.ref(), .out = expected.ref(), .diagonal = diagonal});
          cuda::triu({.x = from.ref(), .out = to.ref(), .diagonal = diagonal}, {});
          cuda::triu({.x = from.ref(), .out = from.ref(), .diagonal = diagonal}, {});
          const Tensor found = to.download();
          EXPECT_TRUE(found.same_bits(expected)) << diagonal << ' ' << m << 'x' << n;
          EXPECT_TRUE(found.gaps_intact());
          EXPECT_TRUE(from.download().same_bits(expected)) << "in place";
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastkern
