// SPDX-License-Identifier: Apache-2.0
// Cross entropy as plain double loops, and the problems that the CPU's and CUDA's are tested with.
#pragma once

#include <optional>

#include "fastkern/loss.h"
#include "support.h"

namespace fastkern::test {

struct LossCase {
  std::int64_t rows = 5, classes = 77;
  std::optional<DType> weight = {}, soft = {};
  bool narrow = false, ignore = false;
  double smoothing = 0.0, square = 0.0, cap = 0.0, scale = 1.0;
  Reduction reduction = Reduction::mean;
};

/// Each option alone, and together with others.
inline std::vector<LossCase> loss_options() {
  std::vector<LossCase> cases(12);
  cases[1].weight = DType::f32, cases[1].ignore = true;
  cases[2].smoothing = 0.1, cases[2].narrow = true, cases[2].reduction = Reduction::sum;
  cases[3].soft = DType::f32;
  cases[4].soft = DType::bf16, cases[4].weight = DType::f16, cases[4].smoothing = 0.2;
  cases[5].cap = 5.0, cases[5].ignore = true;
  cases[6].square = 0.01, cases[6].weight = DType::bf16, cases[6].ignore = true;
  cases[7].scale = -0.5, cases[7].square = 0.1;
  cases[8].cap = 3.0, cases[8].scale = 0.7, cases[8].smoothing = 0.3, cases[8].soft = DType::f16;
  cases[9].reduction = Reduction::none, cases[9].ignore = true, cases[9].square = 0.01;
  cases[10].reduction = Reduction::none, cases[10].soft = DType::f32, cases[10].cap = 4.0;
  cases[11].smoothing = 1.0, cases[11].weight = DType::f32, cases[11].reduction = Reduction::sum;
  return cases;
}

struct LossProblem {
  LossCase c;
  Tensor logits, soft, weight;
  std::vector<std::int64_t> classes;
  std::vector<std::int32_t> narrow;
  std::vector<float> dloss, dlse, dzloss;
};

inline LossProblem make_loss(const LossCase& c, DType dtype, const Layout& layout) {
  LossProblem p{.c = c,
                .logits = Tensor(dtype, layout),
                .soft = {},
                .weight = {},
                .classes = {},
                .narrow = {},
                .dloss = {},
                .dlse = {},
                .dzloss = {}};
  p.logits.fill(1);
  for (std::int64_t i = 0; i < p.logits.numel(); ++i) p.logits.set(i, 3.0 * p.logits.get(i));
  if (c.soft) {
    p.soft = Tensor(*c.soft, layout);
    p.soft.fill(2);
    for (std::int64_t i = 0; i < p.soft.numel(); ++i)
      p.soft.set(i, std::abs(p.soft.get(i)) / static_cast<double>(c.classes));
  }
  if (c.weight) p.weight = Tensor(*c.weight, Sizes{c.classes}).fill(3, 4.0);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    p.classes.push_back(c.ignore && r % 3 == 1 ? -100 : (r * 7919 + 5) % c.classes);
    p.narrow.push_back(static_cast<std::int32_t>(p.classes.back()));
    p.dlse.push_back(0.25f * static_cast<float>(r % 7) - 0.5f);
  }
  const std::size_t each = c.reduction == Reduction::none ? c.rows : 1;
  for (std::size_t r = 0; r < each; ++r) {
    p.dloss.push_back(1.5f - 0.125f * static_cast<float>(r % 5));
    p.dzloss.push_back(0.5f + 0.125f * static_cast<float>(r % 3));
  }
  return p;
}

struct ExpectedLoss {
  Expected row_loss, row_zloss, lse, loss, zloss, dlogits, grad;
};

