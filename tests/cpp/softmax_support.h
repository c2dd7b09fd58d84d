// SPDX-License-Identifier: Apache-2.0
// What the tests of the softmax family share: a problem, its results in plain double loops, and a
// forward with its backward on the CPU.
#pragma once

#include <limits>
#include <sstream>

#include "fastkern/softmax.h"
#include "support.h"

namespace fastkern::test {

inline constexpr SoftmaxKind kSoftmaxKinds[] = {SoftmaxKind::softmax, SoftmaxKind::log_softmax,
                                                SoftmaxKind::logsumexp};

struct SoftmaxProblem {
  SoftmaxKind kind = SoftmaxKind::softmax;
  DType dtype = DType::f32, out = DType::f32;
  std::int64_t rows = 1, n = 1;
  std::int64_t behind = 0;            // above 0: (rows, n, behind), over the middle
  std::int64_t queries = 0;           // above 0: (rows / queries, queries, n), causal
  bool masked = false, keep = false;  // keep: with a mask of i8
  double scale = 1.0;

  bool of_rows() const { return kind == SoftmaxKind::logsumexp; }
  std::int64_t columns() const { return std::max<std::int64_t>(behind, 1); }
  std::int64_t numbers() const { return rows * columns(); }
  std::int64_t at(std::int64_t row, std::int64_t i) const {
    return (row / columns() * n + i) * columns() + row % columns();
  }
  bool hidden(std::int64_t row, std::int64_t i) const {
    if (keep && ((row * n + i) % 3 == 1 || row == rows - 1)) return true;
    return queries > 0 && i >= causal_columns(row, queries, n);
  }
  Sizes sizes() const {
    if (behind) return {rows, n, behind};
    return queries ? Sizes{rows / queries, queries, n} : Sizes{rows, n};
  }
  std::string text() const {
    std::ostringstream text;
    text << "kind " << static_cast<int>(kind) << ' ' << name_of(dtype) << " to " << name_of(out)
         << ' ' << rows << 'x' << n << 'x' << behind << " queries " << queries
         << (masked ? " masked" : "") << (keep ? " keep" : "");
    return text.str();
  }
};

/// Inputs and outputs of a problem, in rows `gap` elements apart that begin `offset` elements off.
struct SoftmaxTensors {
  Tensor x, mask, y, dy, dx;  // y of logsumexp: one number for each row

