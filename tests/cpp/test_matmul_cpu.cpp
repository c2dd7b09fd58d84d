// SPDX-License-Identifier: Apache-2.0
// What attention on the CPU is made of: products of small matrices, exp and tanh in f32. These
// headers are not public, so they are found from here.
#include <limits>
#include <random>

#include "../../cpp/cpu/exponential.h"
#include "../../cpp/cpu/matmul.h"
#include "support.h"

namespace fastkern {
namespace {

constexpr std::int64_t kColumns = cpu::kMatmulColumns;

/// A matrix in a larger one of NaN.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride, std::int64_t step = 1)
      : rows(rows),
        columns(columns),
        stride(stride),
        step(step),
        data((rows + 2) * stride + (columns + 2) * step, std::nanf("")) {}

  float* first() { return data.data() + stride + step; }
  float& at(std::int64_t r, std::int64_t c) { return first()[r * stride + c * step]; }
  Matrix& fill(unsigned seed, bool integers) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        at(r, c) = integers ? static_cast<float>(random() % 17) - 8.0f : normal(random);
      }
    }
    return *this;
  }
  std::int64_t numbers() const {
    return std::count_if(data.begin(), data.end(), [](float x) { return !std::isnan(x); });
  }

  std::int64_t rows, columns, stride, step;
  std::vector<float> data;
};

template <bool kAdd>
void multiply(Matrix& a, Matrix& b, Matrix& c) {
  cpu::matmul<kAdd>(a.rows, b.columns, a.columns, a.first(), a.stride, a.step, b.first(), b.stride,
                    c.first(), c.stride);
}

/// Of small integers, which f32 adds up without rounding.
template <bool kAdd>
void expect_product(std::int64_t m, std::int64_t n, std::int64_t k, bool transposed) {
  SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << ", add " << kAdd
                                  << ", transposed " << transposed);
  Matrix a = transposed ? Matrix(m, k, 1, m + 3) : Matrix(m, k, k + 5);
  Matrix b(k, n, n + 7), c(m, n, n + 2);
  a.fill(1, true), b.fill(2, true);
  if (kAdd) c.fill(3, true);
  Matrix before = c;
  multiply<kAdd>(a, b, c);
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t j = 0; j < n; ++j) {
      float sum = kAdd ? before.at(r, j) : 0.0f;
      for (std::int64_t i = 0; i < k; ++i) sum += a.at(r, i) * b.at(i, j);
      ASSERT_EQ(c.at(r, j), sum) << r << ", " << j;
    }
  }
  EXPECT_EQ(c.numbers(), m * n);  // nothing around it was written
}

TEST(Matmul, EveryTail) {
  for (std::int64_t m = 0; m <= 25; ++m) {
    for (std::int64_t n = 0; n <= 10 * kColumns; n += kColumns) {
      for (const std::int64_t k : {0, 1, 2, 3, 16, 17}) {
        for (const bool transposed : {false, true}) {
          expect_product<false>(m, n, k, transposed);
          expect_product<true>(m, n, k, transposed);
        }
      }
      if (HasFailure()) return;
    }
  }
}

TEST(Matmul, Blocks) {
  for (const std::int64_t n : {64, 128, 272}) {
    for (const std::int64_t k : {64, 65, 512}) {
      expect_product<false>(64, n, k, false);
      expect_product<true>(63, n, k, true);
    }
  }
}

/// An element has the same bits wherever it lies in a product: alone, or among others.
TEST(Matmul, ElementsDoNotSeeEachOther) {
  const std::int64_t m = 23, n = 9 * kColumns, k = 40;
  Matrix a(m, k, k), b(k, n, n), c(m, n, n);
  a.fill(1, false), b.fill(2, false);
  multiply<false>(a, b, c);
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t j = 0; j < n; j += kColumns) {
      float alone[kColumns];
      cpu::matmul<false>(1, kColumns, k, &a.at(r, 0), k, 1, &b.at(0, j), n, alone, kColumns);
      for (std::int64_t i = 0; i < kColumns; ++i) ASSERT_EQ(alone[i], c.at(r, j + i));
    }
  }
}

/// Adding to what the first half gave is the sum over both.
TEST(Matmul, SumsInOrder) {
  const std::int64_t m = 23, n = 5 * kColumns, k = 40;
  Matrix a(m, k, k), b(k, n, n), c(m, n, n), halves(m, n, n);
  a.fill(1, false), b.fill(2, false);
  multiply<false>(a, b, c);
  cpu::matmul<false>(m, n, 13, &a.at(0, 0), k, 1, &b.at(0, 0), n, halves.first(), n);
  cpu::matmul<true>(m, n, k - 13, &a.at(0, 13), k, 1, &b.at(13, 0), n, halves.first(), n);
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t j = 0; j < n; ++j) ASSERT_EQ(halves.at(r, j), c.at(r, j));
  }
}

/// f of all of `in`, as one value after the other and as a loop of vectors computes it.
template <class F>
std::vector<float> values_of(const F& f, const std::vector<float>& in, bool vectors) {
  std::vector<float> out(in.size());
  if (!vectors) {
    for (std::size_t i = 0; i < in.size(); ++i) out[i] = f(in[i]);
    return out;
  }
  cpu::with_best_isa([=, from = in.data(), to = out.data(), n = in.size()]()
                         __attribute__((always_inline)) {
#pragma GCC ivdep
                           for (std::size_t i = 0; i < n; ++i) to[i] = f(from[i]);
                         });
  return out;
}

