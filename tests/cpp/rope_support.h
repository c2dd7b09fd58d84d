// SPDX-License-Identifier: Apache-2.0
// What the tests of the rotary family share: a problem, its tensors, its calls, and its results in
// plain double loops.
#pragma once

#include <array>
#include <sstream>
#include <vector>

#include "fastkern/rope.h"
#include "support.h"

namespace fastkern::test {

enum class Place { number, positions, narrow, per_token, sequences };

struct RopeProblem {
  DType dtype = DType::f32, table = DType::f32;
  std::int64_t batch = 2, tokens = 5, heads = 3, k_heads = 2, n = 64, turned = 64;
  bool interleaved = false, inverse = false, full = false, weights = true;
  Place place = Place::number;

  std::int64_t rows() const { return place == Place::per_token ? tokens : tokens + 4; }
  std::int64_t width() const { return full ? turned : turned / 2; }
  std::vector<std::int64_t> positions() const {
    std::vector<std::int64_t> found(batch * tokens);
    for (std::int64_t i = 0; i < batch * tokens; ++i) found[i] = (5 * i + 3) % rows();
    return found;
  }
  std::vector<std::int32_t> narrow() const {
    if (place == Place::sequences) {  // one that is empty, one token before and one behind them
      const auto t = static_cast<std::int32_t>(tokens);
      return {std::min(t, 1), t / 2, t / 2, std::max(t - 1, t / 2)};
    }
    const std::vector<std::int64_t> wide = positions();
    return {wide.begin(), wide.end()};
  }
  /// The row of the table for a token; -1 for one of no sequence.
  std::int64_t row(std::int64_t b, std::int64_t s) const {
    if (place == Place::positions || place == Place::narrow) return positions()[b * tokens + s];
    if (place != Place::sequences) return s;
    const std::vector<std::int32_t> bounds = narrow();
    for (std::size_t i = 0; i + 1 < bounds.size(); ++i)
      if (s >= bounds[i] && s < bounds[i + 1]) return s - bounds[i];
    return -1;
  }
  std::string text() const {
    std::ostringstream text;
    text << name_of(dtype) << " table " << name_of(table) << ' ' << batch << 'x' << tokens << 'x'
         << heads << '+' << k_heads << 'x' << n << " turned " << turned << " place "
         << static_cast<int>(place) << (interleaved ? " interleaved" : "")
         << (inverse ? " inverse" : "") << (full ? " full" : "") << (weights ? " weights" : "");
    return text.str();
  }
};

/// q and k, of what there is one for each.
using Two = std::array<Tensor, 2>;

/// Inputs and outputs of a problem; heads `gap` elements apart that begin `offset` elements off.
struct RopeTensors {
  Two x, turned, normed, dy, dx, weight, dweight;
  Tensor cos, sin;

  explicit RopeTensors(const RopeProblem& p, std::int64_t offset = 0, std::int64_t gap = 0) {
    const auto heads = [&](int i) {
      const std::int64_t count = i == 0 ? p.heads : p.k_heads;
      if (i == 1 && count == 0) return Tensor();
      Layout layout = dense_layout({p.batch, p.tokens, count, p.n}, offset);
      layout.strides = dense_strides({p.batch, p.tokens, count + (gap > 0), p.n + gap});
      return Tensor(p.dtype, layout);
    };
    for (int i = 0; i < 2; ++i) {
      x[i] = heads(i).fill(1 + i, 0.2), dy[i] = heads(i).fill(3 + i, 0.1);
      turned[i] = heads(i), normed[i] = heads(i), dx[i] = heads(i);
      if (!p.weights || (i == 1 && p.k_heads == 0)) continue;
      const DType dtype = i == 0 ? p.table : p.dtype;
      weight[i] = Tensor(dtype, dense_layout({p.n}, offset)).fill(5 + i, 1.0);
      dweight[i] = Tensor(dtype, dense_layout({p.n}, offset));
    }
    const auto table = [&] {
      Layout layout = p.place == Place::per_token
                          ? dense_layout({p.batch, p.rows(), p.width()}, offset)
                          : dense_layout({p.rows(), p.width()}, offset);
      if (gap > 0) {
        layout.strides = p.place == Place::per_token
                             ? dense_strides({p.batch, p.rows(), p.width() + gap})
                             : dense_strides({p.rows(), p.width() + gap});
      }
      return Tensor(p.table, layout);
    };
    cos = table(), sin = table();
    for (std::int64_t i = 0; i < cos.numel(); ++i) {
      const std::int64_t column = i % p.width(), half = p.turned / 2;
      const std::int64_t pair = p.interleaved && p.full ? column / 2 : column % half;
      const double angle = (0.5 + i / p.width()) * std::pow(1e3, -static_cast<double>(pair) / half);
      cos.set(i, std::cos(angle)), sin.set(i, std::sin(angle));
    }
  }

