// SPDX-License-Identifier: Apache-2.0
// Group normalisation as plain double loops, and the problems that the CPU and the CUDA tests
// share.
#pragma once

#include <optional>

#include "fastkern/group_norm.h"
#include "support.h"

namespace fastkern::test {

using OptionalDType = std::optional<DType>;
inline constexpr OptionalDType kAffines[] = {std::nullopt, DType::f32, DType::f16, DType::bf16};
inline constexpr Activation kActivations[] = {Activation::none, Activation::silu};
inline constexpr double kGroupEps = 1e-2;  // large enough that a missing one shows

/// (N, C, *) with the channels innermost.
inline Layout channels_last_layout(const Sizes& sizes, std::int64_t offset = 0) {
  Sizes order(sizes.begin() + 2, sizes.end());
  order.insert(order.begin(), sizes[0]);
  order.push_back(sizes[1]);
  const Sizes strides = dense_strides(order);
  Layout layout{"channels-last+" + std::to_string(offset), sizes, {}, offset};
  layout.strides = {strides.front(), strides.back()};
  layout.strides.insert(layout.strides.end(), strides.begin() + 1, strides.end() - 1);
  return layout;
}

inline Layout image_layout_of(const Sizes& sizes, bool channels_last, std::int64_t offset = 0) {
  return channels_last ? channels_last_layout(sizes, offset) : dense_layout(sizes, offset);
}

struct GroupProblem {
  Tensor x, dy, weight, bias;
  Sizes sizes;
  std::int64_t groups;
  Activation activation = Activation::none;
  double eps = kGroupEps;

  std::int64_t batch() const { return sizes[0]; }
  std::int64_t channels() const { return sizes[1]; }
  std::string text() const {
    std::string out(name_of(x.dtype()));
    for (const std::int64_t size : sizes) out += " " + std::to_string(size);
    return out + ", groups " + std::to_string(groups) + ", weight " +
           (weight.given() ? name_of(weight.dtype()) : "none") + ", bias " +
           (bias.given() ? name_of(bias.dtype()) : "none") +
           (activation == Activation::silu ? ", silu" : "");
  }
};

inline GroupProblem make_group_problem(const Sizes& sizes, std::int64_t groups, DType dtype,
                                       OptionalDType weight, OptionalDType bias,
                                       Activation activation, double mean = 0.5) {
  const auto affine = [&](OptionalDType of, unsigned seed, double around) {
    return of ? Tensor(*of, {sizes[1]}).fill(seed, around) : Tensor();
  };
  return {Tensor(dtype, sizes).fill(1, mean),
          Tensor(dtype, sizes).fill(2),
          affine(weight, 7, 1.0),
          affine(bias, 8, 0.0),
          sizes,
          groups,
          activation};
}

struct ExpectedGroupNorm {
  Expected y, mean, rstd, dx, dweight, dbias;
};

/// Forward and backward in double precision.
inline ExpectedGroupNorm group_norm_reference(const GroupProblem& p) {
  const std::vector<double> x = p.x.values(), dy = p.dy.values();
  const std::vector<double> weight = p.weight.values(), bias = p.bias.values();
  const std::int64_t n = p.batch(), channels = p.channels(), d = channels / p.groups;
  const std::int64_t positions =
      x.empty() ? 0 : static_cast<std::int64_t>(x.size()) / (n * channels);
  const std::int64_t size = d * positions;
  const auto zeros = [](std::int64_t count) {
    return Expected{std::vector<double>(count), std::vector<double>(count)};
  };
  const std::int64_t numel = static_cast<std::int64_t>(x.size());
  ExpectedGroupNorm e{zeros(numel), zeros(n * p.groups), zeros(n * p.groups),
                      zeros(numel), zeros(channels),     zeros(channels)};
  for (std::int64_t group = 0; size > 0 && group < n * p.groups; ++group) {
    const std::int64_t first = group * size;
    double sum = 0.0, m2 = 0.0, magnitude = 0.0;
    for (std::int64_t i = 0; i < size; ++i) {
      sum += x[first + i];
      magnitude += std::abs(x[first + i]);
    }
    const double mean = sum / size;
    for (std::int64_t i = 0; i < size; ++i) m2 += (x[first + i] - mean) * (x[first + i] - mean);
    const double rstd = 1.0 / std::sqrt(m2 / size + p.eps);
    e.mean.value[group] = mean, e.mean.scale[group] = magnitude / size;
    e.rstd.value[group] = rstd, e.rstd.scale[group] = rstd;

    double s1 = 0.0, s2 = 0.0, s1_scale = 0.0, s2_scale = 0.0;
    std::vector<double> xhats(size), dzs(size), dz_scales(size);
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t c = group % p.groups * d + i / positions;
      const double w = weight.empty() ? 1.0 : weight[c], b = bias.empty() ? 0.0 : bias[c];
      const double xhat = (x[first + i] - mean) * rstd, z = xhat * w + b;
      // xhat is known to an ulp of x - mean, that is, of the larger of the two.
      const double xhat_scale = (std::abs(x[first + i]) + std::abs(mean)) * rstd;
      const double z_scale = xhat_scale * std::abs(w) + std::abs(b);
      const double s = 1.0 / (1.0 + std::exp(-z));
      const bool silu = p.activation == Activation::silu;
      const double slope = silu ? s * (1.0 + z * (1.0 - s)) : 1.0;
      e.y.value[first + i] = silu ? z * s : z;
      e.y.scale[first + i] = 1.1 * z_scale;
      const double dz = dy[first + i] * slope;
      const double dz_scale = std::abs(dy[first + i]) * (silu ? 1.1 + z_scale : 1.0);
      xhats[i] = xhat, dzs[i] = dz, dz_scales[i] = dz_scale;
      e.dbias.value[c] += dz, e.dbias.scale[c] += dz_scale;
      e.dweight.value[c] += dz * xhat, e.dweight.scale[c] += dz_scale * xhat_scale;
      s1 += dz * w, s1_scale += dz_scale * std::abs(w);
      s2 += dz * w * xhat, s2_scale += dz_scale * std::abs(w) * xhat_scale;
    }
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t c = group % p.groups * d + i / positions;
      const double w = weight.empty() ? 1.0 : weight[c];
      e.dx.value[first + i] = rstd * (dzs[i] * w - (s1 + xhats[i] * s2) / size);
      e.dx.scale[first + i] =
          rstd * (dz_scales[i] * std::abs(w) + (s1_scale + std::abs(xhats[i]) * s2_scale) / size);
    }
  }
  return e;
}

