// SPDX-License-Identifier: Apache-2.0
// Attention and its gradients in double precision, straight from the formulas of attention.h, with
// what an f32 computation may be off.
#pragma once

#include "attention_support.h"
#include "fastkern/philox.h"

namespace fastkern::test {

/// `noise`: an f32 computation may be off by some ulps of this. `of_out`, `of_tiles`: a relative
/// error of `out` as it was stored, and of probabilities and their gradients where they are rounded
/// to the type of the operands before they are multiplied with, is worth this.
struct Bounded {
  Bounded() = default;
  explicit Bounded(const Tensor& like)
      : value(like.given() ? like.numel() : 0),
        noise(value.size()),
        of_out(value.size()),
        of_tiles(value.size()) {}

  std::vector<double> value, noise, of_out, of_tiles;
};

/// `noise`: four times what the CPU kernels need. `tiles`: for kernels that round those.
struct Tolerance {
  double noise = 6e-7;
  bool tiles = false;
};

/// The relative error of one rounding, and what it may be off by however small the value is.
inline double rounding_of(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}
inline double smallest_rounding_of(DType dtype) { return dtype == DType::f16 ? 0x1p-25 : 0.0; }

inline testing::AssertionResult close(const Tensor& actual, const Bounded& expected,
                                      const Tolerance& tolerance = {}) {
  // Probabilities below exp(-87) are 0.
  const double smallest = actual.dtype() == DType::f16 ? 0x1p-24 : 1e-30;
  if (!actual.given() && expected.value.empty()) return testing::AssertionSuccess();
  if (actual.numel() != static_cast<std::int64_t>(expected.value.size())) {
    return testing::AssertionFailure() << "different size";
  }
  for (std::int64_t i = 0; i < actual.numel(); ++i) {
    const double value = expected.value[i], found = actual.get(i);
    if (found == value) continue;  // infinite, too
    const double bound = rounding_of(actual.dtype()) * std::abs(value) +
                         tolerance.noise * expected.noise[i] + expected.of_out[i] +
                         (tolerance.tiles ? expected.of_tiles[i] : 0.0) + smallest;
    if (!(std::abs(found - value) <= bound)) {
      return testing::AssertionFailure()
             << "element " << i << " is " << found << ", expected " << value << " within " << bound;
    }
  }
  return testing::AssertionSuccess();
}

struct ExpectedAttention {
  Bounded out, lse, dq, dk, dv, dbias, dsinks;
};

/// Where entry b lies in the tensors.
struct Entry {
  std::int64_t b, first_q, queries, first_k, keys;
};

inline Entry attention_entry(const AttentionCase& c, std::int64_t b) {
  const auto within = [](std::int64_t i, std::int64_t n) { return i < 0 ? 0 : i > n ? n : i; };
  Entry e{b, b * c.queries, c.queries, b * c.keys, c.keys};
  if (c.packed()) {
    e.first_q = within(c.start_q[b], c.queries), e.first_k = within(c.start_k[b], c.keys);
    e.queries = std::max<std::int64_t>(within(c.start_q[b + 1], c.queries) - e.first_q, 0);
    e.keys = std::max<std::int64_t>(within(c.start_k[b + 1], c.keys) - e.first_k, 0);
  }
  if (!c.used_q.empty()) e.queries = within(c.used_q[b], e.queries);
  if (!c.used_k.empty()) e.keys = within(c.used_k[b], e.keys);
  return e;
}

/// Element (b, h, i, j) of a bias, whose dimensions may be 1.
inline std::int64_t bias_index(const Sizes& sizes, std::int64_t b, std::int64_t h, std::int64_t i,
                               std::int64_t j) {
  const auto at = [&](int d, std::int64_t index) { return sizes[d] == 1 ? 0 : index; };
  return ((at(0, b) * sizes[1] + at(1, h)) * sizes[2] + at(2, i)) * sizes[3] + j;
}

class AttentionReference {
 public:
  explicit AttentionReference(const AttentionProblem& p)
      : p_(p),
        c_(p.c),
        q_(p.q.values()),
        k_(p.k.values()),
        v_(p.v.values()),
        dout_(p.dout.values()),
        dlse_(p.dlse.values()),
        bias_(p.bias.values()),
        slopes_(p.slopes.values()),
        sinks_(p.sinks.values()),
        blocks_(p.blocks.values()),
        bias_sizes_(sizes_of(p.bias)),
        block_sizes_(sizes_of(p.blocks)) {}

  ExpectedAttention operator()() {
    const AttentionOutputs blank = blank_attention(p_);
    all_ = {Bounded(blank.out), Bounded(blank.lse),   Bounded(blank.dq),    Bounded(blank.dk),
            Bounded(blank.dv),  Bounded(blank.dbias), Bounded(blank.dsinks)};
    std::fill(all_.lse.value.begin(), all_.lse.value.end(), -INFINITY);
    for (std::int64_t b = 0; b < c_.batch; ++b) {
      const Entry e = attention_entry(c_, b);
      for (std::int64_t h = 0; h < c_.heads; ++h) {
        for (std::int64_t i = 0; i < e.queries; ++i) query(e, h, i);
      }
    }
    return all_;
  }

