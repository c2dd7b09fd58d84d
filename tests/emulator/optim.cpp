// SPDX-License-Identifier: Apache-2.0
// cuda::optim_step, cuda::optim_norm and cuda::optim_scale in the emulator against cpu::, whose
// formulas are the same: bits are compared, but where a norm is in between.
#include "fastkern/optim.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;

constexpr const char* kKinds[] = {"adam",    "amsgrad", "sgd",   "lion", "adagrad",
                                  "rmsprop", "nadam",   "radam", "lamb", "muon"};
constexpr const char* kRoundings[] = {"nearest", "stochastic", "kahan", "master", "remainder"};

struct OptimCase {
  OptimKind kind = OptimKind::adam;
  OptimRounding rounding = OptimRounding::nearest;
  DType param = DType::f32, grad = DType::f32, state = DType::f32;
  Sizes sizes;
  int shift = 0;  // elements off a boundary, of every third tensor
  bool skip = false, scaled = false, decoupled = false, maximize = false, found = false;
  bool many = false;  // tensors, more than fit the arguments of a kernel
  int device = 0;

  std::string text() const {
    std::ostringstream out;
    out << "optim " << kKinds[static_cast<int>(kind)] << " "
        << kRoundings[static_cast<int>(rounding)] << " " << name_of(param) << " " << name_of(grad)
        << " " << name_of(state) << " device " << device << " shift " << shift
        << (skip ? " skip" : "") << (scaled ? " scaled" : "") << (decoupled ? " decoupled" : "")
        << (maximize ? " maximize" : "") << (found ? " found" : "") << (many ? " many" : "")
        << " sizes";
    for (const std::int64_t n : sizes) out << " " << n;
    return out.str();
  }
};

/// Tensors of a case, and a table of them.
struct OptimCall {
  explicit OptimCall(const OptimCase& c);
  NamedTensors tensors();
  OptimStep args();

  OptimCase c;
  std::vector<Tensor> params, grads, states[kOptimStates], scales[kOptimCodedStates], extras;
  std::vector<float> steps, products, workspace, partials;
  std::vector<std::uint64_t> host, device;
  float scale = 8.0f, found = 0.0f, norm = 0.0f, factor = 0.75f;
  double sum = 0.0;
};

OptimCall::OptimCall(const OptimCase& of) : c(of) {
  const std::size_t count = c.sizes.size();
  const auto make = [&](DType dtype, std::size_t i, unsigned seed, float by) {
    Tensor t(dtype, {c.sizes[i]}, {1}, i % 3 == 2 ? c.shift : 0);
    t.fill(seed + static_cast<unsigned>(i), 0.0);
    for (std::int64_t e = 0; e < t.numel(); ++e) t.set(e, by * t.get(e));
    t.allow_writes();
    return t;
  };
  steps.assign(count, 3.0f), products.assign(count, 0.5f);
  host.assign(OptimTable::bytes(static_cast<std::int64_t>(count)) / 8, 0);
  device.assign(host.size(), ~0ull);
  const OptimTable table(host.data(), static_cast<std::int64_t>(count));
  for (std::size_t i = 0; i < count; ++i) {
    params.push_back(make(c.param, i, 1, 1.0f));
    grads.push_back(make(c.grad, i, 1000, 1.0f));
    for (int k = 0; k < optim_states(c.kind); ++k) {
      states[k].push_back(make(c.state, i, 2000 + 1000 * k, 0.25f));
      if (c.state == DType::u8) {
        auto* const codes = static_cast<std::uint8_t*>(states[k][i].ref().data);
        const std::int64_t blocks = (c.sizes[i] + kOptimCodeBlock - 1) / kOptimCodeBlock;
        for (std::int64_t e = 0; e < c.sizes[i]; ++e) {
          codes[e] = static_cast<std::uint8_t>((e * 2654435761u + i * 40503u) >> 13);
        }
        scales[k].emplace_back(DType::f32, Sizes{blocks}, Sizes{1});
        scales[k][i].allow_writes();
        // Some blocks are beyond what the kernel takes as ordinary, some have nothing but zeros.
        for (std::int64_t b = 0; b < blocks; ++b) {
          const float large = k == 0 ? 3e20f : 1e12f;
          scales[k][i].set(b, b % 5 == 4   ? 0.0f
                              : b % 7 == 5 ? large
                                           : 0.25f * static_cast<float>(b % 3 + 1));
        }
        for (std::int64_t e = 0; e < c.sizes[i]; ++e) {
          const std::int64_t b = e / kOptimCodeBlock;
          if (b % 5 == 4) grads[i].set(e, b % 2 == 0 && e % 256 == 77 ? 1e-30f : 0.0f);
        }
        continue;
      }
      if (k == 0 && c.kind != OptimKind::rmsprop && c.kind != OptimKind::adagrad) continue;
      // Averages of squares are not negative, and not below the square of RMSprop's average.
      const float least = c.kind == OptimKind::rmsprop && k == 0 ? 1.0f : 0.0f;
      for (std::int64_t e = 0; e < c.sizes[i]; ++e)
        states[k][i].set(e, least + 0.25f * std::abs(states[k][i].get(e)));
    }
    const DType extra = c.rounding == OptimRounding::master ? DType::f32 : c.param;
    extras.push_back(make(extra, i, 5000, c.rounding == OptimRounding::master ? 1.0f : 1e-3f));
  }
  for (std::size_t i = 0; i < count; ++i) {
    OptimTensor& t = table.tensor()[i];
    t.param = params[i].ref().data;
    for (int k = 0; k < optim_states(c.kind); ++k) t.state[k] = states[k][i].ref().data;
    for (int k = 0; k < kOptimCodedStates && c.state == DType::u8; ++k) {
      t.scale[k] =
          k < optim_states(c.kind) ? static_cast<float*>(scales[k][i].ref().data) : nullptr;
    }
    t.extra = c.rounding >= OptimRounding::kahan ? extras[i].ref().data : nullptr;
    t.step = &steps[i];
    t.product = c.kind == OptimKind::nadam ? &products[i] : nullptr;
    t.numel = c.sizes[i];
    t.group = static_cast<std::int32_t>(i % 2);
    t.index = static_cast<std::uint32_t>(i + 7);
    table.grad()[i] = c.skip && i % 4 == 1 ? nullptr : grads[i].ref().data;
  }
  table.number_chunks("emulator");
  workspace.assign(optim_workspace(c.kind, table.tensors(), table.chunks()) / 4, NAN);
  partials.assign(table.chunks(), NAN);
}

