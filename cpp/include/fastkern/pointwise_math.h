// SPDX-License-Identifier: Apache-2.0
// What the formulas of pointwise_ops.h are made of, and the formulas as functors. The same source
// is compiled for the CPU, where f32 functions are written so that loops over them become vectors
// (no calls, no branches), and for the device, where CUDA's own functions serve.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "fastkern/pointwise_ops.h"

#if defined(__CUDACC__)
#define FASTKERN_HD __host__ __device__ __forceinline__
#else
#define FASTKERN_HD __attribute__((always_inline)) inline
#endif

namespace fastkern {

template <class R>
struct Complex {
  R re, im;
  Complex() = default;
  FASTKERN_HD constexpr Complex(R real, R imag = R(0)) : re(real), im(imag) {}
};
template <class R>
FASTKERN_HD Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class R>
FASTKERN_HD Complex<R> operator-(Complex<R> a, Complex<R> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class R>
FASTKERN_HD Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class R>
FASTKERN_HD bool operator==(Complex<R> a, Complex<R> b) {
  return a.re == b.re && a.im == b.im;
}

namespace math {

// ---- sums, products and powers: integers wrap around -------------------------------------------

using Wrapping = std::uint64_t;

template <class T>
FASTKERN_HD T add(T a, T b) {
  return a + b;
}
FASTKERN_HD std::int64_t add(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<Wrapping>(a) + static_cast<Wrapping>(b));
}
template <class T>
FASTKERN_HD T sub(T a, T b) {
  return a - b;
}
FASTKERN_HD std::int64_t sub(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<Wrapping>(a) - static_cast<Wrapping>(b));
}
template <class T>
FASTKERN_HD T mul(T a, T b) {
  return a * b;
}
FASTKERN_HD std::int64_t mul(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<Wrapping>(a) * static_cast<Wrapping>(b));
}
template <class T>
FASTKERN_HD T neg(T a) {
  return -a;
}
FASTKERN_HD std::int64_t neg(std::int64_t a) { return sub(std::int64_t{0}, a); }
template <class R>
FASTKERN_HD Complex<R> neg(Complex<R> a) {
  return {-a.re, -a.im};
}

template <class T>
FASTKERN_HD bool truth(T a) {
  return a != T(0);
}
template <class R>
FASTKERN_HD bool truth(Complex<R> a) {
  return (a.re != R(0)) | (a.im != R(0));
}

template <class T>
FASTKERN_HD bool isnan(T a) {
  return a != a;
}
template <class T>
FASTKERN_HD bool isinf(T a) {
  return (a < T(0) ? -a : a) == std::numeric_limits<T>::infinity();
}

/// A NaN of either is the result.
template <class T>
FASTKERN_HD T max(T a, T b) {
  const T larger = a > b ? a : b;
  return a != a ? a : larger;
}
template <class T>
FASTKERN_HD T min(T a, T b) {
  const T smaller = a < b ? a : b;
  return a != a ? a : smaller;
}

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float max(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}
__device__ __forceinline__ float min(float a, float b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
}
#endif

FASTKERN_HD float abs(float a) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) & 0x7fffffffu);
}
FASTKERN_HD double abs(double a) {
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(a) & 0x7fffffffffffffffull);
}
FASTKERN_HD std::int64_t abs(std::int64_t a) { return a < 0 ? neg(a) : a; }

// ---- functions of the library at hand
// ------------------------------------------------------------

#if defined(__CUDA_ARCH__)
#define FASTKERN_MATH(name, of_float, of_double)                         \
  __device__ __forceinline__ float name(float a) { return of_float(a); } \
  __device__ __forceinline__ double name(double a) { return of_double(a); }
