// SPDX-License-Identifier: Apache-2.0
// cuda::softmax and cuda::softmax_bwd in the emulator against cpu::.
#include "fastkern/softmax.h"

#include <cmath>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;
using Doubles = std::vector<double>;

enum class Mask { none, keep, add };

struct SoftmaxCase {
  SoftmaxKind kind = SoftmaxKind::softmax;
  DType dtype = DType::f32, out = DType::f32;
  std::int64_t rows = 1, n = 1, behind = 0;  // behind: (rows, n, behind), over the middle
  std::int64_t queries = 0;                  // above 0: causal, of so many rows together
  bool masked = false;
  Mask mask = Mask::none;
  double scale = 1.0;
  std::int64_t gap = 0;  // elements between rows
  int shift = 0;         // elements off a boundary: of all operands, each a little further
  int device = 0;

  std::string text() const;
};

std::string SoftmaxCase::text() const {
  constexpr const char* kKinds[] = {"softmax", "log_softmax", "logsumexp"};
  std::ostringstream out_;
  out_ << kKinds[static_cast<int>(kind)] << ' ' << name_of(dtype) << " to " << name_of(out) << ' '
       << rows << 'x' << n;
  if (behind) out_ << 'x' << behind;
  if (queries) out_ << " causal " << queries;
  if (masked) out_ << " masked " << static_cast<int>(mask) << " scale " << scale;
  out_ << " gap " << gap << " shift " << shift << " device " << device;
  return out_.str();
}

struct SoftmaxCall {
  SoftmaxCall(const SoftmaxCase& c, int shift, std::int64_t gap);
  NamedTensors tensors() {
    return {{"x", &x},
            {"mask", &mask},
            {"y", &y},
            {"lse", &lse},
            {"dy", &dy},
            {"dx", &dx},
            {"workspace", &workspace},
            {"bwd_workspace", &bwd_workspace}};
  }

  Tensor x, mask, y, lse, dy, dx, workspace, bwd_workspace;
  SoftmaxFwd forward;
  SoftmaxBwd backward;
};

SoftmaxCall::SoftmaxCall(const SoftmaxCase& c, int shift, std::int64_t gap) {
  const bool of_rows = c.kind == SoftmaxKind::logsumexp;
  const std::int64_t columns = std::max<std::int64_t>(c.behind, 1);
  auto tensor = [&, turn = 0](DType dtype) mutable {
    if (c.behind)
      return Tensor(dtype, {c.rows, c.n, c.behind}, {c.n * c.behind, c.behind, 1}, shift * ++turn);
    const std::int64_t pitch = c.n + gap;
    if (c.queries)
      return Tensor(dtype, {c.rows / c.queries, c.queries, c.n}, {c.queries * pitch, pitch, 1},
                    shift * ++turn);
    return Tensor(dtype, {c.rows, c.n}, {pitch, 1}, shift * ++turn);
  };
  const auto numbers = [&](DType dtype) { return Tensor(dtype, {c.rows * columns}, {1}); };
  const auto scratch = [](std::size_t bytes, Tensor& memory, auto& args) {
    if (bytes == 0) return;
    memory = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
    memory.allow_writes();
    args.workspace = memory.ref().data, args.workspace_size = bytes;
  };
  x = tensor(c.dtype), x.fill(1, 0.3);
  // A third of a row hidden, and the last row as a whole.
  if (c.mask != Mask::none) {
    mask = tensor(c.mask == Mask::keep ? DType::i8 : c.out);
    if (c.mask == Mask::add) mask.fill(2, 0.0);
    for (std::int64_t i = 0; i < mask.numel(); ++i) {
      const bool hidden = i * 7 % 3 == 1 || i / c.n == c.rows - 1;
      if (c.mask == Mask::keep) mask.set(i, hidden ? 0.0f : 1.0f);
      if (c.mask == Mask::add && hidden) mask.set(i, -INFINITY);
    }
  }
  y = tensor(c.out), dx = tensor(c.dtype);
  lse = numbers(c.dtype);
  dy = of_rows ? numbers(c.dtype) : tensor(c.out);
  dy.fill(3, 0.1);
  for (Tensor* output : {&y, &lse, &dx}) output->allow_writes();
  forward = {.kind = c.kind,
             .middle = c.behind > 0,
             .x = x.ref(),
             .y = of_rows ? lse.ref() : y.ref(),
             .masked = c.masked,
             .causal = c.queries > 0,
             .scale = c.scale,
             .mask = mask.ref()};
  backward = {.kind = c.kind,
              .middle = c.behind > 0,
              .dy = dy.ref(),
              .y = of_rows ? x.ref() : y.ref(),
              .lse = of_rows ? lse.ref() : TensorRef{},
              .dx = dx.ref(),
              .causal = c.queries > 0,
              .scale = c.scale};
  scratch(cuda::softmax_workspace(forward, c.device), workspace, forward);
  scratch(cuda::softmax_bwd_workspace(backward, c.device), bwd_workspace, backward);
}

/// Sizes of the terms that results are sums of.
struct Terms {
  Doubles y, lse, dx;
};

