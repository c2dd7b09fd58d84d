// SPDX-License-Identifier: Apache-2.0
// What the tests of the row norms on CUDA share: a call as data, its operands here and there, and
// how far its results may lie from the CPU's.
#pragma once

#include <array>
#include <deque>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>

#include "fastkern/norm.h"
#include "fastkern/philox.h"
#include "support.cuh"

namespace fastkern::test {

inline constexpr double kEps = 1e-2;  // large enough that a missing one shows
inline constexpr std::int64_t kSeed = 0x123456789abcdef0, kOffset = -3;

struct Types {
  DType x;       // and of the gradient of the branch
  DType stream;  // residual and h, and their gradients
  DType y;       // and of dy
  DType weight;  // weights, biases and their gradients
};
constexpr Types all_of(DType t) { return {t, t, t, t}; }

inline constexpr Types kMixes[] = {
    {DType::bf16, DType::f32, DType::bf16, DType::f32},
    {DType::bf16, DType::bf16, DType::f32, DType::bf16},
    {DType::f16, DType::bf16, DType::f32, DType::f16},
    {DType::f32, DType::f16, DType::bf16, DType::bf16},
};

inline std::vector<Types> some_types() {
  return {all_of(DType::f32), all_of(DType::f16), all_of(DType::bf16), kMixes[0], kMixes[1]};
}

/// A call of forward, or of backward.
struct Case {
  NormKind kind = NormKind::rms;
  std::int64_t m = 1, n = 1;
  Types types = all_of(DType::f32);
  bool weight = true, bias = false;
  std::int64_t heads = 0;                                                     // 0: vectors of (N)
  bool two = false;                                                           // outputs
  bool stream = false, residual = false, in_place = false, rowscale = false;  // forward
  bool dh = false, dbranch = false;                                           // backward
  double p = 0.0, weight_offset = 0.0, eps = kEps;

  bool drops() const { return p > 0.0 || rowscale; }
  std::string text() const {
    std::ostringstream out;
    out << (kind == NormKind::rms ? "rms " : "layer ") << m << " x " << n << ", x "
        << name_of(types.x) << ", stream " << name_of(types.stream) << ", y " << name_of(types.y)
        << ", weight " << name_of(types.weight);
    const std::pair<const char*, bool> flags[] = {
        {"weight", weight}, {"bias", bias},         {"two", two},
        {"stream", stream}, {"residual", residual}, {"in place", in_place},
        {"dh", dh},         {"dbranch", dbranch},   {"rowscale", rowscale}};
    for (const auto& [name, on] : flags) out << (on ? ", " : "") << (on ? name : "");
    out << ", heads " << heads << ", p " << p << ", weight offset " << weight_offset;
    return out.str();
  }
};

/// How the operands of a call lie in memory: row tensors take the layouts in turn.
struct Arrangement {
  std::vector<Layout> rows;  // none: dense
  std::size_t shift = 0;
  std::int64_t vector_offset = 0;  // elements between an aligned address and weights
};

/// Gives out operands of a call in host memory.
struct OnHost {
  TensorRef in(Tensor& t) { return t.ref(); }
  TensorRef out(Tensor& t) { return t.ref(); }
  const std::int64_t* number(const std::int64_t& v) { return &v; }
};

/// The same in device memory.
class OnDevice {
 public:
  TensorRef in(Tensor& t) { return bring(t, false); }
  TensorRef out(Tensor& t) { return bring(t, true); }
  const std::int64_t* number(std::int64_t v) {
    numbers_.emplace_back(std::vector<std::int64_t>{v});
    return numbers_.back().data();
  }
  /// Brings outputs back; nothing else may have been written.
  void finish() {
    cuda_ok(cudaDeviceSynchronize(), "the call");
    int i = 0;
    for (const Entry& e : entries_) {
      Tensor now = e.device.download();
      if (e.output) {
        EXPECT_TRUE(now.gaps_intact()) << "operand " << i;
        *e.host = std::move(now);
      } else {
        EXPECT_TRUE(now.bytes() == e.host->bytes()) << "operand " << i << " was written";
      }
      ++i;
    }
  }

 private:
  struct Entry {
    Tensor* host;
    DeviceTensor device;
    bool output;
  };
  TensorRef bring(Tensor& t, bool output) {
    if (!t.given()) return {};
    entries_.push_back({&t, DeviceTensor(t), output});
    return entries_.back().device.ref();
  }
  std::deque<Entry> entries_;
  std::deque<DeviceArray<std::int64_t>> numbers_;
};

/// Makes the operands of a call, in the order in which they are asked for.
class Maker {
 public:
  Maker(const Case& c, const Arrangement& how) : c_(c), how_(how) {}