/// The largest error in units of the last place.
template <class F, class Exact>
double worst_ulps(const F& f, const Exact& exact, const std::vector<float>& in) {
  double worst = 0.0;
  for (const bool vectors : {false, true}) {
    const std::vector<float> out = values_of(f, in, vectors);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double expected = exact(static_cast<double>(in[i]));
      const float rounded = static_cast<float>(std::abs(expected));
      const double ulp =
          static_cast<double>(std::nextafter(rounded, INFINITY)) - static_cast<double>(rounded);
      const double off = std::abs(static_cast<double>(out[i]) - expected) / ulp;
      if (std::isnan(off)) return off;
      worst = std::max(worst, off);
    }
  }
  return worst;
}

std::vector<float> evenly(double low, double high) {
  constexpr int kCount = 300'000;
  std::vector<float> values;
  for (int i = 0; i <= kCount; ++i) {
    values.push_back(static_cast<float>(low + (high - low) * i / kCount));
  }
  return values;
}

/// Every magnitude from 2^-40 to 2^last, of both signs.
std::vector<float> magnitudes(int last) {
  std::vector<float> values;
  for (int exponent = -40; exponent < last; ++exponent) {
    for (int i = 0; i < 2000; ++i) {
      const float value = std::ldexp(1.0f + static_cast<float>(i) / 2000.0f, exponent);
      values.push_back(value);
      values.push_back(-value);
    }
  }
  return values;
}

const auto exp_of = [](float v) __attribute__((always_inline)) { return cpu::exp_of(v); };
const auto exp_to_zero = [](float v) __attribute__((always_inline)) { return cpu::exp_to_zero(v); };
const auto tanh_of = [](float v) __attribute__((always_inline)) { return cpu::tanh_of(v); };
const auto exact_exp = [](double v) { return std::exp(v); };
const auto exact_tanh = [](double v) { return std::tanh(v); };
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Exponential, ExpIsWithinTwoUlps) {
  EXPECT_LE(worst_ulps(exp_of, exact_exp, evenly(-87.0, 88.0)), 2.0);
  EXPECT_LE(worst_ulps(exp_of, exact_exp, evenly(-1.0, 1.0)), 2.0);
  EXPECT_LE(worst_ulps(exp_of, exact_exp, magnitudes(6)), 2.0);
  EXPECT_LE(worst_ulps(exp_to_zero, exact_exp, evenly(-87.0, 88.0)), 2.0);
}

TEST(Exponential, ExpAtItsEnds) {
  const std::vector<float> in{0.0f,  -0.0f,  -87.0f,  -87.001f,  -1000.0f,     -kInfinity,
                              88.0f, 88.01f, 1000.0f, kInfinity, std::nanf("")};
  for (const bool vectors : {false, true}) {
    const std::vector<float> full = values_of(exp_of, in, vectors);
    const std::vector<float> zero = values_of(exp_to_zero, in, vectors);
    for (const std::size_t i : {0, 1}) {
      EXPECT_EQ(full[i], 1.0f);
      EXPECT_EQ(zero[i], 1.0f);
    }
    for (const std::size_t i : {3, 4, 5}) {
      EXPECT_EQ(full[i], full[2]);
      EXPECT_EQ(zero[i], 0.0f);
    }
    for (const std::size_t i : {7, 8, 9}) EXPECT_EQ(full[i], full[6]);
    EXPECT_TRUE(std::isnan(full[10]) && std::isnan(zero[10]));
    EXPECT_GT(zero[2], 0.0f);
  }
}

TEST(Exponential, TanhIsWithinTwoUlps) {
  EXPECT_LE(worst_ulps(tanh_of, exact_tanh, evenly(-10.0, 10.0)), 2.0);
  EXPECT_LE(worst_ulps(tanh_of, exact_tanh, evenly(-0.7, 0.7)), 2.0);
  EXPECT_LE(worst_ulps(tanh_of, exact_tanh, magnitudes(20)), 2.0);
}

TEST(Exponential, TanhAtItsEnds) {
  const std::vector<float> in{0.0f, kInfinity, -kInfinity, 1e30f, -1e30f, std::nanf("")};
  for (const bool vectors : {false, true}) {
    const std::vector<float> out = values_of(tanh_of, in, vectors);
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 1.0f);
    EXPECT_EQ(out[2], -1.0f);
    EXPECT_EQ(out[3], 1.0f);
    EXPECT_EQ(out[4], -1.0f);
    EXPECT_TRUE(std::isnan(out[5]));
  }
  for (const float v : evenly(0.0, 10.0)) ASSERT_EQ(cpu::tanh_of(-v), -cpu::tanh_of(v)) << v;
}

TEST(Exponential, SigmoidIsWithinFourUlps) {
  const auto sigmoid = [](float v) __attribute__((always_inline)) { return cpu::sigmoid(v); };
  const auto exact = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  EXPECT_LE(worst_ulps(sigmoid, exact, evenly(-87.0, 87.0)), 4.0);
}

}  // namespace
}  // namespace fastkern
