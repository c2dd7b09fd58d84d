// SPDX-License-Identifier: Apache-2.0
// Blocks of the compute type from memory of any type, and back.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>

#include "pointwise.h"

namespace fastkern::cpu {
namespace {

/// A byte that says yes or no.
struct Bool {
  std::uint8_t byte;
};

template <class F>
FASTKERN_INLINE void dispatch_any(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::i8:
      return f.template operator()<std::int8_t>();
    case DType::u8:
      return f.template operator()<std::uint8_t>();
    case DType::i16:
      return f.template operator()<std::int16_t>();
    case DType::i32:
      return f.template operator()<std::int32_t>();
    case DType::i64:
      return f.template operator()<std::int64_t>();
    case DType::boolean:
      return f.template operator()<Bool>();
    case DType::c64:
      return f.template operator()<Complex<float>>();
    case DType::c128:
      return f.template operator()<Complex<double>>();
    case DType::f8e4m3:
      break;
  }
  fail("fastkern: no pointwise functions of ", name_of(dtype));
}

template <class T>
inline constexpr bool kIsComplex = false;
template <class R>
inline constexpr bool kIsComplex<Complex<R>> = true;

/// An element as a number of the language; of a complex one the real part.
template <class S>
FASTKERN_INLINE auto plain(S v) {
  if constexpr (std::is_same_v<S, f16> || std::is_same_v<S, bf16>) {
    return to_float(v);
  } else if constexpr (std::is_same_v<S, Bool>) {
    return static_cast<std::int32_t>(v.byte != 0);
  } else if constexpr (kIsComplex<S>) {
    return v.re;
  } else {
    return v;
  }
}

template <class To, class From>
FASTKERN_INLINE To converted(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (kIsComplex<To>) {
    using R = decltype(To::re);
    if constexpr (kIsComplex<From>) {
      return {static_cast<R>(v.re), static_cast<R>(v.im)};
    } else {
      return To(static_cast<R>(plain(v)));
    }
  } else if constexpr (std::is_same_v<To, f16> || std::is_same_v<To, bf16>) {
    return from_float<To>(static_cast<float>(plain(v)));
  } else if constexpr (std::is_same_v<To, Bool>) {
    return {static_cast<std::uint8_t>(math::truth(v))};
  } else if constexpr (std::is_integral_v<To> && std::is_floating_point_v<decltype(plain(v))>) {
    return static_cast<To>(static_cast<std::int64_t>(plain(v)));
  } else {
    return static_cast<To>(plain(v));
  }
}

#if defined(__x86_64__)
// f16 by the instructions for it, which no compiler finds in to_float and from_float.
__attribute__((target("avx2,f16c"))) inline void dense(const f16* in, float* out, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(part));
  }
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
__attribute__((target("avx2,f16c"))) inline void dense(const float* in, f16* out, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i part = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), part);
  }
  for (; i < n; ++i) out[i] = from_float<f16>(in[i]);
}
#endif

/// n elements that lie at strides in bytes, at any addresses. Dense and aligned ones are a loop of
/// vectors.
template <class To, class From>
void convert(const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride,
             std::int64_t n) {
  const auto aligned = [](const void* p, std::size_t size) {
    return reinterpret_cast<std::uintptr_t>(p) % size == 0;
  };
  if (from_stride == sizeof(From) && to_stride == sizeof(To) && aligned(from, alignof(From)) &&
      aligned(to, alignof(To))) {
    if constexpr (std::is_same_v<To, From>) {
      std::memcpy(to, from, n * sizeof(To));
      return;
    }
    const From* const in = reinterpret_cast<const From*>(from);
    To* const out = reinterpret_cast<To*>(to);
#if defined(__x86_64__)
    if constexpr ((std::is_same_v<From, f16> && std::is_same_v<To, float>) ||
                  (std::is_same_v<From, float> && std::is_same_v<To, f16>)) {
      if (best_isa() != Isa::basic) return dense(in, out, n);
    }
#endif
    with_best_isa([=]() __attribute__((always_inline)) {
#pragma GCC ivdep
      for (std::int64_t i = 0; i < n; ++i) out[i] = converted<To>(in[i]);
    });
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) {
    From in;
    std::memcpy(&in, from + i * from_stride, sizeof in);
    const To out = converted<To>(in);
    std::memcpy(to + i * to_stride, &out, sizeof out);
  }
}

}  // namespace

template <class T>
void load_block(DType dtype, const char* from, std::int64_t stride, std::int64_t n, T* to) {
  char* const block = reinterpret_cast<char*>(to);
  dispatch_any(dtype, [&]<class S>() {
    if (stride != 0) return convert<T, S>(from, stride, block, sizeof(T), n);
    convert<T, S>(from, sizeof(S), block, sizeof(T), 1);
    for (std::int64_t i = 1; i < n; ++i) to[i] = to[0];
  });
}

template <class T>
void store_block(DType dtype, const T* from, std::int64_t n, char* to, std::int64_t stride) {
  dispatch_any(dtype, [&]<class S>() {
    convert<S, T>(reinterpret_cast<const char*>(from), sizeof(T), to, stride, n);
  });
}

#define FASTKERN_BLOCKS(T)                                                         \
  template void load_block<T>(DType, const char*, std::int64_t, std::int64_t, T*); \
  template void store_block<T>(DType, const T*, std::int64_t, char*, std::int64_t)
FASTKERN_BLOCKS(float);
FASTKERN_BLOCKS(double);
FASTKERN_BLOCKS(std::int64_t);
FASTKERN_BLOCKS(Complex<float>);
FASTKERN_BLOCKS(Complex<double>);
#undef FASTKERN_BLOCKS

}  // namespace fastkern::cpu