  /// Filled from `seed`, around `mean`; seed 0: an output, NaN.
  Tensor rows(bool given, DType dtype, unsigned seed, double mean = 0.0) {
    const std::size_t turn = next_++ * (how_.shift + 1) + how_.shift;
    if (!given) return {};
    Tensor t(dtype,
             how_.rows.empty() ? dense_layout({c_.m, c_.n}) : how_.rows[turn % how_.rows.size()]);
    if (seed > 0) t.fill(seed, mean);
    return t;
  }
  Tensor vector(bool given, unsigned seed) {
    if (!given) return {};
    const Sizes sizes = c_.heads > 0 ? Sizes{c_.heads, c_.n} : Sizes{c_.n};
    Tensor t(c_.types.weight, dense_layout(sizes, how_.vector_offset));
    if (seed > 0) t.fill(seed, 1.0 - c_.weight_offset);
    return t;
  }
  Tensor rowscale() {
    if (!c_.rowscale) return {};
    return Tensor(c_.types.x, dense_layout({c_.m}, how_.vector_offset)).fill(5, 1.0);
  }

 private:
  const Case& c_;
  const Arrangement& how_;
  std::size_t next_ = 0;
};

struct ForwardCall {
  explicit ForwardCall(const Case& call, const Arrangement& how = {}) : c(call) {
    Maker make(c, how);
    const double mean = c.kind == NormKind::layer ? 0.7 : 0.0;
    x = make.rows(true, c.types.x, 1, mean), y = make.rows(true, c.types.y, 0);
    residual = make.rows(c.residual, c.types.stream, 2, mean);
    h = make.rows(c.stream && !c.in_place, c.types.stream, 0);
    y2 = make.rows(c.two, c.types.y, 0);
    weight = make.vector(c.weight, 3), bias = make.vector(c.bias, 4);
    weight2 = make.vector(c.two && c.weight, 6), bias2 = make.vector(c.two && c.bias, 7);
    rowscale = make.rowscale();
  }

  template <class Place>
  NormFwd args(Place& at) {
    NormFwd a;
    a.kind = c.kind, a.eps = c.eps, a.weight_offset = c.weight_offset;
    a.x = at.in(x), a.y = at.out(y), a.y2 = at.out(y2);
    a.weight = at.in(weight), a.bias = at.in(bias);
    a.weight2 = at.in(weight2), a.bias2 = at.in(bias2);
    a.residual = c.in_place ? at.out(residual) : at.in(residual);
    a.h = c.in_place ? a.residual : at.out(h);
    a.rowscale = at.in(rowscale);
    if (c.p > 0.0) a.dropout = {c.p, at.number(kSeed), at.number(kOffset)};
    return a;
  }
  ForwardCall& on_cpu() {
    OnHost host;
    cpu::norm(args(host));
    return *this;
  }
  ForwardCall& on_cuda(Stream stream = {}) {
    OnDevice device;
    cuda::norm(args(device), stream);
    device.finish();
    return *this;
  }
  Tensor& stream() { return c.in_place ? residual : h; }
  std::vector<Tensor*> outputs() {
    std::vector<Tensor*> all{&y, &y2};
    if (c.stream) all.push_back(&stream());
    return all;
  }

  Case c;
  Tensor x, residual, rowscale, weight, bias, weight2, bias2, h, y, y2;
};

/// Which gradients a call of backward gives, of those that its case has.
struct Wanted {
  bool dx = true, dbranch = true, dweight = true, dbias = true;
};

struct BackwardCall {
  explicit BackwardCall(const Case& call, const Wanted& want = {}, const Arrangement& how = {})
      : c(call) {
    Maker make(c, how);
    const bool stream = c.dh || c.dbranch;
    const DType type = stream ? c.types.stream : c.types.x;
    const double mean = c.kind == NormKind::layer ? 0.7 : 0.0;
    x = make.rows(true, type, 1, mean), dy = make.rows(true, c.types.y, 2);
    dx = make.rows(want.dx, type, 0);
    dy2 = make.rows(c.two, c.types.y, 8), dh = make.rows(c.dh, c.types.stream, 9);
    dbranch = make.rows(c.dbranch && want.dbranch, c.types.x, 0);
    weight = make.vector(c.weight, 3), weight2 = make.vector(c.two && c.weight, 6);
    rowscale = make.rowscale();
    dweight = make.vector(c.weight && want.dweight, 0),
    dbias = make.vector(c.bias && want.dbias, 0);
    dweight2 = make.vector(c.two && c.weight && want.dweight, 0);
    dbias2 = make.vector(c.two && c.bias && want.dbias, 0);
  }