 private:
  struct Sum {
    double value = 0.0, magnitude = 0.0;
    void add(double x) { value += x, magnitude += std::abs(x); }
  };
  static Sum dot(const double* a, const double* b, std::int64_t n) {
    Sum sum;
    for (std::int64_t i = 0; i < n; ++i) sum.add(a[i] * b[i]);
    return sum;
  }

  /// A score: its value, what it is off by in ulps, the derivative of the softcap.
  struct Score {
    double value, noise, slope;
  };

  bool visible(const Entry& e, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t position = c_.top_left ? i : i + e.keys - e.queries;
    bool seen =
        (c_.left < 0 || position - j <= c_.left) && (c_.right < 0 || j - position <= c_.right);
    if (!c_.prefix.empty() && j < c_.prefix[e.b]) seen = true;
    if (!blocks_.empty()) {
      const std::int64_t head = block_sizes_[0] == 1 ? 0 : h;
      const std::int64_t row = head * block_sizes_[1] + i / c_.block_size;
      if (blocks_[row * block_sizes_[2] + j / c_.block_size] == 0.0) seen = false;
    }
    if (c_.bias == DType::i8 && bias_[bias_index(bias_sizes_, e.b, h, i, j)] == 0.0) seen = false;
    return seen;
  }

  Score score(const Entry& e, std::int64_t h, std::int64_t i, std::int64_t j, const double* q,
              const double* k) const {
    const Sum qk = dot(q, k, c_.d);
    Score s{qk.value * p_.scale(), qk.magnitude * std::abs(p_.scale()), 1.0};
    if (c_.softcap > 0.0) {
      const double t = std::tanh(s.value / c_.softcap);
      s.value = c_.softcap * t;
      s.slope = 1.0 - t * t;
      s.noise = s.noise * s.slope + std::abs(s.value);
    }
    const auto add = [&](double x) { s.value += x, s.noise += std::abs(x); };
    if (c_.bias_gradient()) add(bias_[bias_index(bias_sizes_, e.b, h, i, j)]);
    if (!slopes_.empty()) {
      const std::int64_t position = c_.top_left ? i : i + e.keys - e.queries;
      const double slope = slopes_[c_.slope_dims == 2 ? e.b * c_.heads + h : h];
      add(-slope * static_cast<double>(std::abs(position - j)));
    }
    return s;
  }

  double dropout_factor(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    if (c_.dropout == 0.0) return 1.0;
    const auto head = static_cast<std::uint64_t>(b * c_.heads + h);
    const PhiloxWords words = philox(p_.seed[0], p_.offset[0] + (head << 32),
                                     (static_cast<std::uint64_t>(i) << 30) + j / 4);
    return words.word[j % 4] < dropout_threshold(c_.dropout) ? 0.0 : 1.0 / (1.0 - c_.dropout);
  }

