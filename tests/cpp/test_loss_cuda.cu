// SPDX-License-Identifier: Apache-2.0
// cuda::cross_entropy, cuda::cross_entropy_bwd and their sums against plain double loops, in
// guarded memory.
#include "loss_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

FoundLoss loss_on_cuda(const LossProblem& p, const Layout& layout, bool in_place = false,
                       Stream stream = {}) {
  FoundLoss out = blank_loss(p, layout);
  if (in_place) out.grad.copy_from(p.logits);
  DeviceTensor logits(p.logits), soft(p.soft), weight(p.weight);
  const DeviceArray<std::int64_t> classes(p.classes);
  const DeviceArray<std::int32_t> narrow(p.narrow);
  const DeviceArray<float> dloss(p.dloss), dlse(p.dlse), dzloss(p.dzloss);
  DeviceTensor row_loss(out.row_loss), row_zloss(out.row_zloss), lse(out.lse), state(out.state),
      loss(out.loss), zloss(out.zloss), dlogits(out.dlogits), grad(out.grad);
  const Tensor scratch(DType::f32, Sizes{p.c.rows});
  DeviceTensor row_loss2(scratch), row_zloss2(scratch), lse2(scratch), state2(out.state),
      loss2(out.loss), zloss2(out.zloss);
  const DeviceArray<float4> workspace(cuda::loss_workspace(p.c.rows) / 16 + 1);
  const auto floats = [](const DeviceTensor& t) { return static_cast<float*>(t.ref().data); };
  const LossPlaces at{logits.ref(), p.c.soft ? soft.ref() : TensorRef{},
                      p.c.weight ? weight.ref() : TensorRef{},
                      p.c.narrow ? static_cast<const void*>(narrow.data())
                                 : static_cast<const void*>(classes.data())};
  const CrossEntropy common = loss_arguments(p.c, at);
  CrossEntropyFwd fwd{common};
  fwd.row_loss = floats(row_loss), fwd.row_zloss = floats(row_zloss);
  fwd.lse = floats(lse), fwd.state = floats(state);
  fwd.loss = floats(loss), fwd.zloss = floats(zloss), fwd.workspace = workspace.data();
  cuda::cross_entropy(fwd, stream);
  CrossEntropyBwd bwd{common};
  bwd.state = fwd.state, bwd.dlogits = dlogits.ref();
  bwd.dloss = dloss.data(), bwd.dlse = dlse.data(), bwd.dzloss = dzloss.data();
  cuda::cross_entropy_bwd(bwd, stream);
  if (p.c.reduction != Reduction::none) {
    if (in_place) fwd.logits = grad.ref();
    fwd.grad = grad.ref();
    fwd.row_loss = floats(row_loss2), fwd.row_zloss = floats(row_zloss2);
    fwd.lse = floats(lse2), fwd.state = floats(state2);
    fwd.loss = floats(loss2), fwd.zloss = floats(zloss2);
    cuda::cross_entropy(fwd, stream);
  }
  cuda_ok(cudaDeviceSynchronize());
  if (p.c.reduction != Reduction::none) {
    const ExpectedLoss expected = loss_reference(p);
    EXPECT_TRUE(close(lse2.download(), expected.lse)) << "lse of forward with gradient";
    EXPECT_TRUE(close(loss2.download(), expected.loss)) << "loss of forward with gradient";
  }
  return {row_loss.download(), row_zloss.download(), lse.download(),     state.download(),
          loss.download(),     zloss.download(),     dlogits.download(), grad.download()};
}

class LossCuda : public CudaTest, public testing::WithParamInterface<DType> {};

