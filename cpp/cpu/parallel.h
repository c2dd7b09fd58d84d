// SPDX-License-Identifier: Apache-2.0
// parallel_for(count, grain, [&](begin, end) {...}) for the CPU kernels, on whatever pool is
// installed; with_best_isa(body) runs an inlined body compiled for the widest vectors this
// processor has.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fastkern/core.h"
#include "fastkern/scalar.h"

namespace fastkern::cpu {

void run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context);

template <class F>
void parallel_for(std::int64_t count, std::int64_t grain, F&& f) {
  if (count <= 0) return;
  if (count <= grain) return f(std::int64_t{0}, count);
  using Body = std::remove_reference_t<F>;
  run_parallel(
      count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

/// Rows a thread should take at least, so that waking it up costs little against the work.
inline std::int64_t row_grain(std::int64_t row_length) {
  return 1 + 16384 / (row_length > 0 ? row_length : 1);
}

// The body (and all it calls in its hot loop) must be always_inline: it is then compiled once per
// target. It may take the number of floats in a vector as a template argument.
template <int kFloats, class F>
FASTKERN_INLINE void run_body(const F& f) {
  if constexpr (requires { f.template operator()<kFloats>(); }) {
    f.template operator()<kFloats>();
  } else {
    f();
  }
}

#if defined(__x86_64__)
template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) void run_avx512(
    const F& f) {
  run_body<16>(f);
}
template <class F>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const F& f) {
  run_body<8>(f);
}
#endif

/// The widest vectors of this processor that there is code for; all have f16 conversions.
enum class Isa { basic, avx2, avx512 };
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::basic;
  }();
  return best;
#else
  return Isa::basic;
#endif
}

template <class F>
void with_best_isa(const F& f) {
#if defined(__x86_64__)
  const Isa isa = best_isa();
  if (isa == Isa::avx512) return run_avx512(f);
  if (isa == Isa::avx2) return run_avx2(f);
#endif
  run_body<4>(f);
}

}  // namespace fastkern::cpu