  template <class Place>
  NormBwd args(Place& at) {
    NormBwd a;
    a.kind = c.kind, a.eps = c.eps, a.weight_offset = c.weight_offset;
    a.x = at.in(x), a.dy = at.in(dy), a.dy2 = at.in(dy2), a.dh = at.in(dh);
    a.weight = at.in(weight), a.weight2 = at.in(weight2), a.rowscale = at.in(rowscale);
    a.dx = at.out(dx), a.dbranch = at.out(dbranch);
    a.dweight = at.out(dweight), a.dbias = at.out(dbias);
    a.dweight2 = at.out(dweight2), a.dbias2 = at.out(dbias2);
    if (c.p > 0.0) a.dropout = {c.p, at.number(kSeed), at.number(kOffset)};
    return a;
  }
  BackwardCall& on_cpu() {
    OnHost host;
    cpu::norm_bwd(args(host));
    return *this;
  }
  BackwardCall& on_cuda(Stream stream = {}) {
    OnDevice device;
    NormBwd a = args(device);
    a.workspace_size = cuda::norm_bwd_workspace(a, stream.device);
    EXPECT_EQ(a.workspace_size % 4, 0u);
    // Exactly as large as asked for: a byte more is a canary. It starts as NaN.
    Tensor workspace(DType::f32, {static_cast<std::int64_t>(a.workspace_size / 4)});
    if (a.workspace_size > 0) a.workspace = device.out(workspace).data;
    cuda::norm_bwd(a, stream);
    device.finish();
    return *this;
  }
  std::vector<Tensor*> outputs() { return {&dx, &dbranch, &dweight, &dbias, &dweight2, &dbias2}; }

  Case c;
  Tensor x, dy, dy2, dh, weight, weight2, rowscale, dx, dbranch, dweight, dbias, dweight2, dbias2;
};

template <class Call>
void expect_same(Call& found, Call& expected) {
  const std::vector<Tensor*> a = found.outputs(), b = expected.outputs();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i]->given() && b[i]->given()) {
      EXPECT_TRUE(a[i]->same_bits(*b[i])) << "output " << i;
    }
  }
}

// ---- bounds -------------------------------------------------------------------------------------

inline constexpr double kNoise = 4e-6;  // of f32 terms as large as a scale, summed in another order

/// The distance between neighbours of a dtype at v.
inline double ulp(DType dtype, double v) {
  const int digits = dtype == DType::f32 ? 23 : dtype == DType::f16 ? 10 : 7;
  const int lowest = dtype == DType::f16 ? -14 : -126;
  const int exponent = v == 0.0 || !std::isfinite(v) ? lowest : std::max(std::ilogb(v), lowest);
  return std::ldexp(1.0, exponent - digits);
}

/// Within one unit in the last place and the noise of an f32 computation of terms as large as
/// `scale`; and, since such noise seldom turns a rounding, equal nearly everywhere in 16 bits.
inline testing::AssertionResult near(const Tensor& found, const Tensor& expected,
                                     const std::vector<double>& scale) {
  const std::int64_t count = expected.numel();
  if (found.numel() != count || static_cast<std::int64_t>(scale.size()) != count) {
    return testing::AssertionFailure() << "different size";
  }
  std::int64_t different = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = found.get(i), b = expected.get(i);
    if (a == b) continue;
    const double noise = kNoise * scale[i];
    const double bound = ulp(found.dtype(), std::max(std::abs(a), std::abs(b))) + noise;
    if (!(std::abs(a - b) <= bound)) {
      return testing::AssertionFailure() << "element " << i << " of " << count << " is " << a
                                         << ", expected " << b << " within " << bound;
    }
    different += std::abs(a - b) > noise;
  }
  if (found.dtype() != DType::f32 && different > 3 + count / 50) {
    return testing::AssertionFailure() << different << " of " << count << " are rounded otherwise";
  }
  return testing::AssertionSuccess();
}