FASTKERN_MATH(sqrt, ::sqrtf, ::sqrt)
FASTKERN_MATH(rsqrt, ::rsqrtf, ::rsqrt)
FASTKERN_MATH(exp, ::expf, ::exp)
FASTKERN_MATH(sin, ::sinf, ::sin)
FASTKERN_MATH(cos, ::cosf, ::cos)
FASTKERN_MATH(tanh, ::tanhf, ::tanh)
FASTKERN_MATH(erf, ::erff, ::erf)
FASTKERN_MATH(floor, ::floorf, ::floor)
FASTKERN_MATH(trunc, ::truncf, ::trunc)
#undef FASTKERN_MATH
__device__ __forceinline__ float fmod(float a, float b) { return ::fmodf(a, b); }
__device__ __forceinline__ double fmod(double a, double b) { return ::fmod(a, b); }
__device__ __forceinline__ float pow(float a, float b) { return ::powf(a, b); }
__device__ __forceinline__ double pow(double a, double b) { return ::pow(a, b); }
#else

FASTKERN_HD float sqrt(float a) { return std::sqrt(a); }
FASTKERN_HD float rsqrt(float a) { return 1.0f / std::sqrt(a); }
FASTKERN_HD float floor(float a) { return std::floor(a); }
FASTKERN_HD float trunc(float a) { return std::trunc(a); }
FASTKERN_HD float fmod(float a, float b) { return std::fmod(a, b); }
FASTKERN_HD double sqrt(double a) { return std::sqrt(a); }
FASTKERN_HD double rsqrt(double a) { return 1.0 / std::sqrt(a); }
FASTKERN_HD double exp(double a) { return std::exp(a); }
FASTKERN_HD double sin(double a) { return std::sin(a); }
FASTKERN_HD double cos(double a) { return std::cos(a); }
FASTKERN_HD double tanh(double a) { return std::tanh(a); }
FASTKERN_HD double erf(double a) { return std::erf(a); }
FASTKERN_HD double floor(double a) { return std::floor(a); }
FASTKERN_HD double trunc(double a) { return std::trunc(a); }
FASTKERN_HD double fmod(double a, double b) { return std::fmod(a, b); }
FASTKERN_HD double pow(double a, double b) { return std::pow(a, b); }

/// exp within an ulp: 2^n * exp(v - n ln 2), n = round(v / ln 2). The power is taken in two halves,
/// for results that are denormal and those beyond 2^127.
FASTKERN_HD float exp(float v) {
  constexpr float kOnes = 0x1.8p23f;  // the last bit of a sum with it is worth 1
  const float low = v < -105.0f ? -105.0f : v, x = low > 90.0f ? 90.0f : low;
  const float shifted = x * 1.44269504f + kOnes, n = shifted - kOnes;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const std::int32_t power = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(shifted)) -
                             static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(kOnes));
  const std::int32_t half = power >> 1;
  const float one = std::bit_cast<float>(static_cast<std::uint32_t>(half + 127) << 23);
  const float two = std::bit_cast<float>(static_cast<std::uint32_t>(power - half + 127) << 23);
  return (p * r * r + r + 1.0f) * one * two;
}

/// 2^q for q from -126 to 126: a power of two and 2^r, |r| <= 1/2.
FASTKERN_HD float exp2_within(float q) {
  constexpr float kOnes = 0x1.8p23f;
  const float shifted = q + kOnes, r = q - (shifted - kOnes);
  float t = 1.5403530e-4f;
  t = t * r + 1.3333558e-3f;
  t = t * r + 9.6181291e-3f;
  t = t * r + 5.5504109e-2f;
  t = t * r + 2.4022651e-1f;
  t = t * r + 6.9314718e-1f;
  t = t * r + 1.0f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  return t * std::bit_cast<float>(power);
}

/// tanh to two ulps: a polynomial around 0, where 1 - 2 / (exp(2 v) + 1) cancels.
FASTKERN_HD float tanh(float v) {
  const float a = abs(v), z = v * v;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * v + v;
  const float large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  const float near = a == 0.0f ? v : small;  // -0 stays -0
  return a < 0.625f ? near : v < 0.0f ? -large : large;
}