  void query(const Entry& e, std::int64_t h, std::int64_t i) {
    const std::int64_t g = h / (c_.heads / c_.kv_heads), d = c_.d, dv = c_.dv;
    const std::int64_t row = (e.first_q + i) * c_.heads + h;
    const std::int64_t lse_at =
        c_.packed() ? h * c_.queries + e.first_q + i : (e.b * c_.heads + h) * c_.queries + i;
    const double unit = rounding_of(p_.dtype), smallest = smallest_rounding_of(p_.dtype);
    const double *const q = &q_[row * d], *const dout = &dout_[row * dv];
    const auto key_row = [&](std::int64_t j) { return (e.first_k + j) * c_.kv_heads + g; };

    std::vector<std::int64_t> seen;
    std::vector<Score> s;
    double top = sinks_.empty() ? -INFINITY : sinks_[h];
    for (std::int64_t j = 0; j < e.keys; ++j) {
      if (!visible(e, h, i, j)) continue;
      seen.push_back(j);
      s.push_back(score(e, h, i, j, q, &k_[key_row(j) * d]));
      top = std::max(top, s.back().value);
    }
    if (seen.empty() && sinks_.empty()) return;
    const double of_sink = sinks_.empty() ? 0.0 : std::exp(sinks_[h] - top);
    double sum = of_sink;
    for (const Score& x : s) sum += std::exp(x.value - top);
    const double lse = top + std::log(sum);

    // Forward. A probability is off by as much as its score and the logarithm of the sum are.
    double lse_noise = 1.0 + std::abs(lse);
    std::vector<double> probability(seen.size()), factor(seen.size()), off(seen.size());
    for (std::size_t n = 0; n < seen.size(); ++n) {
      probability[n] = std::exp(s[n].value - lse);
      factor[n] = dropout_factor(e.b, h, i, seen[n]);
      lse_noise += probability[n] * s[n].noise;
    }
    for (std::size_t n = 0; n < seen.size(); ++n) off[n] = 1.0 + s[n].noise + lse_noise;
    all_.lse.value[lse_at] = lse;
    all_.lse.noise[lse_at] = lse_noise;
    std::vector<double> out(dv), out_noise(dv);
    for (std::size_t n = 0; n < seen.size(); ++n) {
      const double* const v = &v_[key_row(seen[n]) * dv];
      for (std::int64_t x = 0; x < dv; ++x) {
        const double term = probability[n] * factor[n] * v[x];
        out[x] += term;
        out_noise[x] += std::abs(term) * off[n];
        all_.out.of_tiles[row * dv + x] += unit * std::abs(term) + smallest * std::abs(v[x]);
      }
    }
    for (std::int64_t x = 0; x < dv; ++x) {
      all_.out.value[row * dv + x] = out[x];
      all_.out.noise[row * dv + x] = out_noise[x];
    }

    // Backward. d lse / d s = p, d out / d s[j] = p[j] (f[j] v[j] - out).
    const double of_lse = dlse_.empty() ? 0.0 : dlse_[lse_at];
    const Sum dout_out = dot(dout, out.data(), dv);
    const double delta = dout_out.value - of_lse;
    double delta_noise = std::abs(of_lse);
    for (std::int64_t x = 0; x < dv; ++x) delta_noise += std::abs(dout[x]) * out_noise[x];
    for (std::size_t n = 0; n < seen.size(); ++n) {
      const std::int64_t j = seen[n], key = key_row(j);
      const double *const k = &k_[key * d], *const v = &v_[key * dv];
      const double prob = probability[n], pf = prob * factor[n];
      const Sum dp = dot(dout, v, dv);
      for (std::int64_t x = 0; x < dv; ++x) {
        const std::int64_t at = key * dv + x;
        all_.dv.value[at] += pf * dout[x];
        all_.dv.noise[at] += pf * std::abs(dout[x]) * off[n];
        all_.dv.of_tiles[at] += (unit * pf + smallest) * std::abs(dout[x]);
      }
      const double ds = prob * (dp.value * factor[n] - delta);
      const double ds_noise =
          prob * (dp.magnitude * factor[n] + delta_noise) + std::abs(ds) * off[n];
      const double of_out = unit * prob * dout_out.magnitude;
      if (c_.bias_gradient()) {
        const std::int64_t at = bias_index(bias_sizes_, e.b, h, i, j);
        all_.dbias.value[at] += ds;
        all_.dbias.noise[at] += ds_noise;
        all_.dbias.of_out[at] += of_out;
      }
      const double slope = s[n].slope * p_.scale();
      // The derivative of a softcap is the difference of 1 and what is known to an ulp of its
      // score.
      const double bend = c_.softcap > 0.0 ? 1.0 + s[n].noise / c_.softcap : 0.0;
      const double product_noise = ds_noise * std::abs(slope) + std::abs(ds * p_.scale()) * bend;
      const auto to = [&](Bounded& of, std::int64_t first, const double* with) {
        for (std::int64_t x = 0; x < d; ++x) {
          of.value[first + x] += ds * slope * with[x];
          of.noise[first + x] += product_noise * std::abs(with[x]);
          of.of_out[first + x] += of_out * std::abs(slope * with[x]);
          of.of_tiles[first + x] +=
              (unit * std::abs(ds * slope) + smallest * std::abs(p_.scale())) * std::abs(with[x]);
        }
      };
      to(all_.dq, row * d, k);
      to(all_.dk, key * d, q);
    }
    if (!sinks_.empty()) {
      const double prob = std::exp(sinks_[h] - lse);
      all_.dsinks.value[h] -= prob * delta;
      all_.dsinks.noise[h] +=
          prob * delta_noise + std::abs(prob * delta) * (1.0 + std::abs(sinks_[h]) + lse_noise);
      all_.dsinks.of_out[h] += unit * prob * dout_out.magnitude;
    }
  }

  const AttentionProblem& p_;
  const AttentionCase& c_;
  std::vector<double> q_, k_, v_, dout_, dlse_, bias_, slopes_, sinks_, blocks_;
  Sizes bias_sizes_, block_sizes_;
  ExpectedAttention all_;
};

inline ExpectedAttention attention_reference(const AttentionProblem& p) {
  return AttentionReference(p)();
}

inline void expect_forward(const AttentionOutputs& found, const ExpectedAttention& expected,
                           const Tolerance& tolerance = {}) {
  EXPECT_TRUE(close(found.out, expected.out, tolerance)) << "out";
  EXPECT_TRUE(close(found.lse, expected.lse, tolerance)) << "lse";
}

inline void expect_attention(const AttentionOutputs& found, const ExpectedAttention& expected,
                             const Tolerance& tolerance = {}) {
  expect_forward(found, expected, tolerance);
  EXPECT_TRUE(close(found.dq, expected.dq, tolerance)) << "dq";
  EXPECT_TRUE(close(found.dk, expected.dk, tolerance)) << "dk";
  EXPECT_TRUE(close(found.dv, expected.dv, tolerance)) << "dv";
  EXPECT_TRUE(close(found.dbias, expected.dbias, tolerance)) << "dbias";
  EXPECT_TRUE(close(found.dsinks, expected.dsinks, tolerance)) << "dsinks";
}

}  // namespace fastkern::test
