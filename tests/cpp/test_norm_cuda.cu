// SPDX-License-Identifier: Apache-2.0
// cuda::norm against cpu::norm, in guarded memory. Quantised results: test_norm_quant_cuda.cu.
#include "norm_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

/// What the group of types at `index` has: the three pure ones, then mixtures.
std::vector<Types> types_of(int index) {
  if (index < 3) return {all_of(kDTypes[index])};
  return {std::begin(kMixes), std::end(kMixes)};
}

std::string group_name(int index) { return index < 3 ? name_of(kDTypes[index]) : "mixed"; }

class NormCuda : public CudaTest, public testing::WithParamInterface<NormKind> {
 protected:
  NormKind kind() const { return GetParam(); }
};

std::string kind_name(const testing::TestParamInfo<NormKind>& info) {
  return info.param == NormKind::rms ? "rms" : "layer";
}

INSTANTIATE_TEST_SUITE_P(Kinds, NormCuda, testing::Values(NormKind::rms, NormKind::layer),
                         kind_name);

class NormCudaTypes : public CudaTest,
                      public testing::WithParamInterface<std::tuple<NormKind, int>> {
 protected:
  NormKind kind() const { return std::get<0>(GetParam()); }
  std::vector<Types> types() const { return types_of(std::get<1>(GetParam())); }
};

INSTANTIATE_TEST_SUITE_P(Types, NormCudaTypes,
                         testing::Combine(testing::Values(NormKind::rms, NormKind::layer),
                                          testing::Range(0, 4)),
                         [](const auto& info) {
                           return (std::get<0>(info.param) == NormKind::rms ? "rms_" : "layer_") +
                                  group_name(std::get<1>(info.param));
                         });

/// The residual stream in all its forms.
std::vector<Case> streams(NormKind kind) {
  const Case plain{.kind = kind, .stream = true};
  std::vector<Case> all(10, plain);
  all[0].residual = true;
  all[1].residual = true, all[1].in_place = true, all[1].bias = true;
  all[2].weight = false;  // and no residual
  all[3].residual = true, all[3].p = 0.1;
  all[4].residual = true, all[4].p = 0.5, all[4].rowscale = true, all[4].weight_offset = 1.0;
  all[5].residual = true, all[5].in_place = true, all[5].rowscale = true;
  all[6].p = 0.5, all[6].bias = true;
  all[7].residual = true, all[7].two = true;
  all[8].residual = true, all[8].two = true, all[8].bias = true, all[8].p = 0.1,
  all[8].weight_offset = 1.0;
  all[9].residual = true, all[9].two = true, all[9].in_place = true, all[9].weight = false;
  return all;
}

