// SPDX-License-Identifier: Apache-2.0
// cpu::norm and cpu::norm_bwd against plain double loops.
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <sstream>
#include <thread>
#include <tuple>

#include "fastkern/norm.h"
#include "fastkern/philox.h"
#include "support.h"

namespace fastkern {
namespace {

using test::dense_layout;
using test::Expected;
using test::Layout;
using test::Sizes;
using test::Tensor;

constexpr double kEps = 1e-2;  // large enough that a missing one shows
constexpr double kP = 0.3;
constexpr std::int64_t kSeed = 0x123456789abcdef0, kOffset = -3;
constexpr std::int64_t kHeads = 2;

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
std::vector<Features> all_features() {
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
std::vector<Features> some_features() {
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
  DType of(int operand) const { return test::kDTypes[(first + operand * step) % 3]; }
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
NormFwd plain(NormKind kind, Tensor& x, Tensor& y, double eps = kEps) {
  NormFwd args;
  args.kind = kind, args.x = x.ref(), args.y = y.ref(), args.eps = eps;
  return args;
}

Expected expected_of(std::size_t size) {
  return {std::vector<double>(size), std::vector<double>(size)};
}

/// Element i of a parameter for row r.
std::size_t parameter_index(const Features& f, std::int64_t r, std::int64_t n, std::int64_t c) {
  return static_cast<std::size_t>((f.heads ? r % kHeads * n : 0) + c);
}

double keep(const Features& f, std::int64_t e) {
  if (!f.dropout) return 1.0;
  return dropout_keeps(kSeed, kOffset, e, dropout_threshold(kP)) ? 1.0 / (1.0 - kP) : 0.0;
}

Expected stream_reference(const Problem& p, const std::vector<double>& residual) {
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

RowStatistics statistics_of(const Features& f, const double* row, std::int64_t n) {
  const double mean = f.kind == NormKind::layer ? std::accumulate(row, row + n, 0.0) / n : 0.0;
  double squares = 0.0;
  for (std::int64_t c = 0; c < n; ++c) squares += (row[c] - mean) * (row[c] - mean);
  const double rstd = 1.0 / std::sqrt(squares / n + kEps);
  return {mean, rstd, f.kind == NormKind::layer ? 0.2 : 0.0};
}

Expected norm_reference(const Problem& p, const std::vector<double>& h, const Tensor& weight,
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

struct ExpectedGrads {
  Expected dx, dbranch;
  std::array<Expected, 2> dweight, dbias;
};

ExpectedGrads grads_reference(const Problem& p) {
  const std::vector<double> x = p.x.values(), dh = p.dh.values(), rowscale = p.rowscale.values();
  const std::vector<double> dy[2] = {p.dy.values(), p.dy2.values()};
  const std::vector<double> w[2] = {p.weight.values(), p.weight2.values()};
  ExpectedGrads out{expected_of(x.size()), expected_of(x.size()), {}, {}};
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

void expect_forward(Problem& p) {
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

void expect_backward(Problem& p) {
  const ExpectedGrads expected = grads_reference(p);
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

class NormCpu : public testing::TestWithParam<Mix> {
 protected:
  Mix mix() const { return GetParam(); }
};

std::string mix_name(const testing::TestParamInfo<Mix>& mix) {
  constexpr const char* kSteps[] = {"_alone", "_up", "_down"};
  return std::string(name_of(mix.param.of(0))) + kSteps[mix.param.step];
}

INSTANTIATE_TEST_SUITE_P(Mixes, NormCpu,
                         testing::Values(Mix{0, 0}, Mix{1, 0}, Mix{2, 0}, Mix{0, 1}, Mix{1, 1},
                                         Mix{2, 1}, Mix{0, 2}, Mix{1, 2}, Mix{2, 2}),
                         mix_name);

TEST_P(NormCpu, EveryCombinationOfFeatures) {
  for (const Features& f : all_features()) {
    SCOPED_TRACE(f.text());
    Problem p(f, mix(), 6, 45);
    expect_forward(p);
    expect_backward(p);
    if (HasFailure()) return;
  }
}

TEST_P(NormCpu, ShapesOfAllSorts) {
  const std::pair<std::int64_t, std::int64_t> shapes[] = {
      {1, 1},    {3, 5},    {6, 31},    {4, 32},     {5, 33},    {130, 7},
      {64, 257}, {2, 1000}, {200, 512}, {33, 2'049}, {1, 70'000}};
  for (const auto& [m, n] : shapes) {
    for (const Features& f : some_features()) {
      if (f.heads && m % kHeads != 0) continue;
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + " " + f.text());
      Problem p(f, mix(), m, n);
      expect_forward(p);
      expect_backward(p);
      if (HasFailure()) return;
    }
  }
}

TEST_P(NormCpu, AnyStridesGiveTheSameBits) {
  constexpr std::int64_t m = 6, n = 45;
  const std::vector<Layout> layouts = test::row_layouts(m, n);
  for (const Features& f : some_features()) {
    Problem expected(f, mix(), m, n);
    cpu::norm(expected.fwd());
    cpu::norm_bwd(expected.bwd());
    for (std::size_t shift = 0; shift < layouts.size(); ++shift) {
      Problem found(f, mix(), m, n, layouts, shift);
      cpu::norm(found.fwd());
      cpu::norm_bwd(found.bwd());
      for (std::size_t i = 0; i < found.outputs().size(); ++i) {
        if (!found.outputs()[i]->given()) continue;
        EXPECT_TRUE(found.outputs()[i]->gaps_intact());
        EXPECT_TRUE(found.outputs()[i]->same_bits(*expected.outputs()[i]))
            << f.text() << ", shift " << shift << ", output " << i;
      }
    }
  }
}

TEST_P(NormCpu, EachGradientAloneHasTheSameBits) {
  const Features f = some_features().back();
  Problem all(f, mix(), 37, 65), alone(f, mix(), 37, 65);
  cpu::norm_bwd(all.bwd());
  TensorRef NormBwd::* const gradients[] = {&NormBwd::dx,    &NormBwd::dbranch,  &NormBwd::dweight,
                                            &NormBwd::dbias, &NormBwd::dweight2, &NormBwd::dbias2};
  for (TensorRef NormBwd::* const wanted : gradients) {
    NormBwd args = alone.bwd();
    for (TensorRef NormBwd::* const other : gradients) {
      if (other != wanted) args.*other = {};
    }
    cpu::norm_bwd(args);
  }
  for (std::size_t i = 3; i < all.outputs().size(); ++i) {
    EXPECT_TRUE(alone.outputs()[i]->same_bits(*all.outputs()[i])) << "output " << i;
  }
}

TEST_P(NormCpu, TheNormOfTheStreamHasTheBitsOfTheNormOfH) {
  for (const Features& f : some_features()) {
    if (!f.stream) continue;
    Problem p(f, mix(), 12, 77);
    cpu::norm(p.fwd());
    Tensor y(p.y.dtype(), {12, 77}), y2 = y;
    NormFwd args = plain(f.kind, p.stream(), y);
    args.weight = p.weight.ref(), args.bias = p.bias.ref(), args.weight_offset = f.weight_offset;
    cpu::norm(args);
    EXPECT_TRUE(y.same_bits(p.y)) << f.text();
    if (!f.second) continue;
    args.weight = p.weight2.ref(), args.bias = p.bias2.ref(), args.y = y2.ref();
    cpu::norm(args);
    EXPECT_TRUE(y2.same_bits(p.y2)) << f.text();
  }
}

TEST_P(NormCpu, EachHeadHasTheBitsOfACallOfItsOwn) {
  constexpr std::int64_t m = 14, n = 40;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Problem p({.kind = kind, .weight = true, .bias = true, .heads = true}, mix(), m, n);
    cpu::norm(p.fwd());
    cpu::norm_bwd(p.bwd());
    const auto of_head = [&](const Tensor& t, std::int64_t head) {
      Tensor out(t.dtype(), {t.numel() / n / kHeads, n});
      for (std::int64_t e = 0; e < out.numel(); ++e) {
        out.set(e, t.get((e / n * kHeads + head) * n + e % n));
      }
      return out;
    };
    for (std::int64_t head = 0; head < kHeads; ++head) {
      Problem alone({.kind = kind, .weight = true, .bias = true}, mix(), m / kHeads, n);
      alone.x = of_head(p.x, head), alone.dy = of_head(p.dy, head);
      alone.weight.copy_from(of_head(p.weight, head)), alone.bias.copy_from(of_head(p.bias, head));
      cpu::norm(alone.fwd());
      cpu::norm_bwd(alone.bwd());
      EXPECT_TRUE(alone.y.same_bits(of_head(p.y, head)));
      EXPECT_TRUE(alone.dx.same_bits(of_head(p.dx, head)));
      EXPECT_TRUE(alone.dweight.same_bits(of_head(p.dweight, head)));
      EXPECT_TRUE(alone.dbias.same_bits(of_head(p.dbias, head)));
    }
  }
}

TEST_P(NormCpu, NoRowsOrNoColumns) {
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{0, 5}, {4, 0}, {0, 0}}) {
    for (const Features& f : some_features()) {
      Problem p(f, mix(), m, n);
      cpu::norm(p.fwd());
      cpu::norm_bwd(p.bwd());
      for (const Tensor* t : p.outputs()) EXPECT_TRUE(t->gaps_intact());
      for (const Tensor* t : {&p.dweight, &p.dbias, &p.dweight2, &p.dbias2}) {
        for (const double v : t->values()) EXPECT_EQ(v, 0.0);
      }
    }
  }
}

int pieces = 1;
int calls = 0;

/// `pieces` unequal parts, on threads of their own.
void split(std::int64_t count, std::int64_t, ParallelBody body, void* context) {
  ++calls;
  const int parts = static_cast<int>(std::min<std::int64_t>(pieces, count));
  const auto cut = [&](std::int64_t i) {
    return i == parts ? count : count * i * i / (parts * parts);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < parts; ++i)
    threads.emplace_back([&, i] { body(context, cut(i), cut(i + 1)); });
  for (std::thread& thread : threads) thread.join();
}

TEST_P(NormCpu, ThreadsDoNotChangeTheResult) {
  constexpr std::int64_t m = 302, n = 640;
  for (const Features& f : some_features()) {
    Problem expected(f, mix(), m, n);
    cpu::norm(expected.fwd());
    cpu::norm_bwd(expected.bwd());
    set_parallel_for(split);
    for (const int count : {1, 3, 7, 1000}) {
      pieces = count;
      calls = 0;
      Problem found(f, mix(), m, n);
      cpu::norm(found.fwd());
      cpu::norm_bwd(found.bwd());
      EXPECT_GE(calls, 2);
      for (std::size_t i = 0; i < found.outputs().size(); ++i) {
        if (!found.outputs()[i]->given()) continue;
        EXPECT_TRUE(found.outputs()[i]->same_bits(*expected.outputs()[i]))
            << f.text() << ", " << count << " pieces, output " << i;
      }
    }
    set_parallel_for(nullptr);
  }
}

TEST_P(NormCpu, DroppedElementsAreZeroWhateverTheyWere) {
  for (const std::int64_t n : {45, 64, 130}) {
    Features f{.stream = true, .dropout = true};
    Problem p(f, mix(), 5, n);
    for (std::int64_t e = 0; e < p.x.numel(); ++e) {
      const double v = e % 2 == 0 ? std::nan("") : std::numeric_limits<double>::infinity();
      if (keep(f, e) == 0.0) p.x.set(e, v);
    }
    expect_forward(p);
    for (std::int64_t e = 0; e < p.x.numel(); ++e) {
      if (keep(f, e) == 0.0) {
        ASSERT_EQ(p.h.get(e), 0.0) << e;
      }
    }
  }
}

TEST_P(NormCpu, DropoutOfEverythingLeavesTheResidual) {
  Problem p({.stream = true, .residual = true, .dropout = true}, mix(), 4, 33);
  NormFwd args = p.fwd();
  args.dropout.p = 1.0;
  cpu::norm(args);
  Tensor rounded(p.h.dtype(), {4, 33});
  EXPECT_TRUE(p.h.same_bits(rounded.copy_from(p.residual)));
}

/// Quantised outputs lie in plain bytes: `Tensor` holds numbers that are computed with.
struct Quantised {
  std::vector<std::uint8_t> codes;
  std::vector<float> scale;
};

Quantised quantise(Problem& p, DType dtype, std::optional<float> static_scale = std::nullopt) {
  Quantised q{std::vector<std::uint8_t>(p.m * p.n, 0x55), std::vector<float>(p.m, -1.0f)};
  if (static_scale) q.scale = {*static_scale};
  NormFwd args = p.fwd();
  args.y = dense(q.codes.data(), dtype, p.m, p.n);
  args.scale = dense(q.scale.data(), DType::f32, q.scale.size());
  args.static_scale = static_scale.has_value();
  cpu::norm(args);
  return q;
}

std::uint8_t code_of(DType dtype, float v) {
  return dtype == DType::f8e4m3 ? from_float<f8e4m3>(v).bits
                                : static_cast<std::uint8_t>(from_float<i8>(v));
}

TEST_P(NormCpu, QuantisedOutputIsTheF32OutputRoundedOnce) {
  for (const DType dtype : {DType::f8e4m3, DType::i8}) {
    const float largest = dtype == DType::f8e4m3 ? 448.0f : 127.0f;
    for (Features f : some_features()) {
      if (f.second) f.second = f.in_place = false;
      Problem p(f, mix(), 8, 173);
      p.y = Tensor(DType::f32, {p.m, p.n});
      cpu::norm(p.fwd());
      const std::vector<double> y = p.y.values();
      const Quantised dynamic = quantise(p, dtype), fixed = quantise(p, dtype, 0.013f);
      EXPECT_EQ(fixed.scale[0], 0.013f);
      for (std::int64_t r = 0; r < p.m; ++r) {
        float max = 0.0f;
        for (std::int64_t c = 0; c < p.n; ++c) {
          max = std::max(max, std::abs(static_cast<float>(y[r * p.n + c])));
        }
        ASSERT_EQ(dynamic.scale[r], max / largest) << f.text();
        for (std::int64_t e = r * p.n; e < (r + 1) * p.n; ++e) {
          const float v = static_cast<float>(y[e]);
          ASSERT_EQ(dynamic.codes[e], code_of(dtype, v * (largest / max))) << f.text() << e;
          ASSERT_EQ(fixed.codes[e], code_of(dtype, v * (1.0f / 0.013f))) << f.text() << e;
        }
      }
    }
  }
}

TEST_P(NormCpu, QuantisedZeroNanAndTinyRows) {
  Problem p({}, mix(), 4, 50);
  for (std::int64_t c = 0; c < p.n; ++c) p.x.set(c, 0.0), p.x.set(2 * p.n + c, 0.0);
  p.x.set(1 * p.n + 7, std::nan(""));
  p.x.set(2 * p.n + 7, 0x1p-24);
  for (const DType dtype : {DType::f8e4m3, DType::i8}) {
    const Quantised q = quantise(p, dtype);
    EXPECT_EQ(q.scale[0], 0.0f);
    EXPECT_TRUE(std::isnan(q.scale[1]));
    EXPECT_GT(q.scale[2], 0.0f);
    EXPECT_TRUE(std::isfinite(q.scale[3]));
    const std::uint8_t top = dtype == DType::f8e4m3 ? 0x7e : 127;
    for (std::int64_t c = 0; c < p.n; ++c) {
      EXPECT_EQ(q.codes[c], 0);
      EXPECT_EQ(q.codes[p.n + c] & 0x7f, dtype == DType::f8e4m3 ? 0x7f : 0);
      EXPECT_EQ(q.codes[2 * p.n + c], c == 7 ? top : 0);
    }
  }
}

TEST(NormCpuEdge, EpsIsInsideTheRoot) {
  Tensor x(DType::f32, {1, 4}), y(DType::f32, {1, 4});
  for (int i = 0; i < 4; ++i) x.set(i, 1.0);
  cpu::norm(plain(NormKind::rms, x, y, 3.0));
  for (int i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(static_cast<float>(y.get(i)), 0.5f);
}

TEST(NormCpuEdge, ConstantRowsGiveTheBias) {
  for (const DType dtype : test::kDTypes) {
    Tensor x(dtype, {2, 1000}), bias = Tensor(DType::f32, {1000}).fill(1), y(DType::f32, {2, 1000});
    for (int i = 0; i < 2000; ++i) x.set(i, i < 1000 ? 0.0 : 12345.678);
    NormFwd args = plain(NormKind::layer, x, y, 1e-12);
    args.bias = bias.ref();
    cpu::norm(args);
    for (int i = 0; i < 2000; ++i) ASSERT_EQ(y.get(i), bias.get(i % 1000)) << i;
  }
}

// One ulp of the mean is a thousandth of the deviation here.
TEST(NormCpuEdge, LayerNormOfRowsFarFromZero) {
  for (const std::int64_t n : {100, 4096, 100'000}) {
    Problem p({.kind = NormKind::layer, .weight = true}, {0, 0}, 2, n);
    p.x.fill(3, 1e4);
    cpu::norm(p.fwd());
    const std::vector<double> expected = norm_reference(p, p.x.values(), p.weight, p.bias).value;
    for (std::int64_t e = 0; e < 2 * n; ++e) {
      ASSERT_NEAR(p.y.get(e), expected[e], 1e-6 * (1 + std::abs(expected[e])));
    }
    const std::vector<double> dx = grads_reference(p).dx.value;
    cpu::norm_bwd(p.bwd());
    for (std::int64_t e = 0; e < 2 * n; ++e) {
      ASSERT_NEAR(p.dx.get(e), dx[e], 2e-6 * (1 + std::abs(dx[e])));
    }
  }
}

// Statistics start from the mean of the first columns, which says nothing about the row here.
TEST(NormCpuEdge, LayerNormOfRowsThatBeginUnlikeTheRest) {
  constexpr std::int64_t n = 3000;
  for (const int odd_columns : {1, 16, 32, 33, 500}) {
    for (const double step : {0.5, 3.0, 1e2, 1e4, 1e6}) {
      Problem p({.kind = NormKind::layer, .weight = true}, {0, 0}, 2, n);
      for (std::int64_t c = 0; c < odd_columns; ++c) {
        p.x.set(c, p.x.get(c) + step);
        p.x.set(n + c, p.x.get(n + c) - step);
      }
      SCOPED_TRACE(std::to_string(odd_columns) + " columns off by " + std::to_string(step));
      expect_forward(p);
      expect_backward(p);
    }
  }
}

TEST(NormCpuEdge, NanAndInfinityStayInTheirRows) {
  constexpr std::int64_t m = 5, n = 70;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Tensor x = Tensor(DType::bf16, {m, n}).fill(1), clean(DType::bf16, {m, n}), y = clean;
    NormFwd args = plain(kind, x, clean);
    cpu::norm(args);
    x.set(1 * n + 3, std::nan(""));
    x.set(3 * n + 69, std::numeric_limits<double>::infinity());
    args.y = y.ref();
    cpu::norm(args);
    for (std::int64_t i = 0; i < m * n; ++i) {
      const std::int64_t row = i / n;
      if (row == 1 || i == 3 * n + 69 || (row == 3 && kind == NormKind::layer)) {
        EXPECT_TRUE(std::isnan(y.get(i))) << i;
      } else {
        EXPECT_EQ(y.get(i), row == 3 ? 0.0 : clean.get(i)) << i;
      }
    }
  }
}

TEST(NormCpuEdge, ZeroRowsWithoutEpsAreNanAndStayAlone) {
  constexpr std::int64_t m = 130, n = 70, zero = 77;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Problem p({.kind = kind, .weight = true}, {0, 0}, m, n);
    for (std::int64_t c = 0; c < n; ++c) p.x.set(zero * n + c, 0.0);
    NormFwd fwd = p.fwd();
    NormBwd bwd = p.bwd();
    fwd.eps = bwd.eps = 0.0;
    cpu::norm(fwd);
    cpu::norm_bwd(bwd);
    for (std::int64_t e = 0; e < m * n; ++e) {
      ASSERT_EQ(std::isnan(p.y.get(e)), e / n == zero) << e;
      ASSERT_EQ(std::isnan(p.dx.get(e)), e / n == zero) << e;
    }
    for (const double v : p.dweight.values()) ASSERT_TRUE(std::isnan(v));
  }
}

TEST(NormCpuEdge, LargeF16SumsDoNotOverflow) {
  constexpr std::int64_t n = 4096;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    Tensor x(DType::f16, {1, n}), y(DType::f16, {1, n});
    for (std::int64_t i = 0; i < n; ++i) x.set(i, i % 2 ? 60000.0 : -60000.0);
    cpu::norm(plain(kind, x, y));
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(y.get(i), i % 2 ? 1.0 : -1.0);
  }
}

TEST(NormCpuEdge, RefusedStridesNameTheOpAndTheArgument) {
  const Features f = some_features().back();
  Tensor bad(DType::f32, {"", {4, 8}, {1, 4}});
  const std::pair<const char*, TensorRef NormFwd::*> forward[] = {{"x", &NormFwd::x},
                                                                  {"y", &NormFwd::y},
                                                                  {"residual", &NormFwd::residual},
                                                                  {"h", &NormFwd::h},
                                                                  {"y2", &NormFwd::y2}};
  for (const auto& [name, member] : forward) {
    Problem p(f, {0, 0}, 4, 8);
    NormFwd args = p.fwd();
    args.op = "fastkern::some_norm";
    args.*member = bad.ref();
    EXPECT_TRUE(test::contains(test::error_of([&] { cpu::norm(args); }),
                               std::string("fastkern::some_norm: ") + name + " must"));
  }
  const std::pair<const char*, TensorRef NormBwd::*> backward[] = {
      {"dy", &NormBwd::dy}, {"x", &NormBwd::x},     {"dx", &NormBwd::dx},
      {"dh", &NormBwd::dh}, {"dy2", &NormBwd::dy2}, {"dbranch", &NormBwd::dbranch}};
  for (const auto& [name, member] : backward) {
    Problem p(f, {0, 0}, 4, 8);
    NormBwd args = p.bwd();
    args.op = "fastkern::some_norm_bwd";
    args.*member = bad.ref();
    EXPECT_TRUE(test::contains(test::error_of([&] { cpu::norm_bwd(args); }),
                               std::string("fastkern::some_norm_bwd: ") + name + " must"));
  }
}

TEST(NormCpuEdge, EveryHeadHasTheSameNumberOfRows) {
  Problem p({.weight = true, .heads = true}, {0, 0}, 3, 8);
  EXPECT_TRUE(test::contains(test::error_of([&] { cpu::norm_bwd(p.bwd()); }), "heads"));
}

TEST(NormCpuEdge, OneScaleDoesNotServeTwoOutputs) {
  Problem p({.second = true}, {0, 0}, 2, 8);
  EXPECT_TRUE(test::contains(test::error_of([&] { quantise(p, DType::i8); }), "y2"));
}

}  // namespace
}  // namespace fastkern
