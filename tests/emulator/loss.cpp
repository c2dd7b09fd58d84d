// SPDX-License-Identifier: Apache-2.0
// cuda::cross_entropy and cuda::cross_entropy_bwd in the emulator against cpu::.
#include "fastkern/loss.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;
using Doubles = std::vector<double>;

struct LossCase {
  DType dtype = DType::f32;
  std::int64_t rows = 3, classes = 1;
  std::optional<DType> weight, soft;
  bool narrow = false, ignore = false, in_place = false;
  double smoothing = 0.0, square = 0.0, cap = 0.0, scale = 1.0;
  Reduction reduction = Reduction::mean;
  int shift = 0, gap = 0;  // elements off a boundary, between rows
  int device = 0;

  std::string text() const;
};

std::string LossCase::text() const {
  constexpr const char* kWords[] = {"none", "mean", "sum"};
  std::ostringstream out;
  out << "loss " << name_of(dtype) << " " << rows << "x" << classes << " "
      << kWords[static_cast<int>(reduction)] << " device " << device << " shift " << shift
      << " gap " << gap << ": weight " << (weight ? name_of(*weight) : "none") << " soft "
      << (soft ? name_of(*soft) : "none") << (narrow ? " narrow" : "") << (ignore ? " ignore" : "")
      << (in_place ? " in-place" : "") << " smoothing " << smoothing << " square " << square
      << " cap " << cap << " scale " << scale;
  return out.str();
}

/// Forward, backward, and forward with the gradient where the losses are summed up.
struct LossCall {
  explicit LossCall(const LossCase& c);
  NamedTensors tensors();
  template <class Forward, class Backward>
  void run(const Forward& forward_of, const Backward& backward_of);

  LossCase c;
  Tensor logits, soft, weight, dloss, dlse, dzloss;
  Tensor row_loss, row_zloss, lse, state, loss, zloss, dlogits, workspace;
  Tensor grad, grad_rows, grad_lse, grad_state, grad_loss;  // of forward with gradient
  std::vector<std::int64_t> classes;
  std::vector<std::int32_t> narrow_classes;
};

LossCall::LossCall(const LossCase& of) : c(of) {
  const Sizes sizes = {c.rows, c.classes};
  const auto matrix = [&](DType dtype, int shift) {
    return Tensor(dtype, sizes, {c.classes + c.gap, 1}, shift);
  };
  const auto floats = [](std::int64_t n) {
    Tensor t(DType::f32, {n}, {1});
    t.allow_writes();
    return t;
  };
  logits = matrix(c.dtype, c.shift), dlogits = matrix(c.dtype, c.shift);
  grad = matrix(c.dtype, 0);
  logits.fill(1, 0.5);
  for (std::int64_t i = 0; i < logits.numel(); ++i) logits.set(i, 3.0f * logits.get(i));
  for (std::int64_t i = 0; i < logits.numel(); ++i) grad.set(i, logits.get(i));
  dlogits.allow_writes(), grad.allow_writes();
  if (c.soft) {
    soft = matrix(*c.soft, c.shift);
    soft.fill(2, 0.0);
    for (std::int64_t i = 0; i < soft.numel(); ++i)
      soft.set(i, std::abs(soft.get(i)) / static_cast<float>(c.classes));
  }
  if (c.weight) {
    weight = Tensor(*c.weight, {c.classes}, {1}, c.shift);
    weight.fill(3, 3.0);
  }
  const std::int64_t each = c.reduction == Reduction::none ? c.rows : 1;
  dloss = floats(each), dzloss = floats(each), dlse = floats(c.rows);
  dloss.fill(4, 1.0), dzloss.fill(5, 1.0), dlse.fill(6, 1.0);
  row_loss = floats(c.rows), row_zloss = floats(c.rows), lse = floats(c.rows);
  grad_rows = floats(2 * c.rows), grad_lse = floats(c.rows);
  state = floats(loss_state_size(c.rows)), grad_state = floats(loss_state_size(c.rows));
  loss = floats(1), zloss = floats(1), grad_loss = floats(2);
  workspace = floats(4 + static_cast<std::int64_t>(cuda::loss_workspace(c.rows)) / 4);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    const std::int64_t t = (r * 7919 + 13) % c.classes;
    classes.push_back(c.ignore && r % 3 == 1 ? -100 : t);
    narrow_classes.push_back(static_cast<std::int32_t>(classes.back()));
  }
}

