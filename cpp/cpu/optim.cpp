// SPDX-License-Identifier: Apache-2.0
// A step of an optimizer on the CPU: chunks are shared among threads, a chunk is worked on in
// blocks of float32. The formulas are those of optim_formula.h, element by element, so neither
// threads nor vectors change a bit.
#include "fastkern/optim.h"

#include "optim_blocks.h"
#include "optim_lamb.h"

namespace fastkern::cpu {
namespace {

/// n elements: values and gradients of type P, states of type S.
template <class Formula, class P, class S>
FASTKERN_INLINE void update_block(const typename Formula::Numbers& numbers, float factor, int n,
                                  P* p, const P* g, S* const* states) {
  constexpr int kStates = Formula::kStates;
  const typename Formula::Numbers local = numbers;
  S* const s0 = states[0];
  S* const s1 = states[kStates > 1 ? 1 : 0];
  S* const s2 = states[kStates > 2 ? 2 : 0];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float s[kStates];
    s[0] = to_float(s0[i]);
    if constexpr (kStates > 1) s[1] = to_float(s1[i]);
    if constexpr (kStates > 2) s[2] = to_float(s2[i]);
    const float grad = optim::mul(to_float(g[i]), factor);
    p[i] = from_float<P>(Formula::update(local, to_float(p[i]), grad, s));
    s0[i] = from_float<S>(s[0]);
    if constexpr (kStates > 1) s1[i] = from_float<S>(s[1]);
    if constexpr (kStates > 2) s2[i] = from_float<S>(s[2]);
  }
}

/// f(tensor, its number, numbers, gradient factor, steps, first element, elements) for each block.
template <class Formula, class F>
void for_steps(const OptimStep& a, const OptimTable& table, std::int64_t block, const F& f) {
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
          f(buffers, t, table.grad()[i], numbers, factor, step, at, n);
        },
        block);
  });
}

/// What is in memory as P and S, a chunk at a time, in one loop.
template <class Formula, class P, class S>
void step_plain(const OptimStep& a, const OptimTable& table) {
  const auto chunk = [](OptimBuffers&, const OptimTensor& t, const void* grad, const auto& numbers,
                        float factor, std::uint64_t, std::int64_t at, int n) {
    S* states[Formula::kStates];
    for (int k = 0; k < Formula::kStates; ++k) states[k] = static_cast<S*>(t.state[k]) + at;
    with_best_isa([&]() __attribute__((always_inline)) {
      update_block<Formula>(numbers, factor, n, static_cast<P*>(t.param) + at,
                            static_cast<const P*>(grad) + at, states);
    });
  };
  for_steps<Formula>(a, table, kOptimChunk, chunk);
}

template <class Formula>
void step_all(const OptimStep& a, const OptimTable& table) {
  if (is_plain(a, table, DType::f32, DType::f32)) {
    return step_plain<Formula, float, float>(a, table);
  }
  if (is_plain(a, table, DType::bf16, DType::bf16)) {
    return step_plain<Formula, bf16, bf16>(a, table);
  }
  if (is_plain(a, table, DType::bf16, DType::f32)) {
    return step_plain<Formula, bf16, float>(a, table);
  }
  const auto block = [&](OptimBuffers& buffers, const OptimTensor& t, const void* grad,
                         const auto& numbers, float factor, std::uint64_t step, std::int64_t at,
                         int n) {
    load_buffers(a, t, grad, at, n, buffers);
    with_best_isa([&]() __attribute__((always_inline)) {
      update_block<Formula>(numbers, factor, n, buffers.p, buffers.g, buffers.s);
    });
    store_values(a, t, step, at, n, buffers);
    store_states(a, t, at, n, buffers);
  };
  for_steps<Formula>(a, table, kOptimBlock, block);
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
  FK_CHECK(a.state != DType::u8 || optim_has_codes(a.kind), a.op,
           ": states of 8 bits must be those of adam, sgd or lion, got kind ",
           static_cast<int>(a.kind));
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
