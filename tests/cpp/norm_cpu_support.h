// SPDX-License-Identifier: Apache-2.0
// What the tests of cpu::norm and cpu::norm_bwd share: calls with every feature, and plain double
// loops that say what must come out.
#pragma once

#include <array>
#include <numeric>
#include <sstream>
#include <utility>

#include "fastkern/norm.h"
#include "fastkern/philox.h"
#include "support.h"

namespace fastkern::test {

inline constexpr double kEps = 1e-2;  // large enough that a missing one shows
inline constexpr double kP = 0.3;
inline constexpr std::int64_t kSeed = 0x123456789abcdef0, kOffset = -3;
inline constexpr std::int64_t kHeads = 2;

/// What a call has beyond x and y.
struct Features {
  NormKind kind = NormKind::rms;
  bool weight = false, bias = false, heads = false, second = false;
  bool stream = false, residual = false, in_place = false, rowscale = false, dropout = false;
  double weight_offset = 0.0;

  std::string text() const {
    std::ostringstream out;
    out << (kind == NormKind::rms ? "rms" : "layer");
    const std::pair<const char*, bool> flags[] = {
        {" weight", weight},     {" bias", bias},         {" heads", heads},
        {" second", second},     {" stream", stream},     {" residual", residual},
        {" in place", in_place}, {" rowscale", rowscale}, {" dropout", dropout}};
    for (const auto& [name, on] : flags) out << (on ? name : "");
    out << " offset " << weight_offset;
    return out.str();
  }
};

/// Every sensible combination.
inline std::vector<Features> all_features() {
  std::vector<Features> all;
  for (int bits = 0; bits < 1024; ++bits) {
    const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
    Features f{.kind = bit(0) ? NormKind::layer : NormKind::rms,
               .weight = bit(1),
               .bias = bit(2),
               .heads = bit(3),
               .second = bit(4),
               .stream = bit(5),
               .residual = bit(6),
               .in_place = bit(7),
               .rowscale = bit(8),
               .dropout = bit(9),
               .weight_offset = bit(1) && bit(2) ? 1.0 : 0.0};
    if (!f.stream && (f.residual || f.rowscale || f.dropout)) continue;
    if (f.in_place && !f.residual) continue;
    if (f.heads && !f.weight && !f.bias) continue;
    all.push_back(f);
  }
  return all;
}

/// The features one by one and all together.
inline std::vector<Features> some_features() {
  std::vector<Features> some;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    some.push_back({.kind = kind});
    some.push_back({.kind = kind, .weight = true, .bias = true});
    some.push_back({.kind = kind, .weight = true, .heads = true});
    some.push_back({.kind = kind, .weight = true, .stream = true, .residual = true});
    some.push_back({.kind = kind,
                    .weight = true,
                    .bias = true,
                    .second = true,
                    .stream = true,
                    .residual = true,
                    .in_place = true,
                    .rowscale = true,
                    .dropout = true,
                    .weight_offset = 1.0});
  }
  return some;
}

/// Operand k of a call has type kDTypes[(first + k * step) % 3].
struct Mix {
  int first, step;
  DType of(int operand) const { return kDTypes[(first + operand * step) % 3]; }
};

/// The tensors of one forward and one backward call. Not given where the features leave them out.
struct Problem {
  Problem(const Features& f, const Mix& mix, std::int64_t m, std::int64_t n)
      : Problem(f, mix, m, n, {dense_layout({m, n})}) {}

  /// Row tensors take the layouts in turn.
  Problem(const Features& f, const Mix& mix, std::int64_t m, std::int64_t n,
          const std::vector<Layout>& layouts, std::size_t shift = 0)
      : f(f), m(m), n(n) {
    std::size_t next = shift;
    int operand = 0;
    const auto rows = [&](bool given, unsigned seed) {
      const DType dtype = mix.of(operand++);
      const Layout& layout = layouts[next++ * (shift + 1) % layouts.size()];
      Tensor t = given ? Tensor(dtype, layout) : Tensor();
      return seed == 0 ? t : t.fill(seed, f.kind == NormKind::layer ? 0.7 : 0.0);
    };
    const auto parameter = [&](bool given, unsigned seed) {
      const Sizes sizes = f.heads ? Sizes{kHeads, n} : Sizes{n};
      const DType dtype = mix.of(operand++);
      Tensor t = given ? Tensor(dtype, sizes) : Tensor();
      return seed == 0 ? t : t.fill(seed, 1.0);
    };
    x = rows(true, 1);
    weight = parameter(f.weight, 2), bias = parameter(f.bias, 3);
    y = rows(true, 0);
    residual = rows(f.residual, 4);
    h = rows(f.stream && !f.in_place, 0);
    rowscale = f.rowscale ? Tensor(mix.of(operand++), {m}).fill(5, 1.0) : Tensor();
    weight2 = parameter(f.second && f.weight, 6), bias2 = parameter(f.second && f.bias, 7);
    const DType y_dtype = y.dtype();
    y2 = f.second ? Tensor(y_dtype, layouts[next++ % layouts.size()]) : Tensor();
    dy = rows(true, 8), dy2 = rows(f.second, 9), dh = rows(f.stream, 10);
    dx = rows(true, 0), dbranch = rows(f.stream, 0);
    dweight = parameter(f.weight, 0), dbias = parameter(f.bias, 0);
    dweight2 = parameter(f.second && f.weight, 0), dbias2 = parameter(f.second && f.bias, 0);
  }

