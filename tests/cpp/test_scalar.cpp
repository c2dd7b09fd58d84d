// SPDX-License-Identifier: Apache-2.0
// Narrow numbers on the host, against the formats' definitions.
#include <limits>

#include "support.h"

namespace fastkern {
namespace {

constexpr std::uint32_t kSign = 0x8000;

std::uint32_t bits(float v) { return std::bit_cast<std::uint32_t>(v); }

/// Sign, exponent and fraction of a 16-bit format: its values by definition.
struct Format {
  int exponent_bits, fraction_bits;

  std::uint32_t infinity() const { return ((1u << exponent_bits) - 1) << fraction_bits; }
  bool is_nan(std::uint32_t code) const { return (code & 0x7fffu) > infinity(); }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }

  /// The magnitude of a code below `infinity()`; one exponent further up for `infinity()` itself.
  double magnitude(std::uint32_t code) const {
    const int exponent = static_cast<int>(code >> fraction_bits);
    const std::uint32_t fraction = code & ((1u << fraction_bits) - 1);
    if (exponent == 0) return std::ldexp(fraction, 1 - bias() - fraction_bits);
    return std::ldexp(fraction + (1u << fraction_bits), exponent - bias() - fraction_bits);
  }

  /// Round to nearest, ties to the even code, by looking the neighbours up.
  std::uint32_t round(float v) const {
    const std::uint32_t sign = std::signbit(v) ? kSign : 0u;
    const double target = std::abs(static_cast<double>(v));
    if (target >= magnitude(infinity())) return sign | infinity();
    std::uint32_t low = 0, high = infinity();
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (magnitude(middle) <= target ? low : high) = middle;
    }
    const double tie = (magnitude(low) + magnitude(high)) / 2;
    const bool up = target > tie || (target == tie && low % 2 == 1);
    return sign | (up ? high : low);
  }
};

constexpr Format kF16{5, 10}, kBf16{8, 7};

template <class T>
void expect_all_codes_widen(const Format& format) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const float widened = to_float(T{static_cast<std::uint16_t>(code)});
    ASSERT_EQ(std::signbit(widened), (code & kSign) != 0) << code;
    if (format.is_nan(code)) {
      ASSERT_TRUE(std::isnan(widened)) << code;
    } else if ((code & 0x7fffu) == format.infinity()) {
      ASSERT_TRUE(std::isinf(widened)) << code;
    } else {
      ASSERT_EQ(std::abs(widened), format.magnitude(code & 0x7fffu)) << code;
    }
  }
}

template <class T>
void expect_all_codes_round_trip(const Format& format) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const std::uint32_t back = from_float<T>(to_float(T{static_cast<std::uint16_t>(code)})).bits;
    if (format.is_nan(code)) {
      ASSERT_TRUE(format.is_nan(back)) << code;
      ASSERT_EQ(back & kSign, code & kSign) << code;
    } else {
      ASSERT_EQ(back, code);
    }
  }
}

template <class T>
void expect_rounds(const Format& format, float v) {
  ASSERT_EQ(from_float<T>(v).bits, format.round(v)) << std::hexfloat << v;
  ASSERT_EQ(from_float<T>(-v).bits, format.round(-v)) << std::hexfloat << -v;
}

/// Every tie between two neighbours, and the floats right beside it.
template <class T>
void expect_ties_round_to_even(const Format& format) {
  for (std::uint32_t code = 0; code < format.infinity(); ++code) {
    const double tie = (format.magnitude(code) + format.magnitude(code + 1)) / 2;
    const float v = static_cast<float>(tie);
    ASSERT_EQ(v, tie);
    expect_rounds<T>(format, v);
    expect_rounds<T>(format, std::nextafter(v, 0.0f));
    expect_rounds<T>(format, std::nextafter(v, std::numeric_limits<float>::infinity()));
  }
}

template <class T>
void expect_random_floats_round(const Format& format) {
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    const float v = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!std::isnan(v)) expect_rounds<T>(format, v);
  }
}

