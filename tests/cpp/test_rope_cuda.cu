// SPDX-License-Identifier: Apache-2.0
// cuda::rope, cuda::qk_norm_rope and its gradient against plain double loops, in guarded memory.
#include <map>

#include "rope_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class RopeCuda : public CudaTest {};

/// A problem's tensors on the device.
struct OnDevice {
  OnDevice(const RopeProblem& p, RopeTensors& t)
      : positions(p.positions()), narrow(p.narrow()), host(t) {
    for (Tensor* each : t.all())
      if (each->given()) memory.emplace(each, DeviceTensor(*each));
    calls = rope_calls(
        p, [&](Tensor& tensor) { return tensor.given() ? memory.at(&tensor).ref() : TensorRef{}; },
        t, positions.data(), narrow.data());
  }

  void run(Stream stream = {}) {
    cuda::rope(calls.turn, stream);
    cuda::qk_norm_rope(calls.forward, stream);
    const std::size_t bytes = cuda::qk_norm_rope_bwd_workspace(calls.backward, stream.device);
    // Exactly the size asked for, between canaries.
    const DeviceTensor workspace(
        Tensor(DType::f32, Sizes{static_cast<std::int64_t>(std::max<std::size_t>(bytes / 4, 1))}));
    calls.backward.workspace = workspace.ref().data, calls.backward.workspace_size = bytes;
    cuda::qk_norm_rope_bwd(calls.backward, stream);
    cuda_ok(cudaDeviceSynchronize());
    EXPECT_TRUE(workspace.download().gaps_intact()) << "workspace";
    for (Tensor* output : host.outputs())
      if (output->given()) *output = memory.at(output).download();
  }

  DeviceArray<std::int64_t> positions;
  DeviceArray<std::int32_t> narrow;
  RopeTensors& host;
  std::map<const Tensor*, DeviceTensor> memory;
  RopeCalls calls;
};

void expect_matches(std::int64_t n, std::int64_t turned) {
  for (const RopeProblem& p : rope_problems(n, turned)) {
    RopeTensors dense(p);
    OnDevice(p, dense).run();
    expect_rope(p, dense);
    // One element off and gaps: the other kernels, the same bits.
    RopeTensors strided(p, 1, 3);
    OnDevice(p, strided).run();
    SCOPED_TRACE(p.text());
    for (std::size_t i = 0; i < dense.outputs().size(); ++i) {
      if (!dense.outputs()[i]->given()) continue;
      EXPECT_TRUE(strided.outputs()[i]->same_bits(*dense.outputs()[i])) << i;
      EXPECT_TRUE(strided.outputs()[i]->gaps_intact()) << i;
    }
    if (testing::Test::HasFailure()) return;
  }
}

TEST_F(RopeCuda, HeadsInPacks) {
  for (const std::int64_t n : {16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512}) {
    expect_matches(n, n);
    if (HasFailure()) return;
  }
}

TEST_F(RopeCuda, HeadsNotInPacks) {
  for (const std::int64_t n : {2, 4, 6, 14, 18, 36, 72, 100, 130, 254, 258}) {
    expect_matches(n, n);
    if (HasFailure()) return;
  }
}

TEST_F(RopeCuda, SomeColumnsStay) {
  for (const auto& [n, turned] : {std::pair<std::int64_t, std::int64_t>{3, 2},
                                  {64, 32},
                                  {128, 64},
                                  {128, 96},
                                  {96, 32},
                                  {80, 32},
                                  {65, 64},
                                  {256, 64},
                                  {257, 34},
                                  {129, 126},
                                  {496, 494},
                                  {512, 496}}) {
    expect_matches(n, turned);
    if (HasFailure()) return;
  }
}

TEST_F(RopeCuda, InPlace) {
  for (const RopeProblem& p : rope_problems(128, 64)) {
    RopeTensors t(p);
    OnDevice device(p, t);
    device.run();
    device.calls.turn.q_out = device.calls.turn.q, device.calls.turn.k_out = device.calls.turn.k;
    cuda::rope(device.calls.turn, {});
    cuda_ok(cudaDeviceSynchronize());
    SCOPED_TRACE(p.text());
    for (int i = 0; i < 2; ++i) {
      if (!t.x[i].given()) continue;
      const Tensor written = device.memory.at(&t.x[i]).download();
      EXPECT_TRUE(written.same_bits(t.turned[i]) && written.gaps_intact()) << i;
    }
  }
}