NamedTensors LossCall::tensors() {
  return {{"logits", &logits},       {"soft", &soft},           {"weight", &weight},
          {"dloss", &dloss},         {"dlse", &dlse},           {"dzloss", &dzloss},
          {"row_loss", &row_loss},   {"row_zloss", &row_zloss}, {"lse", &lse},
          {"state", &state},         {"loss", &loss},           {"zloss", &zloss},
          {"dlogits", &dlogits},     {"workspace", &workspace}, {"grad", &grad},
          {"grad_rows", &grad_rows}, {"grad_lse", &grad_lse},   {"grad_state", &grad_state},
          {"grad_loss", &grad_loss}};
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.ref().data); }

template <class Forward, class Backward>
void LossCall::run(const Forward& forward_of, const Backward& backward_of) {
  CrossEntropy common;
  common.logits = logits.ref();
  if (c.soft) {
    common.probabilities = soft.ref();
  } else {
    common.target.narrow = c.narrow;
    common.target.data = c.narrow ? static_cast<const void*>(narrow_classes.data())
                                  : static_cast<const void*>(classes.data());
  }
  if (c.weight) common.weight = weight.ref();
  common.label_smoothing = c.smoothing, common.lse_square_scale = c.square;
  common.softcap = c.cap, common.logit_scale = c.scale, common.reduction = c.reduction;
  CrossEntropyFwd forward{common};
  forward.row_loss = floats_of(row_loss), forward.row_zloss = floats_of(row_zloss);
  forward.lse = floats_of(lse), forward.state = floats_of(state);
  forward.loss = floats_of(loss), forward.zloss = floats_of(zloss);
  forward.workspace = workspace.ref().data;
  forward_of(forward);
  CrossEntropyBwd backward{common};
  backward.state = floats_of(state), backward.dlogits = dlogits.ref();
  backward.dloss = floats_of(dloss), backward.dlse = floats_of(dlse);
  backward.dzloss = floats_of(dzloss);
  backward_of(backward);
  if (c.reduction == Reduction::none) return;
  if (c.in_place) forward.logits = grad.ref();
  forward.grad = grad.ref();
  forward.row_loss = floats_of(grad_rows), forward.row_zloss = floats_of(grad_rows) + c.rows;
  forward.lse = floats_of(grad_lse), forward.state = floats_of(grad_state);
  forward.loss = floats_of(grad_loss), forward.zloss = floats_of(grad_loss) + 1;
  forward_of(forward);
}

/// Of values that differ by rounding: their own size, and that of the terms of a target's gradient.
Doubles sizes_of(const Tensor& expected, double besides) {
  Doubles sizes = expected.values();
  for (double& size : sizes) size = 4.0 * std::abs(size) + besides;
  return sizes;
}

