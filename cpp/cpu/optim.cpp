// SPDX-License-Identifier: Apache-2.0
// A step of an optimizer on the CPU: chunks are shared among threads, a chunk is worked on in
// blocks of float32. The formulas are those of optim_formula.h, element by element, so neither
// threads nor vectors change a bit.
#include "fastkern/optim.h"

#include "optim_blocks.h"
#include "optim_lamb.h"

namespace fastkern::cpu {
namespace {

template <class Formula>
FASTKERN_INLINE void update_block(const typename Formula::Numbers& numbers, float factor, int n,
                                  const OptimBuffers& b) {
  constexpr int kStates = Formula::kStates;
  const typename Formula::Numbers local = numbers;
  float* const p = b.p;
  const float* const g = b.g;
  float* const s0 = b.s[0];
  float* const s1 = b.s[kStates > 1 ? 1 : 0];
  float* const s2 = b.s[kStates > 2 ? 2 : 0];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float states[kStates];
    states[0] = s0[i];
    if constexpr (kStates > 1) states[1] = s1[i];
    if constexpr (kStates > 2) states[2] = s2[i];
    p[i] = Formula::update(local, p[i], optim::mul(g[i], factor), states);
    s0[i] = states[0];
    if constexpr (kStates > 1) s1[i] = states[1];
    if constexpr (kStates > 2) s2[i] = states[2];
  }
}

template <class Formula>
void step_all(const OptimStep& a, const OptimTable& table) {
  parallel_for(table.chunks(), 4, [&](std::int64_t begin, std::int64_t end) {
    OptimBuffers buffers;
    typename Formula::Numbers numbers;  // of tensor `last`, as `factor` and `step` are
    std::int64_t last = -1;
    std::uint64_t step = 0;
    float factor = 1.0f;
    for_blocks(
        table, begin, end,
        [&](std::int64_t i, std::int64_t, std::int64_t at, int n) {
          const OptimTensor& t = table.tensor()[i];
          if (i != last) {
            const optim::Start start = optim_start(a, t);
            numbers = Formula::numbers(start);
            factor = optim::gradient_factor(start.group, a.grad_factor, a.grad_scale);
            step = start.steps, last = i;
          }
          load_buffers(a, t, table.grad()[i], at, n, buffers);
          with_best_isa([&]() __attribute__((always_inline)) {
            update_block<Formula>(numbers, factor, n, buffers);
          });
          store_values(a, t, step, at, n, buffers);
          store_states(a, t, at, n, buffers);
        },
        optim_block(a, table));
  });
}

void run(const OptimStep& a, const OptimTable& table) {
  switch (a.kind) {
    case OptimKind::adam:
      return step_all<optim::Adam<false>>(a, table);
    case OptimKind::amsgrad:
      return step_all<optim::Adam<true>>(a, table);
    case OptimKind::sgd:
      return step_all<optim::Sgd>(a, table);
    case OptimKind::lion:
      return step_all<optim::Lion>(a, table);
    case OptimKind::adagrad:
      return step_all<optim::Adagrad>(a, table);
    case OptimKind::rmsprop:
      return step_all<optim::RmsProp>(a, table);
    case OptimKind::nadam:
      return step_all<optim::NAdam>(a, table);
    case OptimKind::radam:
      return step_all<optim::RAdam>(a, table);
    case OptimKind::muon:
      return step_all<optim::Muon>(a, table);
    case OptimKind::lamb:
      return lamb_step(a, table);
  }
  fail(a.op, ": kind must be one of OptimKind, got ", static_cast<int>(a.kind));
}

}  // namespace

void optim_step(const OptimStep& a) {
  if (a.tensors == 0 || (a.found_inf && *a.found_inf != 0.0f)) return;
  const OptimTable table(const_cast<void*>(a.host), a.tensors);
  run(a, table);
  for (std::int64_t i = 0; i < a.tensors; ++i) {
    const OptimTensor& t = table.tensor()[i];
    if (!table.grad()[i]) continue;
    if (t.product) *t.product = optim::NAdam::next_product(optim_start(a, t));
    if (t.step) *t.step += 1.0f;
  }
}

}  // namespace fastkern::cpu

#if !FASTKERN_HAS_CUDA
// So that callers need not know how the library was built.
namespace fastkern::cuda {

void optim_step(const OptimStep& a, Stream) { fail(a.op, ": this build has no CUDA kernels"); }
void optim_norm(const OptimNorm& a, Stream) { fail(a.op, ": this build has no CUDA kernels"); }
void optim_scale(const OptimScale& a, Stream) { fail(a.op, ": this build has no CUDA kernels"); }
void optim_write(void*, const void*, std::int64_t, const char* op, Stream) {
  fail(op, ": this build has no CUDA kernels");
}

}  // namespace fastkern::cuda
#endif
