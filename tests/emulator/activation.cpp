// SPDX-License-Identifier: Apache-2.0
// Gated activations, bias_act, dropout and bias_dropout_add in the emulator against cpu::.
#include "fastkern/activation.h"

#include <cmath>
#include <sstream>

#include "fastkern/dropout.h"
#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;
using Doubles = std::vector<double>;

enum class Op { gated, quantised, bias_act, dropout, bias_dropout_add };
enum class Layout { split, halves, pairs };

struct ActivationCase {
  Op op = Op::gated;
  Layout layout = Layout::split;
  ActivationKind kind = ActivationKind::silu;
  DType dtype = DType::f32, other = DType::f32;  // other: of bias, and of a mixed residual
  std::int64_t rows = 1, n = 1, gap = 0;
  int shift = 0;
  double p = 0.0;

  std::string text() const;
};

std::string ActivationCase::text() const {
  constexpr const char* kOps[] = {"gated", "quantised", "bias_act", "dropout", "bias_dropout_add"};
  constexpr const char* kLayouts[] = {"split", "halves", "pairs"};
  std::ostringstream out;
  out << kOps[static_cast<int>(op)] << ' ' << kLayouts[static_cast<int>(layout)] << " kind "
      << static_cast<int>(kind) << ' ' << name_of(dtype) << '/' << name_of(other) << ' ' << rows
      << 'x' << n << " gap " << gap << " shift " << shift << " p " << p;
  return out.str();
}

const std::int64_t kSeed = 0x123456789abcdef0, kOffset = -3;
float quant_scale = 0.02f;

TensorRef columns(TensorRef t, std::int64_t begin, std::int64_t n) {
  t.data = static_cast<char*>(t.data) + begin * size_of(t.dtype);
  t.sizes[t.ndim - 1] = n;
  return t;
}

/// The operands of a call, those of the device strided.
struct ActivationCall {
  ActivationCall(const ActivationCase& c, int shift, std::int64_t gap);
  NamedTensors tensors() {
    return {{"a", &a},   {"b", &b},         {"bias", &bias},
            {"y", &y},   {"dy", &dy},       {"da", &da},
            {"db", &db}, {"dbias", &dbias}, {"workspace", &workspace}};
  }
  void run(bool on_device);

  ActivationCase c;
  Tensor a, b, bias, y, dy, da, db, dbias, workspace;
};

ActivationCall::ActivationCall(const ActivationCase& c_, int shift, std::int64_t gap) : c(c_) {
  const bool gated = c.op == Op::gated || c.op == Op::quantised;
  const bool packed = gated && c.layout != Layout::split;
  auto tensor = [&, turn = 0](DType dtype, bool twice = false) mutable {
    const std::int64_t n = twice ? 2 * c.n : c.n;
    return Tensor(dtype, {c.rows, n}, {n + gap, 1}, shift * ++turn);
  };
  const DType second = c.op == Op::bias_dropout_add ? c.other : c.dtype;
  a = tensor(c.dtype, packed), a.fill(1, 0.2);
  if (!packed) b = tensor(second), b.fill(2, -0.1);
  y = tensor(c.op == Op::quantised ? (c.kind == ActivationKind::silu ? DType::i8 : DType::f8e4m3)
             : c.op == Op::bias_dropout_add ? second
                                            : c.dtype);
  dy = tensor(c.op == Op::bias_dropout_add ? second : c.dtype), dy.fill(3, 0.1);
  da = tensor(c.dtype, packed);
  if (!packed) db = tensor(c.dtype);
  if (!gated) {
    bias = Tensor(c.other, {c.n}, {1}, shift), bias.fill(4, 0.0);
    dbias = Tensor(c.other, {c.n}, {1}, shift);
    const std::size_t bytes = cuda::column_sums_workspace(dy.ref(), dbias.ref());
    workspace = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
  }
  for (Tensor* output : {&y, &da, &db, &dbias, &workspace}) output->allow_writes();
}