/// `noise`: what f32 may be off in xhat, in units of kNoise, beside its relative error.
struct RowMoments {
  double mean, rstd, noise;
};

inline RowMoments moments_of(const Case& c, const double* row) {
  double mean = 0.0, squares = 0.0, largest = 0.0;
  if (c.kind == NormKind::layer) mean = std::accumulate(row, row + c.n, 0.0) / c.n;
  for (std::int64_t i = 0; i < c.n; ++i) {
    squares += (row[i] - mean) * (row[i] - mean);
    largest = std::max(largest, std::abs(row[i]));
  }
  const double rstd = 1.0 / std::sqrt(squares / c.n + c.eps);
  return {mean, rstd, c.kind == NormKind::layer ? 0.25 * rstd * largest : 0.0};
}

/// Where a row's columns lie in the vectors.
inline std::int64_t vector_start(const Case& c, std::int64_t row) {
  return c.heads > 0 ? row % c.heads * c.n : 0;
}

inline std::vector<double> stream_scale(const ForwardCall& call) {
  const std::vector<double> x = call.x.values(), residual = call.residual.values(),
                            rowscale = call.rowscale.values();
  std::vector<double> scale(x.size());
  for (std::size_t e = 0; e < x.size(); ++e) {
    const double row = rowscale.empty() ? 1.0 : rowscale[e / call.c.n];
    scale[e] = std::abs(x[e] * row * dropout_scale(call.c.p)) +
               (residual.empty() ? 0.0 : std::abs(residual[e]));
  }
  return scale;
}

inline std::vector<double> norm_scale(const Case& c, const std::vector<double>& h,
                                      const Tensor& weight, const Tensor& bias) {
  const std::vector<double> w = weight.values(), b = bias.values();
  std::vector<double> scale(h.size());
  for (std::int64_t r = 0; r < c.m && c.n > 0; ++r) {
    const RowMoments s = moments_of(c, &h[r * c.n]);
    const std::int64_t start = vector_start(c, r);
    for (std::int64_t i = 0; i < c.n; ++i) {
      const double factor = w.empty() ? 1.0 : w[start + i] + c.weight_offset;
      scale[r * c.n + i] =
          (std::abs(h[r * c.n + i] - s.mean) * s.rstd + s.noise) * std::abs(factor) +
          (b.empty() ? 0.0 : std::abs(b[start + i]));
    }
  }
  return scale;
}

struct GradientScales {
  std::vector<double> dx, dbranch;
  std::array<std::vector<double>, 2> dweight, dbias;
};

/// Sums over the rows err like random walks: with the root of the sum of the squares.
inline GradientScales gradient_scales(const BackwardCall& call) {
  const Case& c = call.c;
  const std::int64_t n = c.n, size = std::max<std::int64_t>(c.heads, 1) * n;
  const std::vector<double> x = call.x.values(), dh = call.dh.values(),
                            rowscale = call.rowscale.values();
  const std::array dy{call.dy.values(), call.dy2.values()};
  const std::array w{call.weight.values(), call.weight2.values()};
  GradientScales s{std::vector<double>(x.size()), std::vector<double>(x.size()), {}, {}};
  for (auto* sums : {&s.dweight, &s.dbias}) sums->fill(std::vector<double>(size));
  std::vector<double> g(n);
  for (std::int64_t r = 0; r < c.m && n > 0; ++r) {
    const RowMoments row = moments_of(c, &x[r * n]);
    const std::int64_t start = vector_start(c, r);
    const auto xhat = [&](std::int64_t i) {
      return std::abs(x[r * n + i] - row.mean) * row.rstd + row.noise;
    };
    double sum = 0.0, dot = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      g[i] = 0.0;
      for (int k = 0; k < 2; ++k) {
        if (dy[k].empty()) continue;
        const double v = std::abs(dy[k][r * n + i]);
        g[i] += v * std::abs(w[k].empty() ? 1.0 : w[k][start + i] + c.weight_offset);
        s.dweight[k][start + i] += v * xhat(i) * v * xhat(i);
        s.dbias[k][start + i] += v * v;
      }
      sum += g[i] / n, dot += g[i] * xhat(i) / n;
    }
    const double branch = dropout_scale(c.p) * (rowscale.empty() ? 1.0 : std::abs(rowscale[r]));
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t e = r * n + i;
      s.dx[e] = row.rstd * (g[i] + sum + xhat(i) * dot) + (dh.empty() ? 0.0 : std::abs(dh[e]));
      s.dbranch[e] = s.dx[e] * branch;
    }
  }
  for (auto* sums : {&s.dweight, &s.dbias}) {
    for (std::vector<double>& of_one : *sums) {
      for (double& v : of_one) v = 2.0 * std::sqrt(v);
    }
  }
  return s;
}

