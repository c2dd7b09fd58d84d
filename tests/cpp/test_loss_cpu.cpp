// SPDX-License-Identifier: Apache-2.0
// cpu::cross_entropy, cpu::cross_entropy_bwd and their sums against plain double loops.
#include "loss_support.h"
#include "threads.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

FoundLoss loss_on_cpu(LossProblem& p, const Layout& layout, bool in_place = false) {
  FoundLoss out = blank_loss(p, layout);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.ref().data); };
  const LossPlaces at{p.logits.ref(), p.c.soft ? p.soft.ref() : TensorRef{},
                      p.c.weight ? p.weight.ref() : TensorRef{},
                      p.c.narrow ? static_cast<const void*>(p.narrow.data())
                                 : static_cast<const void*>(p.classes.data())};
  const CrossEntropy common = loss_arguments(p.c, at);
  CrossEntropyFwd fwd{common};
  fwd.row_loss = floats(out.row_loss), fwd.row_zloss = floats(out.row_zloss);
  fwd.lse = floats(out.lse), fwd.state = floats(out.state);
  fwd.loss = floats(out.loss), fwd.zloss = floats(out.zloss);
  cpu::cross_entropy(fwd);
  CrossEntropyBwd bwd{common};
  bwd.state = fwd.state, bwd.dlogits = out.dlogits.ref();
  bwd.dloss = p.dloss.data(), bwd.dlse = p.dlse.data(), bwd.dzloss = p.dzloss.data();
  cpu::cross_entropy_bwd(bwd);
  if (p.c.reduction == Reduction::none) return out;
  if (in_place) {
    out.grad.copy_from(p.logits);
    fwd.logits = out.grad.ref();
  }
  fwd.grad = out.grad.ref();
  cpu::cross_entropy(fwd);
  return out;
}

class LossCpu : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { set_parallel_for(nullptr); }
};

INSTANTIATE_TEST_SUITE_P(Types, LossCpu, testing::ValuesIn(kDTypes),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(name_of(dtype.param));
                         });

TEST_P(LossCpu, Options) {
  int turn = 0;
  for (const LossCase& c : loss_options()) {
    for (const Layout& layout : row_layouts(c.rows, c.classes)) {
      SCOPED_TRACE(std::to_string(turn) + " " + layout.name);
      LossProblem p = make_loss(c, GetParam(), layout);
      expect_loss(loss_on_cpu(p, layout, turn++ % 2 == 0), p);
    }
  }
}

/// Around the blocks of columns, and what a vector leaves over.
TEST_P(LossCpu, Sizes) {
  for (const std::int64_t v : {1, 2, 31, 32, 33, 1000, 4095, 4096, 4097, 8193, 20000}) {
    for (LossCase c : {LossCase{}, loss_options()[4], loss_options()[8]}) {
      c.rows = 3, c.classes = v;
      SCOPED_TRACE(v);
      const Layout layout = dense_layout({3, v});
      LossProblem p = make_loss(c, GetParam(), layout);
      expect_loss(loss_on_cpu(p, layout), p);
    }
  }
}

TEST_P(LossCpu, SameBitsWhateverThreadsAndLayout) {
  const LossCase c{.rows = 40, .classes = 3001, .ignore = true, .square = 0.01};
  const Layout dense = dense_layout({40, 3001});
  LossProblem p = make_loss(c, GetParam(), dense);
  const FoundLoss expected = loss_on_cpu(p, dense);
  for (const Layout& layout : row_layouts(40, 3001)) {
    LossProblem other = make_loss(c, GetParam(), layout);
    set_parallel_for(split);
    for (pieces = 1; pieces <= 3; ++pieces) {
      const FoundLoss found = loss_on_cpu(other, layout);
      EXPECT_TRUE(found.row_loss.same_bits(expected.row_loss)) << layout.name;
      EXPECT_TRUE(found.dlogits.same_bits(expected.dlogits)) << layout.name;
      EXPECT_TRUE(found.loss.same_bits(expected.loss)) << layout.name;
    }
    set_parallel_for(nullptr);
  }
}

TEST(Loss, RefusesClassesThatThereAreNot) {
  const Layout layout = dense_layout({5, 77});
  for (const std::int64_t wrong : {std::int64_t{77}, std::int64_t{-1}, std::int64_t{1} << 40}) {
    LossProblem p = make_loss({}, DType::f32, layout);
    p.classes[2] = wrong;
    EXPECT_TRUE(contains(error_of([&] { loss_on_cpu(p, layout); }),
                         "target must hold classes from 0 to 76 or ignore_index (-100), got " +
                             std::to_string(wrong) + " for row 2"));
  }
}

TEST(Loss, NoRows) {
  float state[2], loss = 0.0f, zloss = 1.0f;
  CrossEntropyFwd args;
  args.logits = dense(nullptr, DType::f32, 0, 7);
  args.target.data = state;
  args.state = state, args.loss = &loss, args.zloss = &zloss;
  cpu::cross_entropy(args);
  EXPECT_TRUE(std::isnan(loss));
  args.reduction = Reduction::sum;
  cpu::cross_entropy(args);
  EXPECT_EQ(loss, 0.0f);
  EXPECT_EQ(zloss, 0.0f);
}

TEST(Loss, ScaleUnlessOne) {
  for (const DType dtype : kDTypes) {
    Tensor x = Tensor(dtype, Sizes{1001}).fill(1);
    const Tensor before = x;
    float factor = 1.0f;
    cpu::scale_unless_one(x.ref(), &factor);
    EXPECT_TRUE(x.same_bits(before));
    factor = 0.5f;
    cpu::scale_unless_one(x.ref(), &factor);
    for (std::int64_t i = 0; i < 1001; ++i) EXPECT_EQ(x.get(i), 0.5 * before.get(i));
    EXPECT_TRUE(x.gaps_intact());
  }
}

/// What fits on chip stays there; the longest rows of a cluster, and beyond.
TEST(Loss, Plans) {
  constexpr std::int64_t kLimit = 227 * 1024;
  const auto blocks = [](std::int64_t v, DType dtype, bool clusters, std::int64_t limit) {
    const Plan plan = cuda::cross_entropy_grad_plan(v, dtype, clusters, limit);
    EXPECT_LE(plan.shared_bytes, limit);
    return plan.resident ? plan.blocks_per_row : 0;
  };
  EXPECT_EQ(blocks(1, DType::f32, true, kLimit), 1);
  EXPECT_EQ(blocks(50304, DType::bf16, true, kLimit), 1);
  EXPECT_EQ(blocks(128256, DType::bf16, true, kLimit), 4);
  EXPECT_EQ(blocks(262144, DType::bf16, true, kLimit), 8);
  EXPECT_EQ(blocks(262144, DType::f32, true, kLimit), 16);
  EXPECT_EQ(blocks(400000, DType::f32, true, kLimit), 0);
  EXPECT_EQ(blocks(128256, DType::bf16, false, kLimit), 0);
  EXPECT_EQ(blocks(50304, DType::bf16, false, 99 * 1024), 0);
  EXPECT_EQ(blocks(32000, DType::bf16, false, 99 * 1024), 1);
}

}  // namespace
}  // namespace fastkern