TEST_F(RopeCuda, PositionsOutsideOfTheTableGiveNaNInTheirTokens) {
  const RopeProblem p{.dtype = DType::bf16, .n = 96, .turned = 64, .place = Place::positions};
  RopeTensors good(p), bad(p);
  OnDevice(p, good).run();
  OnDevice device(p, bad);
  std::vector<std::int64_t> positions = p.positions();
  positions[0] = -1, positions[4] = p.rows(), positions[7] = std::int64_t{1} << 40;
  const DeviceArray<std::int64_t> wrong(positions);
  device.calls.turn.angles.positions = device.calls.forward.angles.positions = wrong.data();
  device.calls.backward.angles.positions = wrong.data();
  device.run();
  for (int which = 0; which < 2; ++which) {
    const std::int64_t heads = which == 0 ? p.heads : p.k_heads;
    for (std::int64_t i = 0; i < bad.turned[which].numel(); ++i) {
      const std::int64_t token = i / p.n / heads;
      const bool outside = token == 0 || token == 4 || token == 7;
      if (outside && i % p.n < p.turned) {
        ASSERT_TRUE(std::isnan(bad.turned[which].get(i))) << i;
        ASSERT_TRUE(std::isnan(bad.normed[which].get(i))) << i;
      } else {
        ASSERT_EQ(bad.turned[which].get(i), good.turned[which].get(i)) << i;
        ASSERT_EQ(bad.normed[which].get(i), good.normed[which].get(i)) << i;
        if (outside) continue;
        ASSERT_EQ(bad.dx[which].get(i), good.dx[which].get(i)) << i;
      }
    }
  }
}

TEST_F(RopeCuda, ManyTokens) {
  for (const bool interleaved : {false, true}) {
    const RopeProblem p{.dtype = DType::bf16,
                        .batch = 3,
                        .tokens = 1031,
                        .heads = 9,
                        .k_heads = 2,
                        .n = 128,
                        .turned = 128,
                        .interleaved = interleaved};
    RopeTensors t(p);
    OnDevice(p, t).run();
    expect_rope(p, t);
  }
}

TEST_F(RopeCuda, NothingToTurn) {
  for (int d = 0; d < 3; ++d) {
    RopeProblem p{.k_heads = d};
    (d == 0 ? p.batch : d == 1 ? p.tokens : p.heads) = 0;
    RopeTensors t(p);
    OnDevice(p, t).run();
    for (std::int64_t i = 0; i < p.n; ++i) EXPECT_EQ(t.dweight[0].get(i), 0.0) << d << ' ' << i;
  }
}

TEST_F(RopeCuda, RepeatsOnASideStream) {
  const SideStream side;
  const RopeProblem p{.dtype = DType::bf16,
                      .tokens = 511,
                      .heads = 8,
                      .n = 128,
                      .turned = 128,
                      .place = Place::narrow};
  RopeTensors first(p);
  OnDevice(p, first).run();
  for (int i = 0; i < 10; ++i) {
    RopeTensors again(p);
    OnDevice(p, again).run(side.stream());
    for (std::size_t o = 0; o < first.outputs().size(); ++o)
      ASSERT_TRUE(again.outputs()[o]->same_bits(*first.outputs()[o])) << o;
  }
}

TEST_F(RopeCuda, RefusesAWorkspaceTooSmall) {
  const RopeProblem p;
  RopeTensors t(p);
  OnDevice device(p, t);
  EXPECT_GT(cuda::qk_norm_rope_bwd_workspace(device.calls.backward, 0), 0u);
  EXPECT_TRUE(contains(error_of([&] { cuda::qk_norm_rope_bwd(device.calls.backward, {}); }),
                       "workspace must be at least"));
}

}  // namespace
}  // namespace fastkern
