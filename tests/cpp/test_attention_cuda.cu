// SPDX-License-Identifier: Apache-2.0
// cuda::attention and cuda::attention_bwd against plain double loops, in guarded memory.
#include "attention_cases.h"
#include "attention_on_device.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

AttentionOutputs attention_on_cuda(AttentionProblem p, bool gradients = true) {
  OnDevice place;
  AttentionOutputs out = blank_attention(p);
  cuda::attention(attention_fwd(p, out, place), {});
  if (gradients) {
    AttentionBwd bwd = attention_bwd(p, out, place);
    bwd.workspace_size = cuda::attention_bwd_workspace(bwd, {});
    DeviceTensor workspace(Tensor(DType::f32, {static_cast<std::int64_t>(bwd.workspace_size / 4)}));
    bwd.workspace = workspace.ref().data;
    cuda::attention_bwd(bwd, {});
    cuda_ok(cudaDeviceSynchronize());
    EXPECT_TRUE(workspace.download().gaps_intact()) << "workspace";
  }
  cuda_ok(cudaDeviceSynchronize());
  for (const auto& [name, t] : out.named()) {
    if (place.where.count(t)) *t = place.where[t]->download();
  }
  return out;
}

class AttentionCuda : public CudaTest, public testing::WithParamInterface<DType> {
 protected:
  void expect_matches(const AttentionCase& c) {
    const AttentionProblem p = make_attention(c, GetParam());
    SCOPED_TRACE(p.text());
    // Gradients of wide heads are there in f32 alone.
    const bool gradients = GetParam() == DType::f32 || std::max(c.d, c.dv) <= 256;
    const AttentionOutputs found = attention_on_cuda(p, gradients);
    // Products of f32 are as good as those of the CPU.
    const Tolerance tolerance =
        GetParam() == DType::f32 ? Tolerance{} : Tolerance{.noise = 6e-6, .tiles = true};
    const ExpectedAttention expected = attention_reference(p);
    if (gradients) {
      expect_attention(found, expected, tolerance);
    } else {
      expect_forward(found, expected, tolerance);
    }
    expect_guards(found);
    expect_same(attention_on_cuda(p, gradients), found);
  }
};

INSTANTIATE_TEST_SUITE_P(Types, AttentionCuda, testing::Values(DType::f32, DType::f16, DType::bf16),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

TEST_P(AttentionCuda, Options) {
  for (const AttentionCase& c : attention_cases()) {
    expect_matches(c);
    if (HasFatalFailure()) return;
  }
}

TEST_P(AttentionCuda, Sizes) {
  for (const std::int64_t queries : {1, 15, 17, 63, 64, 65, 127, 129, 257}) {
    for (const std::int64_t keys : {1, 16, 33, 64, 65, 128, 129, 300}) {
      AttentionCase c{.name = "sizes",
                      .batch = 1,
                      .heads = 2,
                      .kv_heads = 1,
                      .queries = queries,
                      .keys = keys,
                      .d = 64,
                      .dv = 64};
      expect_matches(c);
      c.right = 0;
      expect_matches(c);
      c.left = queries / 2, c.right = 16;
      expect_matches(c);
    }
  }
}

TEST_P(AttentionCuda, HeadDimensions) {
  for (const std::int64_t d :
       {1, 7, 8, 16, 31, 32, 40, 64, 65, 80, 96, 104, 128, 160, 192, 200, 256}) {
    AttentionCase c{.name = "dimensions", .batch = 1, .heads = 2, .queries = 131, .keys = 197};
    c.d = c.dv = d;
    expect_matches(c);
    c.dv = 40, c.right = 0;
    expect_matches(c);
    c.d = 24, c.dv = d;
    expect_matches(c);
  }
}

TEST_P(AttentionCuda, WideHeads) {
  for (const std::int64_t d : {257, 288, 320, 384, 511, 512}) {
    AttentionCase c{.name = "wide", .batch = 1, .heads = 2, .queries = 70, .keys = 133};
    c.d = c.dv = d, c.right = 0;
    expect_matches(c);
    c.dv = 64, c.sinks = DType::f32, c.softcap = 2.0;
    expect_matches(c);
    c.d = 100, c.dv = d, c.bias = DType::f32, c.dropout = 0.2;
    expect_matches(c);
  }
  AttentionCase packed = packed_case();
  packed.d = 192, packed.dv = 320;
  expect_matches(packed);
}

}  // namespace
}  // namespace fastkern
