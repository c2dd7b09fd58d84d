// SPDX-License-Identifier: Apache-2.0
// cuda::group_norm and cuda::group_norm_bwd in the emulator against cpu::.
#include "fastkern/group_norm.h"

#include <cmath>
#include <optional>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;
using Doubles = std::vector<double>;

struct GroupCase {
  DType dtype = DType::f32;
  std::optional<DType> weight = DType::f32, bias = DType::f32;
  Sizes sizes;
  std::int64_t groups = 1;
  bool silu = false, channels_last = false;
  bool saved_stats = true;  // backward gets them
  int shift = 0;            // elements off a boundary: of all operands, each a little further
  int device = 0;
  double eps = 1e-2;

  std::int64_t channels() const { return sizes[1]; }
  std::int64_t group_count() const { return sizes[0] * groups; }
  std::string text() const;
};

std::string GroupCase::text() const {
  std::ostringstream out;
  out << "group " << name_of(dtype);
  for (std::size_t d = 0; d < sizes.size(); ++d) out << (d ? "x" : " ") << sizes[d];
  out << " groups " << groups << (channels_last ? " channels-last" : "") << " shift " << shift
      << " device " << device << ": weight " << (weight ? name_of(*weight) : "none") << " bias "
      << (bias ? name_of(*bias) : "none") << (silu ? " silu" : "")
      << (saved_stats ? "" : " stats-not-saved");
  return out.str();
}

/// Strides of (N, C, *) with the channels where `last` says.
Sizes strides_of(const Sizes& sizes, bool last) {
  Sizes strides(sizes.size());
  std::int64_t next = last ? sizes[1] : 1;
  for (std::size_t d = sizes.size(); d-- > 0;) {
    if (last && d == 1) {
      strides[d] = 1;
    } else {
      strides[d] = next;
      next *= sizes[d];
    }
  }
  return strides;
}

/// Both passes: a forward, and a backward with what it saved.
struct GroupCall {
  GroupCall(const GroupCase& c, int shift);
  NamedTensors tensors();

  Tensor x, dy, weight, bias, y, stats, dx, dweight, dbias, workspace, bwd_workspace;
  GroupNormFwd forward;
  GroupNormBwd backward;
};

GroupCall::GroupCall(const GroupCase& c, int shift) {
  auto image = [&, turn = 0]() mutable {
    return Tensor(c.dtype, c.sizes, strides_of(c.sizes, c.channels_last), shift * ++turn);
  };
  const auto vector = [&](std::optional<DType> dtype) {
    return dtype ? Tensor(*dtype, {c.channels()}, {1}, shift) : Tensor();
  };
  const auto scratch = [](std::size_t bytes, Tensor& memory, auto& args) {
    if (bytes == 0) return;
    memory = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
    memory.allow_writes();
    args.workspace = memory.ref().data, args.workspace_size = bytes;
  };
  x = image(), dy = image(), y = image(), dx = image();
  x.fill(1, 0.5), dy.fill(2, 0.0);
  weight = vector(c.weight), bias = vector(c.bias);
  weight.fill(3, 1.0), bias.fill(4, 0.0);
  dweight = vector(c.weight.value_or(DType::f32)), dbias = vector(c.bias.value_or(DType::f32));
  stats = Tensor(DType::f32, {c.sizes[0], c.groups, 2}, {2 * c.groups, 2, 1});
  for (Tensor* output : {&y, &stats, &dx, &dweight, &dbias}) output->allow_writes();

  const Activation activation = c.silu ? Activation::silu : Activation::none;
  forward = {.x = x.ref(),
             .weight = weight.ref(),
             .bias = bias.ref(),
             .y = y.ref(),
             .stats = stats.ref(),
             .num_groups = c.groups,
             .eps = c.eps,
             .activation = activation};
  backward = {.dy = dy.ref(),
              .x = x.ref(),
              .weight = weight.ref(),
              .bias = bias.ref(),
              .stats = c.saved_stats ? stats.ref() : TensorRef{},
              .dx = dx.ref(),
              .dweight = dweight.ref(),
              .dbias = dbias.ref(),
              .num_groups = c.groups,
              .eps = c.eps,
              .activation = activation};
  scratch(cuda::group_norm_workspace(forward, c.device), workspace, forward);
  scratch(cuda::group_norm_bwd_workspace(backward, c.device), bwd_workspace, backward);
}

