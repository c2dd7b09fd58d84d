// SPDX-License-Identifier: Apache-2.0
// What the C++ tests of optimizers share: parameters of many sizes with their states, and tables of
// them.
#pragma once

#include "fastkern/optim.h"
#include "support.h"

namespace fastkern::test {

inline constexpr OptimKind kOptimKinds[] = {
    OptimKind::adam,    OptimKind::amsgrad, OptimKind::sgd,   OptimKind::lion, OptimKind::adagrad,
    OptimKind::rmsprop, OptimKind::nadam,   OptimKind::radam, OptimKind::lamb, OptimKind::muon};

struct OptimCase {
  OptimKind kind = OptimKind::adam;
  OptimRounding rounding = OptimRounding::nearest;
  DType param = DType::f32, grad = DType::f32, state = DType::f32;
  Sizes sizes = {0, 1, 7, 63, 64, 65, 1023, 8191, 8193};
  bool shifted = false, skip = false, scaled = false, found = false;

  std::string text() const {
    return "kind " + std::to_string(static_cast<int>(kind)) + " rounding " +
           std::to_string(static_cast<int>(rounding)) + " " + name_of(param) + " " + name_of(grad) +
           " " + name_of(state) + (shifted ? " shifted" : "") + (skip ? " skip" : "") +
           (scaled ? " scaled" : "") + (found ? " found" : "");
  }
};

/// Every kind with every rounding and several types; options in turns.
inline std::vector<OptimCase> optim_cases() {
  constexpr DType kTypes[][3] = {
      {DType::f32, DType::f32, DType::f32},   {DType::bf16, DType::bf16, DType::bf16},
      {DType::bf16, DType::bf16, DType::f32}, {DType::f16, DType::f32, DType::f16},
      {DType::bf16, DType::bf16, DType::u8},  {DType::f32, DType::bf16, DType::u8}};
  std::vector<OptimCase> cases;
  unsigned turn = 0;
  for (const OptimKind kind : kOptimKinds) {
    for (int rounding = 0; rounding < 5; ++rounding) {
      for (const auto& types : kTypes) {
        if (types[0] == DType::f32 && rounding > 0) continue;
        if (types[0] == DType::f16 && (rounding == 1 || rounding == 4)) continue;
        if (types[2] == DType::u8 && !optim_has_codes(kind)) continue;
        OptimCase c;
        c.kind = kind, c.rounding = static_cast<OptimRounding>(rounding);
        c.param = types[0], c.grad = types[1], c.state = types[2];
        ++turn;
        c.shifted = turn % 3 == 0, c.skip = turn % 4 == 1, c.scaled = turn % 2 == 0;
        c.found = turn % 13 == 7;
        cases.push_back(c);
      }
    }
  }
  return cases;
}

/// Scalars that a step reads: in memory that its kernel can read.
struct OptimScalars {
  float *steps, *products, *scale, *factor, *found, *workspace;
};

class OptimProblem {
 public:
  explicit OptimProblem(const OptimCase& of) : c(of) {
    const auto make = [&](DType dtype, std::size_t i, unsigned seed) {
      Tensor t(dtype, dense_layout({c.sizes[i]}, c.shifted && i % 3 == 1 ? 1 : 0));
      return t.fill(seed + static_cast<unsigned>(i));
    };
    const bool master = c.rounding == OptimRounding::master;
    for (std::size_t i = 0; i < c.sizes.size(); ++i) {
      params.push_back(make(c.param, i, 1));
      grads.push_back(make(c.grad, i, 100));
      extras.push_back(make(master ? DType::f32 : c.param, i, 200));
      if (!master) {
        for (std::int64_t e = 0; e < c.sizes[i]; ++e) extras[i].set(e, 1e-3 * extras[i].get(e));
      }
      for (int k = 0; k < optim_states(c.kind); ++k) {
        states[k].push_back(make(c.state, i, 300 + 100 * k));
        if (c.state == DType::u8) {
          make_codes(i, k);
          continue;
        }
        const bool square = k != 0 || c.kind == OptimKind::rmsprop || c.kind == OptimKind::adagrad;
        const double least = c.kind == OptimKind::rmsprop && k == 0 ? 1.0 : 0.0;
        for (std::int64_t e = 0; square && e < c.sizes[i]; ++e)
          states[k][i].set(e, least + 0.25 * std::abs(states[k][i].get(e)));
      }
    }
  }

  std::vector<Tensor*> all() {
    std::vector<Tensor*> list;
    for (auto* tensors :
         {&params, &grads, &extras, &states[0], &states[1], &states[2], &scales[0], &scales[1]}) {
      for (Tensor& t : *tensors) list.push_back(&t);
    }
    return list;
  }
  std::int64_t count() const { return static_cast<std::int64_t>(params.size()); }