inline ExpectedLoss loss_reference(const LossProblem& p) {
  const LossCase& c = p.c;
  const std::int64_t V = c.classes;
  const std::vector<double> x = p.logits.values(), soft = p.soft.values(), w = p.weight.values();
  const auto weight = [&](std::int64_t j) { return w.empty() ? 1.0 : w[j]; };
  const bool none = c.reduction == Reduction::none, mean = c.reduction == Reduction::mean;
  double D = 0.0, C = 0.0;
  for (const std::int64_t t : p.classes) {
    if (!c.soft && t == -100) continue;
    D += c.soft ? 1.0 : weight(t), C += 1.0;
  }
  if (!mean) D = C = 1.0;
  ExpectedLoss e;
  double loss = 0.0, zloss = 0.0, size = 0.0;
  const auto put = [](Expected& to, double value, double scale) {
    to.value.push_back(value), to.scale.push_back(scale);
  };
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const bool counts = c.soft || p.classes[r] != -100;
    std::vector<double> z(V), slope(V);
    double top = -1e300, sum = 0.0;
    for (std::int64_t j = 0; j < V; ++j) {
      const double y = c.scale * x[r * V + j], t = c.cap > 0 ? std::tanh(y / c.cap) : 0.0;
      z[j] = c.cap > 0 ? c.cap * t : y, slope[j] = c.scale * (1 - t * t);
      top = std::max(top, z[j]);
    }
    for (const double v : z) sum += std::exp(v - top);
    const double lse = counts ? top + std::log(sum) : 0.0;
    double row = 0.0, shares = 0.0, sizes = 0.0, terms = 0.0;
    const auto share = [&](std::int64_t j) {
      const double own = c.soft ? soft[r * V + j] : j == p.classes[r] ? 1.0 : 0.0;
      return weight(j) * (own * (1 - c.smoothing) + c.smoothing / static_cast<double>(V));
    };
    for (std::int64_t j = 0; j < V && counts; ++j) {
      shares += share(j), row += share(j) * (lse - z[j]);
      sizes += std::abs(share(j));
      terms += std::abs(share(j)) * (std::abs(z[j]) + std::abs(lse));
    }
    const double z2 = c.square * lse * lse;
    loss += row / D, zloss += z2 / C, size += terms / D + z2 / C;
    put(e.row_loss, row + (none ? z2 : 0.0), terms + z2);
    put(e.row_zloss, z2, 2 * z2), put(e.lse, lse, std::abs(top) + std::abs(lse));
    const auto gradient = [&](double dloss, double dzloss, double dlse, Expected& to) {
      const double a = dloss * shares + dzloss * 2 * c.square * lse + dlse;
      const double a_size = std::abs(dloss) * sizes +
                            std::abs(dzloss) * 2 * c.square * std::abs(lse) + std::abs(dlse);
      for (std::int64_t j = 0; j < V; ++j) {
        const double q = counts ? std::exp(z[j] - lse) : 0.0, s = counts ? share(j) : 0.0;
        put(to, (a * q - dloss * s) * slope[j],
            (a_size * q * (1 + std::abs(z[j])) + std::abs(dloss * s)) * std::abs(c.scale));
      }
    };
    const std::size_t i = none ? r : 0;
    gradient(p.dloss[i] / D, (p.dloss[i] + p.dzloss[i]) / C, p.dlse[r], e.dlogits);
    gradient(1 / D, 1 / C, 0.0, e.grad);
  }
  put(e.loss, loss + zloss, size), put(e.zloss, zloss, 2 * zloss);
  return e;
}

/// What a call left.
struct FoundLoss {
  Tensor row_loss, row_zloss, lse, state, loss, zloss, dlogits, grad;
};

inline FoundLoss blank_loss(const LossProblem& p, const Layout& layout) {
  const auto floats = [](std::int64_t n) { return Tensor(DType::f32, Sizes{n}); };
  const std::int64_t m = p.c.rows;
  return {floats(m),
          floats(m),
          floats(m),
          floats(loss_state_size(m)),
          floats(1),
          floats(1),
          Tensor(p.logits.dtype(), layout),
          Tensor(p.logits.dtype(), layout)};
}

/// The operands of a call, wherever they lie.
struct LossPlaces {
  TensorRef logits, soft, weight;
  const void* classes;
};

inline CrossEntropy loss_arguments(const LossCase& c, const LossPlaces& at) {
  CrossEntropy a;
  a.op = "test";
  a.logits = at.logits, a.probabilities = at.soft, a.weight = at.weight;
  if (!c.soft) a.target = {at.classes, c.narrow};
  a.label_smoothing = c.smoothing, a.lse_square_scale = c.square, a.softcap = c.cap;
  a.logit_scale = c.scale, a.reduction = c.reduction;
  return a;
}

inline void expect_loss(const FoundLoss& found, const LossProblem& p) {
  const ExpectedLoss e = loss_reference(p);
  EXPECT_TRUE(close(found.row_loss, e.row_loss)) << "row_loss";
  EXPECT_TRUE(close(found.row_zloss, e.row_zloss)) << "row_zloss";
  EXPECT_TRUE(close(found.lse, e.lse)) << "lse";
  EXPECT_TRUE(close(found.dlogits, e.dlogits)) << "dlogits";
  if (p.c.reduction != Reduction::none) {
    EXPECT_TRUE(close(found.loss, e.loss)) << "loss";
    EXPECT_TRUE(close(found.zloss, e.zloss)) << "zloss";
    EXPECT_TRUE(close(found.grad, e.grad)) << "grad";
  }
  for (const Tensor* t : {&found.row_loss, &found.row_zloss, &found.lse, &found.state, &found.loss,
                          &found.zloss, &found.dlogits, &found.grad})
    EXPECT_TRUE(t->gaps_intact());
}

}  // namespace fastkern::test
