// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
// 2011), the same bits on the CPU and the GPU, and dropout on top of it.
#pragma once

#include <cstdint>

namespace fastkern {

struct PhiloxWords {
  std::uint32_t word[4];
};

/// Four random words: a function of its arguments and of nothing else.
constexpr PhiloxWords philox(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index),
                c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(offset),
                c3 = static_cast<std::uint32_t>(offset >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53u} * c0, b = std::uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(b);
    c3 = static_cast<std::uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

/// Element e of a tensor is dropped if word e % 4 of philox(seed, offset, e / 4) is below this.
constexpr std::uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled >= 4294967295.0 ? 0xffffffffu : static_cast<std::uint32_t>(scaled);
}

/// What kept elements are multiplied with; 0 for p = 1, which keeps nothing.
constexpr float dropout_scale(double p) {
  return p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
}

/// Whether element e is kept. Where four neighbours are at hand, one philox() serves them all.
constexpr bool dropout_keeps(std::uint64_t seed, std::uint64_t offset, std::uint64_t e,
                             std::uint32_t threshold) {
  return philox(seed, offset, e / 4).word[e % 4] >= threshold;
}

}  // namespace fastkern
