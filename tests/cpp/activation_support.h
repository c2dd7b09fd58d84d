// SPDX-License-Identifier: Apache-2.0
// What the tests of activations and dropout share: problems, their results in plain double loops.
#pragma once

#include <sstream>

#include "fastkern/activation.h"
#include "fastkern/dropout.h"
#include "fastkern/philox.h"
#include "support.h"

namespace fastkern::test {

inline constexpr ActivationKind kGates[] = {
    ActivationKind::silu, ActivationKind::gelu,    ActivationKind::gelu_tanh,
    ActivationKind::relu, ActivationKind::sigmoid, ActivationKind::clamped_silu};
inline constexpr ActivationKind kActs[] = {ActivationKind::gelu, ActivationKind::gelu_tanh,
                                           ActivationKind::relu, ActivationKind::silu,
                                           ActivationKind::quick_gelu};

inline double activation(ActivationKind kind, double z, const ActivationNumbers& n) {
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  switch (kind) {
    case ActivationKind::silu:
      return z * sigmoid(z);
    case ActivationKind::quick_gelu:
      return z * sigmoid(1.702 * z);
    case ActivationKind::gelu:
      return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case ActivationKind::gelu_tanh:
      return 0.5 * z * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (z + 0.044715 * z * z * z)));
    case ActivationKind::relu:
      return std::max(z, 0.0);
    case ActivationKind::sigmoid:
      return sigmoid(z);
    case ActivationKind::clamped_silu: {
      const double c = std::min(z, static_cast<double>(n.limit));
      return c * sigmoid(static_cast<double>(n.alpha) * c);
    }
  }
  return 0.0;
}

/// By a difference, to some ten digits; exact at the corners of relu and of clamps.
inline double slope(ActivationKind kind, double z, const ActivationNumbers& n) {
  if (kind == ActivationKind::relu) return z > 0.0 ? 1.0 : 0.0;
  if (kind == ActivationKind::clamped_silu && z > n.limit) return 0.0;
  constexpr double kStep = 1e-4;
  ActivationNumbers wide = n;
  wide.limit = 1e30f;
  const auto f = [&](double v) { return activation(kind, v, wide); };
  return (8.0 * (f(z + kStep) - f(z - kStep)) - (f(z + 2 * kStep) - f(z - 2 * kStep))) /
         (12.0 * kStep);
}

enum class Packing { split, halves, pairs };

struct GatedProblem {
  ActivationKind kind = ActivationKind::silu;
  Packing packing = Packing::split;
  DType dtype = DType::f32;
  std::int64_t rows = 1, n = 1;
  ActivationNumbers numbers = {.alpha = 1.702f, .limit = 1.0f, .up_offset = 1.0f};

  bool packed() const { return packing != Packing::split; }
  std::int64_t gate_at(std::int64_t i) const {
    return packing == Packing::split    ? i
           : packing == Packing::halves ? i / n * 2 * n + i % n
                                        : 2 * i;
  }
  std::int64_t up_at(std::int64_t i) const {
    return packing == Packing::halves ? gate_at(i) + n : packing == Packing::pairs ? 2 * i + 1 : i;
  }
  std::string text() const {
    std::ostringstream text;
    text << "kind " << static_cast<int>(kind) << " packing " << static_cast<int>(packing) << ' '
         << name_of(dtype) << ' ' << rows << 'x' << n;
    return text.str();
  }
};

/// `a` holds gate, or both if they are packed; da likewise. Rows are `gap` elements apart and begin
/// `offset` elements off.
struct GatedTensors {
  Tensor a, b, y, dy, da, db;

  explicit GatedTensors(const GatedProblem& p, std::int64_t offset = 0, std::int64_t gap = 0) {
    const auto rows = [&](std::int64_t n) {
      Layout layout = dense_layout({p.rows, n}, offset);
      layout.strides = {n + gap, 1};
      return Tensor(p.dtype, layout);
    };
    a = rows(p.packed() ? 2 * p.n : p.n).fill(1, 0.2);
    if (!p.packed()) b = rows(p.n).fill(2, -0.1);
    y = rows(p.n), dy = rows(p.n).fill(3, 0.1);
    da = rows(p.packed() ? 2 * p.n : p.n);
    if (!p.packed()) db = rows(p.n);
  }
};