// ---- what every call must be --------------------------------------------------------------------

/// The call on CUDA against the CPU's: h, and y against the norm of the h that was found.
inline ForwardCall expect_forward(const Case& c, const Arrangement& how = {}) {
  SCOPED_TRACE(c.text());
  ForwardCall found(c, how), expected(c);
  const std::vector<double> scale = c.stream ? stream_scale(expected) : std::vector<double>();
  found.on_cuda();
  expected.on_cpu();
  if (c.stream) {
    if (c.drops()) {
      EXPECT_TRUE(near(found.stream(), expected.stream(), scale)) << "h";
    } else {
      EXPECT_TRUE(found.stream().same_bits(expected.stream())) << "h";
    }
    OnHost host;
    NormFwd of_h = expected.args(host);
    of_h.x = found.stream().ref();
    of_h.residual = of_h.h = of_h.rowscale = {};
    of_h.dropout = {};
    cpu::norm(of_h);
  }
  const std::vector<double> h = (c.stream ? found.stream() : found.x).values();
  EXPECT_TRUE(near(found.y, expected.y, norm_scale(c, h, found.weight, found.bias))) << "y";
  if (c.two) {
    EXPECT_TRUE(near(found.y2, expected.y2, norm_scale(c, h, found.weight2, found.bias2))) << "y2";
  }
  return found;
}

inline BackwardCall expect_backward(const Case& c, const Wanted& want = {},
                                    const Arrangement& how = {}) {
  SCOPED_TRACE(c.text());
  BackwardCall found(c, want, how), expected(c, want);
  found.on_cuda();
  expected.on_cpu();
  const GradientScales s = gradient_scales(expected);
  const auto check = [](const Tensor& a, const Tensor& b, const std::vector<double>& scale,
                        const char* name) {
    if (b.given()) {
      EXPECT_TRUE(near(a, b, scale)) << name;
    }
  };
  check(found.dx, expected.dx, s.dx, "dx");
  check(found.dbranch, expected.dbranch, s.dbranch, "dbranch");
  check(found.dweight, expected.dweight, s.dweight[0], "dweight");
  check(found.dbias, expected.dbias, s.dbias[0], "dbias");
  check(found.dweight2, expected.dweight2, s.dweight[1], "dweight2");
  check(found.dbias2, expected.dbias2, s.dbias[1], "dbias2");
  return found;
}

/// The element type of the kernel for operands of these types.
inline DType kernel_type(std::initializer_list<DType> operands) {
  for (const DType t : operands) {
    if (t != *operands.begin()) return DType::f32;
  }
  return *operands.begin();
}

inline bool same_plan(const Plan& a, const Plan& b) {
  return std::string(a.kernel) == b.kernel && a.threads_per_row == b.threads_per_row &&
         a.rows_per_block == b.rows_per_block && a.blocks_per_row == b.blocks_per_row &&
         a.elements_per_thread == b.elements_per_thread;
}

/// Lengths on both sides of every change of plan, and of every power of two.
template <class PlanOf>
std::vector<std::int64_t> lengths_around(const PlanOf& plan_of) {
  std::set<std::int64_t> lengths{1,  2,  7,    8,    9,      31,     33,      63,
                                 64, 65, 1040, 4100, 16'392, 32'776, 131'080, 262'152};
  for (std::int64_t n = 128; n <= 16'384; n *= 2) lengths.insert({n - 1, n, n + 1});
  for (std::int64_t n = 32'768; n <= 262'144; n *= 2) lengths.insert(n);
  for (std::int64_t n = 2; n <= 262'152; ++n) {
    if (!same_plan(plan_of(n), plan_of(n - 1))) lengths.insert({n - 1, n, n + 7});
  }
  return {lengths.begin(), lengths.end()};
}

/// Fewer rows for longer rows. The short ones: more rows than a grid holds at once.
inline std::vector<std::int64_t> counts_for(std::int64_t n) {
  if (n <= 300) return {1, 2, 5, 133, 300};
  if (n <= 1040) return {1, 3, 133};
  if (n <= 20'000) return {1, 5};
  return {n % 3 == 0 ? 1 : 2};
}

}  // namespace fastkern::test
