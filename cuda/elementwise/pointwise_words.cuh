// SPDX-License-Identifier: Apache-2.0
// Elements of any type in 32-bit words, as memory has them, and their way to the compute type and
// back, within the same registers: N elements of T take the words that they will need as T from the
// start. The type of memory is known at run time only; a switch takes care of all groups of a
// thread at once, and all threads take the same branch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../ptx/memory.cuh"
#include "fastkern/core.h"
#include "fastkern/pointwise_layout.h"
#include "fastkern/pointwise_math.h"

namespace fastkern::pointwise_detail {

template <class T>
inline constexpr bool kIsComplex = false;
template <class R>
inline constexpr bool kIsComplex<Complex<R>> = true;

/// A byte that is 0 or not.
struct Bool {
  std::uint8_t byte;
};

template <class T, int N>
inline constexpr int kWords = N * static_cast<int>(sizeof(T)) / 4;
/// Words of N elements of T.
template <class T, int N>
struct Words {
  std::uint32_t w[kWords<T, N>];
};

/// std::bit_cast for __half2 as well.
template <class To, class From>
__device__ __forceinline__ To cast(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

template <class S, class W>
__device__ __forceinline__ S element(const W& words, int n) {
  if constexpr (sizeof(S) == 1) {
    return cast<S>(static_cast<std::uint8_t>(words.w[n / 4] >> (8 * (n % 4))));
  } else if constexpr (sizeof(S) == 2) {
    return cast<S>(static_cast<std::uint16_t>(words.w[n / 2] >> (16 * (n % 2))));
  } else if constexpr (sizeof(S) == 4) {
    return cast<S>(words.w[n]);
  } else if constexpr (kIsComplex<S>) {
    using R = decltype(S::re);
    return S(element<R>(words, 2 * n), element<R>(words, 2 * n + 1));
  } else {
    return cast<S>(static_cast<std::uint64_t>(words.w[2 * n + 1]) << 32 | words.w[2 * n]);
  }
}

template <class T, class W>
__device__ __forceinline__ void put(W& words, int n, T v) {
  if constexpr (sizeof(T) == 4) {
    words.w[n] = cast<std::uint32_t>(v);
  } else if constexpr (kIsComplex<T>) {
    put(words, 2 * n, v.re);
    put(words, 2 * n + 1, v.im);
  } else {
    const auto bits = std::bit_cast<std::uint64_t>(v);
    words.w[2 * n] = static_cast<std::uint32_t>(bits);
    words.w[2 * n + 1] = static_cast<std::uint32_t>(bits >> 32);
  }
}

/// A real number of the language.
__device__ __forceinline__ float plain(__half v) { return __half2float(v); }
__device__ __forceinline__ float plain(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ int plain(Bool v) { return v.byte != 0; }
template <class S>
__device__ __forceinline__ S plain(S v) {
  return v;
}

template <class T, class S>
__device__ __forceinline__ T to_compute(S v) {
  if constexpr (std::is_same_v<T, S>) {
    return v;
  } else if constexpr (kIsComplex<T>) {
    using R = decltype(T::re);
    if constexpr (kIsComplex<S>) {
      return T(static_cast<R>(v.re), static_cast<R>(v.im));
    } else {
      return T(static_cast<R>(plain(v)));
    }
  } else {
    return static_cast<T>(plain(v));
  }
}

/// Element n as T. Of bf16 both halves of a word are one instruction away from f32, which nvcc does
/// not see where they come as 16 bits.
template <class T, class S, class W>
__device__ __forceinline__ T element_as(const W& words, int n) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, __nv_bfloat16>) {
    const std::uint32_t word = words.w[n / 2];
    return __uint_as_float(n % 2 ? word & 0xffff0000u : word << 16);
  } else {
    return to_compute<T>(element<S>(words, n));
  }
}

template <class S, class T>
__device__ __forceinline__ S to_stored(T v) {
  if constexpr (std::is_same_v<S, T>) {
    return v;
  } else if constexpr (std::is_same_v<S, Bool>) {
    return {static_cast<std::uint8_t>(math::truth(v))};
  } else if constexpr (kIsComplex<S>) {
    using R = decltype(S::re);
    if constexpr (kIsComplex<T>) {
      return S(static_cast<R>(v.re), static_cast<R>(v.im));
    } else {
      return S(static_cast<R>(v));
    }
  } else if constexpr (kIsComplex<T>) {
    return to_stored<S>(v.re);
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else if constexpr (std::is_integral_v<S> && std::is_floating_point_v<T>) {
    return static_cast<S>(static_cast<std::int64_t>(v));
  } else {
    return static_cast<S>(v);
  }
}

/// Types that groups of T have in memory.
template <class T>
struct GroupTypes;
template <>
struct GroupTypes<float> {
  static constexpr std::uint32_t kIn =
      types_of(DType::f32, DType::f16, DType::bf16, DType::boolean, DType::u8);
  static constexpr std::uint32_t kOut =
      types_of(DType::f32, DType::f16, DType::bf16, DType::boolean);
};
template <>
struct GroupTypes<double> {
  static constexpr std::uint32_t kIn = types_of(DType::f64, DType::f32, DType::boolean);
  static constexpr std::uint32_t kOut = types_of(DType::f64, DType::f32, DType::boolean);
};
template <>
struct GroupTypes<std::int64_t> {
  static constexpr std::uint32_t kIn = types_of(DType::i64, DType::i32, DType::boolean, DType::u8);
  static constexpr std::uint32_t kOut =
      types_of(DType::i64, DType::i32, DType::boolean, DType::u8, DType::f32);
};
template <>
struct GroupTypes<Complex<float>> {
  static constexpr std::uint32_t kIn = types_of(DType::c64, DType::boolean);
  static constexpr std::uint32_t kOut = types_of(DType::c64, DType::f32, DType::boolean);
};
template <>
struct GroupTypes<Complex<double>> {  // an element is a pack
  static constexpr std::uint32_t kIn = 0, kOut = 0;
};

/// Types that single elements have: complex numbers come from all, integers from integers.
inline constexpr std::uint32_t kIntegers =
    types_of(DType::i8, DType::u8, DType::i16, DType::i32, DType::i64, DType::boolean);
inline constexpr std::uint32_t kReals =
    kIntegers | types_of(DType::f32, DType::f16, DType::bf16, DType::f64);
template <class T>
inline constexpr std::uint32_t kWritable =
    kIsComplex<T> ? kReals | types_of(DType::c64, DType::c128) : kReals;
template <class T>
inline constexpr std::uint32_t kReadable =
    std::is_same_v<T, std::int64_t> ? kIntegers : kWritable<T>;

/// f(S{}) for the type S of memory, one of `kTypes`.
template <std::uint32_t kTypes, class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  switch (dtype) {
#define FASTKERN_STORED(name, type)                                 \
  case DType::name:                                                 \
    if constexpr ((kTypes & types_of(DType::name)) != 0) f(type{}); \
    break;
    FASTKERN_STORED(f32, float)
    FASTKERN_STORED(f16, __half)
    FASTKERN_STORED(bf16, __nv_bfloat16)
    FASTKERN_STORED(f64, double)
    FASTKERN_STORED(i8, std::int8_t)
    FASTKERN_STORED(u8, std::uint8_t)
    FASTKERN_STORED(i16, std::int16_t)
    FASTKERN_STORED(i32, std::int32_t)
    FASTKERN_STORED(i64, std::int64_t)
    FASTKERN_STORED(boolean, Bool)
    FASTKERN_STORED(c64, Complex<float>)
    FASTKERN_STORED(c128, Complex<double>)
#undef FASTKERN_STORED
    default:
      break;
  }
}

/// Words of N elements of S become those of N elements of T.
template <class S, class T, int N>
__device__ __forceinline__ void widen(Words<T, N>& words) {
  T v[N];
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = element_as<T, S>(words, n);
#pragma unroll
  for (int n = 0; n < N; ++n) put(words, n, v[n]);
}

/// The other way: the first N * sizeof(S) bytes become elements of S, none wider than T.
template <class S, class T, int N>
__device__ __forceinline__ void narrow(Words<T, N>& words) {
  if constexpr (std::is_same_v<T, float> && N % 2 == 0 &&
                (std::is_same_v<S, __half> || std::is_same_v<S, __nv_bfloat16>)) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {  // two conversions are one instruction
      const float low = element<float>(words, n), high = element<float>(words, n + 1);
      if constexpr (std::is_same_v<S, __half>) {
        words.w[n / 2] = cast<std::uint32_t>(__floats2half2_rn(low, high));
      } else {
        words.w[n / 2] = cast<std::uint32_t>(__floats2bfloat162_rn(low, high));
      }
    }
  } else {
    S v[N];
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = to_stored<S>(element<T>(words, n));
    if constexpr (sizeof(S) >= 4) {
#pragma unroll
      for (int n = 0; n < N; ++n) put(words, n, v[n]);
    } else {
      using Bits = std::conditional_t<sizeof(S) == 1, std::uint8_t, std::uint16_t>;
      constexpr int kPerWord = 4 / sizeof(S);
#pragma unroll
      for (int first = 0; first < N; first += kPerWord) {
        std::uint32_t word = 0;
#pragma unroll
        for (int k = 0; k < kPerWord && first + k < N; ++k)
          word |= static_cast<std::uint32_t>(cast<Bits>(v[first + k])) << (8 * sizeof(S) * k);
        words.w[first / kPerWord] = word;
      }
    }
  }
}

