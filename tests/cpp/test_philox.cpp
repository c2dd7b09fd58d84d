// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 against the known answers of Random123 (kat_vectors), and dropout on top of it.
#include "fastkern/philox.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>

namespace fastkern {
namespace {

using Words = std::array<std::uint32_t, 4>;

/// Counter words 0, 1 are the index, 2, 3 the offset; key words 0, 1 the seed. Low words first.
Words words_of(const Words& counter, const std::array<std::uint32_t, 2>& key) {
  const auto join = [](std::uint64_t low, std::uint64_t high) { return high << 32 | low; };
  const PhiloxWords found =
      philox(join(key[0], key[1]), join(counter[2], counter[3]), join(counter[0], counter[1]));
  return {found.word[0], found.word[1], found.word[2], found.word[3]};
}

TEST(Philox, KnownAnswers) {
  EXPECT_EQ(words_of({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(words_of({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(words_of({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, IsKnownAtCompileTime) {
  static_assert(philox(0, 0, 0).word[0] == 0x6627e8d5);
  static_assert(dropout_keeps(0, 0, 1, 0xe169c58d) && !dropout_keeps(0, 0, 1, 0xe169c58e));
}

TEST(Dropout, KeepsTheFractionThatIsAskedFor) {
  constexpr int n = 1 << 20;
  for (const double p : {0.0, 0.01, 0.1, 0.5, 0.9, 1.0}) {
    const std::uint32_t threshold = dropout_threshold(p);
    for (const std::uint64_t offset : {0ull, 1ull, 1ull << 40}) {
      int kept = 0;
      for (int e = 0; e < n; ++e) kept += dropout_keeps(1234, offset, e, threshold);
      const double deviation = std::sqrt(n * p * (1 - p));
      EXPECT_NEAR(kept, n * (1 - p), 5 * deviation + 1e-9) << "p " << p << ", offset " << offset;
    }
  }
}

TEST(Dropout, NeighboursSeedsAndOffsetsAreUnrelated) {
  constexpr int n = 1 << 18;
  const std::uint32_t threshold = dropout_threshold(0.5);
  const auto agreements = [&](auto&& other) {
    int count = 0;
    for (int e = 0; e < n; ++e) count += dropout_keeps(7, 9, e, threshold) == other(e);
    return count;
  };
  const double tolerance = 5 * std::sqrt(n * 0.25);
  for (const int step : {1, 2, 3, 4, 64, 4096}) {
    EXPECT_NEAR(agreements([&](int e) { return dropout_keeps(7, 9, e + step, threshold); }), n / 2,
                tolerance);
  }
  EXPECT_NEAR(agreements([&](int e) { return dropout_keeps(8, 9, e, threshold); }), n / 2,
              tolerance);
  EXPECT_NEAR(agreements([&](int e) { return dropout_keeps(7, 10, e, threshold); }), n / 2,
              tolerance);
}

TEST(Dropout, ThresholdAndScaleAtTheEnds) {
  EXPECT_EQ(dropout_threshold(0.0), 0u);
  EXPECT_EQ(dropout_threshold(0.5), 0x80000000u);
  EXPECT_EQ(dropout_threshold(1.0), 0xffffffffu);
  EXPECT_EQ(dropout_scale(0.0), 1.0f);
  EXPECT_EQ(dropout_scale(0.5), 2.0f);
  EXPECT_EQ(dropout_scale(1.0), 0.0f);
}

TEST(Dropout, HighHalvesOfSeedOffsetAndElementCount) {
  const std::uint32_t threshold = dropout_threshold(0.5);
  const auto differs = [&](auto&& a, auto&& b) {
    for (std::uint64_t e = 0; e < 64; ++e) {
      if (a(e) != b(e)) return true;
    }
    return false;
  };
  const auto keeps = [&](std::uint64_t seed, std::uint64_t offset, std::uint64_t first) {
    return [=](std::uint64_t e) { return dropout_keeps(seed, offset, first + e, threshold); };
  };
  EXPECT_TRUE(differs(keeps(1, 1, 0), keeps(1 | 1ull << 32, 1, 0)));
  EXPECT_TRUE(differs(keeps(1, 1, 0), keeps(1, 1 | 1ull << 32, 0)));
  EXPECT_TRUE(differs(keeps(1, 1, 0), keeps(1, 1, 1ull << 34)));
}

}  // namespace
}  // namespace fastkern
