// SPDX-License-Identifier: Apache-2.0
// cuda::rms_norm and cuda::rms_norm_bwd against cpu:: and plain double loops, in guarded memory.
#include <optional>

#include "fastkern/norm.h"
#include "support.cuh"

namespace fastkern {
namespace {

using test::contains;
using test::cuda_ok;
using test::dense_layout;
using test::DeviceTensor;
using test::error_of;
using test::Layout;
using test::Tensor;

constexpr double kEps = 1e-2;  // large enough that a missing one shows

using OptionalDType = std::optional<DType>;
constexpr OptionalDType kWeights[] = {std::nullopt, DType::f32, DType::f16, DType::bf16};

Tensor make_weight(OptionalDType dtype, std::int64_t n, std::int64_t offset = 0) {
  return dtype ? Tensor(*dtype, dense_layout({n}, offset)).fill(7, 1.0) : Tensor();
}

/// One problem on the host, and the layouts in which to bring it to the device.
struct Problem {
  Tensor x, dy, weight;
  std::int64_t n;
};

Problem make_problem(std::int64_t m, std::int64_t n, DType dtype, OptionalDType weight) {
  return {Tensor(dtype, {m, n}).fill(1), Tensor(dtype, {m, n}).fill(2), make_weight(weight, n), n};
}

struct Outputs {
  Tensor y, dx, dweight;
};

struct How {
  Layout x, dy, out;               // out: of y and dx
  std::int64_t weight_offset = 0;  // of weight and dweight
  Stream stream = {};
  bool want_dx = true, want_dweight = true;
};

Tensor forward(const Problem& problem, const How& how) {
  const DType dtype = problem.x.dtype();
  Tensor weight = problem.weight;
  if (weight.given()) weight = make_weight(weight.dtype(), problem.n, how.weight_offset);
  const DeviceTensor x(Tensor(dtype, how.x).copy_from(problem.x)), w(weight),
      y(Tensor(dtype, how.out));
  cuda::rms_norm({x.ref(), w.ref(), y.ref(), kEps}, how.stream);
  cuda_ok(cudaDeviceSynchronize(), "rms_norm");
  EXPECT_TRUE(x.download().gaps_intact());
  const Tensor result = y.download();
  EXPECT_TRUE(result.gaps_intact()) << "y, " << how.out.name;
  return result;
}

Outputs backward(const Problem& problem, const How& how) {
  const DType dtype = problem.x.dtype();
  const bool want_dweight = how.want_dweight && problem.weight.given();
  Tensor weight = problem.weight;
  if (weight.given()) weight = make_weight(weight.dtype(), problem.n, how.weight_offset);
  const DeviceTensor x(Tensor(dtype, how.x).copy_from(problem.x)),
      dy(Tensor(dtype, how.dy).copy_from(problem.dy));
  const DeviceTensor w(weight), dx(how.want_dx ? Tensor(dtype, how.out) : Tensor());
  const DeviceTensor dweight(
      want_dweight ? Tensor(weight.dtype(), dense_layout({problem.n}, how.weight_offset))
                   : Tensor());
  RmsNormBwd args{
      .dy = dy.ref(), .x = x.ref(), .weight = w.ref(), .dx = dx.ref(), .dweight = dweight.ref()};
  args.eps = kEps;
  args.workspace_size = cuda::rms_norm_bwd_workspace(args, how.stream.device);
  // Exactly as large as asked for: a byte more is a canary.
  const DeviceTensor workspace(
      Tensor(DType::f32, {static_cast<std::int64_t>(args.workspace_size / 4)}));
  EXPECT_EQ(args.workspace_size % 4, 0u);
  args.workspace = args.workspace_size > 0 ? workspace.ref().data : nullptr;
  cuda::rms_norm_bwd(args, how.stream);
  cuda_ok(cudaDeviceSynchronize(), "rms_norm_bwd");
  EXPECT_TRUE(workspace.download().gaps_intact()) << "workspace";
  Outputs result{{}, dx.download(), dweight.download()};
  EXPECT_TRUE(result.dx.gaps_intact()) << "dx, " << how.out.name;
  EXPECT_TRUE(result.dweight.gaps_intact()) << "dweight";
  return result;
}

Outputs on_cpu(const Problem& problem) {
  Problem p = problem;
  Outputs out{Tensor(p.x.dtype(), {p.x.numel() / p.n, p.n}),
              Tensor(p.x.dtype(), {p.x.numel() / p.n, p.n}),
              p.weight.given() ? Tensor(p.weight.dtype(), {p.n}) : Tensor()};
  cpu::rms_norm({p.x.ref(), p.weight.ref(), out.y.ref(), kEps});
  cpu::rms_norm_bwd({.dy = p.dy.ref(),
                     .x = p.x.ref(),
                     .weight = p.weight.ref(),
                     .dx = out.dx.ref(),
                     .dweight = out.dweight.ref(),
                     .eps = kEps});
  return out;
}

/// The dense call on the GPU and the one on the CPU, each within the same bounds of the double
/// result.
Outputs expect_matches_cpu(const Problem& problem) {
  const Layout dense = dense_layout({problem.x.numel() / problem.n, problem.n});
  const How how{dense, dense, dense};
  Outputs found = backward(problem, how);
  found.y = forward(problem, how);
  const Outputs oracle = on_cpu(problem);
  const auto x = problem.x.values(), dy = problem.dy.values(), weight = problem.weight.values();
  const test::Expected y = test::rms_norm_reference(x, weight, problem.n, kEps);
  const test::ExpectedGrads grads = test::rms_norm_bwd_reference(dy, x, weight, problem.n, kEps);
  EXPECT_TRUE(close(found.y, y));
  EXPECT_TRUE(close(oracle.y, y)) << "(cpu)";
  EXPECT_TRUE(close(found.dx, grads.dx));
  EXPECT_TRUE(close(oracle.dx, grads.dx)) << "(cpu)";
  if (problem.weight.given()) {
    EXPECT_TRUE(close(found.dweight, grads.dweight));
    EXPECT_TRUE(close(oracle.dweight, grads.dweight)) << "(cpu)";
  }
  return found;
}

void expect_same(const Outputs& found, const Outputs& expected) {
  EXPECT_TRUE(found.y.same_bits(expected.y));
  EXPECT_TRUE(found.dx.same_bits(expected.dx));
  EXPECT_TRUE(found.dweight.same_bits(expected.dweight));
}

Outputs run(const Problem& problem, const How& how) {
  Outputs found = backward(problem, how);
  found.y = forward(problem, how);
  return found;
}

bool same_plan(const Plan& a, const Plan& b) {
  return std::string(a.kernel) == b.kernel && a.threads_per_row == b.threads_per_row &&
         a.rows_per_block == b.rows_per_block && a.elements_per_thread == b.elements_per_thread;
}

/// The lengths on both sides of every change of plan, and a few small ones.
std::vector<std::int64_t> lengths_around_plans(DType dtype) {
  std::vector<std::int64_t> lengths{1, 2, 3, 4, 7, 8, 9, 31, 33};
  const std::int64_t last = 8 * 1024 * 16 / size_of(dtype) + 1;
  for (std::int64_t n = 2; n <= last; ++n) {
    if (same_plan(cuda::rms_norm_plan(n, dtype), cuda::rms_norm_plan(n - 1, dtype)) &&
        same_plan(cuda::rms_norm_bwd_plan(n, dtype), cuda::rms_norm_bwd_plan(n - 1, dtype))) {
      continue;
    }
    lengths.insert(lengths.end(), {n - 2, n - 1, n, n + 1});
  }
  return lengths;
}

class RmsNormCuda : public test::CudaTest {
 protected:
  const int multiprocessors_ = cuda::device_count() > 0 ? cuda::device_info(0).multiprocessors : 0;
};

void expect_matches_around_plans(DType dtype) {
  int turn = 0;
  for (const std::int64_t n : lengths_around_plans(dtype)) {
    const std::int64_t partial = cuda::rms_norm_bwd_plan(n, dtype).rows_per_block + 1;
    for (const std::int64_t m : {std::int64_t{1}, partial}) {
      const OptionalDType weight = kWeights[turn++ % 4];
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + ", weight " +
                   (weight ? name_of(*weight) : "none"));
      expect_matches_cpu(make_problem(m, n, dtype, weight));
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST_F(RmsNormCuda, F32MatchesAroundPlans) { expect_matches_around_plans(DType::f32); }
TEST_F(RmsNormCuda, F16MatchesAroundPlans) { expect_matches_around_plans(DType::f16); }
TEST_F(RmsNormCuda, Bf16MatchesAroundPlans) { expect_matches_around_plans(DType::bf16); }

TEST_F(RmsNormCuda, EveryDTypeMixMatches) {
  for (const DType dtype : test::kDTypes) {
    for (const OptionalDType weight : kWeights) {
      for (const std::int64_t n : {64, 65, 1000, 5000, 20'000, 70'000}) {
        SCOPED_TRACE(std::string(name_of(dtype)) + ", weight " +
                     (weight ? name_of(*weight) : "none") + ", n " + std::to_string(n));
        expect_matches_cpu(make_problem(5, n, dtype, weight));
      }
    }
  }
}

/// Alignment and strides of every operand change how memory is reached, never a bit of the result.
TEST_F(RmsNormCuda, AnyStridesAndAlignmentsGiveTheSameBits) {
  for (const DType dtype : test::kDTypes) {
    for (const std::int64_t n : {8, 24, 61, 256, 1000, 4096, 9000, 20'000, 70'000}) {
      const Problem problem = make_problem(6, n, dtype, n % 16 == 0 ? dtype : DType::f32);
      const Outputs expected = expect_matches_cpu(problem);
      const std::vector<Layout> layouts = test::row_layouts(6, n);
      const auto layout = [&](std::size_t i) { return layouts[i % layouts.size()]; };
      for (std::size_t i = 0; i < layouts.size(); ++i) {
        for (const std::size_t shift : {0, 1, 3}) {
          const How how{layout(i), layout(i + 2 * shift), layout(i + shift),
                        static_cast<std::int64_t>(shift)};
          SCOPED_TRACE(std::string(name_of(dtype)) + ", n " + std::to_string(n) + ", x " +
                       how.x.name + ", dy " + how.dy.name + ", out " + how.out.name);
          expect_same(run(problem, how), expected);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(RmsNormCuda, ExpandedRowsAreRead) {
  for (const std::int64_t n : {64, 9000}) {
    const Layout expanded{"one row, seen five times", {5, n}, {0, 1}}, dense = dense_layout({5, n});
    Problem problem = make_problem(5, n, DType::bf16, DType::bf16);
    for (std::int64_t i = n; i < 5 * n; ++i) {
      problem.x.set(i, problem.x.get(i % n));
      problem.dy.set(i, problem.dy.get(i % n));
    }
    expect_same(run(problem, {expanded, expanded, dense}), run(problem, {dense, dense, dense}));
  }
}

/// More rows than the persistent blocks of backward hold at once: they walk, and prefetch past the
/// end.
TEST_F(RmsNormCuda, ManyRowsMatch) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t n : {8, 60, 500, 2048, 8192, 16'384 + 8}) {
      const Plan plan = cuda::rms_norm_bwd_plan(n, dtype);
      const std::int64_t blocks =
          2048 / plan.threads_per_block * multiprocessors_;  // no GPU holds more at once
      const std::int64_t m = (3 * blocks / 2) * plan.rows_per_block + 1;
      SCOPED_TRACE(std::string(name_of(dtype)) + ", " + std::to_string(m) + " x " +
                   std::to_string(n));
      expect_matches_cpu(make_problem(m, n, dtype, dtype));
    }
  }
}

TEST_F(RmsNormCuda, EachGradientAloneHasTheSameBits) {
  for (const std::int64_t n : {40, 3000, 20'000}) {
    const Layout dense = dense_layout({300, n});
    const Problem problem = make_problem(300, n, DType::bf16, DType::f32);
    const Outputs both = backward(problem, {dense, dense, dense});
    const Outputs dx = backward(problem, {dense, dense, dense, 0, {}, true, false});
    const Outputs dweight = backward(problem, {dense, dense, dense, 0, {}, false, true});
    EXPECT_TRUE(dx.dx.same_bits(both.dx)) << n;
    EXPECT_TRUE(dweight.dweight.same_bits(both.dweight)) << n;
  }
}

TEST_F(RmsNormCuda, RepeatsHaveTheSameBits) {
  for (const std::int64_t n : {40, 3000, 20'000}) {
    const Layout dense = dense_layout({300, n});
    const Problem problem = make_problem(300, n, DType::bf16, DType::bf16);
    const Outputs first = run(problem, {dense, dense, dense});
    for (int repeat = 0; repeat < 4; ++repeat)
      expect_same(run(problem, {dense, dense, dense}), first);
  }
}

/// A row's result is the same alone as among others.
TEST_F(RmsNormCuda, RowsDoNotSeeTheirBatch) {
  for (const std::int64_t n : {24, 1000, 9000, 70'000}) {
    constexpr std::int64_t m = 37;
    const Problem all = make_problem(m, n, DType::bf16, DType::bf16);
    const Outputs expected =
        run(all, {dense_layout({m, n}), dense_layout({m, n}), dense_layout({m, n})});
    for (const std::int64_t row : {std::int64_t{0}, std::int64_t{17}, m - 1}) {
      Problem one = make_problem(1, n, DType::bf16, DType::bf16);
      for (std::int64_t c = 0; c < n; ++c) {
        one.x.set(c, all.x.get(row * n + c));
        one.dy.set(c, all.dy.get(row * n + c));
      }
      const Outputs alone =
          run(one, {dense_layout({1, n}), dense_layout({1, n}), dense_layout({1, n})});
      for (std::int64_t c = 0; c < n; ++c) {
        ASSERT_EQ(alone.y.get(c), expected.y.get(row * n + c))
            << "row " << row << ", column " << c << " of " << n;
        ASSERT_EQ(alone.dx.get(c), expected.dx.get(row * n + c))
            << "row " << row << ", column " << c << " of " << n;
      }
    }
  }
}

TEST_F(RmsNormCuda, NoRowsOrNoColumns) {
  for (const auto& [m, n] :
       {std::pair<std::int64_t, std::int64_t>{0, 5}, {0, 40'000}, {3, 0}, {0, 0}}) {
    SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n));
    const Problem problem{Tensor(DType::bf16, {m, n}), Tensor(DType::bf16, {m, n}),
                          make_weight(DType::f32, n), n};
    const Layout dense = dense_layout({m, n});
    forward(problem, {dense, dense, dense});
    const Outputs grads = backward(problem, {dense, dense, dense});
    for (const double v : grads.dweight.values()) EXPECT_EQ(v, 0.0);
  }
}

__global__ void wait_kernel(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

/// The inputs arrive late on a side stream: a call on any other stream would read what was there
/// before.
TEST_F(RmsNormCuda, WorkIsOrderedOnTheGivenStream) {
  constexpr std::int64_t m = 64;
  for (const std::int64_t n : {200, 20'000}) {
    const Layout dense = dense_layout({m, n});
    const Problem problem = make_problem(m, n, DType::bf16, DType::bf16);
    const Outputs expected = run(problem, {dense, dense, dense});
    const test::SideStream side;
    for (const Stream stream : {side.stream(), Stream{}}) {
      const auto handle = static_cast<cudaStream_t>(stream.handle);
      const Tensor blank(DType::bf16, dense);
      const DeviceTensor late_x(problem.x), late_dy(problem.dy);
      DeviceTensor x(blank), dy(blank);
      const DeviceTensor w(problem.weight), y(blank), dx(blank), dweight(Tensor(DType::bf16, {n}));
      RmsNormBwd args{.dy = dy.ref(),
                      .x = x.ref(),
                      .weight = w.ref(),
                      .dx = dx.ref(),
                      .dweight = dweight.ref()};
      args.eps = kEps;
      args.workspace_size = cuda::rms_norm_bwd_workspace(args, 0);
      const DeviceTensor workspace(
          Tensor(DType::f32, {static_cast<std::int64_t>(args.workspace_size / 4)}));
      args.workspace = workspace.ref().data;
      cuda_ok(cudaDeviceSynchronize());
      wait_kernel<<<1, 1, 0, handle>>>(50'000'000);
      x.copy_on(handle, late_x);
      dy.copy_on(handle, late_dy);
      cuda::rms_norm({x.ref(), w.ref(), y.ref(), kEps}, stream);
      cuda::rms_norm_bwd(args, stream);
      cuda_ok(cudaStreamSynchronize(handle));
      expect_same({y.download(), dx.download(), dweight.download()}, expected);
    }
  }
}

TEST_F(RmsNormCuda, CapturedCallsReplay) {
  constexpr std::int64_t m = 64, n = 1000;
  const Layout dense = dense_layout({m, n});
  const Problem problem = make_problem(m, n, DType::bf16, DType::bf16);
  const Outputs expected = run(problem, {dense, dense, dense});
  const test::SideStream side;
  DeviceTensor x(problem.x), y(Tensor(DType::bf16, dense));
  const DeviceTensor w(problem.weight);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  cuda_ok(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
  cuda::rms_norm({x.ref(), w.ref(), y.ref(), kEps}, side.stream());
  cuda_ok(cudaStreamEndCapture(side, &graph));
  cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < 2; ++i) {
    y.upload();
    cuda_ok(cudaDeviceSynchronize());
    cuda_ok(cudaGraphLaunch(replay, side));
    cuda_ok(cudaStreamSynchronize(side));
    EXPECT_TRUE(y.download().same_bits(expected.y));
  }
  cuda_ok(cudaGraphExecDestroy(replay));
  cuda_ok(cudaGraphDestroy(graph));
}

TEST_F(RmsNormCuda, TooSmallAWorkspaceIsRefused) {
  for (const std::int64_t n : {100, 20'000}) {
    const Layout dense = dense_layout({6, n});
    const Problem problem = make_problem(6, n, DType::bf16, DType::bf16);
    const DeviceTensor x(problem.x), dy(problem.dy), w(problem.weight);
    const Tensor blank(DType::bf16, dense), blank_weight(DType::bf16, {n});
    const DeviceTensor dx(blank), dweight(blank_weight);
    RmsNormBwd args{
        .dy = dy.ref(), .x = x.ref(), .weight = w.ref(), .dx = dx.ref(), .dweight = dweight.ref()};
    args.eps = kEps;
    const std::size_t needed = cuda::rms_norm_bwd_workspace(args, 0);
    ASSERT_GT(needed, 0u);
    const DeviceTensor workspace(Tensor(DType::f32, {static_cast<std::int64_t>(needed / 4)}));
    args.workspace = workspace.ref().data;
    args.workspace_size = needed - 1;
    const std::string message = error_of([&] { cuda::rms_norm_bwd(args, {}); });
    EXPECT_TRUE(contains(message, "fastkern::rms_norm_bwd: workspace must")) << message;
    EXPECT_TRUE(contains(message, std::to_string(needed))) << message;
    EXPECT_TRUE(contains(message, std::to_string(needed - 1))) << message;
    cuda_ok(cudaDeviceSynchronize());
    EXPECT_TRUE(dx.download().same_bits(blank));
    EXPECT_TRUE(dweight.download().same_bits(blank_weight));
    args.workspace_size = needed;
    cuda::rms_norm_bwd(args, {});
    cuda_ok(cudaDeviceSynchronize());
    EXPECT_TRUE(dx.download().same_bits(backward(problem, {dense, dense, dense}).dx));
  }
}

TEST_F(RmsNormCuda, GradientOfXAloneNeedsNoWorkspace) {
  for (const std::int64_t n : {100, 20'000}) {
    const Problem problem = make_problem(6, n, DType::bf16, std::nullopt);
    const Layout dense = dense_layout({6, n});
    const DeviceTensor x(problem.x), dy(problem.dy), dx(Tensor(DType::bf16, dense));
    RmsNormBwd args{.dy = dy.ref(), .x = x.ref(), .weight = {}, .dx = dx.ref(), .dweight = {}};
    EXPECT_EQ(cuda::rms_norm_bwd_workspace(args, 0), 0u);
    cuda::rms_norm_bwd(args, {});
    cuda_ok(cudaDeviceSynchronize());
  }
}

/// Calls that are refused before they touch memory, so that none needs to exist.
TEST_F(RmsNormCuda, RefusedCallsNameTheOpAndTheNextOneWorks) {
  const auto message_for = [](const TensorRef& x, const TensorRef& y, Stream stream = {}) {
    return error_of([&] { cuda::rms_norm({x, {}, y, kEps}, stream); });
  };
  void* const nowhere = reinterpret_cast<void*>(std::uintptr_t{4096});
  const std::int64_t many = std::int64_t{1} << 37;
  const TensorRef huge = dense(nowhere, DType::bf16, many, 8);
  std::string message = message_for(huge, huge);
  EXPECT_TRUE(contains(message, "fastkern::rms_norm: ")) << message;
  EXPECT_TRUE(contains(message, "do not fit a CUDA grid")) << message;

  TensorRef two_strides = dense(nowhere, DType::bf16, many / 4, 4, 8);
  two_strides.strides[0] = 64;
  message = message_for(two_strides, huge);
  EXPECT_TRUE(contains(message, "fastkern::rms_norm: ")) << message;
  EXPECT_TRUE(contains(message, "more than 2^32")) << message;

  TensorRef transposed = dense(nowhere, DType::bf16, 8, 8);
  transposed.strides = {1, 8};
  message = message_for(transposed, dense(nowhere, DType::bf16, 8, 8));
  EXPECT_TRUE(contains(message, "fastkern::rms_norm: x must")) << message;

  const TensorRef small = dense(nowhere, DType::bf16, 8, 8);
  message = message_for(small, small, Stream{nullptr, 99});
  EXPECT_TRUE(contains(message, "fastkern::rms_norm: cudaSetDevice failed")) << message;

  expect_matches_cpu(make_problem(4, 64, DType::bf16, DType::bf16));
}

}  // namespace
}  // namespace fastkern