INSTANTIATE_TEST_SUITE_P(Types, LossCuda, testing::Values(DType::f32, DType::f16, DType::bf16),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

TEST_P(LossCuda, Options) {
  int turn = 0;
  for (LossCase c : loss_options()) {
    for (const std::int64_t v : {77, 1024, 4099}) {
      c.classes = v;
      for (const Layout& layout : row_layouts(c.rows, v)) {
        SCOPED_TRACE(std::to_string(turn) + " " + std::to_string(v) + " " + layout.name);
        const LossProblem p = make_loss(c, GetParam(), layout);
        expect_loss(loss_on_cuda(p, layout, turn++ % 2 == 0), p);
      }
    }
  }
}

/// A part of a warp up to a cluster of 16 blocks, and rows that are read twice.
TEST_P(LossCuda, Sizes) {
  int turn = 0;
  for (const std::int64_t v :
       {1,     2,     7,     8,      9,      255,    256,    257,    1023,  1025,
        2047,  2049,  8191,  8200,   16384,  16385,  26624,  26625,  32000, 50257,
        53248, 53249, 75000, 128256, 147457, 151936, 262144, 300000, 600001}) {
    LossCase c = loss_options()[turn % 12];
    c.rows = 3, c.classes = v;
    SCOPED_TRACE(v);
    const Layout layout = turn % 3 == 2 ? Layout{"padded", {3, v}, {v + 8, 1}, 8}
                                        : dense_layout({3, v}, turn % 3 == 1 && v < 9000 ? 1 : 0);
    const LossProblem p = make_loss(c, GetParam(), layout);
    expect_loss(loss_on_cuda(p, layout, turn++ % 2 == 0), p);
  }
}

/// More rows than one block of the sums adds up, and than a grid has on other axes.
TEST_P(LossCuda, ManyRows) {
  for (const std::int64_t rows : {127, 8192, 8193, 70000}) {
    LossCase c = loss_options()[6];
    c.rows = rows, c.classes = 9;
    const Layout layout = dense_layout({rows, 9});
    const LossProblem p = make_loss(c, GetParam(), layout);
    expect_loss(loss_on_cuda(p, layout), p);
  }
}

TEST_P(LossCuda, SameBits) {
  const SideStream side;
  for (const std::int64_t v : {500, 40000, 128256}) {
    const LossCase c{.rows = 6, .classes = v, .ignore = true, .square = 0.01};
    const Layout dense = dense_layout({6, v});
    const FoundLoss expected = loss_on_cuda(make_loss(c, GetParam(), dense), dense);
    for (const Layout& layout : row_layouts(6, v)) {
      const FoundLoss found =
          loss_on_cuda(make_loss(c, GetParam(), layout), layout, false, side.stream());
      EXPECT_TRUE(found.row_loss.same_bits(expected.row_loss)) << layout.name;
      EXPECT_TRUE(found.lse.same_bits(expected.lse)) << layout.name;
      EXPECT_TRUE(found.dlogits.same_bits(expected.dlogits)) << layout.name;
      EXPECT_TRUE(found.grad.same_bits(expected.grad)) << layout.name;
      EXPECT_TRUE(found.loss.same_bits(expected.loss)) << layout.name;
    }
  }
}

TEST_P(LossCuda, ClassesThatThereAreNot) {
  for (const std::int64_t v : {77, 5000, 128256}) {
    for (const std::int64_t wrong : {std::int64_t{-1}, v, std::int64_t{1} << 62}) {
      LossCase c{.rows = 4, .classes = v, .weight = DType::f32, .reduction = Reduction::sum};
      const Layout layout = dense_layout({4, v});
      LossProblem p = make_loss(c, GetParam(), layout);
      p.classes[2] = wrong;
      FoundLoss out = blank_loss(p, layout);
      DeviceTensor logits(p.logits), weight(p.weight), rows(out.row_loss), zrows(out.row_zloss),
          lse(out.lse), state(out.state), loss(out.loss), zloss(out.zloss), grad(out.grad);
      const DeviceArray<std::int64_t> classes(p.classes);
      const auto floats = [](const DeviceTensor& t) { return static_cast<float*>(t.ref().data); };
      CrossEntropyFwd fwd{loss_arguments(c, {logits.ref(), {}, weight.ref(), classes.data()})};
      fwd.row_loss = floats(rows), fwd.row_zloss = floats(zrows), fwd.lse = floats(lse);
      fwd.state = floats(state), fwd.loss = floats(loss), fwd.zloss = floats(zloss);
      fwd.grad = grad.ref();
      cuda::cross_entropy(fwd, {});
      cuda_ok(cudaDeviceSynchronize());
      const Tensor losses = rows.download(), gradient = grad.download();
      for (std::int64_t r = 0; r < 4; ++r) {
        EXPECT_EQ(std::isnan(losses.get(r)), r == 2);
        EXPECT_EQ(std::isnan(gradient.get(r * v + v / 2)), r == 2);
      }
      EXPECT_TRUE(std::isnan(loss.download().get(0)));
    }
  }
}

TEST_P(LossCuda, ScaleUnlessOne) {
  for (const std::int64_t n : {1, 7, 8, 4097, 5000000}) {
    for (const std::int64_t offset : {0, 1}) {
      Tensor host(GetParam(), dense_layout({n}, offset));
      host.fill(1);
      DeviceTensor x(host);
      const DeviceArray<float> factors(std::vector<float>{1.0f, -0.5f});
      cuda::scale_unless_one(x.ref(), factors.data(), {});
      EXPECT_TRUE(x.download().same_bits(host));
      cuda::scale_unless_one(x.ref(), factors.data() + 1, {});
      const Tensor found = x.download();
      EXPECT_TRUE(found.gaps_intact());
      for (std::int64_t i = 0; i < n; i += 1 + n / 1000)
        ASSERT_EQ(found.get(i), -0.5 * host.get(i)) << i;
    }
  }
}

}  // namespace
}  // namespace fastkern