  explicit SoftmaxTensors(const SoftmaxProblem& p, std::int64_t offset = 0, std::int64_t gap = 0) {
    const auto like_x = [&](DType dtype) {
      Layout layout = dense_layout(p.sizes(), offset);
      if (p.behind == 0 && gap > 0) {
        layout.strides = dense_strides(p.queries ? Sizes{p.rows / p.queries, p.queries, p.n + gap}
                                                 : Sizes{p.rows, p.n + gap});
      }
      return Tensor(dtype, layout);
    };
    const auto numbers = [&](DType dtype) { return Tensor(dtype, Sizes{p.numbers()}); };
    x = like_x(p.dtype).fill(1, 0.2);
    y = p.of_rows() ? numbers(p.dtype) : like_x(p.out);
    dy = (p.of_rows() ? numbers(p.dtype) : like_x(p.out)).fill(2, 0.1);
    dx = like_x(p.dtype);
    if (!p.keep) return;
    mask = like_x(DType::i8);
    for (std::int64_t i = 0; i < mask.numel(); ++i)
      mask.set(i, p.hidden(i / p.n, i % p.n) ? 0.0 : 1.0);
  }
};

/// The calls, on tensors that `ref` makes TensorRefs of.
template <class Ref>
SoftmaxFwd softmax_fwd(const SoftmaxProblem& p, const Ref& ref, SoftmaxTensors& t) {
  return {.kind = p.kind,
          .middle = p.behind > 0,
          .x = ref(t.x),
          .y = ref(t.y),
          .masked = p.masked,
          .causal = p.queries > 0,
          .scale = p.scale,
          .mask = ref(t.mask)};
}
template <class Ref>
SoftmaxBwd softmax_bwd(const SoftmaxProblem& p, const Ref& ref, SoftmaxTensors& t) {
  return {.kind = p.kind,
          .middle = p.behind > 0,
          .dy = ref(t.dy),
          .y = p.of_rows() ? ref(t.x) : ref(t.y),
          .lse = p.of_rows() ? ref(t.y) : TensorRef{},
          .dx = ref(t.dx),
          .causal = p.queries > 0,
          .scale = p.scale};
}

inline void softmax_on_cpu(const SoftmaxProblem& p, SoftmaxTensors& t) {
  const auto ref = [](Tensor& tensor) { return tensor.ref(); };
  cpu::softmax(softmax_fwd(p, ref, t));
  cpu::softmax_bwd(softmax_bwd(p, ref, t));
}

struct SoftmaxExpected {
  Expected y, dx;
};

/// y from x; dx from the y that was found, which is what backward gets.
inline SoftmaxExpected softmax_reference(const SoftmaxProblem& p, const SoftmaxTensors& t) {
  const std::vector<double> x = t.x.values(), dy = t.dy.values(), found = t.y.values();
  const std::size_t results = p.of_rows() ? p.numbers() : x.size();
  SoftmaxExpected e{{std::vector<double>(results), std::vector<double>(results)},
                    {std::vector<double>(x.size()), std::vector<double>(x.size())}};
  const auto narrow = [&](double v) {
    if (p.of_rows() || p.out == DType::f32 || p.out == p.dtype) return v;
    Tensor one(p.out, Sizes{1});
    one.set(0, v);
    return one.get(0);
  };
  std::vector<double> z(p.n);
  for (std::int64_t row = 0; row < p.numbers(); ++row) {
    double max = -std::numeric_limits<double>::infinity(), sum = 0.0;
    for (std::int64_t i = 0; i < p.n; ++i) {
      z[i] = p.hidden(row, i) ? -std::numeric_limits<double>::infinity()
                              : narrow(x[p.at(row, i)]) * (p.masked ? p.scale : 1.0);
      max = std::max(max, z[i]);
    }
    const bool nothing = std::isinf(max);
    for (std::int64_t i = 0; i < p.n; ++i) sum += nothing ? 0.0 : std::exp(z[i] - max);
    double of_dy = 0.0, of_dy_size = 0.0;
    for (std::int64_t i = 0; i < p.n && !p.of_rows(); ++i) {
      const double term =
          dy[p.at(row, i)] * (p.kind == SoftmaxKind::softmax ? found[p.at(row, i)] : 1.0);
      of_dy += term, of_dy_size += std::abs(term);
    }
    if (p.of_rows())
      e.y.value[row] = max + std::log(sum), e.y.scale[row] = std::abs(max) + std::log(p.n + 1.0);
    for (std::int64_t i = 0; i < p.n; ++i) {
      const std::int64_t at = p.at(row, i);
      if (p.of_rows()) {
        e.dx.value[at] = dy[row] * std::exp(z[i] - found[row]);
        e.dx.scale[at] = std::abs(e.dx.value[at]) * (1.0 + std::abs(z[i] - found[row]));
      } else if (p.kind == SoftmaxKind::log_softmax) {
        e.y.value[at] = (z[i] - max) - std::log(sum);
        e.y.scale[at] = std::abs(e.y.value[at]) + 0.1;  // a small one is a difference
        e.dx.value[at] = dy[at] - std::exp(found[at]) * of_dy;
        e.dx.scale[at] =
            std::abs(dy[at]) + std::exp(found[at]) * (of_dy_size + std::abs(of_dy) * 8);
      } else {
        e.y.value[at] = nothing ? 0.0 : std::exp(z[i] - max) / sum;
        e.y.scale[at] = e.y.value[at];
        e.dx.value[at] = p.scale * found[at] * (dy[at] - of_dy);
        e.dx.scale[at] = std::abs(p.scale) * found[at] * (std::abs(dy[at]) + of_dy_size);
      }
    }
  }
  return e;
}

/// Results are what they must be, and nothing else was written.
inline void expect_softmax(const SoftmaxProblem& p, const SoftmaxTensors& t) {
  SCOPED_TRACE(p.text());
  const SoftmaxExpected e = softmax_reference(p, t);
  EXPECT_TRUE(close(t.y, e.y)) << "y";
  EXPECT_TRUE(close(t.dx, e.dx)) << "dx";
  for (const Tensor* written : {&t.y, &t.dx}) EXPECT_TRUE(written->gaps_intact());
}

/// Every kind of row: plain, of two types, over the middle, masked, causal; of long rows fewer
/// types.
inline std::vector<SoftmaxProblem> softmax_problems(std::int64_t rows, std::int64_t n) {
  std::vector<SoftmaxProblem> problems;
  for (const DType dtype : kDTypes) {
    if (n > 100'000 && dtype != DType::bf16) continue;
    for (const SoftmaxKind kind : kSoftmaxKinds)
      problems.push_back({.kind = kind, .dtype = dtype, .out = dtype, .rows = rows, .n = n});
    problems.push_back({.dtype = dtype,
                        .out = dtype,
                        .rows = rows,
                        .n = n,
                        .masked = true,
                        .keep = true,
                        .scale = 0.3});
    problems.push_back({.dtype = dtype,
                        .out = dtype,
                        .rows = rows,
                        .n = n,
                        .queries = rows,
                        .masked = true,
                        .scale = 0.3});
  }
  problems.push_back({.dtype = DType::bf16, .out = DType::f32, .rows = rows, .n = n});
  problems.push_back({.kind = SoftmaxKind::log_softmax,
                      .dtype = DType::f32,
                      .out = DType::f16,
                      .rows = rows,
                      .n = n});
  if (n <= 5000) {
    for (const SoftmaxKind kind : kSoftmaxKinds)
      problems.push_back({.kind = kind,
                          .dtype = DType::bf16,
                          .out = DType::bf16,
                          .rows = rows,
                          .n = n,
                          .behind = 35});
  }
  return problems;
}

}  // namespace fastkern::test
