// SPDX-License-Identifier: Apache-2.0
// cpu::optim_step, cpu::optim_norm and cpu::optim_scale against double loops; bits that depend on
// nothing but the element.
#include "optim_support.h"

#include "fastkern/optim_formula.h"
#include "threads.h"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class OptimCpu : public testing::Test {
 protected:
  void TearDown() override { set_parallel_for(nullptr); }
};

/// AdamW and its relatives in float64, one element.
struct Reference {
  double p, m, v;
  void adamw(double g, double t, double lr, double decay) {
    p *= 1.0 - lr * decay;
    m = 0.9 * m + 0.1 * g;
    v = 0.95 * v + 0.05 * g * g;
    p -= lr * (m / (1.0 - std::pow(0.9, t))) / (std::sqrt(v / (1.0 - std::pow(0.95, t))) + 1e-6);
  }
};

TEST_F(OptimCpu, AdamW) {
  for (const DType dtype : kDTypes) {
    OptimCase c;
    c.param = c.grad = c.state = dtype;
    OptimProblem found(c), before(c);
    OptimOnCpu call(found);
    cpu::optim_step(call.args);
    for (std::size_t i = 0; i < c.sizes.size(); i += 2) {  // group 0
      Expected p, m;
      for (std::int64_t e = 0; e < c.sizes[i]; ++e) {
        Reference r{before.params[i].get(e), before.states[0][i].get(e),
                    before.states[1][i].get(e)};
        p.scale.push_back(std::abs(r.p) + 1.0);
        r.adamw(before.grads[i].get(e), 4.0, 0.05, 0.1);
        p.value.push_back(r.p), m.value.push_back(r.m), m.scale.push_back(1.0 + std::abs(r.m));
      }
      EXPECT_TRUE(close(found.params[i], p)) << "parameter " << i;
      EXPECT_TRUE(close(found.states[0][i], m)) << "average " << i;
    }
    EXPECT_EQ(call.steps, std::vector<float>(c.sizes.size(), 4.0f));
  }
}

/// Neither threads nor addresses change a bit, and nothing beside the elements is written.
TEST_F(OptimCpu, SameBits) {
  for (const OptimCase& c : optim_cases()) {
    SCOPED_TRACE(c.text());
    OptimCase other = c;
    other.shifted = !c.shifted;
    OptimProblem first(c), second(other);
    OptimOnCpu a(first), b(second);
    set_parallel_for(nullptr);
    cpu::optim_step(a.args);
    set_parallel_for(split);
    pieces = 5;
    cpu::optim_step(b.args);
    const auto x = first.all(), y = second.all();
    for (std::size_t i = 0; i < x.size(); ++i) {
      EXPECT_TRUE(x[i]->same_bits(*y[i])) << "tensor " << i;
      EXPECT_TRUE(x[i]->gaps_intact() && y[i]->gaps_intact()) << "tensor " << i;
    }
    EXPECT_EQ(a.steps, b.steps);
  }
}

TEST_F(OptimCpu, FoundInfChangesNothing) {
  for (const OptimKind kind : kOptimKinds) {
    OptimCase c;
    c.kind = kind, c.found = true;
    OptimProblem found(c), before(c);
    OptimOnCpu call(found);
    cpu::optim_step(call.args);
    const auto x = found.all(), y = before.all();
    for (std::size_t i = 0; i < x.size(); ++i) EXPECT_TRUE(x[i]->same_bits(*y[i]));
    EXPECT_EQ(call.steps, std::vector<float>(c.sizes.size(), 3.0f));
  }
}

TEST_F(OptimCpu, SkippedTensorsStay) {
  OptimCase c;
  c.skip = true;
  OptimProblem found(c), before(c);
  OptimOnCpu call(found);
  cpu::optim_step(call.args);
  for (std::size_t i = 0; i < c.sizes.size(); ++i) {
    EXPECT_EQ(call.steps[i], i % 4 == 3 ? 3.0f : 4.0f);
    if (i % 4 == 3) {
      EXPECT_TRUE(found.params[i].same_bits(before.params[i]));
    }
  }
}

TEST_F(OptimCpu, NormAndScale) {
  for (const DType dtype : kDTypes) {
    for (const bool largest : {false, true}) {
      OptimCase c;
      c.grad = dtype;
      OptimProblem found(c), before(c);
      OptimOnCpu call(found);
      std::vector<float> partials(64);
      double sum = 0.0, expected = 0.0;
      float norm = 0.0f, factor = 0.0f;
      OptimNorm a;
      a.grad = dtype, a.tensors = found.count(), a.host = call.host.data();
      a.largest = largest, a.max_norm = 2.0, a.grad_scale = &call.scale;
      a.partials = partials.data(), a.sum = &sum, a.norm = &norm, a.factor = &factor;
      cpu::optim_norm(a);
      for (Tensor& t : before.grads) {
        for (const double g : t.values()) {
          expected = largest ? std::max(expected, std::abs(g)) : expected + g * g;
        }
      }
      expected = (largest ? expected : std::sqrt(expected)) / 8.0;
      EXPECT_NEAR(norm, expected, 1e-6 * expected);
      EXPECT_NEAR(factor, std::min(1.0, 2.0 / (expected + 1e-6)), 1e-6);
      OptimScale s;
      s.grad = dtype, s.tensors = found.count(), s.host = call.host.data(), s.factor = &factor;
      cpu::optim_scale(s);
      for (std::size_t i = 0; i < found.grads.size(); ++i) {
        Expected scaled;
        for (const double g : before.grads[i].values()) {
          scaled.value.push_back(g * factor), scaled.scale.push_back(std::abs(g));
        }
        EXPECT_TRUE(close(found.grads[i], scaled));
        EXPECT_TRUE(found.grads[i].gaps_intact());
      }
    }
  }
}

TEST_F(OptimCpu, StochasticRoundingIsExactOnAverage) {
  for (const float v : {1.0f, -1.00001f, 3.1415927f, 1e-20f, -65504.0f}) {
    double sum = 0.0;
    for (std::uint32_t r = 0; r < 65536; ++r) {
      sum += to_float(bf16{optim::stochastic_bf16(v, r)});
    }
    EXPECT_DOUBLE_EQ(sum / 65536, v);
  }
  for (const float v : {INFINITY, -INFINITY}) {
    EXPECT_EQ(to_float(bf16{optim::stochastic_bf16(v, 65535)}), v);
  }
  EXPECT_TRUE(std::isnan(to_float(bf16{optim::stochastic_bf16(NAN, 65535)})));
}

TEST_F(OptimCpu, RemaindersGiveValuesBack) {
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    const float v = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    const float back = optim::with_remainder(optim::nearest_away_bf16(v), optim::remainder_of(v));
    if (std::isnan(v)) {
      EXPECT_TRUE(std::isnan(back));
    } else {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(back), std::bit_cast<std::uint32_t>(v));
    }
  }
  EXPECT_EQ(optim::with_remainder(optim::nearest_away_bf16(INFINITY), 0), INFINITY);
}

TEST_F(OptimCpu, Powers) {
  for (const double base : {0.9, 0.999, 0.96, 0.0, 1.0}) {
    for (const std::uint64_t n : {0ull, 1ull, 2ull, 7ull, 1000ull, 123457ull}) {
      const double expected = std::pow(base, static_cast<double>(n));
      EXPECT_NEAR(optim::power(base, n), expected, 1e-10 * expected);
    }
  }
}

}  // namespace
}  // namespace fastkern
