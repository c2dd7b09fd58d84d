// SPDX-License-Identifier: Apache-2.0
// What the C++ tests share: tensors of any strides in guarded memory, and RMSNorm as plain double
// loops.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "fastkern/core.h"
#include "fastkern/scalar.h"

namespace fastkern::test {

inline constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

using Sizes = std::vector<std::int64_t>;

inline Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (int d = static_cast<int>(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * std::max<std::int64_t>(sizes[d + 1], 1);
  }
  return strides;
}

struct Layout {
  std::string name;
  Sizes sizes, strides;
  std::int64_t offset = 0;  // elements between an aligned address and the first element
};

inline Layout dense_layout(const Sizes& sizes, std::int64_t offset = 0) {
  return {"dense+" + std::to_string(offset), sizes, dense_strides(sizes), offset};
}

/// The ways M rows of N columns come: dense first, then padded, misaligned and, for an even M,
/// under two strides.
inline std::vector<Layout> row_layouts(std::int64_t m, std::int64_t n) {
  std::vector<Layout> layouts{
      dense_layout({m, n}),
      dense_layout({m, n}, 1),
      {"rows padded, aligned", {m, n}, {(n + 7) / 8 * 8 + 16, 1}, 8},
      {"rows padded, misaligned", {m, n}, {n + 3, 1}, 0},
  };
  if (m > 2 && m % 2 == 0) {
    const std::int64_t h = m / 2;
    layouts.push_back({"heads of a fused projection", {2, h, n}, {3 * h * n, n, 1}, h * n});
    layouts.push_back({"leading dimensions swapped", {2, h, n}, {n, 2 * n, 1}, 0});
  }
  return layouts;
}

/// A tensor in its own memory. Guards on both sides and the gaps between elements hold a canary;
/// elements start as NaN.
class Tensor {
 public:
  static constexpr unsigned char kCanary = 0xA5;
  static constexpr std::size_t kGuard = 1024;

  Tensor() = default;  // "not given"
  Tensor(DType dtype, const Layout& layout)
      : ref_{nullptr, dtype, 0, {}, {}},
        offset_(layout.offset),
        dense_(layout.strides == dense_strides(layout.sizes)) {
    ref_.ndim = static_cast<int>(layout.sizes.size());
    std::copy(layout.sizes.begin(), layout.sizes.end(), ref_.sizes.begin());
    std::copy(layout.strides.begin(), layout.strides.end(), ref_.strides.begin());
    std::int64_t span = numel() > 0 ? 1 : 0;
    for (int d = 0; d < ref_.ndim && span > 0; ++d) span += (ref_.sizes[d] - 1) * ref_.strides[d];
    bytes_.assign(2 * kGuard + (offset_ + span) * size_of(dtype), kCanary);
    for (std::int64_t i = 0; i < numel(); ++i) set(i, std::nan(""));
  }
  Tensor(DType dtype, const Sizes& sizes) : Tensor(dtype, dense_layout(sizes)) {}