/// erf to two ulps: v and v times a polynomial of v^2 up to 1, then 1 - 2^p(v).
FASTKERN_HD float erf(float v) {
  const float a = abs(v), z = v * v;
  float p = 7.889119e-05f;
  p = p * z - 8.020841e-04f;
  p = p * z + 5.189535e-03f;
  p = p * z - 2.6854444e-02f;
  p = p * z + 1.12836e-01f;
  p = p * z - 3.7612626e-01f;
  p = p * z + 1.283791e-01f;
  const float x = a > 4.0f ? 4.0f : a;
  float q = 2.8124874e-04f;
  q = q * x - 4.376693e-03f;
  q = q * x + 3.201308e-02f;
  q = q * x - 1.4983308e-01f;
  q = q * x - 9.193801e-01f;
  q = q * x - 1.6268225f;
  q = q * x - 2.9865012e-04f;
  const float large = 1.0f - exp2_within(q);
  return a < 1.0f ? p * v + v : v < 0.0f ? -large : large;
}

/// The share of the normal distribution below x, (1 + erf(x / sqrt(2))) / 2: on the left half of
/// erfc(a) = 2^(a p(a)), which loses nothing to a difference with 1; 0 beyond -5.6, where it is
/// less than 1e-8.
FASTKERN_HD float normal_cdf(float x) {
  const float size = abs(x) * 0.707106781f, a = size > 4.0f ? 4.0f : size;
  float q = 2.83276692e-06f;
  q = q * a - 5.11359879e-05f;
  q = q * a + 3.62727417e-04f;
  q = q * a - 1.05173747e-03f;
  q = q * a - 1.65839302e-03f;
  q = q * a + 2.91236128e-02f;
  q = q * a - 1.48903085e-01f;
  q = q * a - 9.18326395e-01f;
  q = q * a - 1.62791465f;
  const float tail = 0.5f * exp2_within(q * a);
  const float left = size > 4.0f ? 0.0f : tail;
  return x < 0.0f ? left : x != x ? x : 1.0f - left;
}
FASTKERN_HD float gelu(float x) { return x * normal_cdf(x); }
FASTKERN_HD float gelu_grad(float x) {
  return normal_cdf(x) + x * (0.398942280f * exp(-0.5f * x * x));
}

/// Arguments up to this are reduced by sin_within and cos_within.
inline constexpr float kPeriods = 1e6f;

/// sin(v + kQuarters * pi / 2) within an ulp, for |v| <= kPeriods: the nearest multiple of pi / 2
/// is subtracted in f64, in two parts of which the first is a product without rounding.
template <int kQuarters>
FASTKERN_HD float sin_within(float v) {
  constexpr double kOnes = 0x1.8p52;
  const double shifted = static_cast<double>(v) * 0x1.45f306dc9c883p-1 + kOnes;
  const double n = shifted - kOnes;
  const double rest = (static_cast<double>(v) - n * 0x1.921fb544p+0) - n * 0x1.0b4611a626331p-34;
  const std::uint32_t quarter =
      static_cast<std::uint32_t>(std::bit_cast<std::uint64_t>(shifted)) + kQuarters;
  // The small terms in f32, the large one in f64.
  const float r = static_cast<float>(rest), z = r * r;
  float s = 2.7249695904174587e-06f;
  s = s * z - 0.00019840085587929934f;
  s = s * z + 0.008333331905305386f;
  s = s * z - 0.1666666716337204f;
  float c = -2.7300760052639816e-07f;
  c = c * z + 2.4800598112051375e-05f;
  c = c * z - 0.00138888880610466f;
  c = c * z + 0.0416666679084301f;
  const double sine = rest + static_cast<double>(s * z * r);
  const double cosine = (1.0 - 0.5 * rest * rest) + static_cast<double>(c * z * z);
  const float value = static_cast<float>(quarter & 1u ? cosine : sine);
  const float turned =
      std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) ^ (quarter & 2u) << 30);
  return kQuarters == 0 && v == 0.0f ? v : turned;  // -0 stays -0
}
FASTKERN_HD float sin(float v) { return abs(v) <= kPeriods ? sin_within<0>(v) : std::sin(v); }
FASTKERN_HD float cos(float v) { return abs(v) <= kPeriods ? sin_within<1>(v) : std::cos(v); }