NamedTensors GroupCall::tensors() {
  return {{"x", &x},
          {"dy", &dy},
          {"weight", &weight},
          {"bias", &bias},
          {"y", &y},
          {"stats", &stats},
          {"dx", &dx},
          {"dweight", &dweight},
          {"dbias", &dbias},
          {"workspace", &workspace},
          {"bwd_workspace", &bwd_workspace}};
}

/// Sizes of the terms that results are sums of.
struct Terms {
  Doubles y, stats, dx, dweight, dbias;
};

Terms terms_of(const GroupCase& c, const GroupCall& call) {
  const Doubles x = call.x.values(), dy = call.dy.values();
  const Doubles weight = call.weight.values(), bias = call.bias.values();
  const std::int64_t size = static_cast<std::int64_t>(x.size()) / c.group_count();
  const std::int64_t channels = c.channels() / c.groups, positions = size / channels;
  const double count = static_cast<double>(size);
  Terms t{Doubles(x.size()), Doubles(2 * c.group_count()), Doubles(x.size()), Doubles(c.channels()),
          Doubles(c.channels())};
  Doubles g(size), xhats(size);
  for (std::int64_t group = 0; group < c.group_count(); ++group) {
    const std::int64_t first = group * size;
    double sum = 0.0, magnitude = 0.0, m2 = 0.0;
    for (std::int64_t i = 0; i < size; ++i) {
      sum += x[first + i];
      magnitude += std::abs(x[first + i]);
    }
    const double mean = sum / count;
    for (std::int64_t i = 0; i < size; ++i) m2 += (x[first + i] - mean) * (x[first + i] - mean);
    const double rstd = 1.0 / std::sqrt(m2 / count + c.eps);
    t.stats[2 * group] = magnitude / count, t.stats[2 * group + 1] = rstd;

    double of_g = 0.0, of_gx = 0.0;
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t channel = group % c.groups * channels + i / positions;
      const double w = std::abs(weight.empty() ? 1.0 : weight[channel]);
      // x̂ is known to a rounding of x − mean, that is, of the larger of the two.
      const double xhat = (std::abs(x[first + i]) + std::abs(mean)) * rstd;
      const double z = xhat * w + (bias.empty() ? 0.0 : std::abs(bias[channel]));
      t.y[first + i] = 1.1 * z;  // the slope of SiLU is at most 1.1, its curvature below 1
      const double dz = std::abs(dy[first + i]) * (c.silu ? 1.1 + z : 1.0);
      t.dbias[channel] += dz;
      t.dweight[channel] += dz * xhat;
      g[i] = dz * w, xhats[i] = xhat;
      of_g += g[i] / count, of_gx += g[i] * xhat / count;
    }
    for (std::int64_t i = 0; i < size; ++i)
      t.dx[first + i] = rstd * (g[i] + of_g + xhats[i] * of_gx);
  }
  return t;
}

