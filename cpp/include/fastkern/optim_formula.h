// SPDX-License-Identifier: Apache-2.0
// What optimizers compute, element by element, for the CPU and the GPU alike: every operation
// rounds to nearest, and where two are to be one it says so, so that both give the same bits.
//
// A formula has the numbers of a parameter's step (`Numbers`, from float64, once for each tensor)
// and what becomes of one element: its value p, its gradient g, its states s.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "fastkern/optim.h"
#include "fastkern/philox.h"

#if defined(__CUDACC__)
#define FASTKERN_FORMULA __host__ __device__ __forceinline__
#else
#define FASTKERN_FORMULA __attribute__((always_inline)) inline
#endif

namespace fastkern::optim {

#if defined(__CUDA_ARCH__)
FASTKERN_FORMULA float mul(float a, float b) { return __fmul_rn(a, b); }
FASTKERN_FORMULA float add(float a, float b) { return __fadd_rn(a, b); }
FASTKERN_FORMULA float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTKERN_FORMULA float div(float a, float b) { return __fdiv_rn(a, b); }
FASTKERN_FORMULA float root(float a) { return __fsqrt_rn(a); }
FASTKERN_FORMULA double mul(double a, double b) { return __dmul_rn(a, b); }
FASTKERN_FORMULA double add(double a, double b) { return __dadd_rn(a, b); }
FASTKERN_FORMULA double root(double a) { return __dsqrt_rn(a); }
#else
// Products are written so that none can be contracted with a sum: it is fma() that adds them.
FASTKERN_FORMULA float mul(float a, float b) { return a * b; }
FASTKERN_FORMULA float add(float a, float b) { return a + b; }
FASTKERN_FORMULA float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTKERN_FORMULA float div(float a, float b) { return a / b; }
FASTKERN_FORMULA float root(float a) { return __builtin_sqrtf(a); }
// Volatile, once for each tensor: kept from contraction.
FASTKERN_FORMULA double mul(double a, double b) {
  const volatile double product = a * b;
  return product;
}
FASTKERN_FORMULA double add(double a, double b) { return a + b; }
FASTKERN_FORMULA double root(double a) { return __builtin_sqrt(a); }
#endif

/// base ^ n, by multiplications alone; off by n units of the 53rd bit at most.
FASTKERN_FORMULA double power(double base, std::uint64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result = mul(result, base);
    base = mul(base, base);
  }
  return result;
}

/// What a tensor's step starts from.
struct Start {
  const OptimGroup& group;
  double lr;
  std::uint64_t steps;  // this one counted
  double product;       // NAdam's, before this step
  bool centered;        // RMSprop's
};

FASTKERN_FORMULA float narrow(double v) { return static_cast<float>(v); }

/// Adam and AdamW; kLargest: amsgrad.
template <bool kLargest>
struct Adam {
  static constexpr int kStates = kLargest ? 3 : 2;
  struct Numbers {
    float keep, decay;   // p * keep; gradient + p * decay
    float grow1, grow2;  // 1 - beta
    float step_size, eps, unbias2;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    const double bias1 = add(1.0, -power(g.beta1, s.steps));
    const double bias2 = add(1.0, -power(g.beta2, s.steps));
    return {g.decoupled ? narrow(add(1.0, -mul(s.lr, g.weight_decay))) : 1.0f,
            g.decoupled ? 0.0f : narrow(g.weight_decay),
            narrow(add(1.0, -g.beta1)),
            narrow(add(1.0, -g.beta2)),
            narrow(s.lr / bias1),
            narrow(g.eps),
            narrow(1.0 / root(bias2))};
  }
  /// The parameter after weight decay, and new states; `follow` is the rest of `update`.
  static FASTKERN_FORMULA float average(const Numbers& n, float p, float g, float (&s)[kStates]) {
    p = mul(p, n.keep);
    g = fma(p, n.decay, g);
    s[0] = fma(n.grow1, add(g, -s[0]), s[0]);
    s[1] = fma(n.grow2, fma(g, g, -s[1]), s[1]);
    return p;
  }
  static FASTKERN_FORMULA float follow(const Numbers& n, float p, float direction) {
    return fma(-n.step_size, direction, p);
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    p = average(n, p, g, s);
    float second = s[1];
    if constexpr (kLargest) {
      s[2] = second > s[2] || second != second ? second : s[2];
      second = s[2];
    }
    return follow(n, p, div(s[0], fma(root(second), n.unbias2, n.eps)));
  }
};