inline TensorRef columns_of(TensorRef t, std::int64_t begin, std::int64_t n) {
  t.data = static_cast<char*>(t.data) + begin * size_of(t.dtype);
  t.sizes[1] = n;
  return t;
}

/// The calls, on tensors that `ref` makes TensorRefs of.
template <class Ref>
GatedFwd gated_fwd(const GatedProblem& p, const Ref& ref, GatedTensors& t) {
  GatedFwd args;
  args.kind = p.kind, args.numbers = p.numbers, args.y = ref(t.y);
  const TensorRef a = ref(t.a);
  if (p.packing == Packing::pairs) {
    args.pairs = a;
  } else {
    args.gate = columns_of(a, 0, p.n);
    args.up = p.packed() ? columns_of(a, p.n, p.n) : ref(t.b);
  }
  return args;
}
template <class Ref>
GatedBwd gated_bwd(const GatedProblem& p, const Ref& ref, GatedTensors& t) {
  const GatedFwd fwd = gated_fwd(p, ref, t);
  GatedBwd args;
  args.kind = p.kind, args.numbers = p.numbers, args.dy = ref(t.dy);
  args.gate = fwd.gate, args.up = fwd.up, args.pairs = fwd.pairs;
  const TensorRef da = ref(t.da);
  if (p.packing == Packing::pairs) {
    args.dpairs = da;
  } else {
    args.dgate = columns_of(da, 0, p.n);
    args.dup = p.packed() ? columns_of(da, p.n, p.n) : ref(t.db);
  }
  return args;
}

/// Results are what they must be, and nothing else was written.
inline void expect_gated(const GatedProblem& p, const GatedTensors& t) {
  SCOPED_TRACE(p.text());
  const bool clamps = p.kind == ActivationKind::clamped_silu;
  const std::int64_t count = p.rows * p.n;
  Expected y{std::vector<double>(count), std::vector<double>(count)};
  Expected da{std::vector<double>(t.da.numel()), std::vector<double>(t.da.numel())}, db = y;
  for (std::int64_t i = 0; i < count; ++i) {
    const double g = t.a.get(p.gate_at(i)), dy = t.dy.get(i);
    const double raw = p.packed() ? t.a.get(p.up_at(i)) : t.b.get(i);
    const double limit = p.numbers.limit;
    const double u = clamps ? std::clamp(raw, -limit, limit) + p.numbers.up_offset : raw;
    const double f = activation(p.kind, g, p.numbers), df = slope(p.kind, g, p.numbers);
    const bool through = !clamps || std::abs(raw) <= limit;
    y.value[i] = f * u, y.scale[i] = std::abs(f * u) + 0.1 * std::abs(u);
    da.value[p.gate_at(i)] = dy * u * df, da.scale[p.gate_at(i)] = std::abs(dy * u);
    Expected& up = p.packed() ? da : db;
    up.value[p.up_at(i)] = through ? dy * f : 0.0;
    up.scale[p.up_at(i)] = std::abs(dy * f) + 0.1 * std::abs(dy);
  }
  EXPECT_TRUE(close(t.y, y)) << "y";
  EXPECT_TRUE(close(t.da, da)) << "da";
  if (!p.packed()) {
    EXPECT_TRUE(close(t.db, db)) << "db";
  }
  for (const Tensor* written : {&t.y, &t.da, &t.db}) {
    EXPECT_TRUE(!written->given() || written->gaps_intact());
  }
}

/// bias_act and, with p >= 0, bias_dropout_add, with their gradients.
struct BiasProblem {
  ActivationKind kind = ActivationKind::gelu;
  double p = -1.0;
  DType dtype = DType::f32, other = DType::f32;  // other: of bias, and of the residual
  std::int64_t rows = 1, n = 1;

  bool drops() const { return p >= 0.0; }
  std::string text() const {
    std::ostringstream text;
    text << "kind " << static_cast<int>(kind) << " p " << p << ' ' << name_of(dtype) << '/'
         << name_of(other) << ' ' << rows << 'x' << n;
    return text.str();
  }
};

inline constexpr std::int64_t kTestSeed = 0x123456789abcdef0, kTestOffset = -3;