void check_group_norm(const GroupCase& c, bool same_bits) {
  GroupCall found(c, c.shift), expected(c, 0);
  const auto run = [&](const GroupCall& call) {
    cuda::group_norm(call.forward, {nullptr, c.device});
    cuda::group_norm_bwd(call.backward, {nullptr, c.device});
  };
  if (!run_guarded(found.tensors(), [&] { run(found); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    GroupCall plain(c, 0);
    run_guarded(plain.tensors(), [&] { run(plain); });
    expect_same_bits(found.tensors(), plain.tensors(), {"y", "stats", "dx", "dweight", "dbias"});
  }
  cpu::group_norm(expected.forward);
  cpu::group_norm_bwd(expected.backward);
  const Terms terms = terms_of(c, expected);
  expect_near("y", found.y, expected.y, terms.y);
  expect_near("stats", found.stats, expected.stats, terms.stats);
  expect_near("dx", found.dx, expected.dx, terms.dx);
  expect_near("dweight", found.dweight, expected.dweight, terms.dweight);
  expect_near("dbias", found.dbias, expected.dbias, terms.dbias);
}

struct Image {
  Sizes sizes;
  std::int64_t groups;
};

/// Groups held by a part of a warp up to a cluster of eight blocks, and in memory; channels-last,
/// slabs of one pack up to a block's width, held by one block up to eight, and in memory.
const Image kImages[] = {
    {{3, 10}, 5},          {{70, 96}, 32},        {{5, 4096}, 1},        {{2, 6, 1, 1}, 2},
    {{3, 4, 5}, 2},        {{2, 35, 7, 7}, 7},    {{2, 35, 7, 7}, 35},   {{2, 40, 8, 8}, 4},
    {{2, 15, 2, 3, 5}, 5}, {{9, 2, 33}, 1},       {{40, 24, 2}, 3},      {{1, 320, 16, 16}, 32},
    {{2, 64, 9, 11}, 32},  {{3, 6, 5, 8}, 3},     {{2, 40, 16, 16}, 4},  {{2, 4, 64, 64}, 2},
    {{1, 8, 128, 128}, 2}, {{1, 3, 150, 151}, 1}, {{1, 2, 256, 520}, 1}, {{1, 24, 32, 33}, 1},
    {{1, 8, 3073}, 1},     {{1, 8, 24, 256}, 1},  {{1, 8, 12, 2049}, 1}, {{1, 2056, 6, 6}, 8},
    {{1, 2056, 5, 5}, 1},  {{1, 64, 40, 41}, 32}, {{1, 1, 600, 512}, 1},
};

constexpr std::optional<DType> kAffines[] = {DType::f32, std::nullopt, DType::bf16};

/// `turn` goes round through everything but shape, layout and type.
GroupCase make_case(const Image& image, DType dtype, bool channels_last, unsigned turn) {
  GroupCase c{.dtype = dtype, .sizes = image.sizes, .groups = image.groups};
  c.channels_last = channels_last;
  c.weight = kAffines[turn % 3], c.bias = kAffines[turn / 2 % 3];
  c.silu = turn % 2 == 0;
  c.saved_stats = turn % 4 != 3;
  c.shift = turn % 5 < 3 ? 0 : static_cast<int>(turn % 3) + 1;
  c.device = turn % 7 < 5 ? 0 : 4;  // with clusters and without
  return c;
}

}  // namespace

std::vector<Case> group_norm_cases(const Options& options) {
  std::vector<Case> cases;
  const bool others_only = !options.sizes.empty() || !options.rows.empty() || options.layout ||
                           options.names.count("rms") || options.names.count("layer");
  if (others_only || !options.wants("group", {"fwd", "bwd", "quant", "group"})) return cases;
  unsigned turn = options.seed * 7919;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (!FASTKERN_EMULATE_F16 && dtype == DType::f16) continue;
    if (!options.wants(name_of(dtype), {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
      continue;
    for (const Image& image : kImages) {
      for (const bool channels_last : {false, true}) {
        if (channels_last && image.sizes.size() < 3) continue;
        for (int i = 0; i < (options.full ? 12 : 2 * options.per); ++i) {
          GroupCase c = make_case(image, dtype, channels_last, ++turn);
          c.device = options.device.value_or(c.device);
          const bool same_bits = options.same_bits;
          cases.push_back({c.text(), [c, same_bits] { check_group_norm(c, same_bits); }});
        }
      }
    }
  }
  return cases;
}

}  // namespace emulator
