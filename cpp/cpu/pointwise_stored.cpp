// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of 16-bit elements in one loop. Through blocks of f32 each takes three passes
// over the first cache, which is more time than memory takes.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "pointwise.h"

namespace fastkern::cpu {
namespace {

/// bf16: conversions are a shift and a sum, part of the loop.
template <class F>
void evaluate_bf16(const void* const* in, const float* numbers, const Number* scalars, void* out,
                   std::int64_t n) {
  const bf16* const a = static_cast<const bf16*>(in[0]);
  bf16* const to = static_cast<bf16*>(out);
  const Scalars<float> s{{number_as<float>(scalars[0]), number_as<float>(scalars[1])}};
  const auto run = [&](const auto& b, const auto& c) __attribute__((always_inline)) {
    with_best_isa([&]() __attribute__((always_inline)) {
      const Scalars<float> local = s;  // which no store in the loop can change
      const auto second = b, third = c;
#pragma GCC ivdep
      for (std::int64_t i = 0; i < n; ++i) {
        to[i] =
            from_float<bf16>(F::template apply<float>(to_float(a[i]), second(i), third(i), local));
      }
    });
  };
  const auto none = [](std::int64_t) __attribute__((always_inline)) { return 0.0f; };
  const auto elements = [](const void* from) __attribute__((always_inline)) {
    return [p = static_cast<const bf16*>(from)](std::int64_t i)
               __attribute__((always_inline)) { return to_float(p[i]); };
  };
  const auto number = [](float v) __attribute__((always_inline)) {
    return [v](std::int64_t) __attribute__((always_inline)) { return v; };
  };
  if constexpr (F::kInputs == 1) {
    run(none, none);
  } else if constexpr (F::kInputs == 2) {
    numbers ? run(number(numbers[0]), none) : run(elements(in[1]), none);
  } else {
    numbers ? run(number(numbers[0]), number(numbers[1])) : run(elements(in[1]), elements(in[2]));
  }
}

/// sin and cos of arguments that the loop reduces; of infinity it makes NaN.
template <int kQuarters>
struct SinWithin {
  static constexpr int kInputs = 1;
  template <class T>
  static FASTKERN_HD T apply(T a, T, T, const Scalars<T>&) {
    return math::sin_within<kQuarters>(a);
  }
};

template <int kQuarters>
void evaluate_sin_bf16(const void* const* in, const float*, const Number* scalars, void* out,
                       std::int64_t n) {
  const bf16* const a = static_cast<const bf16*>(in[0]);
  bf16* const to = static_cast<bf16*>(out);
  bool large = false;
  with_best_isa([&]() __attribute__((always_inline)) {
    int found = 0;
    for (std::int64_t i = 0; i < n; ++i) found |= math::abs(to_float(a[i])) > math::kPeriods;
    large = found != 0;
  });
  if (!large) return evaluate_bf16<SinWithin<kQuarters>>(in, nullptr, scalars, out, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = to_float(a[i]);
    to[i] = from_float<bf16>(kQuarters == 0 ? math::sin(v) : math::cos(v));
  }
}

/// Whether a function has such loops: the result is of the inputs' type, and the formula does not
/// take so long that conversions are no matter.
constexpr bool has_loop(Pointwise f) {
  switch (f) {
    case Pointwise::where:
    case Pointwise::sin:
    case Pointwise::cos:
    case Pointwise::pow:
    case Pointwise::div_trunc:
    case Pointwise::div_floor:
    case Pointwise::rsub:
    case Pointwise::clamp_min:
    case Pointwise::clamp_max:
      return false;
    default:
      return (pointwise_info(f).types & kFloat) != 0 &&
             pointwise_info(f).promotion != Promotion::always_bool;
  }
}

/// Elements one by one, from `begin` to n.
template <class F, bool kNumbers>
FASTKERN_INLINE void finish_f16(const f16* const* in, const float* numbers, const Scalars<float>& s,
                                f16* to, std::int64_t begin, std::int64_t n) {
  for (std::int64_t i = begin; i < n; ++i) {
    float v[kMaxInputs] = {to_float(in[0][i])};
    for (int k = 1; k < F::kInputs; ++k) v[k] = kNumbers ? numbers[k - 1] : to_float(in[k][i]);
    to[i] = from_float<f16>(F::template apply<float>(v[0], v[1], v[2], s));
  }
}

#if defined(__x86_64__)
// f16 has instructions for its conversions, which compilers do not find in to_float: loops over one
// vector between them, which become its arithmetic.
template <class F, bool kNumbers>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))) void f16_avx512(
    const f16* const* in, const float* numbers, const Scalars<float>& scalars, f16* to,
    std::int64_t n) {
  constexpr int kLanes = 16;
  const Scalars<float> s = scalars;
  alignas(64) float v[kMaxInputs][kLanes] = {}, result[kLanes];
  for (int k = 1; kNumbers && k < F::kInputs; ++k) std::fill_n(v[k], kLanes, numbers[k - 1]);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < (kNumbers ? 1 : F::kInputs); ++k) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[k] + i));
      _mm512_store_ps(v[k], _mm512_maskz_cvtph_ps(0xffff, half));
    }
    for (int j = 0; j < kLanes; ++j)
      result[j] = F::template apply<float>(v[0][j], v[1][j], v[2][j], s);
    // maskz: GCC 12 warns of the plain intrinsic.
    const __m256i half =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_load_ps(result), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), half);
  }
  finish_f16<F, kNumbers>(in, numbers, s, to, i, n);
}