  std::vector<Tensor*> all() {
    std::vector<Tensor*> list{&cos, &sin};
    for (Two* two : {&x, &turned, &normed, &dy, &dx, &weight, &dweight})
      for (Tensor& t : *two) list.push_back(&t);
    return list;
  }
  std::vector<Tensor*> outputs() {
    std::vector<Tensor*> list;
    for (Two* two : {&turned, &normed, &dx, &dweight})
      for (Tensor& t : *two) list.push_back(&t);
    return list;
  }
};

struct RopeCalls {
  RopeFwd turn;
  QkNormRopeFwd forward;
  QkNormRopeBwd backward;
};

inline constexpr double kRopeEps = 1e-5, kRopeOffset = 0.25;

/// On tensors that `ref` makes TensorRefs of, and positions where a kernel can read them.
template <class Ref>
RopeCalls rope_calls(const RopeProblem& p, const Ref& ref, RopeTensors& t, const void* positions,
                     const std::int32_t* narrow) {
  RopeAngles angles{
      .cos = ref(t.cos), .sin = ref(t.sin), .rotary_dim = p.turned, .interleaved = p.interleaved};
  angles.positions_batch_stride = p.tokens;
  if (p.place == Place::positions) angles.positions = positions;
  if (p.place == Place::narrow) angles.positions = narrow, angles.narrow = true;
  if (p.place == Place::sequences) angles.cu_seqlens = narrow, angles.sequences = 3;
  RopeCalls calls{.turn = {.q = ref(t.x[0]),
                           .k = ref(t.x[1]),
                           .q_out = ref(t.turned[0]),
                           .k_out = ref(t.turned[1]),
                           .angles = angles},
                  .forward = {.q = ref(t.x[0]),
                              .k = ref(t.x[1]),
                              .q_weight = ref(t.weight[0]),
                              .k_weight = ref(t.weight[1]),
                              .q_out = ref(t.normed[0]),
                              .k_out = ref(t.normed[1]),
                              .angles = angles,
                              .eps = kRopeEps,
                              .weight_offset = kRopeOffset},
                  .backward = {.q = ref(t.x[0]),
                               .k = ref(t.x[1]),
                               .q_weight = ref(t.weight[0]),
                               .k_weight = ref(t.weight[1]),
                               .dq_out = ref(t.dy[0]),
                               .dk_out = ref(t.dy[1]),
                               .dq = ref(t.dx[0]),
                               .dk = ref(t.dx[1]),
                               .dq_weight = ref(t.dweight[0]),
                               .dk_weight = ref(t.dweight[1]),
                               .angles = angles,
                               .eps = kRopeEps,
                               .weight_offset = kRopeOffset}};
  calls.turn.angles.inverse = p.inverse;
  return calls;
}

inline RopeCalls rope_on_cpu(const RopeProblem& p, RopeTensors& t) {
  const std::vector<std::int64_t> positions = p.positions();
  const std::vector<std::int32_t> narrow = p.narrow();
  const RopeCalls calls = rope_calls(
      p, [](Tensor& tensor) { return tensor.ref(); }, t, positions.data(), narrow.data());
  cpu::rope(calls.turn);
  cpu::qk_norm_rope(calls.forward);
  cpu::qk_norm_rope_bwd(calls.backward);
  return calls;
}

/// A head turned, by the negative angle if `back`; the sizes of the terms beside it.
inline void turn_head(const RopeProblem& p, const RopeTensors& t, std::int64_t b, std::int64_t s,
                      bool back, std::vector<double>& v, std::vector<double>& scale) {
  const std::int64_t row = p.row(b, s), half = p.turned / 2;
  for (std::int64_t i = 0; i < p.n; ++i) scale[i] = std::abs(v[i]);
  for (std::int64_t i = 0; i < half && row >= 0; ++i) {
    const std::int64_t a = p.interleaved ? 2 * i : i, c = p.interleaved ? a + 1 : half + i;
    const std::int64_t column = p.interleaved && p.full ? 2 * i : i;
    const std::int64_t at =
        ((p.place == Place::per_token ? b * p.rows() : 0) + row) * p.width() + column;
    const double cos = t.cos.get(at), sin = back ? -t.sin.get(at) : t.sin.get(at);
    const double x = v[a], y = v[c];
    v[a] = x * cos - y * sin, v[c] = y * cos + x * sin;
    scale[a] = scale[c] = std::abs(x) + std::abs(y);
  }
}

inline void expect_rope(const RopeProblem& p, RopeTensors& t) {
  SCOPED_TRACE(p.text());
  for (int which = 0; which < 2; ++which) {
    if (!t.x[which].given()) continue;
    const std::int64_t heads = which == 0 ? p.heads : p.k_heads, count = t.x[which].numel();
    const std::vector<double> x = t.x[which].values(), dy = t.dy[which].values();
    std::vector<double> w(p.n, 1.0);
    if (p.weights) {
      w = t.weight[which].values();
      for (double& value : w) value += kRopeOffset;
    }
    const auto sized = [](std::int64_t size) {
      return Expected{std::vector<double>(size), std::vector<double>(size)};
    };
    Expected turned = sized(count), normed = sized(count), dx = sized(count);
    Expected dweight = sized(p.n);
    std::vector<double> v(p.n), scale(p.n);
    for (std::int64_t head = 0; head * p.n < count; ++head) {
      const std::int64_t first = head * p.n, token = head / heads;
      const std::int64_t b = token / p.tokens, s = token % p.tokens;
      const auto keep = [&](Expected& to) {
        std::copy(v.begin(), v.end(), to.value.begin() + first);
        std::copy(scale.begin(), scale.end(), to.scale.begin() + first);
      };
      v.assign(x.begin() + first, x.begin() + first + p.n);
      turn_head(p, t, b, s, p.inverse, v, scale);
      keep(turned);

      double squares = 0.0;
      for (std::int64_t c = 0; c < p.n; ++c) squares += x[first + c] * x[first + c];
      const double rstd = 1.0 / std::sqrt(squares / p.n + kRopeEps);
      for (std::int64_t c = 0; c < p.n; ++c) v[c] = x[first + c] * rstd * w[c];
      turn_head(p, t, b, s, false, v, scale);
      keep(normed);

      v.assign(dy.begin() + first, dy.begin() + first + p.n);
      turn_head(p, t, b, s, true, v, scale);
      double dot = 0.0, dot_scale = 0.0;
      for (std::int64_t c = 0; c < p.n; ++c) {
        dot += v[c] * w[c] * x[first + c] * rstd;
        dot_scale += std::abs(scale[c] * w[c] * x[first + c] * rstd);
      }
      for (std::int64_t c = 0; c < p.n; ++c) {
        const double xhat = x[first + c] * rstd;
        dx.value[first + c] = rstd * (v[c] * w[c] - xhat * dot / p.n);
        dx.scale[first + c] = rstd * (std::abs(scale[c] * w[c]) + std::abs(xhat) * dot_scale / p.n);
        dweight.value[c] += v[c] * xhat;
        dweight.scale[c] += std::abs(scale[c] * xhat);
      }
    }
    EXPECT_TRUE(close(t.turned[which], turned)) << "rope, " << which;
    EXPECT_TRUE(close(t.normed[which], normed)) << "qk_norm_rope, " << which;
    EXPECT_TRUE(close(t.dx[which], dx)) << "dx, " << which;
    if (!p.weights) continue;
    EXPECT_TRUE(close(t.dweight[which], dweight)) << "dweight, " << which;
  }
  for (const Tensor* output : t.outputs()) {
    if (!output->given()) continue;
    EXPECT_TRUE(output->gaps_intact());
  }
}

/// Every place, pairs of both kinds, tables of both widths, with k and without.
inline std::vector<RopeProblem> rope_problems(std::int64_t n, std::int64_t turned) {
  std::vector<RopeProblem> problems;
  unsigned i = 0;
  for (const DType dtype : kDTypes) {
    for (const bool interleaved : {false, true}) {
      for (int more = 0; more < 2; ++more, ++i) {
        RopeProblem p{.dtype = dtype, .table = kDTypes[i % 3], .n = n, .turned = turned};
        p.place = static_cast<Place>(i % 5);
        p.batch = p.place == Place::sequences ? 1 : 2;
        p.tokens = 5 + i % 3, p.heads = 1 + i % 7, p.k_heads = i % 3;
        p.interleaved = interleaved, p.inverse = i % 2, p.full = i / 2 % 2, p.weights = i % 4 != 3;
        problems.push_back(p);
      }
    }
  }
  return problems;
}

}  // namespace fastkern::test