template <class T>
void expect_specials(const Format& format) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(from_float<T>(infinity).bits, format.infinity());
  EXPECT_EQ(from_float<T>(-infinity).bits, kSign | format.infinity());
  EXPECT_EQ(from_float<T>(std::numeric_limits<float>::max()).bits, format.infinity());
  EXPECT_EQ(from_float<T>(0.0f).bits, 0u);
  EXPECT_EQ(from_float<T>(-0.0f).bits, kSign);
  // A payload in the low bits alone must not be cut down to an infinity.
  for (const std::uint32_t nan : {0x7f800001u, 0x7fffffffu, 0x7fc00000u, 0x7f810000u}) {
    EXPECT_TRUE(format.is_nan(from_float<T>(std::bit_cast<float>(nan)).bits)) << nan;
    EXPECT_EQ(from_float<T>(std::bit_cast<float>(nan | 0x80000000u)).bits & kSign, kSign) << nan;
  }
}

TEST(Scalar, F16WidensToItsDefinition) { expect_all_codes_widen<f16>(kF16); }
TEST(Scalar, Bf16WidensToItsDefinition) { expect_all_codes_widen<bf16>(kBf16); }
TEST(Scalar, F16RoundTrips) { expect_all_codes_round_trip<f16>(kF16); }
TEST(Scalar, Bf16RoundTrips) { expect_all_codes_round_trip<bf16>(kBf16); }
TEST(Scalar, F16TiesGoToEven) { expect_ties_round_to_even<f16>(kF16); }
TEST(Scalar, Bf16TiesGoToEven) { expect_ties_round_to_even<bf16>(kBf16); }
TEST(Scalar, F16RoundsAnyFloat) { expect_random_floats_round<f16>(kF16); }
TEST(Scalar, Bf16RoundsAnyFloat) { expect_random_floats_round<bf16>(kBf16); }
TEST(Scalar, F16Specials) { expect_specials<f16>(kF16); }
TEST(Scalar, Bf16Specials) { expect_specials<bf16>(kBf16); }

TEST(Scalar, NanKeepsItsPayloadWhenWidened) {
  EXPECT_EQ(bits(to_float(f16{0x7e01})), 0x7fc02000u);
  EXPECT_EQ(bits(to_float(bf16{0x7fc1})), 0x7fc10000u);
}

TEST(Scalar, KnownCodes) {
  EXPECT_EQ(from_float<f16>(1.0f).bits, 0x3c00);
  EXPECT_EQ(from_float<f16>(65504.0f).bits, 0x7bff);
  EXPECT_EQ(from_float<f16>(65519.996f).bits, 0x7bff);
  EXPECT_EQ(from_float<f16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<f16>(0x1p-24f).bits, 0x0001);
  EXPECT_EQ(from_float<f16>(0x1p-25f).bits, 0x0000);
  EXPECT_EQ(from_float<f16>(0x1.000002p-25f).bits, 0x0001);
  EXPECT_EQ(from_float<f16>(std::numeric_limits<float>::denorm_min()).bits, 0x0000);
  EXPECT_EQ(from_float<bf16>(1.0f).bits, 0x3f80);
  EXPECT_EQ(from_float<bf16>(1.00390625f).bits, 0x3f80);
  EXPECT_EQ(from_float<bf16>(0x1p-133f).bits, 0x0001);
}

/// f8e4m3 by definition: like an IEEE format, but only the last code of a sign is special (NaN).
float f8_value(std::uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 0xfu);
  const int fraction = static_cast<int>(code & 7u);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(fraction + 8, exponent - 10);
  return static_cast<float>(code & 0x80u ? -magnitude : magnitude);
}

/// Nearest code, ties to even, saturating, by trying them all.
std::uint32_t f8_round(float v) {
  const std::uint32_t sign = std::signbit(v) ? 0x80u : 0u;
  std::uint32_t best = 0;
  double distance = std::numeric_limits<double>::infinity();
  for (std::uint32_t code = 0; code < 0x7f; ++code) {
    const double d = std::abs(std::min(std::abs(static_cast<double>(v)), 448.0) - f8_value(code));
    if (d < distance || (d == distance && code % 2 == 0)) best = code, distance = d;
  }
  return sign | best;
}

TEST(ScalarF8, AllCodesWidenAndRoundTrip) {
  EXPECT_EQ(f8_value(0x7e), 448.0f);
  for (std::uint32_t code = 0; code < 256; ++code) {
    const float widened = to_float(f8e4m3{static_cast<std::uint8_t>(code)});
    if ((code & 0x7fu) == 0x7f) {
      EXPECT_TRUE(std::isnan(widened));
    } else {
      EXPECT_EQ(bits(widened), bits(f8_value(code))) << code;
    }
    EXPECT_EQ(from_float<f8e4m3>(widened).bits, code);
  }
}