template <class F, bool kNumbers>
__attribute__((target("avx2,fma,f16c"))) void f16_avx2(const f16* const* in, const float* numbers,
                                                       const Scalars<float>& scalars, f16* to,
                                                       std::int64_t n) {
  constexpr int kLanes = 8;
  const Scalars<float> s = scalars;
  alignas(32) float v[kMaxInputs][kLanes] = {}, result[kLanes];
  for (int k = 1; kNumbers && k < F::kInputs; ++k) std::fill_n(v[k], kLanes, numbers[k - 1]);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < (kNumbers ? 1 : F::kInputs); ++k) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[k] + i));
      _mm256_store_ps(v[k], _mm256_cvtph_ps(half));
    }
    for (int j = 0; j < kLanes; ++j)
      result[j] = F::template apply<float>(v[0][j], v[1][j], v[2][j], s);
    const __m128i half = _mm256_cvtps_ph(_mm256_load_ps(result), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  finish_f16<F, kNumbers>(in, numbers, s, to, i, n);
}
#endif

template <class F>
void evaluate_f16(const void* const* in, const float* numbers, const Number* scalars, void* out,
                  std::int64_t n) {
  const f16* from[kMaxInputs] = {};
  for (int k = 0; k < F::kInputs; ++k) from[k] = static_cast<const f16*>(in[k]);
  f16* const to = static_cast<f16*>(out);
  const Scalars<float> s{{number_as<float>(scalars[0]), number_as<float>(scalars[1])}};
  const auto run = [&]<bool kNumbers>() {
#if defined(__x86_64__)
    const Isa isa = best_isa();
    if (isa == Isa::avx512) return f16_avx512<F, kNumbers>(from, numbers, s, to, n);
    if (isa == Isa::avx2) return f16_avx2<F, kNumbers>(from, numbers, s, to, n);
#endif
    finish_f16<F, kNumbers>(from, numbers, s, to, 0, n);
  };
  numbers ? run.template operator()<true>() : run.template operator()<false>();
}

template <class F, bool kHalf, bool kCompiled>
constexpr EvaluateStored stored_entry() {
  if constexpr (!kCompiled) {
    return nullptr;
  } else if constexpr (kHalf) {
    return evaluate_f16<F>;
  } else {
    return evaluate_bf16<F>;
  }
}

template <bool kHalf>
EvaluateStored find(Pointwise f) {
  static constexpr EvaluateStored kTable[] = {
#define FASTKERN_ENTRY(name, inputs, promotion, types, ...) \
  stored_entry<functor::name, kHalf, has_loop(Pointwise::name)>(),
      FASTKERN_POINTWISE_OPS(FASTKERN_ENTRY)
#undef FASTKERN_ENTRY
  };
  return kTable[static_cast<int>(f)];
}

}  // namespace

EvaluateStored evaluate_stored(Pointwise f, DType stored) {
  if (stored == DType::bf16) {
    if (f == Pointwise::sin) return evaluate_sin_bf16<0>;
    if (f == Pointwise::cos) return evaluate_sin_bf16<1>;
    return find<false>(f);
  }
  if (stored == DType::f16) {
    if (f == Pointwise::sin) return evaluate_f16<SinWithin<0>>;
    if (f == Pointwise::cos) return evaluate_f16<SinWithin<1>>;
    return find<true>(f);
  }
  return nullptr;
}

}  // namespace fastkern::cpu