void check_loss(const LossCase& c, bool same_bits) {
  LossCall found(c), expected(c);
  const Stream stream{nullptr, c.device};
  const auto run = [&](LossCall& call) {
    call.run([&](const CrossEntropyFwd& a) { cuda::cross_entropy(a, stream); },
             [&](const CrossEntropyBwd& a) { cuda::cross_entropy_bwd(a, stream); });
  };
  if (!run_guarded(found.tensors(), [&] { run(found); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    LossCase dense = c;
    dense.shift = dense.gap = 0;
    LossCall plain(dense);
    run_guarded(plain.tensors(), [&] { run(plain); });
    expect_same_bits(found.tensors(), plain.tensors(), {"row_loss", "lse", "state", "dlogits"});
  }
  expected.run([](const CrossEntropyFwd& a) { cpu::cross_entropy(a); },
               [](const CrossEntropyBwd& a) { cpu::cross_entropy_bwd(a); });
  const double z = 30.0, weights = c.weight ? 6.0 : 1.0;
  expect_near("row_loss", found.row_loss, expected.row_loss,
              sizes_of(expected.row_loss, z * weights));
  expect_near("lse", found.lse, expected.lse, sizes_of(expected.lse, z));
  expect_near("row_zloss", found.row_zloss, expected.row_zloss,
              sizes_of(expected.row_zloss, z * z * c.square));
  // A target's own gradient is a difference from its weight; the coefficient of softmax may be one.
  const auto gradient_sizes = [&](const Tensor& t) {
    Doubles sizes = sizes_of(t, c.soft || c.smoothing > 0 ? 4.0 * weights / c.classes : 1e-9);
    for (std::int64_t i = 0; i < t.numel(); ++i) {
      const double x = c.scale * expected.logits.get(i);
      const double z = c.cap > 0.0 ? c.cap * std::tanh(x / c.cap) : x;
      sizes[i] += 4.0 * weights * std::exp(z - expected.lse.get(i / c.classes));
    }
    for (std::int64_t r = 0; r < c.rows && !c.soft; ++r) {
      if (expected.classes[r] >= 0) sizes[r * c.classes + expected.classes[r]] += 4.0 * weights;
    }
    return sizes;
  };
  expect_near("dlogits", found.dlogits, expected.dlogits, gradient_sizes(expected.dlogits));
  if (c.reduction == Reduction::none) return;
  expect_near("loss", found.loss, expected.loss, sizes_of(expected.loss, z));
  expect_near("zloss", found.zloss, expected.zloss, sizes_of(expected.zloss, z * z * c.square));
  expect_near("grad", found.grad, expected.grad, gradient_sizes(expected.grad));
  expect_near("grad_lse", found.grad_lse, expected.lse, sizes_of(expected.lse, z));
  expect_near("grad_loss", found.grad_loss, expected.grad_loss, sizes_of(expected.grad_loss, z));
}

/// Rows of a warp up to a block; held by a block, by clusters of 2 to 16, and by none.
const std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {3, 1},    {5, 7},      {9, 64},     {4, 77},    {3, 1000},  {2, 1032},  {130, 16},
    {3, 4099}, {2, 8200},   {3, 26624},  {2, 40000}, {3, 53256}, {2, 60001}, {2, 75000},
    {2, 8193}, {1, 160000}, {1, 300000}, {8200, 3},  {17000, 8},
};

LossCase make_case(std::pair<std::int64_t, std::int64_t> shape, DType dtype, unsigned turn) {
  constexpr std::optional<DType> kWeights[] = {std::nullopt, DType::f32, DType::bf16};
  LossCase c;
  c.dtype = dtype, c.rows = shape.first, c.classes = shape.second;
  c.weight = kWeights[turn % 3];
  if (turn % 5 == 1) c.soft = turn % 2 ? DType::f32 : DType::bf16;
  c.narrow = turn % 4 == 2, c.ignore = turn % 3 != 2, c.in_place = turn % 2 == 0;
  c.smoothing = turn % 7 == 3 || turn % 7 == 5 ? 0.1 : 0.0;
  c.square = turn % 3 == 0 ? 1e-2 : 0.0;
  c.cap = turn % 6 == 4 ? 5.0 : 0.0;
  c.scale = turn % 8 == 6 ? -0.5 : turn % 8 == 7 ? 0.7 : 1.0;
  c.reduction = static_cast<Reduction>(turn / 2 % 3);
  c.shift = turn % 5 < 3 ? 0 : static_cast<int>(turn % 3) + 1;
  c.gap = turn % 4 == 3 ? 5 : turn % 4 == 1 ? 16 : 0;
  constexpr int kDeviceTurns[] = {0, 0, 4, 0, 6, 0};
  c.device = kDeviceTurns[turn % 6];
  return c;
}

}  // namespace

std::vector<Case> loss_cases(const Options& options) {
  std::vector<Case> cases;
  const bool others_only =
      options.layout || options.names.count("rms") || options.names.count("layer");
  if (others_only || !options.wants("loss", {"fwd", "bwd", "quant", "group", "loss"})) return cases;
  unsigned turn = options.seed * 7919;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (!FASTKERN_EMULATE_F16 && dtype == DType::f16) continue;
    if (!options.wants(name_of(dtype), {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
      continue;
    for (const auto& shape : kShapes) {
      if (!options.sizes.empty() && !options.sizes.count(shape.second)) continue;
      for (int i = 0; i < (options.full ? 24 : 2 * options.per); ++i) {
        LossCase c = make_case(shape, dtype, ++turn);
        c.device = options.device.value_or(c.device);
        const bool same_bits = options.same_bits;
        cases.push_back({c.text(), [c, same_bits] { check_loss(c, same_bits); }});
      }
    }
  }
  return cases;
}

}  // namespace emulator