struct Sgd {
  static constexpr int kStates = 1;
  struct Numbers {
    float decay, momentum, grow, lr;
    bool plain, first, nesterov;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    return {narrow(g.weight_decay),
            narrow(g.beta1),
            narrow(add(1.0, -g.beta2)),
            narrow(s.lr),
            g.beta1 == 0.0,
            s.steps == 1,
            g.nesterov};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    g = fma(p, n.decay, g);
    if (!n.plain) {
      s[0] = n.first ? g : fma(n.momentum, s[0], mul(n.grow, g));
      g = n.nesterov ? fma(n.momentum, s[0], g) : s[0];
    }
    return fma(-n.lr, g, p);
  }
};

struct Lion {
  static constexpr int kStates = 1;
  struct Numbers {
    float keep, grow1, grow2, lr;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    return {narrow(add(1.0, -mul(s.lr, g.weight_decay))), narrow(add(1.0, -g.beta1)),
            narrow(add(1.0, -g.beta2)), narrow(s.lr)};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    const float change = add(g, -s[0]);
    const float direction = fma(n.grow1, change, s[0]);
    s[0] = fma(n.grow2, change, s[0]);
    p = mul(p, n.keep);
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : mul(direction, 0.0f);
    return fma(-n.lr, sign, p);
  }
};

struct Adagrad {
  static constexpr int kStates = 1;
  struct Numbers {
    float decay, step_size, eps;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    const double slower = add(1.0, mul(static_cast<double>(s.steps - 1), g.beta1));
    return {narrow(g.weight_decay), narrow(s.lr / slower), narrow(g.eps)};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    g = fma(p, n.decay, g);
    s[0] = fma(g, g, s[0]);
    return fma(-n.step_size, div(g, add(root(s[0]), n.eps)), p);
  }
};

/// s: square_avg, grad_avg, momentum_buffer.
struct RmsProp {
  static constexpr int kStates = 3;
  struct Numbers {
    float decay, grow, momentum, lr, eps;
    bool centered, plain;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    return {narrow(g.weight_decay), narrow(add(1.0, -g.beta2)),
            narrow(g.beta1),        narrow(s.lr),
            narrow(g.eps),          s.centered,
            g.beta1 == 0.0};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    g = fma(p, n.decay, g);
    s[0] = fma(n.grow, fma(g, g, -s[0]), s[0]);
    float square = s[0];
    if (n.centered) {
      s[1] = fma(n.grow, add(g, -s[1]), s[1]);
      square = fma(-s[1], s[1], square);
    }
    const float direction = div(g, add(root(square), n.eps));
    if (n.plain) return fma(-n.lr, direction, p);
    s[2] = fma(n.momentum, s[2], direction);
    return fma(-n.lr, s[2], p);
  }
};

struct NAdam {
  static constexpr int kStates = 2;
  struct Numbers {
    float keep, decay, grow1, grow2, of_grad, of_average, eps, unbias2;
  };
  /// The momentum of step n.
  static FASTKERN_FORMULA double momentum(const OptimGroup& g, std::uint64_t n) {
    return mul(g.beta1, add(1.0, -mul(0.5, power(g.decay_base, n))));
  }
  static FASTKERN_FORMULA float next_product(const Start& s) {
    return narrow(mul(s.product, momentum(s.group, s.steps)));
  }
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    const double now = momentum(g, s.steps), next = momentum(g, s.steps + 1);
    const double product = next_product(s);
    const double bias2 = add(1.0, -power(g.beta2, s.steps));
    return {g.decoupled ? narrow(add(1.0, -mul(s.lr, g.weight_decay))) : 1.0f,
            g.decoupled ? 0.0f : narrow(g.weight_decay),
            narrow(add(1.0, -g.beta1)),
            narrow(add(1.0, -g.beta2)),
            narrow(mul(s.lr, add(1.0, -now)) / add(1.0, -product)),
            narrow(mul(s.lr, next) / add(1.0, -mul(product, next))),
            narrow(g.eps),
            narrow(1.0 / root(bias2))};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    p = mul(p, n.keep);
    g = fma(p, n.decay, g);
    s[0] = fma(n.grow1, add(g, -s[0]), s[0]);
    s[1] = fma(n.grow2, fma(g, g, -s[1]), s[1]);
    const float denominator = fma(root(s[1]), n.unbias2, n.eps);
    return fma(-1.0f, div(fma(n.of_average, s[0], mul(n.of_grad, g)), denominator), p);
  }
};