struct GroupOutputs {
  Tensor y, stats, dx, dweight, dbias;
};

/// Tensors of NaN for everything that a forward and a backward give, in guarded memory.
inline GroupOutputs blank_outputs(const GroupProblem& p, const Layout& layout) {
  const auto gradient = [&](const Tensor& of) {
    return Tensor(of.given() ? of.dtype() : DType::f32, {p.channels()});
  };
  return {Tensor(p.x.dtype(), layout), Tensor(DType::f32, {p.batch(), p.groups, 2}),
          Tensor(p.x.dtype(), layout), gradient(p.weight), gradient(p.bias)};
}

inline Tensor in_layout(const Tensor& t, const Layout& layout) {
  return Tensor(t.dtype(), layout).copy_from(t);
}

inline GroupOutputs group_norm_on_cpu(const GroupProblem& p, const Layout& layout,
                                      bool saved_stats = true) {
  GroupOutputs out = blank_outputs(p, layout);
  Tensor x = in_layout(p.x, layout), dy = in_layout(p.dy, layout);
  Tensor weight = p.weight, bias = p.bias;
  cpu::group_norm({.x = x.ref(),
                   .weight = weight.ref(),
                   .bias = bias.ref(),
                   .y = out.y.ref(),
                   .stats = out.stats.ref(),
                   .num_groups = p.groups,
                   .eps = p.eps,
                   .activation = p.activation});
  cpu::group_norm_bwd({.dy = dy.ref(),
                       .x = x.ref(),
                       .weight = weight.ref(),
                       .bias = bias.ref(),
                       .stats = saved_stats ? out.stats.ref() : TensorRef{},
                       .dx = out.dx.ref(),
                       .dweight = out.dweight.ref(),
                       .dbias = out.dbias.ref(),
                       .num_groups = p.groups,
                       .eps = p.eps,
                       .activation = p.activation});
  return out;
}

inline void expect_group_norm(const GroupOutputs& found, const ExpectedGroupNorm& expected) {
  EXPECT_TRUE(close(found.y, expected.y)) << "y";
  for (std::size_t i = 0; i < expected.mean.value.size(); ++i) {
    EXPECT_NEAR(found.stats.get(2 * i), expected.mean.value[i], 4e-6 * expected.mean.scale[i]);
    EXPECT_NEAR(found.stats.get(2 * i + 1), expected.rstd.value[i], 4e-6 * expected.rstd.scale[i]);
  }
  EXPECT_TRUE(close(found.dx, expected.dx)) << "dx";
  EXPECT_TRUE(close(found.dweight, expected.dweight)) << "dweight";
  EXPECT_TRUE(close(found.dbias, expected.dbias)) << "dbias";
}

inline void expect_same(const GroupOutputs& found, const GroupOutputs& expected) {
  EXPECT_TRUE(found.y.same_bits(expected.y)) << "y";
  EXPECT_TRUE(found.stats.same_bits(expected.stats)) << "stats";
  EXPECT_TRUE(found.dx.same_bits(expected.dx)) << "dx";
  EXPECT_TRUE(found.dweight.same_bits(expected.dweight)) << "dweight";
  EXPECT_TRUE(found.dbias.same_bits(expected.dbias)) << "dbias";
}

inline void expect_guards(const GroupOutputs& found) {
  for (const Tensor* t : {&found.y, &found.stats, &found.dx, &found.dweight, &found.dbias}) {
    EXPECT_TRUE(t->gaps_intact());
  }
}

}  // namespace fastkern::test
