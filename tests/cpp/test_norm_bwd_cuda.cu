// SPDX-License-Identifier: Apache-2.0
// cuda::norm_bwd against cpu::norm_bwd, in guarded memory, with a workspace of exactly the size
// asked for that starts as NaN.
#include "norm_support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class NormBwdCuda : public CudaTest, public testing::WithParamInterface<NormKind> {
 protected:
  NormKind kind() const { return GetParam(); }
  const int multiprocessors_ = cuda::device_count() > 0 ? cuda::device_info(0).multiprocessors : 0;
};

INSTANTIATE_TEST_SUITE_P(Kinds, NormBwdCuda, testing::Values(NormKind::rms, NormKind::layer),
                         [](const auto& info) {
                           return info.param == NormKind::rms ? "rms" : "layer";
                         });

class NormBwdCudaTypes : public CudaTest,
                         public testing::WithParamInterface<std::tuple<NormKind, int>> {
 protected:
  NormKind kind() const { return std::get<0>(GetParam()); }
  std::vector<Types> types() const {
    const int index = std::get<1>(GetParam());
    if (index < 3) return {all_of(kDTypes[index])};
    return {std::begin(kMixes), std::end(kMixes)};
  }
};

INSTANTIATE_TEST_SUITE_P(Types, NormBwdCudaTypes,
                         testing::Combine(testing::Values(NormKind::rms, NormKind::layer),
                                          testing::Range(0, 4)),
                         [](const auto& info) {
                           const int index = std::get<1>(info.param);
                           return std::string(std::get<0>(info.param) == NormKind::rms ? "rms_"
                                                                                       : "layer_") +
                                  (index < 3 ? name_of(kDTypes[index]) : "mixed");
                         });

/// The gradients around a residual stream in all their forms.
std::vector<Case> streams(NormKind kind) {
  std::vector<Case> all(9, Case{.kind = kind});
  all[0].dh = true;
  all[1].dh = true, all[1].bias = true, all[1].weight_offset = 1.0;
  all[2].dh = all[2].dbranch = true, all[2].p = 0.1;  // dweight without dbias
  all[3].dbranch = true, all[3].p = 0.5, all[3].bias = true;
  all[4].dh = all[4].dbranch = true, all[4].rowscale = true, all[4].weight = false;
  all[5].dh = all[5].dbranch = true, all[5].p = 0.5, all[5].rowscale = true, all[5].bias = true;
  all[6].dh = true, all[6].two = true;
  all[7].dh = all[7].dbranch = true, all[7].two = true, all[7].bias = true, all[7].p = 0.1,
  all[7].weight_offset = 1.0;
  all[8].two = true, all[8].bias = true;
  return all;
}

/// The plan of a case, on a device of compute capability 9.0.
Plan plan_of(const Case& c, std::int64_t n) {
  const bool stream = c.dh || c.dbranch;
  const DType type = stream ? kernel_type({c.types.x, c.types.stream, c.types.y})
                            : kernel_type({c.types.x, c.types.y});
  return cuda::norm_bwd_plan(c.kind, n, type, true, 227 * 1024, stream || c.two, c.two);
}