struct RAdam {
  static constexpr int kStates = 2;
  struct Numbers {
    float keep, decay, grow1, grow2, step_size, unbias2, eps;
    bool adaptive;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    const double beta2t = power(g.beta2, s.steps);
    const double bias1 = add(1.0, -power(g.beta1, s.steps)), bias2 = add(1.0, -beta2t);
    const double most = 2.0 / add(1.0, -g.beta2) - 1.0;
    const double now = add(most, -(mul(mul(2.0, static_cast<double>(s.steps)), beta2t) / bias2));
    const bool adaptive = now > 5.0;
    const double rect = adaptive ? root(mul(mul(add(now, -4.0), add(now, -2.0)), most) /
                                        mul(mul(add(most, -4.0), add(most, -2.0)), now))
                                 : 1.0;
    return {g.decoupled ? narrow(add(1.0, -mul(s.lr, g.weight_decay))) : 1.0f,
            g.decoupled ? 0.0f : narrow(g.weight_decay),
            narrow(add(1.0, -g.beta1)),
            narrow(add(1.0, -g.beta2)),
            narrow(mul(s.lr, rect) / bias1),
            narrow(root(bias2)),
            narrow(g.eps),
            adaptive};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float p, float g, float (&s)[kStates]) {
    p = mul(p, n.keep);
    g = fma(p, n.decay, g);
    s[0] = fma(n.grow1, add(g, -s[0]), s[0]);
    s[1] = fma(n.grow2, fma(g, g, -s[1]), s[1]);
    const float ratio = div(n.unbias2, add(root(s[1]), n.eps));
    return fma(-mul(n.step_size, n.adaptive ? ratio : 1.0f), s[0], p);
  }
};

/// The direction of LAMB: `update` leaves the parameter's states behind and gives what the trust
/// ratio is to scale.
struct Lamb {
  static constexpr int kStates = 2;
  struct Numbers {
    float decay, grow1, grow2, unbias1, unbias2, eps, lr;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    const double bias1 = add(1.0, -power(g.beta1, s.steps));
    const double bias2 = add(1.0, -power(g.beta2, s.steps));
    return {narrow(g.weight_decay),
            narrow(add(1.0, -g.beta1)),
            narrow(add(1.0, -g.beta2)),
            narrow(1.0 / bias1),
            narrow(1.0 / root(bias2)),
            narrow(g.eps),
            narrow(s.lr)};
  }
  static FASTKERN_FORMULA void average(const Numbers& n, float g, float (&s)[kStates]) {
    s[0] = fma(n.grow1, add(g, -s[0]), s[0]);
    s[1] = fma(n.grow2, fma(g, g, -s[1]), s[1]);
  }
  static FASTKERN_FORMULA float direction(const Numbers& n, float p, const float (&s)[kStates]) {
    return fma(p, n.decay, div(mul(s[0], n.unbias1), fma(root(s[1]), n.unbias2, n.eps)));
  }
};

/// Muon's momentum: gives the direction that is to be made orthogonal.
struct Muon {
  static constexpr int kStates = 1;
  struct Numbers {
    float grow, momentum;
    bool nesterov;
  };
  static FASTKERN_FORMULA Numbers numbers(const Start& s) {
    const OptimGroup& g = s.group;
    return {narrow(add(1.0, -g.beta1)), narrow(g.beta1), g.nesterov};
  }
  static FASTKERN_FORMULA float update(const Numbers& n, float, float g, float (&s)[kStates]) {
    s[0] = fma(n.grow, add(g, -s[0]), s[0]);
    return n.nesterov ? fma(n.momentum, add(s[0], -g), g) : s[0];
  }
};

