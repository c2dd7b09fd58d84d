// SPDX-License-Identifier: Apache-2.0
#include "optim_blocks.h"

namespace fastkern::cpu {
namespace {

/// The values of a parameter, as its rounding keeps them.
FASTKERN_INLINE void get_values(const OptimStep& a, const OptimTensor& t, std::int64_t at, int n,
                                float* out) {
  switch (a.rounding) {
    case OptimRounding::master:
      return load_block<float>(t.extra, at, n, out);
    case OptimRounding::kahan: {
      float lost[kOptimBlock];
      load_block(a.param, t.param, at, n, out);
      load_block(a.param, t.extra, at, n, lost);
      for (int i = 0; i < n; ++i) out[i] += lost[i];
      return;
    }
    case OptimRounding::remainder: {
      const auto* const high = static_cast<const std::uint16_t*>(t.param) + at;
      const auto* const low = static_cast<const std::int16_t*>(t.extra) + at;
      for (int i = 0; i < n; ++i) out[i] = optim::with_remainder(high[i], low[i]);
      return;
    }
    default:
      return load_block(a.param, t.param, at, n, out);
  }
}

FASTKERN_INLINE void put_values(const OptimStep& a, const OptimTensor& t, std::uint64_t step,
                                std::int64_t at, int n, const float* in) {
  auto* const bits = static_cast<std::uint16_t*>(t.param) + at;
  switch (a.rounding) {
    case OptimRounding::stochastic:
      for (int i = 0; i < n; i += 8) {
        const PhiloxWords words = optim::rounding_words(a.seed, step, t.index, (at + i) / 8);
        for (int j = 0; j < std::min(8, n - i); ++j) {
          bits[i + j] = optim::stochastic_bf16(in[i + j], optim::half_word(words, j));
        }
      }
      return;
    case OptimRounding::kahan: {
      float rounded[kOptimBlock], lost[kOptimBlock];
      store_block(a.param, t.param, at, n, in);
      load_block(a.param, t.param, at, n, rounded);
      for (int i = 0; i < n; ++i) lost[i] = optim::lost_by_rounding(in[i], rounded[i]);
      return store_block(a.param, t.extra, at, n, lost);
    }
    case OptimRounding::master:
      store_block<float>(t.extra, at, n, in);
      if (a.param != DType::bf16) return store_block(a.param, t.param, at, n, in);
      for (int i = 0; i < n; ++i) bits[i] = optim::nearest_away_bf16(in[i]);
      return;
    case OptimRounding::remainder: {
      auto* const low = static_cast<std::int16_t*>(t.extra) + at;
      for (int i = 0; i < n; ++i) {
        bits[i] = optim::nearest_away_bf16(in[i]);
        low[i] = optim::remainder_of(in[i]);
      }
      return;
    }
    default:
      return store_block(a.param, t.param, at, n, in);
  }
}

/// Codes of n elements, which begin a block of kOptimCodeBlock, as float32.
template <bool kSigned>
FASTKERN_INLINE void decode_blocks(const std::uint8_t* codes, const float* scales, int n,
                                   float* out) {
  for (int first = 0; first < n; first += kOptimCodeBlock) {
    const float scale = *scales++;
    const int end = std::min(n, first + static_cast<int>(kOptimCodeBlock));
    for (int i = first; i < end; ++i) {
      out[i] = optim::mul(optim::BlockCode<kSigned>::decode(codes[i]), scale);
    }
  }
}
template <bool kSigned>
FASTKERN_INLINE void encode_blocks(const float* in, int n, std::uint8_t* codes, float* scales) {
  for (int first = 0; first < n; first += kOptimCodeBlock) {
    const int end = std::min(n, first + static_cast<int>(kOptimCodeBlock));
    std::uint32_t largest = 0;
    for (int i = first; i < end; ++i) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(in[i]) & 0x7fffffffu);
    }
    const float inverse = optim::inverse_of(largest);
    for (int i = first; i < end; ++i) {
      codes[i] = static_cast<std::uint8_t>(optim::BlockCode<kSigned>::encode(in[i], inverse));
    }
    *scales++ = std::bit_cast<float>(largest);
  }
}

/// The values of a block are those in memory.
bool in_place(const OptimStep& a) {
  return a.param == DType::f32 && a.rounding == OptimRounding::nearest;
}

}  // namespace

void load_buffers(const OptimStep& a, const OptimTensor& t, const void* grad, std::int64_t at,
                  int n, OptimBuffers& b) {
  with_best_isa([&]() __attribute__((always_inline)) {
    if (in_place(a)) {
      b.p = static_cast<float*>(t.param) + at;
    } else {
      b.p = b.memory[0];
      get_values(a, t, at, n, b.p);
    }
    if (grad && a.grad == DType::f32) {
      b.g = static_cast<const float*>(grad) + at;
    } else if (grad) {
      b.g = b.memory[1];
      load_block(a.grad, grad, at, n, b.memory[1]);
    }
    for (int k = 0; k < optim_states(a.kind); ++k) {
      if (t.state[k] && a.state == DType::f32) {
        b.s[k] = static_cast<float*>(t.state[k]) + at;
        continue;
      }
      b.s[k] = b.memory[2 + k];
      if (t.state[k] && a.state == DType::u8) {
        const auto* const codes = static_cast<const std::uint8_t*>(t.state[k]) + at;
        const float* const scales = t.scale[k] + at / kOptimCodeBlock;
        if (optim::has_sign(a.kind, k)) {
          decode_blocks<true>(codes, scales, n, b.s[k]);
        } else {
          decode_blocks<false>(codes, scales, n, b.s[k]);
        }
      } else if (t.state[k]) {
        load_block(a.state, t.state[k], at, n, b.s[k]);
      } else {
        std::fill(b.s[k], b.s[k] + n, 0.0f);
      }
    }
  });
}

void store_values(const OptimStep& a, const OptimTensor& t, std::uint64_t step, std::int64_t at,
                  int n, const OptimBuffers& b) {
  if (in_place(a)) return;
  with_best_isa([&]() __attribute__((always_inline)) { put_values(a, t, step, at, n, b.p); });
}

void store_states(const OptimStep& a, const OptimTensor& t, std::int64_t at, int n,
                  const OptimBuffers& b) {
  if (a.state == DType::f32) return;
  with_best_isa([&]() __attribute__((always_inline)) {
    for (int k = 0; k < optim_states(a.kind); ++k) {
      if (!t.state[k]) continue;
      if (a.state != DType::u8) {
        store_block(a.state, t.state[k], at, n, b.s[k]);
        continue;
      }
      auto* const codes = static_cast<std::uint8_t*>(t.state[k]) + at;
      float* const scales = t.scale[k] + at / kOptimCodeBlock;
      if (optim::has_sign(a.kind, k)) {
        encode_blocks<true>(b.s[k], n, codes, scales);
      } else {
        encode_blocks<false>(b.s[k], n, codes, scales);
      }
    }
  });
}

}  // namespace fastkern::cpu