void ActivationCall::run(bool on_device) {
  const auto run = [&](const auto& args, auto on_cuda, auto on_cpu) {
    on_device ? on_cuda(args, Stream{}) : on_cpu(args);
  };
  const Dropout dropout{c.p, &kSeed, &kOffset};
  if (c.op == Op::gated || c.op == Op::quantised) {
    GatedFwd fwd;
    GatedBwd bwd;
    fwd.kind = bwd.kind = c.kind;
    fwd.y = y.ref(), bwd.dy = dy.ref();
    fwd.numbers.limit = bwd.numbers.limit = 1.0f;
    if (c.layout == Layout::split) {
      fwd.gate = bwd.gate = a.ref(), fwd.up = bwd.up = b.ref();
      bwd.dgate = da.ref(), bwd.dup = db.ref();
    } else if (c.layout == Layout::halves) {
      fwd.gate = bwd.gate = columns(a.ref(), 0, c.n), fwd.up = bwd.up = columns(a.ref(), c.n, c.n);
      bwd.dgate = columns(da.ref(), 0, c.n), bwd.dup = columns(da.ref(), c.n, c.n);
    } else {
      fwd.pairs = bwd.pairs = a.ref(), bwd.dpairs = da.ref();
    }
    if (c.op == Op::quantised) fwd.scale = dense(&quant_scale, DType::f32, 1);
    run(fwd, cuda::gated, cpu::gated);
    if (c.op == Op::gated) run(bwd, cuda::gated_bwd, cpu::gated_bwd);
  } else if (c.op == Op::bias_act) {
    run(BiasAct{.kind = c.kind, .x = a.ref(), .bias = bias.ref(), .y = y.ref()}, cuda::bias_act,
        cpu::bias_act);
    run(BiasActBwd{.kind = c.kind,
                   .dy = dy.ref(),
                   .x = a.ref(),
                   .bias = bias.ref(),
                   .dx = da.ref(),
                   .dbias = dbias.ref(),
                   .workspace = workspace.ref().data,
                   .workspace_size = static_cast<std::size_t>(workspace.numel()) * 4},
        cuda::bias_act_bwd, cpu::bias_act_bwd);
  } else if (c.op == Op::dropout) {
    run(DropoutCall{.x = a.ref(), .y = y.ref(), .dropout = dropout}, cuda::dropout, cpu::dropout);
  } else {
    run(BiasDropoutAdd{.x = a.ref(),
                       .bias = bias.ref(),
                       .residual = b.ref(),
                       .y = y.ref(),
                       .dropout = dropout},
        cuda::bias_dropout_add, cpu::bias_dropout_add);
    run(BiasDropoutAddBwd{.dy = dy.ref(),
                          .dx = da.ref(),
                          .dbias = dbias.ref(),
                          .dropout = dropout,
                          .workspace = workspace.ref().data,
                          .workspace_size = static_cast<std::size_t>(workspace.numel()) * 4},
        cuda::bias_dropout_add_bwd, cpu::bias_dropout_add_bwd);
  }
}

/// Of 8-bit results few may be one step off.
void expect_near_quantised(const Tensor& found, const Tensor& expected) {
  std::int64_t off = 0, wrong = 0;
  for (std::int64_t i = 0; i < expected.numel(); ++i) {
    const double a = found.get(i), b = expected.get(i);
    off += !(a == b);
    wrong += !(std::abs(a - b) <= std::max(1.0, std::max(std::abs(a), std::abs(b)) / 7));
  }
  if (wrong > 0 || off > 3 + expected.numel() / 30)
    fail_case("y", std::to_string(wrong) + " wrong, " + std::to_string(off) + " rounded otherwise");
}