  DType dtype() const { return ref_.dtype; }
  bool given() const { return ref_.given(); }
  std::int64_t numel() const { return ref_.numel(); }
  std::vector<unsigned char>& bytes() { return bytes_; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  /// The view over this memory, or over a copy of it that starts at `base`.
  TensorRef ref(void* base) const {
    TensorRef ref = ref_;
    if (given()) ref.data = static_cast<unsigned char*>(base) + byte_of(0);
    return ref;
  }
  TensorRef ref() { return ref(bytes_.data()); }

  /// Elements are counted in row-major order whatever the strides.
  double get(std::int64_t i) const { return get_part(i, 0); }
  /// Part 0 is the number, or the real part of a complex one; part 1 the imaginary part.
  double get_part(std::int64_t i, int part) const {
    double value = 0.0;
    stored([&]<class T>(int parts) {
      if (part >= parts) return;
      T element;
      std::memcpy(&element, &bytes_[byte_of(i) + part * sizeof(T)], sizeof(T));
      if constexpr (requires { to_float(element); } && !std::is_integral_v<T>) {
        value = to_float(element);
      } else {
        value = static_cast<double>(element);
      }
    });
    return value;
  }
  void set(std::int64_t i, double value, double imag = 0.0) {
    stored([&]<class T>(int parts) {
      const double both[] = {value, imag};
      for (int part = 0; part < parts; ++part) {
        T element;
        if constexpr (std::is_same_v<T, i8> || !std::is_arithmetic_v<T>) {
          element = from_float<T>(static_cast<float>(both[part]));
        } else {
          // An integer that is not set yet: any.
          element = std::is_integral_v<T> && std::isnan(value) ? T(91) : static_cast<T>(both[part]);
        }
        std::memcpy(&bytes_[byte_of(i) + part * sizeof(T)], &element, sizeof(T));
      }
    });
  }
  std::vector<double> values() const {
    std::vector<double> out(given() ? numel() : 0);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = get(i);
    return out;
  }

  Tensor& fill(unsigned seed, double mean = 0.0) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(static_cast<float>(mean));
    for (std::int64_t i = 0; given() && i < numel(); ++i) set(i, normal(random));
    return *this;
  }
  Tensor& copy_from(const Tensor& other) {
    for (std::int64_t i = 0; given() && i < numel(); ++i) set(i, other.get(i));
    return *this;
  }

  /// Whether every byte that belongs to no element still is what it was.
  testing::AssertionResult gaps_intact() const {
    std::vector<bool> element(bytes_.size(), false);
    for (std::int64_t i = 0; given() && i < numel(); ++i) {
      std::fill_n(element.begin() + byte_of(i), size_of(dtype()), true);
    }
    for (std::size_t b = 0; b < bytes_.size(); ++b) {
      if (!element[b] && bytes_[b] != kCanary) {
        return testing::AssertionFailure() << "byte " << static_cast<std::int64_t>(b) - byte_of(0)
                                           << " from the first element was written";
      }
    }
    return testing::AssertionSuccess();
  }

  /// Bitwise equality of the elements, in row-major order. Any NaN is like any other: a processor
  /// makes negative ones where a GPU makes positive ones.
  testing::AssertionResult same_bits(const Tensor& other) const {
    if (dtype() != other.dtype() || numel() != other.numel()) {
      return testing::AssertionFailure() << "different dtype or size";
    }
    for (std::int64_t i = 0; given() && i < numel(); ++i) {
      if (std::memcmp(&bytes_[byte_of(i)], &other.bytes_[other.byte_of(i)], size_of(dtype())) !=
              0 &&
          !(std::isnan(get(i)) && std::isnan(other.get(i)))) {
        return testing::AssertionFailure()
               << "element " << i << ": " << get(i) << " and " << other.get(i);
      }
    }
    return testing::AssertionSuccess();
  }

 private:
  /// f<T>(parts) for elements that are so many T.
  template <class F>
  void stored(const F& f) const {
    switch (dtype()) {
      case DType::f64:
        return f.template operator()<double>(1);
      case DType::u8:
      case DType::boolean:
        return f.template operator()<std::uint8_t>(1);
      case DType::i16:
        return f.template operator()<std::int16_t>(1);
      case DType::i32:
        return f.template operator()<std::int32_t>(1);
      case DType::i64:
        return f.template operator()<std::int64_t>(1);
      case DType::c64:
        return f.template operator()<float>(2);
      case DType::c128:
        return f.template operator()<double>(2);
      default:
        dispatch_stored(dtype(), [&]<class T>() { f.template operator()<T>(1); });
    }
  }

  std::int64_t byte_of(std::int64_t i) const {
    std::int64_t element = offset_ + (dense_ ? i : 0);
    for (int d = ref_.ndim - 1; d >= 0 && i > 0 && !dense_; --d) {
      element += i % ref_.sizes[d] * ref_.strides[d];
      i /= ref_.sizes[d];
    }
    return static_cast<std::int64_t>(kGuard) + element * size_of(dtype());
  }