/// |a|^b = 2^(b log2 |a|) in f64, and the sign of a if b is odd.
FASTKERN_HD float pow(float a, float b) {
  constexpr double kOnes = 0x1.8p52, kInfinity = std::numeric_limits<double>::infinity();
  const double x = abs(a), y = b;
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
  // x = 2^e * m, m from sqrt(1/2) to sqrt(2)
  const std::uint64_t above = (bits - 0x3fe6a09e667f3bcdull) & 0xfff0000000000000ull;
  const double m = std::bit_cast<double>(bits - above);
  // The exponent as a double, without a conversion of 64-bit integers.
  const double e =
      std::bit_cast<double>((((above >> 52) + 2048u) & 0xfffu) | 0x4330000000000000ull) -
      (0x1p52 + 2048.0);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double q = 0.31371624731480535;
  q = q * z + 0.3176522718335608;
  q = q * z + 0.41226673119251744;
  q = q * z + 0.57707734769072;
  q = q * z + 0.9617966962335545;
  q = q * z + 2.8853900817767486;
  double log = e + s * q;
  log = x == 0.0 ? -kInfinity : log;
  log = x == kInfinity ? kInfinity : log;
  log = x != x ? x : log;
  double t = y * log;
  t = t < -200.0 ? -200.0 : t;
  t = t > 200.0 ? 200.0 : t;
  const double shifted = t + kOnes, n = shifted - kOnes, r = t - n;
  double p = 1.5201918214194853e-05;
  p = p * r + 0.00015469291153506534;
  p = p * r + 0.0013333922578394326;
  p = p * r + 0.009618027253544452;
  p = p * r + 0.055504103534311615;
  p = p * r + 0.24022651198160233;
  p = p * r + 0.6931471807284492;
  p = p * r + 0.9999999999616812;
  const double power = std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023u) << 52);
  float result = static_cast<float>(p * power);
  // Conditions in f32 alone: one that mixed the two would keep the loop from becoming vectors.
  constexpr float kBeyond = std::numeric_limits<float>::infinity();
  const float size = abs(a), half = 0.5f * b;
  const float lost = abs(b - std::trunc(b)), odd = abs(half - std::trunc(half));
  result =
      a < 0.0f && size < kBeyond && lost > 0.0f ? std::numeric_limits<float>::quiet_NaN() : result;
  const float signed_result = std::bit_cast<float>(std::bit_cast<std::uint32_t>(result) ^
                                                   (std::bit_cast<std::uint32_t>(a) & 0x80000000u));
  result = lost == 0.0f && odd > 0.0f ? signed_result : result;
  result = size == 1.0f && abs(b) == kBeyond ? 1.0f : result;
  return (a == 1.0f) | (b == 0.0f) ? 1.0f : result;
}
#endif

/// |a|, without a square that overflows.
template <class R>
FASTKERN_HD Complex<R> abs(Complex<R> a) {
  const R x = abs(a.re), y = abs(a.im);
  const R large = x > y ? x : y, small = x > y ? y : x;
  const R ratio = large > R(0) ? small / large : R(0);
  const R size = large * math::sqrt(R(1) + ratio * ratio);
  const R infinity = std::numeric_limits<R>::infinity();
  return Complex<R>((x == infinity) | (y == infinity) ? infinity : size);
}

FASTKERN_HD std::int64_t pow(std::int64_t a, std::int64_t b) {
  if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 != 0 ? -1 : 1) : 0;
  std::int64_t result = 1;
  for (; b != 0; b >>= 1, a = mul(a, a)) {
    if (b & 1) result = mul(result, a);
  }
  return result;
}

// ---- divisions
// -----------------------------------------------------------------------------------

template <class T>
FASTKERN_HD T div_trunc(T a, T b) {
  return math::trunc(a / b);
}
/// The quotient of integers, cut off; 0 for a division by zero, which nobody may count on.
FASTKERN_HD std::int64_t div_trunc(std::int64_t a, std::int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);
  // A division of 32 bits takes a fraction of the time.
  if (static_cast<std::int32_t>(a) == a && static_cast<std::int32_t>(b) == b) {
    return static_cast<std::int32_t>(a) / static_cast<std::int32_t>(b);
  }
  return a / b;
}