TEST_P(NormCudaTypes, MatchesAroundPlans) {
  int turn = 0;
  for (Types types : types()) {
    const DType type = kernel_type({types.x, types.y});
    for (const std::int64_t n : lengths_around(
             [&](std::int64_t length) { return cuda::norm_plan(kind(), length, type); })) {
      for (const std::int64_t m : counts_for(n)) {
        Case c{.kind = kind(), .m = m, .n = n, .types = types};
        c.types.weight = ++turn % 2 == 0 ? types.weight : kDTypes[turn / 2 % 3];
        c.weight = turn % 7 != 0, c.bias = turn % 3 != 1, c.weight_offset = turn % 5 == 0;
        expect_forward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormCudaTypes, StreamsMatchAroundPlans) {
  std::size_t turn = 0;
  const std::vector<Case> cases = streams(kind());
  for (const Types& types : types()) {
    const DType type = kernel_type({types.x, types.stream, types.y});
    for (const std::int64_t n : lengths_around(
             [&](std::int64_t length) { return cuda::norm_plan(kind(), length, type); })) {
      Case c = cases[turn++ % cases.size()];
      c.m = n <= 1040 ? 37 : n <= 20'000 ? 5 : 2, c.n = n, c.types = types;
      expect_forward(c);
      if (HasFailure()) return;
    }
  }
}

TEST_P(NormCudaTypes, EveryStreamMatches) {
  for (const Types& types : types()) {
    for (const std::int64_t n : {7, 8, 100, 1024, 4100, 9000, 20'000, 70'000, 140'000}) {
      for (Case c : streams(kind())) {
        c.m = n <= 1024 ? 9 : 2, c.n = n, c.types = types;
        expect_forward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormCuda, AnyNumberOfRowsMatches) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {64, 128, 1024}) {
      for (const std::int64_t m : {0, 1, 131, 132, 133, 263, 264, 265, 1000}) {
        expect_forward({.kind = kind(), .m = m, .n = n, .types = types, .bias = m % 2 == 0});
        if (HasFailure()) return;
      }
    }
  }
}

/// Several rows for each team of a persistent grid: its rings and barriers go round.
TEST_P(NormCuda, ManyLongRowsMatch) {
  for (const Types& types : {all_of(DType::f32), all_of(DType::bf16), kMixes[0]}) {
    for (const auto& [m, n] : {std::pair<int, int>{600, 8200}, {150, 20'000}, {30, 65'536}}) {
      expect_forward({.kind = kind(), .m = m, .n = n, .types = types, .bias = true});
      expect_forward({.kind = kind(),
                      .m = m / 2,
                      .n = n,
                      .types = types,
                      .stream = true,
                      .residual = true,
                      .in_place = true});
      if (HasFailure()) return;
    }
  }
}

TEST_P(NormCuda, HeadsMatch) {
  for (const Types& types : some_types()) {
    for (const std::int64_t heads : {1, 3, 8, 32}) {
      for (const std::int64_t n : {64, 100, 128, 1024, 9000, 140'000}) {
        if (heads > (n > 9000 ? 3 : n > 1024 ? 8 : 32)) continue;
        Case c{.kind = kind(), .m = heads * (n > 1024 ? 2 : 7), .n = n, .types = types};
        c.bias = true, c.heads = heads;
        expect_forward(c);
        c.weight = false;
        if (n <= 1024) expect_forward(c);
        c.weight = true, c.bias = false, c.stream = c.residual = c.two = true;
        expect_forward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormCuda, DropoutOfEverythingLeavesTheResidual) {
  for (const std::int64_t n : {8, 101, 9000, 140'000}) {
    ForwardCall call = expect_forward({.kind = kind(),
                                       .m = 3,
                                       .n = n,
                                       .types = all_of(DType::bf16),
                                       .stream = true,
                                       .residual = true,
                                       .p = 1.0});
    EXPECT_TRUE(call.h.same_bits(call.residual)) << n;
  }
}

/// Alignment and strides of every operand change how memory is reached, never a bit of the result.
TEST_P(NormCudaTypes, AnyStridesAndAlignmentsGiveTheSameBits) {
  std::vector<Case> cases{
      {.kind = kind(), .bias = true}, {.kind = kind(), .weight_offset = 1.0}, {.kind = kind()}};
  const std::vector<Case> more = streams(kind());
  cases.insert(cases.end(), {more[1], more[4], more[8]});
  for (const Types& types : types()) {
    for (const std::int64_t n :
         {8, 24, 61, 192, 256, 768, 1000, 4096, 9000, 12'289, 20'000, 32'768, 140'000}) {
      const std::vector<Layout> layouts = row_layouts(6, n);
      for (Case c : cases) {
        if (n > 10'000 && (c.two || (n > 30'000 && c.stream))) continue;
        c.m = 6, c.n = n, c.types = types;
        ForwardCall expected = expect_forward(c);
        for (std::size_t shift = 0; shift < (n > 10'000 ? 3 : layouts.size()); ++shift) {
          SCOPED_TRACE(c.text() + ", shift " + std::to_string(shift));
          const Arrangement how{layouts, shift, static_cast<std::int64_t>(shift) % 3};
          expect_same(ForwardCall(c, how).on_cuda(), expected);
        }
        // All of one layout: every path at once.
        for (const Layout& layout : layouts) {
          if (n > 10'000) break;
          SCOPED_TRACE(c.text() + ", all " + layout.name);
          expect_same(ForwardCall(c, {{layout}, 0, 1}).on_cuda(), expected);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormCuda, ExpandedRowsAreRead) {
  for (const std::int64_t n : {64, 9000}) {
    const Case c{.kind = kind(), .m = 5, .n = n, .types = all_of(DType::bf16)};
    ForwardCall dense(c), expanded(c);
    expanded.x = Tensor(DType::bf16, Layout{"one row, five times", {5, n}, {0, 1}}).fill(1);
    dense.x.copy_from(expanded.x);
    expect_same(expanded.on_cuda(), dense.on_cuda());
  }
}

/// A row's result is the same alone as among others.
TEST_P(NormCuda, RowsDoNotSeeTheirBatch) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {24, 100, 768, 1000, 4096, 6144, 9000, 40'000, 140'000}) {
      const std::int64_t m = n <= 9000 ? 300 : 5;
      Case c{.kind = kind(), .m = m, .n = n, .types = types, .bias = true};
      c.stream = c.residual = n % 3 != 0;
      ForwardCall all(c);
      c.m = 1;
      for (const std::int64_t row : {std::int64_t{0}, m / 2, m - 1}) {
        ForwardCall one(c);
        for (std::int64_t i = 0; i < n; ++i) {
          one.x.set(i, all.x.get(row * n + i));
          if (c.residual) one.residual.set(i, all.residual.get(row * n + i));
        }
        if (row == 0) all.on_cuda();
        one.on_cuda();
        for (std::int64_t i = 0; i < n; ++i) {
          ASSERT_EQ(one.y.get(i), all.y.get(row * n + i))
              << all.c.text() << ", row " << row << ", column " << i;
        }
      }
    }
  }
}

TEST_P(NormCuda, RepeatsHaveTheSameBits) {
  for (const std::int64_t n : {40, 3000, 20'000}) {
    for (Case c : {Case{.kind = kind(), .bias = true}, streams(kind())[1], streams(kind())[8]}) {
      c.m = 300 * 40 / n + 20, c.n = n, c.types = all_of(DType::bf16);
      ForwardCall first(c);
      first.on_cuda();
      for (int repeat = 0; repeat < 50; ++repeat) {
        expect_same(ForwardCall(c).on_cuda(), first);
        ASSERT_FALSE(HasFailure()) << c.text() << ", repeat " << repeat;
      }
    }
  }
}

/// For lengths that a cluster holds beside the residual, in operands of one type.
TEST_P(NormCuda, TheNormOfTheStreamHasTheBitsOfTheNormOfH) {
  for (const DType type : kDTypes) {
    for (const std::int64_t n : {8, 100, 1000, 1024, 4096, 8200, 20'000, 65'536}) {
      for (Case c : streams(kind())) {
        c.m = 5, c.n = n, c.types = all_of(type), c.two = false;
        ForwardCall call(c);
        call.on_cuda();
        Case of_h = c;
        of_h.stream = of_h.residual = of_h.in_place = of_h.rowscale = false, of_h.p = 0.0;
        ForwardCall norm(of_h);
        norm.x.copy_from(call.stream());
        norm.on_cuda();
        ASSERT_TRUE(call.y.same_bits(norm.y)) << c.text();
      }
    }
  }
}

/// Rows far from zero against doubles: no digits may be lost but those that a mean in f32 lacks.
TEST_F(CudaTest, LayerNormOfRowsFarFromZero) {
  for (const DType type : {DType::f32, DType::f16}) {
    for (const std::int64_t n : {64, 1000, 4096, 9000, 20'000, 140'000}) {
      Case c{.kind = NormKind::layer, .m = 4, .n = n, .types = all_of(type)};
      c.bias = true, c.eps = 1e-5;
      ForwardCall call(c);
      call.x.fill(1, 1e4);
      call.on_cuda();
      const std::vector<double> x = call.x.values(), w = call.weight.values(),
                                b = call.bias.values();
      for (std::int64_t r = 0; r < c.m; ++r) {
        const RowMoments s = moments_of(c, &x[r * n]);
        for (std::int64_t i = 0; i < n; ++i) {
          const double xhat = (x[r * n + i] - s.mean) * s.rstd, y = xhat * w[i] + b[i];
          const double scale = (std::abs(xhat) + 0.1 * std::abs(s.mean) * s.rstd) * std::abs(w[i]);
          ASSERT_NEAR(call.y.get(r * n + i), y, ulp(type, y) + kNoise * (scale + std::abs(b[i])))
              << c.text() << ", row " << r << ", column " << i;
        }
      }
    }
  }
}

/// Rows with NaN or infinity, and of zeros without eps, change no other row.
TEST_P(NormCuda, NanAndInfinityStayInTheirRows) {
  for (const std::int64_t n : {8, 100, 1024, 9000, 20'000, 140'000}) {
    Case c{.kind = kind(), .m = 5, .n = n, .types = all_of(DType::bf16), .eps = 0.0};
    ForwardCall clean(c), call(c);
    for (std::int64_t i = 0; i < n; ++i) call.x.set(2 * n + i, 0.0);
    call.x.set(n + n / 2, std::nan(""));
    call.x.set(3 * n + n - 1, std::numeric_limits<double>::infinity());
    clean.on_cuda(), call.on_cuda();
    for (const std::int64_t row : {0, 4}) {
      for (std::int64_t i = row * n; i < (row + 1) * n; ++i)
        ASSERT_EQ(call.y.get(i), clean.y.get(i)) << c.text() << ", element " << i;
    }
    // rms of a row with an infinity is infinite: 0 but for that element.
    for (std::int64_t i = n; i < (kind() == NormKind::layer ? 4 : 3) * n; ++i)
      ASSERT_TRUE(std::isnan(call.y.get(i))) << c.text() << ", element " << i;
  }
}

TEST_P(NormCuda, NoRowsOrNoColumns) {
  for (const auto& [m, n] :
       {std::pair<std::int64_t, std::int64_t>{0, 5}, {0, 40'000}, {0, 300'000}, {3, 0}, {0, 0}}) {
    ForwardCall({.kind = kind(), .m = m, .n = n, .bias = true}).on_cuda();
  }
}

__global__ void wait_kernel(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

/// The inputs arrive late on a side stream: a call on any other stream would read what was there
/// before. A second call takes its input from the first.
TEST_P(NormCuda, WorkIsOrderedOnTheGivenStream) {
  for (const std::int64_t n : {200, 20'000, 140'000}) {
    const Case c{.kind = kind(), .m = 16, .n = n, .types = all_of(DType::bf16)};
    ForwardCall expected(c), twice(c);
    expected.on_cuda();
    twice.x.copy_from(expected.y);
    twice.on_cuda();
    const SideStream side;
    for (const Stream stream : {side.stream(), Stream{}}) {
      const auto handle = static_cast<cudaStream_t>(stream.handle);
      const Tensor blank(DType::bf16, {c.m, n});
      const DeviceTensor late(expected.x), w(expected.weight), y(blank), z(blank);
      DeviceTensor x(blank);
      NormFwd args;
      args.kind = kind(), args.eps = kEps, args.weight = w.ref();
      cuda_ok(cudaDeviceSynchronize());
      wait_kernel<<<1, 1, 0, handle>>>(20'000'000);
      x.copy_on(handle, late);
      args.x = x.ref(), args.y = y.ref();
      cuda::norm(args, stream);
      args.x = y.ref(), args.y = z.ref();
      cuda::norm(args, stream);
      cuda_ok(cudaStreamSynchronize(handle));
      EXPECT_TRUE(y.download().same_bits(expected.y)) << n;
      EXPECT_TRUE(z.download().same_bits(twice.y)) << n;
    }
  }
}

TEST_P(NormCuda, CapturedCallsReplay) {
  for (const std::int64_t n : {1000, 20'000}) {
    const Case c{.kind = kind(), .m = 64, .n = n, .types = all_of(DType::bf16)};
    ForwardCall expected(c);
    expected.on_cuda();
    const SideStream side;
    const DeviceTensor x(expected.x), w(expected.weight);
    DeviceTensor y(Tensor(DType::bf16, {c.m, n}));
    NormFwd args;
    args.kind = kind(), args.eps = kEps;
    args.x = x.ref(), args.weight = w.ref(), args.y = y.ref();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    cuda_ok(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
    cuda::norm(args, side.stream());
    cuda::norm(args, side.stream());
    cuda_ok(cudaStreamEndCapture(side, &graph));
    cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
    for (int i = 0; i < 2; ++i) {
      y.upload();
      cuda_ok(cudaDeviceSynchronize());
      cuda_ok(cudaGraphLaunch(replay, side));
      cuda_ok(cudaStreamSynchronize(side));
      EXPECT_TRUE(y.download().same_bits(expected.y)) << n;
    }
    cuda_ok(cudaGraphExecDestroy(replay));
    cuda_ok(cudaGraphDestroy(graph));
  }
}

/// Calls that are refused before they touch memory, so that none needs to exist.
TEST_F(CudaTest, RefusedNormsNameTheOpAndTheNextOneWorks) {
  const auto message_for = [](const TensorRef& x, const TensorRef& y, Stream stream = {}) {
    NormFwd args;
    args.op = "fastkern::some_norm", args.x = x, args.y = y;
    return error_of([&] { cuda::norm(args, stream); });
  };
  void* const nowhere = reinterpret_cast<void*>(std::uintptr_t{4096});
  const std::int64_t many = std::int64_t{1} << 40;
  const TensorRef huge = dense(nowhere, DType::bf16, many, 8);
  std::string message = message_for(huge, huge);
  EXPECT_TRUE(contains(message, "fastkern::some_norm: ")) << message;
  EXPECT_TRUE(contains(message, "do not fit a CUDA grid")) << message;

  TensorRef two_strides = dense(nowhere, DType::bf16, many / 4, 4, 8);
  two_strides.strides[0] = 64;
  message = message_for(two_strides, huge);
  EXPECT_TRUE(contains(message, "fastkern::some_norm: ")) << message;
  EXPECT_TRUE(contains(message, "more than 2^32")) << message;

  TensorRef transposed = dense(nowhere, DType::bf16, 8, 8);
  transposed.strides = {1, 8};
  const TensorRef small = dense(nowhere, DType::bf16, 8, 8);
  message = message_for(transposed, small);
  EXPECT_TRUE(contains(message, "fastkern::some_norm: x must")) << message;

  message = message_for(small, small, Stream{nullptr, 99});
  EXPECT_TRUE(contains(message, "fastkern::some_norm: ")) << message;

  expect_forward({.m = 4, .n = 64, .types = all_of(DType::bf16)});
}

}  // namespace
}  // namespace fastkern