  TensorRef ref_;
  std::int64_t offset_ = 0;
  bool dense_ = true;
  std::vector<unsigned char> bytes_;
};

/// What a result must be: a value, and the sum of magnitudes it is the difference of.
struct Expected {
  std::vector<double> value, scale;
};

/// One rounding to the dtype of `actual`, plus the noise of an f32 computation of terms as large as
/// `scale`.
inline testing::AssertionResult close(const Tensor& actual, const Expected& expected) {
  const DType dtype = actual.dtype();
  const double rounding = dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double smallest = dtype == DType::f16 ? 0x1p-24 : 0x1p-126;
  if (actual.numel() != static_cast<std::int64_t>(expected.value.size())) {
    return testing::AssertionFailure() << "different size";
  }
  for (std::int64_t i = 0; i < actual.numel(); ++i) {
    const double bound =
        rounding * std::abs(expected.value[i]) + 4e-6 * expected.scale[i] + smallest;
    if (!(std::abs(actual.get(i) - expected.value[i]) <= bound)) {
      return testing::AssertionFailure()
             << "element " << i << " is " << actual.get(i) << ", expected " << expected.value[i]
             << " within " << bound;
    }
  }
  return testing::AssertionSuccess();
}

/// RMSNorm of the rows of `x`, whose last dimension is n; an empty weight stands for ones.
inline Expected rms_norm_reference(const std::vector<double>& x, const std::vector<double>& weight,
                                   std::int64_t n, double eps) {
  Expected y{std::vector<double>(x.size()), std::vector<double>(x.size())};
  for (std::size_t first = 0; n > 0 && first < x.size(); first += n) {
    double squares = 0.0;
    for (std::int64_t c = 0; c < n; ++c) squares += x[first + c] * x[first + c];
    const double rstd = 1.0 / std::sqrt(squares / n + eps);
    for (std::int64_t c = 0; c < n; ++c) {
      y.value[first + c] = x[first + c] * rstd * (weight.empty() ? 1.0 : weight[c]);
      y.scale[first + c] = std::abs(y.value[first + c]);
    }
  }
  return y;
}

struct ExpectedGrads {
  Expected dx, dweight;
};

inline ExpectedGrads rms_norm_bwd_reference(const std::vector<double>& dy,
                                            const std::vector<double>& x,
                                            const std::vector<double>& weight, std::int64_t n,
                                            double eps) {
  ExpectedGrads grads{{std::vector<double>(x.size()), std::vector<double>(x.size())},
                      {std::vector<double>(n), std::vector<double>(n)}};
  for (std::size_t first = 0; n > 0 && first < x.size(); first += n) {
    const auto w = [&](std::int64_t c) { return weight.empty() ? 1.0 : weight[c]; };
    double squares = 0.0, dot = 0.0, dot_scale = 0.0;
    for (std::int64_t c = 0; c < n; ++c) {
      const double term = dy[first + c] * w(c) * x[first + c];
      squares += x[first + c] * x[first + c];
      dot += term;
      dot_scale += std::abs(term);
    }
    const double rstd = 1.0 / std::sqrt(squares / n + eps);
    for (std::int64_t c = 0; c < n; ++c) {
      const double xhat = x[first + c] * rstd, g = dy[first + c] * w(c);
      grads.dx.value[first + c] = rstd * (g - xhat * dot * rstd / n);
      grads.dx.scale[first + c] = rstd * (std::abs(g) + std::abs(xhat) * dot_scale * rstd / n);
      grads.dweight.value[c] += dy[first + c] * xhat;
      grads.dweight.scale[c] += std::abs(dy[first + c] * xhat);
    }
  }
  return grads;
}

/// The message of the Error that `call` throws; fails the test if it throws none.
template <class F>
std::string error_of(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no fastkern::Error was thrown";
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace fastkern::test