  /// Fills a table; `place(t)` is where a tensor's data is.
  template <class Place>
  std::vector<std::uint64_t> table(const Place& place, const OptimScalars& scalars) {
    std::vector<std::uint64_t> memory(OptimTable::bytes(count()) / 8);
    const OptimTable table(memory.data(), count());
    for (std::size_t i = 0; i < params.size(); ++i) {
      OptimTensor& t = table.tensor()[i];
      t.param = place(params[i]);
      for (int k = 0; k < optim_states(c.kind); ++k) t.state[k] = place(states[k][i]);
      for (int k = 0; k < kOptimCodedStates; ++k) {
        t.scale[k] = scales[k].empty() ? nullptr : static_cast<float*>(place(scales[k][i]));
      }
      t.extra = c.rounding >= OptimRounding::kahan ? place(extras[i]) : nullptr;
      t.step = scalars.steps + i;
      t.product = c.kind == OptimKind::nadam ? scalars.products + i : nullptr;
      t.numel = c.sizes[i];
      t.group = static_cast<std::int32_t>(i % 2);
      t.index = static_cast<std::uint32_t>(i);
      table.grad()[i] = c.skip && i % 4 == 3 ? nullptr : place(grads[i]);
    }
    table.number_chunks("test");
    return memory;
  }

  OptimStep args(const std::vector<std::uint64_t>& host, const OptimScalars& scalars) const {
    OptimStep a;
    a.kind = c.kind, a.rounding = c.rounding;
    a.param = c.param, a.grad = c.grad, a.state = c.state;
    a.tensors = count();
    a.host = host.data();
    a.groups = 2;
    a.group[0] = {.lr = 0.05,
                  .beta1 = 0.9,
                  .beta2 = 0.95,
                  .eps = 1e-6,
                  .weight_decay = 0.1,
                  .decay_base = 0.99,
                  .decoupled = true};
    a.group[1] = a.group[0];
    a.group[1].lr = 0.01, a.group[1].nesterov = true, a.group[1].maximize = true;
    a.group[1].decoupled = false;
    if (c.scaled) a.grad_scale = scalars.scale, a.grad_factor = scalars.factor;
    a.found_inf = scalars.found;
    a.seed = 42;
    a.workspace = scalars.workspace;
    return a;
  }

  OptimCase c;
  std::vector<Tensor> params, grads, extras, states[kOptimStates], scales[kOptimCodedStates];

 private:
  /// Any codes, with scales some of which are 0.
  void make_codes(std::size_t i, int k) {
    auto* const codes = static_cast<std::uint8_t*>(states[k][i].ref().data);
    for (std::int64_t e = 0; e < c.sizes[i]; ++e) {
      codes[e] = static_cast<std::uint8_t>((e * 2654435761u + i * 40503u) >> 13);
    }
    const std::int64_t blocks = (c.sizes[i] + kOptimCodeBlock - 1) / kOptimCodeBlock;
    scales[k].emplace_back(DType::f32, dense_layout({blocks}, 0));
    // Block 5 is beyond what the kernel takes as ordinary; so are blocks 4, 12, ... with the least
    // gradient, and blocks 8, 16, ... have nothing but zeros.
    for (std::int64_t b = 0; b < blocks; ++b) {
      scales[k][i].set(b, b == 5 ? (k == 0 ? 3e20 : 1e12) : 0.25 * static_cast<double>(b % 4));
    }
    for (std::int64_t e = 4 * kOptimCodeBlock; e < c.sizes[i]; ++e) {
      const std::int64_t b = e / kOptimCodeBlock;
      if (b % 4 == 0) grads[i].set(e, b % 8 == 4 && e % 256 == 77 ? 1e-30 : 0.0);
    }
  }
};

/// The same on the CPU, in place.
struct OptimOnCpu {
  explicit OptimOnCpu(OptimProblem& p)
      : steps(p.count(), 3.0f), products(p.count(), 0.5f), found(p.c.found ? 1.0f : 0.0f) {
    std::int64_t chunks = 0;
    for (const std::int64_t n : p.c.sizes) chunks += (n + kOptimChunk - 1) / kOptimChunk;
    workspace.resize(optim_workspace(p.c.kind, p.count(), chunks) / 4 + 1);
    host = p.table([](Tensor& t) { return t.ref().data; }, scalars());
    args = p.args(host, scalars());
  }
  OptimScalars scalars() {
    return {steps.data(), products.data(), &scale, &factor, &found, workspace.data()};
  }

  std::vector<float> steps, products, workspace;
  float scale = 8.0f, factor = 0.75f, found;
  std::vector<std::uint64_t> host;
  OptimStep args;
};

}  // namespace fastkern::test