  Dropout dropout() const { return {f.dropout ? kP : 0.0, &kSeed, &kOffset}; }

  NormFwd fwd() {
    return {.kind = f.kind,
            .x = x.ref(),
            .weight = weight.ref(),
            .bias = bias.ref(),
            .y = y.ref(),
            .eps = kEps,
            .weight_offset = f.weight_offset,
            .residual = residual.ref(),
            .h = f.in_place ? residual.ref() : h.ref(),
            .rowscale = rowscale.ref(),
            .dropout = dropout(),
            .weight2 = weight2.ref(),
            .bias2 = bias2.ref(),
            .y2 = y2.ref(),
            .scale = {},
            .static_scale = false};
  }

  NormBwd bwd() {
    return {.kind = f.kind,
            .dy = dy.ref(),
            .x = x.ref(),
            .weight = weight.ref(),
            .eps = kEps,
            .weight_offset = f.weight_offset,
            .dx = dx.ref(),
            .dweight = dweight.ref(),
            .dbias = dbias.ref(),
            .dh = dh.ref(),
            .dbranch = dbranch.ref(),
            .rowscale = rowscale.ref(),
            .dropout = dropout(),
            .dy2 = dy2.ref(),
            .weight2 = weight2.ref(),
            .dweight2 = dweight2.ref(),
            .dbias2 = dbias2.ref()};
  }

  Tensor& stream() { return f.in_place ? residual : h; }
  std::vector<Tensor*> outputs() {
    return {&y, &y2, &stream(), &dx, &dbranch, &dweight, &dbias, &dweight2, &dbias2};
  }

  Features f;
  std::int64_t m, n;
  Tensor x, weight, bias, y, residual, h, rowscale, weight2, bias2, y2;
  Tensor dy, dy2, dh, dx, dbranch, dweight, dbias, dweight2, dbias2;
};

/// A call without any of them.
inline NormFwd plain(NormKind kind, Tensor& x, Tensor& y, double eps = kEps) {
  NormFwd args;
  args.kind = kind, args.x = x.ref(), args.y = y.ref(), args.eps = eps;
  return args;
}

inline Expected expected_of(std::size_t size) {
  return {std::vector<double>(size), std::vector<double>(size)};
}

/// Element i of a parameter for row r.
inline std::size_t parameter_index(const Features& f, std::int64_t r, std::int64_t n,
                                   std::int64_t c) {
  return static_cast<std::size_t>((f.heads ? r % kHeads * n : 0) + c);
}

inline double keep(const Features& f, std::int64_t e) {
  if (!f.dropout) return 1.0;
  return dropout_keeps(kSeed, kOffset, e, dropout_threshold(kP)) ? 1.0 / (1.0 - kP) : 0.0;
}

inline Expected stream_reference(const Problem& p, const std::vector<double>& residual) {
  const std::vector<double> x = p.x.values(), rowscale = p.rowscale.values();
  Expected h = expected_of(x.size());
  for (std::size_t e = 0; e < x.size(); ++e) {
    const double scale = rowscale.empty() ? 1.0 : rowscale[e / p.n];
    const double before = residual.empty() ? 0.0 : residual[e];
    const double branch = keep(p.f, e) == 0.0 ? 0.0 : x[e] * keep(p.f, e) * scale;
    h.value[e] = before + branch;
    h.scale[e] = std::abs(before) + std::abs(branch);
  }
  return h;
}

/// `noise`: what f32 may be off in xhat beside its relative error. A mean has that of all elements.
struct RowStatistics {
  double mean, rstd, noise;
};

inline RowStatistics statistics_of(const Features& f, const double* row, std::int64_t n) {
  const double mean = f.kind == NormKind::layer ? std::accumulate(row, row + n, 0.0) / n : 0.0;
  double squares = 0.0;
  for (std::int64_t c = 0; c < n; ++c) squares += (row[c] - mean) * (row[c] - mean);
  const double rstd = 1.0 / std::sqrt(squares / n + kEps);
  return {mean, rstd, f.kind == NormKind::layer ? 0.2 : 0.0};
}