/// How far a parameter follows its direction, from the sums of squares of both.
FASTKERN_FORMULA float trust_ratio(double values, double directions) {
  return values > 0.0 && directions > 0.0 ? narrow(root(values) / root(directions)) : 1.0f;
}

/// NaN if either is.
FASTKERN_FORMULA float larger(float a, float b) { return a > b || a != a ? a : b; }

struct Clip {
  float norm, factor;
};
/// The norm of gradients, from the sum of their squares or their largest, and what they are to be
/// multiplied with so that it is at most max_norm.
FASTKERN_FORMULA Clip clip_of(double sum, bool largest, const float* scale, double max_norm) {
  const double norm = (largest ? sum : root(sum)) / (scale ? static_cast<double>(*scale) : 1.0);
  const double factor = max_norm / add(norm, 1e-6);
  return {narrow(norm), factor < 1.0 || factor != factor ? narrow(factor) : 1.0f};
}

/// What a gradient is multiplied with: the sign, the clipping factor, 1 / grad_scale.
FASTKERN_FORMULA float gradient_factor(const OptimGroup& group, const float* factor,
                                       const float* scale) {
  float by = group.maximize ? -1.0f : 1.0f;
  if (factor) by = mul(by, *factor);
  return scale ? div(by, *scale) : by;
}

// ---- parameters of 16 bits
// -----------------------------------------------------------------------

/// The 16 random bits of element e, of the words of its group of eight.
FASTKERN_FORMULA std::uint32_t half_word(const PhiloxWords& words, int e) {
  const int i = e / 2;  // no array in memory where e is not known
  const std::uint32_t word = i == 0   ? words.word[0]
                             : i == 1 ? words.word[1]
                             : i == 2 ? words.word[2]
                                      : words.word[3];
  return (word >> (e % 2 * 16)) & 0xffffu;
}
/// The words of elements 8 * group to 8 * group + 7.
FASTKERN_FORMULA PhiloxWords rounding_words(std::uint64_t seed, std::uint64_t step,
                                            std::uint32_t index, std::uint64_t group) {
  return philox(seed, step << 32 | index, group);
}

FASTKERN_FORMULA bool is_special(std::uint32_t u) { return (u & 0x7f800000u) == 0x7f800000u; }
/// Infinity, or a NaN that stays one.
FASTKERN_FORMULA std::uint16_t special_bf16(std::uint32_t u) {
  return static_cast<std::uint16_t>((u >> 16) | ((u & 0x007fffffu) != 0 ? 0x0040u : 0u));
}

/// What is left of a value after rounding; nothing of one beyond the type.
FASTKERN_FORMULA float lost_by_rounding(float v, float rounded) {
  return is_special(std::bit_cast<std::uint32_t>(rounded)) ? 0.0f : add(v, -rounded);
}

/// bf16 of a value, up with the probability that makes the expected value exact.
FASTKERN_FORMULA std::uint16_t stochastic_bf16(float v, std::uint32_t random16) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  return is_special(u) ? special_bf16(u) : static_cast<std::uint16_t>((u + random16) >> 16);
}

/// bf16 of a master value, ties away from zero: as with 16 more bits in a signed remainder.
FASTKERN_FORMULA std::uint16_t nearest_away_bf16(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  return is_special(u) ? special_bf16(u) : static_cast<std::uint16_t>((u + 0x8000u) >> 16);
}
FASTKERN_FORMULA std::int16_t remainder_of(float v) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(v);
  return static_cast<std::int16_t>(is_special(u) ? 0u : u & 0xffffu);
}
FASTKERN_FORMULA float with_remainder(std::uint16_t param, std::int16_t remainder) {
  return std::bit_cast<float>((static_cast<std::uint32_t>(param) << 16) +
                              static_cast<std::uint32_t>(static_cast<std::int32_t>(remainder)));
}

}  // namespace fastkern::optim