TEST_P(NormBwdCudaTypes, MatchesAroundPlans) {
  int turn = 0;
  for (const Types& types : types()) {
    Case c{.kind = kind(), .types = types};
    for (const std::int64_t n :
         lengths_around([&](std::int64_t length) { return plan_of(c, length); })) {
      for (const std::int64_t m : counts_for(n)) {
        c.m = m, c.n = n;
        c.types.weight = ++turn % 2 == 0 ? types.weight : kDTypes[turn / 2 % 3];
        c.weight = turn % 7 != 0, c.bias = turn % 3 == 1, c.weight_offset = turn % 5 == 0;
        expect_backward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCudaTypes, StreamsMatchAroundPlans) {
  std::size_t turn = 0;
  const std::vector<Case> cases = streams(kind());
  for (const bool two : {false, true}) {
    for (const Types& types : types()) {
      Case like = cases[two ? 7 : 5];
      like.types = types;
      for (const std::int64_t n :
           lengths_around([&](std::int64_t length) { return plan_of(like, length); })) {
        Case c = cases[turn++ % cases.size()];
        while (c.two != two) c = cases[turn++ % cases.size()];
        c.m = n <= 1040 ? 37 : n <= 20'000 ? 5 : 2, c.n = n, c.types = types;
        expect_backward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCudaTypes, EveryStreamMatches) {
  for (const Types& types : types()) {
    for (const std::int64_t n : {7, 8, 100, 1024, 4100, 9000, 20'000, 70'000, 140'000}) {
      for (Case c : streams(kind())) {
        c.m = n <= 1024 ? 9 : 2, c.n = n, c.types = types;
        expect_backward(c);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCuda, AnyNumberOfRowsMatches) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {64, 128, 1024}) {
      for (const std::int64_t m : {0, 1, 131, 132, 133, 263, 264, 265, 1000}) {
        expect_backward({.kind = kind(), .m = m, .n = n, .types = types, .bias = m % 2 == 0});
        if (HasFailure()) return;
      }
    }
  }
}

/// Several rows for each team: its ring and its barriers go round.
TEST_P(NormBwdCuda, ManyRowsMatch) {
  for (const Types& types : {all_of(DType::f32), all_of(DType::bf16), kMixes[0]}) {
    for (const std::int64_t n : {8, 60, 500, 2048, 8192}) {
      Case c{.kind = kind(), .n = n, .types = types, .bias = n % 3 == 0};
      const Plan plan = plan_of(c, n);
      c.m = (5 * plan.blocks_per_sm * multiprocessors_ / 2) * plan.rows_per_block + 1;
      expect_backward(c);
      if (HasFailure()) return;
    }
    for (const auto& [m, n] : {std::pair<int, int>{150, 16'392}, {100, 20'000}, {30, 65'536}}) {
      Case c{.kind = kind(), .m = m, .n = n, .types = types};
      expect_backward(c);
      c.m = m / 2, c.dh = c.dbranch = true, c.p = 0.5;
      expect_backward(c);
      if (HasFailure()) return;
    }
  }
}

TEST_P(NormBwdCuda, HeadsMatch) {
  for (const Types& types : some_types()) {
    for (const std::int64_t heads : {1, 3, 8, 32}) {
      for (const std::int64_t n : {64, 100, 128, 1024, 9000, 40'000}) {
        if (heads > 8 && n > 1024) continue;
        Case c{.kind = kind(), .m = heads * (n > 1024 ? 5 : 41), .n = n, .types = types};
        c.bias = n % 3 != 0, c.heads = heads;
        expect_backward(c);
        if (n <= 1024) {
          c.two = c.dh = true;
          expect_backward(c);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCuda, MoreHeadsThanTeamsMatch) {
  for (const std::int64_t n : {1024, 8192}) {
    Case c{.kind = kind(), .n = n, .types = all_of(DType::bf16), .bias = true};
    const Plan plan = plan_of(c, n);
    c.heads = plan.blocks_per_sm * multiprocessors_ * plan.rows_per_block / plan.blocks_per_row;
    for (const int more : {0, 1}) {  // as many, and one more
      c.heads += more, c.m = 3 * c.heads;
      expect_backward(c);
    }
  }
}

/// Not asking for a gradient changes no bit of the others, where the kernel is the same one.
TEST_P(NormBwdCuda, EachGradientAloneHasTheSameBits) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {40, 3000, 20'000, 140'000}) {
      Case c{.kind = kind(), .m = n > 3000 ? 9 : 300, .n = n, .types = types};
      c.bias = kind() == NormKind::layer;
      BackwardCall all = expect_backward(c);
      for (const Wanted& want : {Wanted{true, false, false, false},
                                 {false, false, true, false},
                                 {false, false, false, true},
                                 {false, false, true, true}}) {
        if (want.dbias && !c.bias) continue;
        BackwardCall some(c, want);
        expect_same(some.on_cuda(), all);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCuda, EveryChoiceOfGradientsMatches) {
  for (const std::int64_t n : {100, 4096, 20'000}) {
    for (Case c : streams(kind())) {
      c.m = 5, c.n = n, c.types = all_of(DType::bf16), c.bias = true;
      for (int bits = 1; bits < 16; ++bits) {
        const Wanted want{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
        SCOPED_TRACE("wanted " + std::to_string(bits));
        expect_backward(c, want);
        if (HasFailure()) return;
      }
    }
  }
}

/// Alignment and strides of every operand change how memory is reached, never a bit of the result.
TEST_P(NormBwdCudaTypes, AnyStridesAndAlignmentsGiveTheSameBits) {
  const std::vector<Case> more = streams(kind());
  for (const Types& types : types()) {
    for (const std::int64_t n : {8, 24, 61, 256, 1000, 4096, 9000, 20'000, 140'000}) {
      const std::vector<Layout> layouts = row_layouts(6, n);
      for (Case c : {Case{.kind = kind(), .bias = true}, more[2], more[5], more[7]}) {
        if (n > 10'000 && (c.two || (n > 100'000 && c.dbranch))) continue;
        c.m = 6, c.n = n, c.types = types;
        BackwardCall expected = expect_backward(c);
        for (std::size_t shift = 0; shift < (n > 10'000 ? 3 : layouts.size()); ++shift) {
          SCOPED_TRACE(c.text() + ", shift " + std::to_string(shift));
          const Arrangement how{layouts, shift, static_cast<std::int64_t>(shift) % 3};
          expect_same(BackwardCall(c, {}, how).on_cuda(), expected);
        }
        for (const Layout& layout : layouts) {
          if (n > 10'000) break;
          SCOPED_TRACE(c.text() + ", all " + layout.name);
          expect_same(BackwardCall(c, {}, {{layout}, 0, 1}).on_cuda(), expected);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCuda, ExpandedRowsAreRead) {
  for (const std::int64_t n : {64, 9000}) {
    const Layout one{"one row, five times", {5, n}, {0, 1}};
    const Case c{.kind = kind(), .m = 5, .n = n, .types = all_of(DType::bf16)};
    BackwardCall dense(c), expanded(c);
    expanded.x = Tensor(DType::bf16, one).fill(1), expanded.dy = Tensor(DType::bf16, one).fill(2);
    dense.x.copy_from(expanded.x), dense.dy.copy_from(expanded.dy);
    expect_same(expanded.on_cuda(), dense.on_cuda());
  }
}

TEST_P(NormBwdCuda, RowsDoNotSeeTheirBatch) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {24, 100, 1000, 4096, 9000, 40'000, 140'000}) {
      const std::int64_t m = n <= 9000 ? 300 : 5;
      Case c{.kind = kind(), .m = m, .n = n, .types = types};
      c.dh = n % 3 != 0;
      BackwardCall all(c);
      all.on_cuda();
      c.m = 1;
      for (const std::int64_t row : {std::int64_t{0}, m / 2, m - 1}) {
        BackwardCall one(c);
        for (std::int64_t i = 0; i < n; ++i) {
          one.x.set(i, all.x.get(row * n + i)), one.dy.set(i, all.dy.get(row * n + i));
          if (c.dh) one.dh.set(i, all.dh.get(row * n + i));
        }
        one.on_cuda();
        for (std::int64_t i = 0; i < n; ++i) {
          ASSERT_EQ(one.dx.get(i), all.dx.get(row * n + i))
              << all.c.text() << ", row " << row << ", column " << i;
        }
      }
    }
  }
}

TEST_P(NormBwdCuda, RepeatsHaveTheSameBits) {
  const std::vector<Case> more = streams(kind());
  for (const std::int64_t n : {40, 3000, 20'000}) {
    for (Case c : {Case{.kind = kind(), .bias = true}, more[2], more[7]}) {
      c.m = 300 * 40 / n + 20, c.n = n, c.types = all_of(DType::bf16);
      BackwardCall first(c);
      first.on_cuda();
      for (int repeat = 0; repeat < 50; ++repeat) {
        expect_same(BackwardCall(c).on_cuda(), first);
        ASSERT_FALSE(HasFailure()) << c.text() << ", repeat " << repeat;
      }
    }
  }
}

/// Without eps a row of zeros has no finite rstd. Teams without a row must not take part in that.
TEST_P(NormBwdCuda, RowsThatAreNoneLeaveNoNan) {
  for (const Types& types : some_types()) {
    for (const std::int64_t n : {8, 64, 100, 1024, 4096, 9000, 20'000}) {
      for (const std::int64_t m : {1, 3, 133}) {
        if (m * n > 1'000'000) continue;
        expect_backward(
            {.kind = kind(), .m = m, .n = n, .types = types, .bias = n % 3 == 0, .eps = 0.0});
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(NormBwdCuda, NanAndInfinityStayInTheirRows) {
  for (const std::int64_t n : {8, 100, 1024, 9000, 20'000, 140'000}) {
    Case c{.kind = kind(), .m = 5, .n = n, .types = all_of(DType::bf16), .eps = 0.0};
    BackwardCall clean(c), call(c);
    for (std::int64_t i = 0; i < n; ++i) call.x.set(2 * n + i, 0.0);
    call.x.set(n + n / 2, std::nan(""));
    call.x.set(3 * n + n - 1, std::numeric_limits<double>::infinity());
    clean.on_cuda(), call.on_cuda();
    for (const std::int64_t row : {0, 4}) {
      for (std::int64_t i = row * n; i < (row + 1) * n; ++i)
        ASSERT_EQ(call.dx.get(i), clean.dx.get(i)) << c.text() << ", element " << i;
    }
    for (std::int64_t i = n; i < (kind() == NormKind::layer ? 4 : 3) * n; ++i)
      ASSERT_TRUE(std::isnan(call.dx.get(i))) << c.text() << ", element " << i;
  }
}

TEST_P(NormBwdCuda, TheSumsOverNoRowsAreZero) {
  for (const auto& [m, n] :
       {std::pair<std::int64_t, std::int64_t>{0, 5}, {0, 40'000}, {0, 300'000}, {3, 0}, {0, 0}}) {
    BackwardCall call({.kind = kind(), .m = m, .n = n, .bias = true});
    call.on_cuda();
    for (const double v : call.dweight.values()) ASSERT_EQ(v, 0.0) << m << " x " << n;
    for (const double v : call.dbias.values()) ASSERT_EQ(v, 0.0) << m << " x " << n;
  }
}

TEST_P(NormBwdCuda, CapturedCallsReplay) {
  for (const std::int64_t n : {1000, 20'000, 140'000}) {
    const Case c{.kind = kind(), .m = 24, .n = n, .types = all_of(DType::bf16)};
    BackwardCall call(c), expected(c);
    expected.on_cuda();
    const SideStream side;
    OnDevice device;
    NormBwd args = call.args(device);
    args.workspace_size = cuda::norm_bwd_workspace(args, 0);
    const DeviceArray<float> workspace(args.workspace_size / 4, std::nanf(""));
    args.workspace = workspace.data();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    cuda_ok(cudaStreamBeginCapture(side, cudaStreamCaptureModeGlobal));
    cuda::norm_bwd(args, side.stream());
    cuda::norm_bwd(args, side.stream());  // after the first: they share the workspace
    cuda_ok(cudaStreamEndCapture(side, &graph));
    cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
    cuda_ok(cudaDeviceSynchronize());
    for (int i = 0; i < 2; ++i) cuda_ok(cudaGraphLaunch(replay, side));
    cuda_ok(cudaStreamSynchronize(side));
    device.finish();
    expect_same(call, expected);
    cuda_ok(cudaGraphExecDestroy(replay));
    cuda_ok(cudaGraphDestroy(graph));
  }
}

TEST_P(NormBwdCuda, TooSmallAWorkspaceIsRefused) {
  for (const std::int64_t n : {100, 20'000, 140'000}) {
    const Case c{.kind = kind(), .m = 6, .n = n, .types = all_of(DType::bf16), .bias = true};
    BackwardCall call(c), blank(c);
    OnDevice device;
    NormBwd args = call.args(device);
    args.op = "fastkern::some_norm_bwd";
    const std::size_t needed = cuda::norm_bwd_workspace(args, 0);
    ASSERT_GT(needed, 0u);
    const DeviceArray<float> workspace(needed / 4);
    args.workspace = workspace.data();
    args.workspace_size = needed - 1;
    const std::string message = error_of([&] { cuda::norm_bwd(args, {}); });
    EXPECT_TRUE(contains(message, "fastkern::some_norm_bwd: workspace must")) << message;
    EXPECT_TRUE(contains(message, std::to_string(needed))) << message;
    EXPECT_TRUE(contains(message, std::to_string(needed - 1))) << message;
    device.finish();
    expect_same(call, blank);  // nothing was written
  }
}

TEST_P(NormBwdCuda, GradientsOfRowsAloneNeedNoWorkspace) {
  for (const std::int64_t n : {100, 20'000}) {
    BackwardCall call({.kind = kind(), .m = 6, .n = n, .weight = false, .dh = true});
    OnDevice device;
    NormBwd args = call.args(device);
    EXPECT_EQ(cuda::norm_bwd_workspace(args, 0), 0u);
    cuda::norm_bwd(args, {});
    device.finish();
  }
}

}  // namespace
}  // namespace fastkern