inline Expected norm_reference(const Problem& p, const std::vector<double>& h, const Tensor& weight,
                               const Tensor& bias) {
  const std::vector<double> w = weight.values(), b = bias.values();
  Expected y = expected_of(h.size());
  for (std::int64_t r = 0; r < p.m; ++r) {
    const RowStatistics s = statistics_of(p.f, &h[r * p.n], p.n);
    for (std::int64_t c = 0; c < p.n; ++c) {
      const std::size_t i = parameter_index(p.f, r, p.n, c), e = r * p.n + c;
      const double xhat = (h[e] - s.mean) * s.rstd;
      const double factor = w.empty() ? 1.0 : w[i] + p.f.weight_offset;
      const double shift = b.empty() ? 0.0 : b[i];
      y.value[e] = xhat * factor + shift;
      y.scale[e] = (std::abs(xhat) + s.noise) * std::abs(factor) + std::abs(shift);
    }
  }
  return y;
}

struct ExpectedNormGrads {
  Expected dx, dbranch;
  std::array<Expected, 2> dweight, dbias;
};

inline ExpectedNormGrads grads_reference(const Problem& p) {
  const std::vector<double> x = p.x.values(), dh = p.dh.values(), rowscale = p.rowscale.values();
  const std::vector<double> dy[2] = {p.dy.values(), p.dy2.values()};
  const std::vector<double> w[2] = {p.weight.values(), p.weight2.values()};
  ExpectedNormGrads out{expected_of(x.size()), expected_of(x.size()), {}, {}};
  const std::int64_t n = p.n, size = p.f.heads ? kHeads * n : n;
  for (int k = 0; k < 2; ++k) out.dweight[k] = expected_of(size), out.dbias[k] = expected_of(size);
  for (std::int64_t r = 0; r < p.m; ++r) {
    const RowStatistics s = statistics_of(p.f, &x[r * n], n);
    std::vector<double> g(n), xhat(n);
    double sum = 0.0, dot = 0.0, sum_scale = 0.0, dot_scale = 0.0;
    for (std::int64_t c = 0; c < n; ++c) {
      const std::size_t i = parameter_index(p.f, r, n, c), e = r * n + c;
      xhat[c] = (x[e] - s.mean) * s.rstd;
      for (int k = 0; k < 2; ++k) {
        if (dy[k].empty()) continue;
        g[c] += dy[k][e] * (w[k].empty() ? 1.0 : w[k][i] + p.f.weight_offset);
        out.dweight[k].value[i] += dy[k][e] * xhat[c];
        out.dweight[k].scale[i] += std::abs(dy[k][e]) * (std::abs(xhat[c]) + s.noise);
        out.dbias[k].value[i] += dy[k][e];
        out.dbias[k].scale[i] += std::abs(dy[k][e]);
      }
      sum += g[c], sum_scale += std::abs(g[c]);
      dot += g[c] * xhat[c], dot_scale += std::abs(g[c] * xhat[c]);
    }
    const bool layer = p.f.kind == NormKind::layer;
    for (std::int64_t c = 0; c < n; ++c) {
      const std::size_t e = r * n + c;
      const double more = dh.empty() ? 0.0 : dh[e];
      const double factor = keep(p.f, e) * (rowscale.empty() ? 1.0 : rowscale[r]);
      out.dx.value[e] = s.rstd * (g[c] - (layer ? sum / n : 0.0) - xhat[c] * dot / n) + more;
      out.dx.scale[e] = s.rstd * (std::abs(g[c]) + sum_scale / n +
                                  (std::abs(xhat[c]) + s.noise) * dot_scale / n) +
                        std::abs(more);
      out.dbranch.value[e] = out.dx.value[e] * factor;
      out.dbranch.scale[e] = out.dx.scale[e] * std::abs(factor);
    }
  }
  return out;
}

inline void expect_forward(Problem& p) {
  const std::vector<double> residual = p.residual.values();
  cpu::norm(p.fwd());
  if (p.f.stream) {
    EXPECT_TRUE(close(p.stream(), stream_reference(p, residual)));
  }
  const std::vector<double> h = p.f.stream ? p.stream().values() : p.x.values();
  EXPECT_TRUE(close(p.y, norm_reference(p, h, p.weight, p.bias)));
  if (p.f.second) {
    EXPECT_TRUE(close(p.y2, norm_reference(p, h, p.weight2, p.bias2)));
  }
  for (const Tensor* t : p.outputs()) EXPECT_TRUE(t->gaps_intact());
}

inline void expect_backward(Problem& p) {
  const ExpectedNormGrads expected = grads_reference(p);
  cpu::norm_bwd(p.bwd());
  EXPECT_TRUE(close(p.dx, expected.dx));
  if (p.f.stream) {
    EXPECT_TRUE(close(p.dbranch, expected.dbranch));
  }
  const Tensor *dweight[] = {&p.dweight, &p.dweight2}, *dbias[] = {&p.dbias, &p.dbias2};
  for (int k = 0; k < 2; ++k) {
    if (dweight[k]->given()) {
      EXPECT_TRUE(close(*dweight[k], expected.dweight[k])) << k;
    }
    if (dbias[k]->given()) {
      EXPECT_TRUE(close(*dbias[k], expected.dbias[k])) << k;
    }
  }
  for (const Tensor* t : p.outputs()) EXPECT_TRUE(t->gaps_intact());
}

}  // namespace fastkern::test