void check_activation(const ActivationCase& c, bool same_bits) {
  ActivationCall found(c, c.shift, c.gap), expected(c, 0, 0);
  if (!run_guarded(found.tensors(), [&] { found.run(true); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    ActivationCall plain(c, 0, 0);
    run_guarded(plain.tensors(), [&] { plain.run(true); });
    expect_same_bits(found.tensors(), plain.tensors(), {"y", "da", "db", "dbias"});
  }
  expected.run(false);
  if (c.op == Op::quantised) return expect_near_quantised(found.y, expected.y);
  // exp of the emulator is exact; what is left is P, and what f32 loses in the differences.
  const double noise = c.dtype == DType::f32 ? kNoise : 2e-5;
  const auto near = [&](const char* name, const Tensor& a, const Tensor& b, double size) {
    if (b.given()) expect_near(name, a, b, Doubles(b.numel(), size), noise);
  };
  near("y", found.y, expected.y, 8.0);
  if (c.op == Op::dropout) return;
  near("da", found.da, expected.da, 8.0);
  if (c.op == Op::gated) near("db", found.db, expected.db, 8.0);
  // Sums of as many numbers.
  near("dbias", found.dbias, expected.dbias, 8.0 * static_cast<double>(c.rows));
}

const std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {1, 1},    {3, 2},    {7, 3},    {5, 8},    {4, 16},   {77, 31},   {33, 64},
    {9, 129},  {3, 255},  {65, 256}, {17, 264}, {3, 1000}, {2, 1031},  {5, 2048},
    {2, 4104}, {1, 8192}, {2, 9001}, {300, 72}, {1500, 8}, {1, 65536}, {1, 70007},
};

ActivationCase make_case(std::int64_t rows, std::int64_t n, DType dtype, unsigned turn) {
  ActivationCase c{.dtype = dtype, .other = dtype, .rows = rows, .n = n};
  constexpr Op kTurns[] = {Op::gated,     Op::bias_act,        Op::gated,   Op::bias_dropout_add,
                           Op::quantised, Op::gated,           Op::dropout, Op::bias_act,
                           Op::gated,     Op::bias_dropout_add};
  c.op = kTurns[turn % 10];
  c.layout = static_cast<Layout>(turn / 10 % 3);
  if (c.op == Op::bias_act) {
    constexpr ActivationKind kKinds[] = {ActivationKind::gelu, ActivationKind::gelu_tanh,
                                         ActivationKind::relu, ActivationKind::silu,
                                         ActivationKind::quick_gelu};
    c.kind = kKinds[turn / 3 % 5];
    c.other = turn % 4 == 0 ? DType::f32 : dtype;
  } else {
    c.kind = static_cast<ActivationKind>(turn / 2 % 6);
  }
  if (c.op == Op::bias_dropout_add && turn % 3 == 0)
    c.other = dtype == DType::f32 ? DType::bf16 : DType::f32;
  c.p = turn % 7 == 0 ? 0.0 : turn % 7 == 1 ? 1.0 : 0.3;
  c.gap = turn % 5 < 1 ? 3 : turn % 5 == 1 ? 16 : 0;
  c.shift = turn % 4 == 3 ? static_cast<int>(turn % 3) + 1 : 0;
  return c;
}

}  // namespace

std::vector<Case> activation_cases(const Options& options) {
  std::vector<Case> cases;
  unsigned turn = options.seed * 7919;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (!FASTKERN_EMULATE_F16 && dtype == DType::f16) continue;
    if (!options.wants(name_of(dtype), {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
      continue;
    for (const auto& [rows, n] : kShapes) {
      if (!options.sizes.empty() && options.sizes.count(n) == 0) continue;
      const int count = options.full ? 90 : rows * n > 20000 ? 4 : 10 * options.per;
      for (int i = 0; i < count; ++i) {
        const ActivationCase c = make_case(rows, n, dtype, ++turn);
        const bool same_bits = options.same_bits;
        cases.push_back({c.text(), [c, same_bits] { check_activation(c, same_bits); }});
      }
    }
  }
  return cases;
}

}  // namespace emulator
