// SPDX-License-Identifier: Apache-2.0
// Optimizer states of 8 bits: blocks of 256 elements, in the order of memory, with one float32
// scale each, the largest magnitude of the block (dynamic quantisation: Dettmers et al., 2022).
//
// A code stands for a number in [-1, 1] or, for averages of squares, [0, 1], which is a line from
// piece to piece: the range between two powers of 8 (of 16 without a sign) has twice the codes of
// the range below it, at equal distances. 0 and 1 are among the numbers, and all have few bits:
// what is decoded and encoded again has the same code and the same scale.
#pragma once

#include <bit>
#include <cstdint>

#include "fastkern/optim_formula.h"

namespace fastkern::optim {

template <bool kSigned>
struct BlockCode {
  static constexpr int kShift = kSigned ? 3 : 4;  // bits of the ratio of two ranges
  static constexpr int kTop = kSigned ? 6 : 7;    // the number of the last piece: 2 ^ kTop codes
  static constexpr int kBase = 1 << kShift;
  /// Exponents of float32 from kFirst on have lines of their own; those below, that of the first.
  static constexpr int kLines = kShift * (kTop + 1) + 1, kFirst = 127 - kShift * (kTop + 1);

  /// code = slope · number + offset, rounded
  struct Line {
    float slope, offset;
  };
  static FASTKERN_FORMULA float power_of_two(int n) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(n + 127) << 23);
  }
  /// Of exponent kFirst + i.
  static FASTKERN_FORMULA Line line(int i) {
    const int piece = kShift == 3 ? (i * 171) >> 9 : i >> 2;  // i / kShift
    return {
        mul(power_of_two(kShift * (kTop - piece) + piece), static_cast<float>(kBase) / (kBase - 1)),
        fma(power_of_two(piece), static_cast<float>(kBase - 2) / (kBase - 1), -1.0f)};
  }
  /// The number of x's line; `magnitude` has the bits of |x| / scale.
  static FASTKERN_FORMULA int line_of(std::uint32_t magnitude) {
    const int i = static_cast<int>(magnitude >> 23) - kFirst;
    return i > 0 ? i : 0;
  }
  /// |x| / scale as bits, at most those of 1, also for NaN.
  static FASTKERN_FORMULA std::uint32_t magnitude_of(float x, float inverse) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(mul(x, inverse)) & 0x7fffffffu;
    return bits < 0x3f800000u ? bits : 0x3f800000u;
  }
  /// A square that is not 0 does not become 0: steps divide by its root.
  static FASTKERN_FORMULA std::uint32_t encode(float x, std::uint32_t magnitude, Line l) {
    const float at = fma(std::bit_cast<float>(magnitude), l.slope, l.offset);
    const std::uint32_t code = std::bit_cast<std::uint32_t>(add(at, 0x1.8p23f)) & 0xffu;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    if (kSigned) return code | ((bits >> 24) & 0x80u);
    return code == 0 && (bits & 0x7fffffffu) != 0 ? 1u : code;
  }
  static FASTKERN_FORMULA std::uint32_t encode(float x, float inverse) {
    const std::uint32_t magnitude = magnitude_of(x, inverse);
    return encode(x, magnitude, line(line_of(magnitude)));
  }
  /// The number, exactly.
  static FASTKERN_FORMULA float decode(std::uint32_t code) {
    const std::uint32_t c = kSigned ? code & 0x7fu : code;
    const float f = add(std::bit_cast<float>(c | 0x4b000000u), -0x1p23f);
    const std::uint32_t piece = std::bit_cast<std::uint32_t>(f) >> 23;  // 127 more
    const float in_piece = mul(add(f, 1.0f), std::bit_cast<float>((254u - piece) << 23));
    const float number =
        fma(in_piece, static_cast<float>(kBase - 1) / kBase, static_cast<float>(2 - kBase) / kBase);
    const std::uint32_t range = 127u + kShift * (piece - 127u - kTop);
    const std::uint32_t bits =
        c == 0 ? 0u : std::bit_cast<std::uint32_t>(mul(number, std::bit_cast<float>(range << 23)));
    return std::bit_cast<float>(kSigned ? bits | (code & 0x80u) << 24 : bits);
  }
};

/// What numbers of a block are multiplied with; `largest`: bits of the largest magnitude, which is
/// the scale. 0 where it is not a normal number.
FASTKERN_FORMULA float inverse_of(std::uint32_t largest) {
  const bool normal = largest >= 0x00800000u && largest < 0x7f800000u;
  return normal ? div(1.0f, std::bit_cast<float>(largest)) : 0.0f;
}

/// Whether state k of a kind has a sign.
constexpr bool has_sign(OptimKind kind, int k) { return kind != OptimKind::adam || k == 0; }

}  // namespace fastkern::optim