NamedTensors OptimCall::tensors() {
  NamedTensors all;
  for (std::size_t i = 0; i < params.size(); ++i) {
    all.emplace_back("param", &params[i]);
    all.emplace_back("grad", &grads[i]);
    for (int k = 0; k < optim_states(c.kind); ++k) all.emplace_back("state", &states[k][i]);
    for (auto& those : scales) {
      if (!those.empty()) all.emplace_back("scales", &those[i]);
    }
    all.emplace_back("extra", &extras[i]);
  }
  return all;
}

OptimStep OptimCall::args() {
  OptimStep a;
  a.kind = c.kind, a.rounding = c.rounding;
  a.param = c.param, a.grad = c.grad, a.state = c.state;
  a.tensors = static_cast<std::int64_t>(params.size());
  a.host = host.data(), a.table = device.data();
  a.groups = 2;
  a.group[0] = {.lr = 0.05,
                .beta1 = 0.9,
                .beta2 = 0.95,
                .eps = 1e-6,
                .weight_decay = 0.1,
                .decay_base = 0.99,
                .decoupled = c.decoupled,
                .nesterov = c.decoupled,
                .maximize = c.maximize};
  a.group[1] = a.group[0];
  a.group[1].lr = 0.01, a.group[1].weight_decay = 0.0;
  if (c.scaled) a.grad_scale = &scale, a.grad_factor = &factor;
  found = c.found ? 1.0f : 0.0f;
  a.found_inf = &found;
  a.seed = 12345678901ull;
  a.workspace = workspace.data();
  return a;
}

void compare_steps(OptimCall& found, OptimCall& expected) {
  const NamedTensors a = found.tensors(), b = expected.tensors();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (found.c.kind == OptimKind::lamb && std::strcmp(a[i].first, "param") == 0 &&
        found.c.param == DType::f32) {
      expect_near("param", *a[i].second, *b[i].second,
                  std::vector<double>(a[i].second->numel(), 1.0));
    } else if (found.c.kind != OptimKind::lamb && !a[i].second->same_bits(*b[i].second)) {
      fail_case(a[i].first, "of tensor " + std::to_string(i * found.params.size() / a.size()) +
                                " has other bits");
    }
  }
  if (found.steps != expected.steps) fail_case("steps", "are others");
  if (found.products != expected.products) fail_case("products", "are others");
}

void check_steps(const OptimCase& c) {
  OptimCall found(c), expected(c);
  const Stream stream{nullptr, c.device};
  const auto run = [&] {
    const OptimStep a = found.args();
    cuda::optim_write(a.table, a.host, static_cast<std::int64_t>(found.host.size() * 8), a.op,
                      stream);
    for (int i = 0; i < 2; ++i) cuda::optim_step(a, stream);
  };
  if (!run_guarded(found.tensors(), run)) return;
  for (int i = 0; i < 2; ++i) cpu::optim_step(expected.args());
  compare_steps(found, expected);
}