Terms terms_of(const SoftmaxCase& c, const SoftmaxCall& call) {
  const Doubles y = call.y.values(), x = call.x.values(), dy = call.dy.values();
  const std::int64_t columns = std::max<std::int64_t>(c.behind, 1);
  Terms t{Doubles(x.size()), Doubles(c.rows * columns, 12.0), Doubles(x.size())};
  for (std::int64_t row = 0; row < c.rows * columns; ++row) {
    const auto at = [&](std::int64_t i) {
      return (row / columns * c.n + i) * columns + row % columns;
    };
    double sum = 0.0;
    if (c.kind != SoftmaxKind::logsumexp) {
      for (std::int64_t i = 0; i < c.n; ++i)
        sum += std::abs(dy[at(i)]) * (c.kind == SoftmaxKind::softmax ? std::abs(y[at(i)]) : 1.0);
    }
    for (std::int64_t i = 0; i < c.n; ++i) {
      const double value = std::abs(y[at(i)]);
      if (c.kind == SoftmaxKind::softmax) {
        t.y[at(i)] = value;
        t.dx[at(i)] = std::abs(c.scale) * value * (std::abs(dy[at(i)]) + sum);
      } else if (c.kind == SoftmaxKind::log_softmax) {
        t.y[at(i)] = value + 12.0;
        t.dx[at(i)] = std::abs(dy[at(i)]) + std::exp(-value) * sum;
      } else {
        t.dx[at(i)] = 12.0 * std::abs(dy[row]);
      }
    }
  }
  return t;
}

void check_softmax(const SoftmaxCase& c, bool same_bits) {
  SoftmaxCall found(c, c.shift, c.gap), expected(c, 0, 0);
  const auto run = [&](const SoftmaxCall& call) {
    cuda::softmax(call.forward, {nullptr, c.device});
    cuda::softmax_bwd(call.backward, {nullptr, c.device});
  };
  if (!run_guarded(found.tensors(), [&] { run(found); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    SoftmaxCall plain(c, 0, 0);
    run_guarded(plain.tensors(), [&] { run(plain); });
    if (c.kind == SoftmaxKind::logsumexp) {
      expect_same_bits(found.tensors(), plain.tensors(), {"lse", "dx"});
    } else {
      expect_same_bits(found.tensors(), plain.tensors(), {"y", "dx"});
    }
  }
  // The CPU's gradient is made of the same result: a rounding of that is no error of backward's.
  cpu::softmax(expected.forward);
  const Terms terms = terms_of(c, expected);
  if (c.kind == SoftmaxKind::logsumexp) {
    expect_near("lse", found.lse, expected.lse, terms.lse);
    for (std::int64_t i = 0; i < found.lse.numel(); ++i) expected.lse.set(i, found.lse.get(i));
  } else {
    expect_near("y", found.y, expected.y, terms.y);
    for (std::int64_t i = 0; i < found.y.numel(); ++i) expected.y.set(i, found.y.get(i));
  }
  cpu::softmax_bwd(expected.backward);
  expect_near("dx", found.dx, expected.dx, terms.dx);
}

/// Rows in a part of a warp up to a block's registers, in shared memory, in clusters of two up to
/// sixteen blocks, and in segments; of 16-bit types.
const std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {5, 1},     {77, 3},    {9, 16},     {7, 17},     {65, 64},    {3, 77},     {9, 129},
    {5, 513},   {3, 1000},  {4, 1024},   {2, 2047},   {3, 4096},   {2, 4104},   {2, 8191},
    {2, 8192},  {2, 8200},  {1, 12289},  {2, 16400},  {1, 32768},  {1, 40001},  {1, 49152},
    {2, 49160}, {1, 65537}, {1, 102400}, {1, 262144}, {1, 262152}, {1, 393224}, {1, 800003},
};

/// `turn` goes round through everything but shape and types.
SoftmaxCase make_case(std::int64_t rows, std::int64_t n, DType dtype, DType out, unsigned turn) {
  SoftmaxCase c{.dtype = dtype, .out = out, .rows = rows, .n = n};
  c.kind = static_cast<SoftmaxKind>(turn % 3);
  if (c.kind == SoftmaxKind::logsumexp) c.out = dtype;
  if (turn % 3 == 0 && turn % 2 == 0) {
    c.masked = true, c.scale = 0.4;
    c.mask = static_cast<Mask>(turn / 6 % 3);
    if (turn / 18 % 2 == 0) c.queries = c.rows;
  }
  if (turn % 5 == 4 && n <= 4104 && !c.masked) c.behind = 1 + turn % 67;
  c.gap = turn % 7 < 2 ? 3 : turn % 7 == 2 ? 16 : 0;
  c.shift = turn % 4 == 3 ? static_cast<int>(turn % 3) + 1 : 0;
  c.device = turn % 11 < 7 ? 0 : turn % 11 < 9 ? 4 : 6;  // with clusters and without
  return c;
}

}  // namespace

std::vector<Case> softmax_cases(const Options& options) {
  std::vector<Case> cases;
  constexpr std::pair<DType, DType> kTypes[] = {{DType::f32, DType::f32},
                                                {DType::bf16, DType::bf16},
                                                {DType::bf16, DType::f32},
                                                {DType::f32, DType::bf16},
                                                {DType::f16, DType::f16}};
  unsigned turn = options.seed * 7919;
  for (const auto& [dtype, out] : kTypes) {
    if (!FASTKERN_EMULATE_F16 && dtype == DType::f16) continue;
    const char* const name = dtype == out ? name_of(dtype) : "mixed";
    if (!options.wants(name, {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"})) continue;
    for (const auto& [rows, n] : kShapes) {
      if (!options.sizes.empty() && options.sizes.count(n) == 0) continue;
      for (int i = 0; i < (options.full ? 24 : n > 50000 ? 1 : 4 * options.per); ++i) {
        SoftmaxCase c = make_case(rows, n, dtype, out, ++turn);
        c.device = options.device.value_or(c.device);
        const bool same_bits = options.same_bits;
        cases.push_back({c.text(), [c, same_bits] { check_softmax(c, same_bits); }});
      }
    }
  }
  return cases;
}

}  // namespace emulator