/// floor(a / b) of the exact quotient: a less its remainder is a multiple of b.
template <class T>
FASTKERN_HD T div_floor(T a, T b) {
  if (b == T(0)) return a / b;
  const T rest = math::fmod(a, b);
  T quotient = (a - rest) / b;
  if (rest != T(0) && (b < T(0)) != (rest < T(0))) quotient -= T(1);
  if (quotient == T(0))
    return (a / b < T(0)) | ((a == T(0)) & (T(1) / (a / b) < T(0))) ? -T(0) : T(0);
  const T whole = math::floor(quotient);
  return quotient - whole > T(0.5) ? whole + T(1) : whole;
}
FASTKERN_HD std::int64_t div_floor(std::int64_t a, std::int64_t b) {
  const std::int64_t quotient = div_trunc(a, b), rest = sub(a, mul(quotient, b));
  return quotient - ((rest != 0) & ((rest < 0) != (b < 0)) & (b != 0));
}

// ---- activations
// ---------------------------------------------------------------------------------

template <class T>
FASTKERN_HD T sigmoid(T x) {
  return T(1) / (T(1) + math::exp(-x));
}
template <class T>
FASTKERN_HD T silu_grad(T x) {
  const T s = math::sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}
template <class T>
FASTKERN_HD T gelu(T x) {
  return T(0.5) * x * (T(1) + math::erf(x * T(0.70710678118654752440)));
}
template <class T>
FASTKERN_HD T gelu_grad(T x) {
  // No sum of two products: which one a compiler fuses with the sum differs from loop to loop.
  const T cdf = T(0.5) + T(0.5) * math::erf(x * T(0.70710678118654752440));
  return cdf + x * (T(0.39894228040143267794) * math::exp(T(-0.5) * x * x));
}
/// tanh(sqrt(2 / pi) * (x + 0.044715 x^3))
template <class T>
FASTKERN_HD T gelu_inner(T x) {
  return math::tanh(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x));
}
template <class T>
FASTKERN_HD T gelu_tanh(T x) {
  return T(0.5) * x * (T(1) + math::gelu_inner(x));
}
template <class T>
FASTKERN_HD T gelu_tanh_grad(T x) {
  const T t = math::gelu_inner(x);
  const T slope = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * x * x);
  return (T(0.5) + T(0.5) * t) + T(0.5) * x * (T(1) - t * t) * slope;
}

}  // namespace math

// ---- the formulas
// --------------------------------------------------------------------------------

/// The run-time scalars of a call, in the formula s(0) and s(1).
template <class T>
struct Scalars {
  T value[2];
  FASTKERN_HD T operator()(int i) const { return value[i]; }
};

/// A result as T; a comparison's in a form that becomes a vector.
template <class T, class R>
FASTKERN_HD T as(R v) {
  if constexpr (std::is_same_v<R, bool>) {
    return v ? T(1) : T(0);
  } else {
    return v;
  }
}

/// functor::name: the formula of a line of the table, for any compute type. Results of a comparison
/// are 0 or 1.
namespace functor {
#define FASTKERN_FUNCTOR(name, inputs, promotion, types, ...)                                    \
  struct name {                                                                                  \
    static constexpr int kInputs = inputs;                                                       \
    static constexpr unsigned kTypes = types;                                                    \
    static constexpr bool kTruth = Promotion::promotion == Promotion::always_bool;               \
    template <class T>                                                                           \
    static FASTKERN_HD T apply([[maybe_unused]] T a, [[maybe_unused]] T b, [[maybe_unused]] T c, \
                               [[maybe_unused]] const Scalars<T>& s) {                           \
      return as<T>(__VA_ARGS__);                                                                 \
    }                                                                                            \
  };
FASTKERN_POINTWISE_OPS(FASTKERN_FUNCTOR)
#undef FASTKERN_FUNCTOR
}  // namespace functor

}  // namespace fastkern
