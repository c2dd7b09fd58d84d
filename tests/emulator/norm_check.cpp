// SPDX-License-Identifier: Apache-2.0
// cuda::norm and cuda::norm_bwd in the emulator against cpu::. A result may be off by a rounding
// and by a share of the terms it is a sum of, which are added up here in double precision.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "fastkern/philox.h"
#include "norm_case.h"

namespace emulator {

using namespace fastkern;

namespace {

using Doubles = std::vector<double>;

struct RowMoments {
  double mean, rstd;
  double noise;  // of (x - mean) * rstd, in units of the noise allowed

  double size(double x) const { return std::abs(x - mean) * rstd + noise; }
};

RowMoments moments_of(const NormCase& c, const double* row) {
  double sum = 0.0, squares = 0.0, largest = 0.0;
  for (std::int64_t i = 0; i < c.n; ++i) sum += row[i];
  const bool layer = c.kind == NormKind::layer;
  const double n = static_cast<double>(c.n), mean = layer ? sum / n : 0.0;
  for (std::int64_t i = 0; i < c.n; ++i) {
    squares += (row[i] - mean) * (row[i] - mean);
    largest = std::max(largest, std::abs(row[i]));
  }
  const double rstd = 1.0 / std::sqrt(squares / n + c.eps);
  return {mean, rstd, layer ? 0.25 * rstd * largest : 0.0};
}

/// Where the weights of a row begin.
std::int64_t head_of(const NormCase& c, std::int64_t row) {
  return c.heads > 0 ? row % c.heads * c.n : 0;
}

double at_or(const Doubles& values, std::int64_t i, double missing) {
  return values.empty() ? missing : values[i];
}

Doubles magnitudes(const Doubles& values) {
  Doubles sizes(values.size());
  std::transform(values.begin(), values.end(), sizes.begin(), [](double v) { return std::abs(v); });
  return sizes;
}

/// Sizes of the terms of norm(h) * weight + bias.
Doubles norm_terms(const NormCase& c, const Doubles& h, const Tensor& weight, const Tensor& bias) {
  const Doubles w = weight.values(), b = bias.values();
  Doubles terms(h.size());
  for (std::int64_t row = 0; row < c.m; ++row) {
    const RowMoments moments = moments_of(c, &h[row * c.n]);
    for (std::int64_t i = 0; i < c.n; ++i) {
      const std::int64_t e = row * c.n + i, at = head_of(c, row) + i;
      const double factor = w.empty() ? 1.0 : w[at] + c.weight_offset;
      terms[e] = moments.size(h[e]) * std::abs(factor) + std::abs(at_or(b, at, 0.0));
    }
  }
  return terms;
}

/// How many representable numbers lie between two of f8e4m3 or i8.
int steps_between(bool fp8, unsigned a, unsigned b) {
  const auto order = [fp8](unsigned bits) -> int {
    if (!fp8) return static_cast<std::int8_t>(bits);
    const int magnitude = static_cast<int>(bits & 127);
    return bits & 128 ? -magnitude : magnitude;
  };
  return std::abs(order(a) - order(b));
}

/// Quantised values may be the next one, where the number lies between two; few are.
void check_quantised(const NormCase& c, const ForwardCall& found, const ForwardCall& expected) {
  if (!c.static_scale()) {
    constexpr double kScaleNoise = 1e-5;
    expect_near("scale", found.scale, expected.scale, magnitudes(expected.scale.values()),
                kScaleNoise);
  }
  std::int64_t wrong = 0, first = -1, others = 0;
  for (std::int64_t e = 0; e < c.m * c.n; ++e) {
    const float a = found.y.get(e), b = expected.y.get(e);
    if (a == b || found.y.bits(e) == expected.y.bits(e)) continue;
    ++others;
    const int steps = steps_between(c.fp8(), found.y.bits(e), expected.y.bits(e));
    if (steps <= 1 && std::isnan(a) == std::isnan(b)) continue;
    if (wrong++ == 0) first = e;
  }
  if (wrong > 0) {
    fail_case("y", std::to_string(wrong) + " are wrong; the first, element " +
                       std::to_string(first) + ", is " + std::to_string(found.y.get(first)) +
                       ", expected " + std::to_string(expected.y.get(first)));
  }
  if (others > 3 + c.m * c.n / 200)
    fail_case("y", std::to_string(others) + " are rounded otherwise");
}

}  // namespace

void check_norm(const NormCase& c, bool same_bits) {
  ForwardCall found(c, false), expected(c, true);
  const Stream stream{nullptr, c.device};
  if (!run_guarded(found.tensors(), [&] { cuda::norm(found.args, stream); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    ForwardCall plain(c, true);
    run_guarded(plain.tensors(), [&] { cuda::norm(plain.args, stream); });
    expect_same_bits(found.tensors(), plain.tensors(),
                     {"y", "h", "y2", "scale", c.in_place ? "residual" : "h"});
  }

  // Before the call: it may be in place.
  const Doubles x = expected.x.values(), residual = expected.residual.values();
  const Doubles rowscale = expected.rowscale.values();
  cpu::norm(expected.args);

  const Tensor& h = c.in_place ? found.residual : found.h;
  if (c.stream) {
    Doubles terms(x.size());
    for (std::size_t e = 0; e < terms.size(); ++e) {
      const double scale = at_or(rowscale, static_cast<std::int64_t>(e) / c.n, 1.0);
      terms[e] = std::abs(x[e] * scale * dropout_scale(c.dropout)) +
                 std::abs(at_or(residual, static_cast<std::int64_t>(e), 0.0));
    }
    expect_near("h", h, c.in_place ? expected.residual : expected.h, terms);
    // y is a function of the rounded h: of the one that was found.
    NormFwd of_h = expected.args;
    of_h.x = h.ref();
    of_h.residual = of_h.h = of_h.rowscale = {}, of_h.dropout = {};
    cpu::norm(of_h);
  }
  if (c.quantised != Quantised::none) return check_quantised(c, found, expected);
  const Doubles normed = (c.stream ? h : found.x).values();
  expect_near("y", found.y, expected.y, norm_terms(c, normed, found.weight, found.bias));
  if (c.two)
    expect_near("y2", found.y2, expected.y2, norm_terms(c, normed, found.weight2, found.bias2));
}

void check_norm_bwd(const NormCase& c, bool same_bits) {
  BackwardCall found(c, false), expected(c, true);
  const Stream stream{nullptr, c.device};
  if (!run_guarded(found.tensors(), [&] { cuda::norm_bwd(found.args, stream); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    BackwardCall plain(c, true);
    run_guarded(plain.tensors(), [&] { cuda::norm_bwd(plain.args, stream); });
    expect_same_bits(found.tensors(), plain.tensors(),
                     {"dx", "dbranch", "dweight", "dbias", "dweight2", "dbias2"});
  }
  cpu::norm_bwd(expected.args);

  const std::int64_t n = c.n, weights = std::max<std::int64_t>(c.heads, 1) * n;
  const Doubles x = expected.x.values(), dh = expected.dh.values();
  const Doubles rowscale = expected.rowscale.values();
  const Doubles dy[2] = {expected.dy.values(), expected.dy2.values()};
  const Doubles w[2] = {expected.weight.values(), expected.weight2.values()};
  Doubles dx_terms(x.size()), dbranch_terms(x.size()), g(n);
  // Sums over many rows: their errors add up like random ones.
  Doubles dweight_squares[2] = {Doubles(weights), Doubles(weights)};
  Doubles dbias_squares[2] = {Doubles(weights), Doubles(weights)};
  for (std::int64_t row = 0; row < c.m; ++row) {
    const RowMoments moments = moments_of(c, &x[row * n]);
    double sum = 0.0, dot = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double xhat = moments.size(x[row * n + i]);
      const std::int64_t at = head_of(c, row) + i;
      g[i] = 0.0;
      for (int k = 0; k < 1 + c.two; ++k) {
        const double v = std::abs(dy[k][row * n + i]);
        g[i] += v * std::abs(w[k].empty() ? 1.0 : w[k][at] + c.weight_offset);
        dweight_squares[k][at] += v * xhat * v * xhat;
        dbias_squares[k][at] += v * v;
      }
      sum += g[i] / static_cast<double>(n), dot += g[i] * xhat / static_cast<double>(n);
    }
    const double branch = dropout_scale(c.dropout) * std::abs(at_or(rowscale, row, 1.0));
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t e = row * n + i;
      dx_terms[e] =
          moments.rstd * (g[i] + sum + moments.size(x[e]) * dot) + std::abs(at_or(dh, e, 0.0));
      dbranch_terms[e] = dx_terms[e] * branch;
    }
  }
  const auto sum_terms = [](Doubles squares) {
    for (double& v : squares) v = 2.0 * std::sqrt(v);
    return squares;
  };
  expect_near("dx", found.dx, expected.dx, dx_terms);
  expect_near("dbranch", found.dbranch, expected.dbranch, dbranch_terms);
  expect_near("dweight", found.dweight, expected.dweight, sum_terms(dweight_squares[0]));
  expect_near("dbias", found.dbias, expected.dbias, sum_terms(dbias_squares[0]));
  expect_near("dweight2", found.dweight2, expected.dweight2, sum_terms(dweight_squares[1]));
  expect_near("dbias2", found.dbias2, expected.dbias2, sum_terms(dbias_squares[1]));
}

}  // namespace emulator
