// SPDX-License-Identifier: Apache-2.0
// cpu::rope, cpu::qk_norm_rope and its gradient against plain double loops.
#include "rope_support.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

struct Shape {
  std::int64_t n, turned;
};

TEST(RopeCpu, Matches) {
  for (const Shape& shape : {Shape{2, 2},
                             {6, 4},
                             {16, 16},
                             {31, 10},
                             {64, 64},
                             {65, 32},
                             {72, 72},
                             {96, 48},
                             {128, 128},
                             {256, 64},
                             {512, 512}}) {
    for (const RopeProblem& p : rope_problems(shape.n, shape.turned)) {
      RopeTensors t(p);
      rope_on_cpu(p, t);
      expect_rope(p, t);
      if (HasFailure()) return;
    }
  }
}

TEST(RopeCpu, StridesAndOffsetsChangeNoBit) {
  for (const RopeProblem& p : rope_problems(80, 64)) {
    RopeTensors dense(p), strided(p, 3, 5);
    rope_on_cpu(p, dense);
    rope_on_cpu(p, strided);
    expect_rope(p, strided);
    SCOPED_TRACE(p.text());
    for (std::size_t i = 0; i < dense.outputs().size(); ++i)
      EXPECT_TRUE(strided.outputs()[i]->same_bits(*dense.outputs()[i])) << i;
  }
}

TEST(RopeCpu, InPlaceGivesTheSameBits) {
  for (const RopeProblem& p : rope_problems(96, 32)) {
    RopeTensors t(p), again(p);
    RopeCalls calls = rope_on_cpu(p, t);
    calls.turn.q_out = calls.turn.q, calls.turn.k_out = calls.turn.k;
    const std::vector<std::int64_t> positions = p.positions();
    const std::vector<std::int32_t> narrow = p.narrow();
    RopeAngles& a = calls.turn.angles;
    if (a.positions)
      a.positions = a.narrow ? static_cast<const void*>(narrow.data()) : positions.data();
    if (a.cu_seqlens) a.cu_seqlens = narrow.data();
    cpu::rope(calls.turn);
    SCOPED_TRACE(p.text());
    for (int i = 0; i < 2; ++i) {
      if (!t.x[i].given()) continue;
      EXPECT_TRUE(t.x[i].same_bits(t.turned[i]) && t.x[i].gaps_intact()) << i;
    }
  }
}

TEST(RopeCpu, InverseUndoes) {
  RopeProblem p{.n = 128, .turned = 128};
  RopeTensors t(p);
  RopeCalls calls = rope_on_cpu(p, t);
  calls.turn.q = calls.turn.q_out, calls.turn.k = calls.turn.k_out;
  calls.turn.angles.inverse = true;
  cpu::rope(calls.turn);
  for (std::int64_t i = 0; i < t.x[0].numel(); ++i)
    ASSERT_NEAR(t.turned[0].get(i), t.x[0].get(i), 1e-5) << i;
}

TEST(RopeCpu, RefusesPositionsOutsideOfTheTable) {
  RopeProblem p{.place = Place::positions};
  RopeTensors t(p);
  RopeCalls calls = rope_on_cpu(p, t);
  const std::int64_t least = std::numeric_limits<std::int64_t>::min();
  for (const std::int64_t bad : {std::int64_t{-1}, p.rows(), std::int64_t{1} << 40, least}) {
    std::vector<std::int64_t> positions = p.positions();
    positions[7] = bad;
    for (RopeAngles* a : {&calls.turn.angles, &calls.forward.angles, &calls.backward.angles})
      a->positions = positions.data();
    const std::string words = "positions must give positions between 0 and 8";
    EXPECT_TRUE(contains(error_of([&] { cpu::rope(calls.turn); }), words));
    EXPECT_TRUE(contains(error_of([&] { cpu::qk_norm_rope(calls.forward); }), words));
    EXPECT_TRUE(contains(error_of([&] { cpu::qk_norm_rope_bwd(calls.backward); }), words));
  }
  const std::int32_t bounds[] = {-9, 2, 5, 5};
  calls.turn.angles.positions = nullptr, calls.turn.angles.cu_seqlens = bounds;
  calls.turn.angles.sequences = 3;
  EXPECT_TRUE(contains(error_of([&] { cpu::rope(calls.turn); }), "cu_seqlens must give positions"));
}

TEST(RopeCpu, NothingToTurn) {
  for (int d = 0; d < 3; ++d) {
    RopeProblem p{.k_heads = 0};
    (d == 0 ? p.batch : d == 1 ? p.tokens : p.heads) = 0;
    RopeTensors t(p);
    rope_on_cpu(p, t);
    for (std::int64_t i = 0; i < p.n; ++i) EXPECT_EQ(t.dweight[0].get(i), 0.0) << d << ' ' << i;
  }
}

}  // namespace
}  // namespace fastkern