/// kBytes, 1 to 16, from an address that is a multiple of them.
template <int kBytes, class W>
__device__ __forceinline__ void load_pack(const char* p, W& words) {
  if constexpr (kBytes == 16) {
    const uint4 v = ptx::ld_global(p);
    words.w[0] = v.x, words.w[1] = v.y, words.w[2] = v.z, words.w[3] = v.w;
  } else if constexpr (kBytes == 8) {
    const uint2 v = ptx::ld_global_8(p);
    words.w[0] = v.x, words.w[1] = v.y;
  } else if constexpr (kBytes == 4) {
    words.w[0] = ptx::ld_global_4(p);
  } else if constexpr (kBytes == 2) {
    words.w[0] = ptx::ld_global_2(p);
  } else {
    words.w[0] = ptx::ld_global_1(p);
  }
}
template <int kBytes, class W>
__device__ __forceinline__ void store_pack(char* p, const W& words) {
  if constexpr (kBytes == 16) {
    ptx::st_global(p, {words.w[0], words.w[1], words.w[2], words.w[3]});
  } else if constexpr (kBytes == 8) {
    ptx::st_global_8(p, {words.w[0], words.w[1]});
  } else if constexpr (kBytes == 4) {
    ptx::st_global_4(p, words.w[0]);
  } else if constexpr (kBytes == 2) {
    ptx::st_global_2(p, words.w[0]);
  } else {
    ptx::st_global_1(p, words.w[0]);
  }
}

__device__ __forceinline__ std::uint32_t divide(std::uint32_t n, const Divider& by) {
  return (__umulhi(n, by.multiplier) + n) >> by.shift;
}

/// The element of 1, 2 or 4 bytes at p in the low bits of a word, of which the others are anything.
/// Loads the aligned word around it: one instruction for every size.
__device__ __forceinline__ std::uint32_t load_word(const char* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  const auto off = static_cast<std::uint32_t>(address & 3);
  return ptx::ld_global_4(p - off) >> (8 * off);
}

}  // namespace fastkern::pointwise_detail