void check_norm(const OptimCase& c, bool largest) {
  OptimCall found(c), expected(c);
  const Stream stream{nullptr, c.device};
  const auto norm_of = [&](OptimCall& call) {
    const OptimStep step = call.args();
    OptimNorm a;
    a.grad = c.grad, a.tensors = step.tensors, a.host = step.host, a.table = step.table;
    a.largest = largest, a.max_norm = 0.5, a.grad_scale = step.grad_scale;
    a.partials = call.partials.data(), a.sum = &call.sum;
    a.norm = &call.norm, a.factor = &call.factor;
    return a;
  };
  const auto scale_of = [&](OptimCall& call) {
    OptimScale a;
    a.grad = c.grad, a.tensors = static_cast<std::int64_t>(c.sizes.size());
    a.host = call.host.data(), a.table = call.device.data(), a.factor = &call.factor;
    return a;
  };
  const auto run = [&] {
    OptimNorm a = norm_of(found);
    cuda::optim_write(a.table, a.host, static_cast<std::int64_t>(found.host.size() * 8), a.op,
                      stream);
    a.last = false;  // the same table twice
    cuda::optim_norm(a, stream);
    a.first = false, a.last = true;
    cuda::optim_norm(a, stream);
    cuda::optim_scale(scale_of(found), stream);
  };
  if (!run_guarded(found.tensors(), run)) return;
  OptimNorm a = norm_of(expected);
  a.last = false;
  cpu::optim_norm(a);
  a.first = false, a.last = true;
  cpu::optim_norm(a);
  if (std::abs(found.norm - expected.norm) > 2e-6f * expected.norm) {
    fail_case("norm", std::to_string(found.norm) + " is not " + std::to_string(expected.norm));
  }
  expected.factor = found.factor;
  cpu::optim_scale(scale_of(expected));
  compare_steps(found, expected);
}

}  // namespace

std::vector<Case> optim_cases(const Options& options) {
  std::vector<Case> cases;
  constexpr DType kTypes[][3] = {
      {DType::f32, DType::f32, DType::f32},   {DType::bf16, DType::bf16, DType::bf16},
      {DType::bf16, DType::bf16, DType::f32}, {DType::bf16, DType::f32, DType::bf16},
      {DType::f16, DType::f16, DType::f16},   {DType::f16, DType::f32, DType::f32},
      {DType::bf16, DType::bf16, DType::u8},  {DType::f32, DType::f32, DType::u8},
      {DType::bf16, DType::f32, DType::u8}};
  const Sizes kSizes[] = {{0, 1, 7, 8191, 8192, 8193, 64}, {63, 65, 1023, 20001, 0, 5000}, {16384}};
  unsigned turn = options.seed * 17;
  for (int kind = 0; kind < 10; ++kind) {
    for (int rounding = 0; rounding < 5; ++rounding) {
      for (const auto& types : kTypes) {
        if (types[0] == DType::f32 && rounding > 0) continue;
        if (types[0] == DType::f16 && (rounding == 1 || rounding == 4)) continue;
        if (types[2] == DType::u8 && !optim_has_codes(static_cast<OptimKind>(kind))) continue;
        if (!options.full && kind > 3 && (turn + kind) % 3 != 0) {
          ++turn;
          continue;
        }
        for (int i = 0; i < options.per; ++i) {
          OptimCase c;
          c.kind = static_cast<OptimKind>(kind);
          c.rounding = static_cast<OptimRounding>(rounding);
          c.param = types[0], c.grad = types[1], c.state = types[2];
          c.sizes = kSizes[++turn % 3];
          c.shift = turn % 4 == 1 ? 1 : turn % 4 == 2 ? 4 : 0;
          c.skip = turn % 3 == 0, c.scaled = turn % 2 == 0, c.decoupled = turn % 5 < 2;
          c.maximize = turn % 7 == 3, c.found = turn % 11 == 5;
          c.device = turn % 4 == 3 ? 4 : 0;
          cases.push_back({c.text(), [c] { check_steps(c); }});
        }
      }
    }
  }
  OptimCase many;
  many.sizes.assign(kOptimInlineGrads + 50, 5);
  many.sizes[100] = 9000;
  cases.push_back({many.text() + " many", [many] { check_steps(many); }});
  // States of 8 bits, of so many chunks that a block works on four, of one tensor or of several.
  for (const OptimRounding rounding : {OptimRounding::nearest, OptimRounding::stochastic}) {
    OptimCase c;
    c.rounding = rounding, c.param = c.grad = DType::bf16, c.state = DType::u8;
    c.sizes.assign(110, 300);
    c.sizes[1] = 0, c.sizes[50] = 3 * kOptimChunk + 700, c.sizes[60] = 8 * kOptimChunk;
    c.skip = true, c.device = 1;
    cases.push_back({c.text(), [c] { check_steps(c); }});
  }
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const bool largest : {false, true}) {
      OptimCase c;
      c.grad = dtype, c.sizes = kSizes[largest], c.shift = 1, c.scaled = largest;
      c.skip = !largest;
      cases.push_back({"norm and scale, " + c.text(), [c, largest] { check_norm(c, largest); }});
    }
  }
  return cases;
}

}  // namespace emulator