struct BiasTensors {
  Tensor x, bias, residual, y, dy, dx, dbias;

  explicit BiasTensors(const BiasProblem& p, std::int64_t offset = 0, std::int64_t gap = 0) {
    const auto rows = [&](DType dtype) {
      Layout layout = dense_layout({p.rows, p.n}, offset);
      layout.strides = {p.n + gap, 1};
      return Tensor(dtype, layout);
    };
    const DType stream = p.drops() ? p.other : p.dtype;
    x = rows(p.dtype).fill(1, 0.2), dx = rows(p.dtype);
    if (p.drops()) residual = rows(stream).fill(2);
    y = rows(stream), dy = rows(stream).fill(3, 0.1);
    bias = Tensor(p.other, Sizes{p.n}).fill(4), dbias = Tensor(p.other, Sizes{p.n});
  }
};

inline void expect_bias(const BiasProblem& p, const BiasTensors& t) {
  SCOPED_TRACE(p.text());
  const std::int64_t count = p.rows * p.n;
  const std::uint32_t threshold = p.drops() ? dropout_threshold(p.p) : 0;
  Expected y{std::vector<double>(count), std::vector<double>(count)}, dx = y;
  Expected dbias{std::vector<double>(p.n), std::vector<double>(p.n)};
  for (std::int64_t i = 0; i < count; ++i) {
    const double z = t.x.get(i) + t.bias.get(i % p.n), dy = t.dy.get(i);
    if (p.drops()) {
      const bool keep =
          p.p == 0.0 || dropout_keeps(static_cast<std::uint64_t>(kTestSeed),
                                      static_cast<std::uint64_t>(kTestOffset), i, threshold);
      const double factor = keep ? dropout_scale(p.p) : 0.0;
      y.value[i] = t.residual.get(i) + factor * z;
      y.scale[i] = std::abs(t.residual.get(i)) + std::abs(factor * z);
      dx.value[i] = factor * dy;
    } else {
      y.value[i] = activation(p.kind, z, {});
      y.scale[i] = std::abs(y.value[i]) + 0.1;
      dx.value[i] = dy * slope(p.kind, z, {});
    }
    dx.scale[i] = std::abs(dy);
    dbias.value[i % p.n] += dx.value[i], dbias.scale[i % p.n] += dx.scale[i];
  }
  EXPECT_TRUE(close(t.y, y)) << "y";
  EXPECT_TRUE(close(t.dx, dx)) << "dx";
  EXPECT_TRUE(close(t.dbias, dbias)) << "dbias";
  for (const Tensor* written : {&t.y, &t.dx, &t.dbias}) EXPECT_TRUE(written->gaps_intact());
}

/// Problems of a size: every activation, bias and residual of another type, dropout with several p.
inline std::vector<BiasProblem> bias_problems(std::int64_t rows, std::int64_t n) {
  std::vector<BiasProblem> problems;
  for (const DType dtype : kDTypes) {
    for (const ActivationKind kind : kActs)
      problems.push_back({.kind = kind, .dtype = dtype, .other = dtype, .rows = rows, .n = n});
    for (const double p : {0.0, 0.3, 1.0})
      problems.push_back({.p = p, .dtype = dtype, .other = dtype, .rows = rows, .n = n});
  }
  problems.push_back({.dtype = DType::bf16, .other = DType::f32, .rows = rows, .n = n});
  problems.push_back({.p = 0.3, .dtype = DType::bf16, .other = DType::f32, .rows = rows, .n = n});
  problems.push_back({.p = 0.3, .dtype = DType::f32, .other = DType::f16, .rows = rows, .n = n});
  return problems;
}

/// Problems of a size: every kind in every packing and type.
inline std::vector<GatedProblem> gated_problems(std::int64_t rows, std::int64_t n) {
  std::vector<GatedProblem> problems;
  for (const DType dtype : kDTypes) {
    for (const ActivationKind kind : kGates) {
      for (const Packing packing : {Packing::split, Packing::halves, Packing::pairs})
        problems.push_back(
            {.kind = kind, .packing = packing, .dtype = dtype, .rows = rows, .n = n});
    }
  }
  return problems;
}

}  // namespace fastkern::test