TEST(ScalarF8, TiesRoundToEven) {
  for (std::uint32_t code = 0; code < 0x7e; ++code) {
    const float tie = (f8_value(code) + f8_value(code + 1)) / 2;
    for (const float v : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e3f)}) {
      EXPECT_EQ(from_float<f8e4m3>(v).bits, f8_round(v)) << std::hexfloat << v;
      EXPECT_EQ(from_float<f8e4m3>(-v).bits, f8_round(-v)) << std::hexfloat << -v;
    }
  }
}

TEST(ScalarF8, RandomFloatsRound) {
  std::mt19937 random(1);
  std::uniform_int_distribution<std::uint32_t> around(bits(0x1p-13f), bits(0x1p10f));
  for (int i = 0; i < 100'000; ++i) {
    const std::uint32_t u = i % 4 ? around(random) : static_cast<std::uint32_t>(random());
    const float v = std::bit_cast<float>(u);
    if (std::isnan(v)) continue;
    ASSERT_EQ(from_float<f8e4m3>(v).bits, f8_round(v)) << std::hexfloat << v;
    ASSERT_EQ(from_float<f8e4m3>(-v).bits, f8_round(-v)) << std::hexfloat << -v;
  }
}

TEST(ScalarF8, SaturatesAndKeepsNan) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float v : {448.0f, 463.9f, 464.0f, 465.0f, 1e30f, infinity}) {
    EXPECT_EQ(from_float<f8e4m3>(v).bits, 0x7e) << v;
    EXPECT_EQ(from_float<f8e4m3>(-v).bits, 0xfe) << v;
  }
  EXPECT_EQ(from_float<f8e4m3>(std::bit_cast<float>(0x7fc00000u)).bits, 0x7f);
  EXPECT_EQ(from_float<f8e4m3>(std::bit_cast<float>(0xff800001u)).bits, 0xff);
  EXPECT_EQ(from_float<f8e4m3>(std::numeric_limits<float>::denorm_min()).bits, 0x00);
  EXPECT_EQ(from_float<f8e4m3>(-0.0f).bits, 0x80);
}

TEST(ScalarI8, RoundsToEvenAndSaturates) {
  for (int i = -300 * 256; i <= 300 * 256; ++i) {
    const float v = static_cast<float>(i) / 256.0f;
    ASSERT_EQ(from_float<i8>(v), std::clamp(std::nearbyint(v), -127.0f, 127.0f)) << v;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(from_float<i8>(infinity), 127);
  EXPECT_EQ(from_float<i8>(-infinity), -127);
  EXPECT_EQ(from_float<i8>(1e30f), 127);
  EXPECT_EQ(from_float<i8>(std::nextafter(0.5f, 1.0f)), 1);
  EXPECT_EQ(from_float<i8>(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(from_float<i8>(std::nanf("")), 0);
  EXPECT_EQ(from_float<i8>(-std::nanf("")), 0);
  for (int i = -128; i < 128; ++i) EXPECT_EQ(to_float(static_cast<i8>(i)), i);
}

TEST(Scalar, NoArithmeticOnQuantisedTypes) {
  for (const DType dtype : {DType::f8e4m3, DType::i8}) {
    EXPECT_TRUE(
        test::contains(test::error_of([&] { dispatch(dtype, []<class T>() {}); }), name_of(dtype)));
  }
}

TEST(Scalar, F32IsLeftAlone) {
  EXPECT_EQ(bits(from_float<float>(-0.1f)), bits(-0.1f));
  EXPECT_EQ(bits(to_float(0.1f)), bits(0.1f));
}

TEST(Scalar, DispatchPicksTheStorageType) {
  for (const DType dtype : test::kDTypes) {
    std::size_t size = 0;
    bool is_f16 = false;
    dispatch(dtype, [&]<class T>() {
      size = sizeof(T);
      is_f16 = std::is_same_v<T, f16>;
    });
    EXPECT_EQ(size, static_cast<std::size_t>(size_of(dtype)));
    EXPECT_EQ(is_f16, dtype == DType::f16);
  }
}

}  // namespace
}  // namespace fastkern
