// SPDX-License-Identifier: Apache-2.0
// cuda::rope, cuda::qk_norm_rope and its gradient in the emulator against cpu::.
#include "fastkern/rope.h"

#include <cmath>
#include <sstream>

#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;
using Doubles = std::vector<double>;

enum class Place { number, positions, narrow, per_token, sequences };

struct RopeCase {
  DType dtype = DType::f32, table = DType::f32;
  std::int64_t batch = 1, tokens = 1, heads = 1, k_heads = 0, n = 2, turned = 2;
  bool interleaved = false, inverse = false, full = false, in_place = false, weights = false;
  Place place = Place::number;
  std::int64_t gap = 0;  // elements between heads
  int shift = 0;         // elements off a boundary: of all operands, each a little further
  int device = 0;

  std::string text() const;
};

std::string RopeCase::text() const {
  constexpr const char* kPlaces[] = {"number", "positions", "narrow", "per token", "sequences"};
  std::ostringstream out;
  out << "rope " << name_of(dtype) << " table " << name_of(table) << ' ' << batch << 'x' << tokens
      << 'x' << heads << '+' << k_heads << 'x' << n << " turned " << turned << ' '
      << kPlaces[static_cast<int>(place)] << (interleaved ? " interleaved" : "")
      << (inverse ? " inverse" : "") << (full ? " full" : "") << (in_place ? " in place" : "")
      << (weights ? " weights" : "") << " gap " << gap << " shift " << shift << " device "
      << device;
  return out.str();
}

struct RopeCall {
  RopeCall(const RopeCase& c, int shift, std::int64_t gap);
  NamedTensors tensors() {
    return {{"q", &q},
            {"k", &k},
            {"q_out", &q_out},
            {"k_out", &k_out},
            {"q_norm", &q_norm},
            {"k_norm", &k_norm},
            {"dq_out", &dq_out},
            {"dk_out", &dk_out},
            {"dq", &dq},
            {"dk", &dk},
            {"q_weight", &q_weight},
            {"k_weight", &k_weight},
            {"dq_weight", &dq_weight},
            {"dk_weight", &dk_weight},
            {"cos", &cos},
            {"sin", &sin},
            {"workspace", &workspace}};
  }

  Tensor q, k, q_out, k_out, q_norm, k_norm, dq_out, dk_out, dq, dk;
  Tensor q_weight, k_weight, dq_weight, dk_weight, cos, sin, workspace;
  std::vector<std::int64_t> positions;
  std::vector<std::int32_t> narrow;
  RopeFwd turn;
  QkNormRopeFwd forward;
  QkNormRopeBwd backward;
};

RopeCall::RopeCall(const RopeCase& c, int shift, std::int64_t gap) {
  int turn_ = 0;
  const auto heads = [&](std::int64_t count, bool given = true) {
    if (!given) return Tensor();
    const std::int64_t pitch = c.n + gap, token = count * pitch + 2 * gap;
    return Tensor(c.dtype, {c.batch, c.tokens, count, c.n}, {c.tokens * token, token, pitch, 1},
                  shift * ++turn_);
  };
  const auto vector = [&](DType dtype) { return Tensor(dtype, {c.n}, {1}, shift * ++turn_); };
  q = heads(c.heads), k = heads(c.k_heads, c.k_heads > 0);
  dq_out = heads(c.heads), dk_out = heads(c.k_heads, c.k_heads > 0);
  q.fill(1, 0.2), k.fill(2, -0.1), dq_out.fill(3, 0.1), dk_out.fill(4, 0.0);
  q_out = heads(c.heads), q_norm = heads(c.heads), dq = heads(c.heads);
  k_out = heads(c.k_heads, c.k_heads > 0), k_norm = heads(c.k_heads, c.k_heads > 0),
  dk = heads(c.k_heads, c.k_heads > 0);
  if (c.weights) {
    q_weight = vector(c.table), k_weight = vector(c.dtype);
    dq_weight = vector(c.table), dk_weight = vector(c.dtype);
    q_weight.fill(5, 1.0), k_weight.fill(6, 1.0);
  }
  const bool per_token = c.place == Place::per_token;
  const std::int64_t half = c.turned / 2, width = c.full ? c.turned : half;
  const std::int64_t rows = per_token ? c.tokens : c.tokens + 3, row = width + gap;
  const auto table = [&] {
    if (per_token)
      return Tensor(c.table, {c.batch, rows, width}, {rows * row, row, 1}, shift * ++turn_);
    return Tensor(c.table, {rows, width}, {row, 1}, shift * ++turn_);
  };
  cos = table(), sin = table();
  for (std::int64_t i = 0; i < cos.numel(); ++i) {
    const std::int64_t column = i % width;
    const std::int64_t pair = c.interleaved && c.full ? column / 2 : column % half;
    const double angle = (i / width % rows + 7 * (i / width / rows)) *
                         std::pow(1e4, -static_cast<double>(pair) / half);
    cos.set(i, static_cast<float>(std::cos(angle)));
    sin.set(i, static_cast<float>(std::sin(angle)));
  }
  RopeAngles angles{.cos = cos.ref(),
                    .sin = sin.ref(),
                    .rotary_dim = c.turned,
                    .interleaved = c.interleaved,
                    .inverse = c.inverse};
  for (std::int64_t i = 0; i < c.batch * c.tokens; ++i)
    positions.push_back((i * 5 + 2) % rows), narrow.push_back((i * 7 + 1) % rows);
  if (c.place == Place::positions) angles.positions = positions.data();
  if (c.place == Place::narrow) angles.positions = narrow.data(), angles.narrow = true;
  angles.positions_batch_stride = c.tokens;
  if (c.place == Place::sequences) {
    narrow = {1, 1, static_cast<std::int32_t>(c.tokens / 2), static_cast<std::int32_t>(c.tokens)};
    if (c.tokens > 4) --narrow.back();
    angles.cu_seqlens = narrow.data(), angles.sequences = 3;
  }
  for (Tensor* output : {&q_out, &k_out, &q_norm, &k_norm, &dq, &dk, &dq_weight, &dk_weight})
    output->allow_writes();
  turn = {.q = q.ref(), .k = k.ref(), .q_out = q_out.ref(), .k_out = k_out.ref(), .angles = angles};
  if (c.in_place) {
    for (std::int64_t i = 0; i < q.numel(); ++i) q_out.set(i, q.get(i));
    for (std::int64_t i = 0; i < k.numel(); ++i) k_out.set(i, k.get(i));
    turn.q = turn.q_out, turn.k = turn.k_out;
  }
  angles.inverse = false;
  const bool with_k_weight = c.weights && c.k_heads > 0;
  forward = {.q = q.ref(),
             .k = k.ref(),
             .q_weight = q_weight.ref(),
             .k_weight = with_k_weight ? k_weight.ref() : TensorRef{},
             .q_out = q_norm.ref(),
             .k_out = k_norm.ref(),
             .angles = angles,
             .eps = 1e-5,
             .weight_offset = c.full ? 0.5 : 0.0};
  backward = {.q = q.ref(),
              .k = k.ref(),
              .q_weight = q_weight.ref(),
              .k_weight = forward.k_weight,
              .dq_out = dq_out.ref(),
              .dk_out = dk_out.ref(),
              .dq = dq.ref(),
              .dk = dk.ref(),
              .dq_weight = dq_weight.ref(),
              .dk_weight = with_k_weight ? dk_weight.ref() : TensorRef{},
              .angles = angles,
              .eps = 1e-5,
              .weight_offset = forward.weight_offset};
  backward.workspace_size = cuda::qk_norm_rope_bwd_workspace(backward, c.device);
  if (backward.workspace_size > 0) {
    workspace = Tensor(DType::f32, {static_cast<std::int64_t>(backward.workspace_size / 4)}, {1});
    workspace.allow_writes();
    backward.workspace = workspace.ref().data;
  }
}

/// Of a head's largest number, and a share of that of all: in small heads the terms cancel.
Doubles sizes_of(const Tensor& t, double factor) {
  Doubles sizes = t.values();
  const std::int64_t n = t.given() ? t.columns() : 1;
  double largest = 0.0;
  for (const double value : sizes) largest = std::max(largest, std::abs(value));
  for (std::size_t row = 0; row < sizes.size(); row += n) {
    double most = 0.1 * largest;
    for (std::int64_t c = 0; c < n; ++c) most = std::max(most, std::abs(sizes[row + c]));
    for (std::int64_t c = 0; c < n; ++c) sizes[row + c] = factor * most;
  }
  return sizes;
}

void check_rope(const RopeCase& c, bool same_bits) {
  RopeCall found(c, c.shift, c.gap), expected(c, 0, 0);
  const auto run = [&](const RopeCall& call) {
    cuda::rope(call.turn, {nullptr, c.device});
    cuda::qk_norm_rope(call.forward, {nullptr, c.device});
    cuda::qk_norm_rope_bwd(call.backward, {nullptr, c.device});
  };
  if (!run_guarded(found.tensors(), [&] { run(found); })) return;
  if (same_bits) {
    const PlainSettings plain_settings;
    RopeCall plain(c, 0, 0);
    run_guarded(plain.tensors(), [&] { run(plain); });
    expect_same_bits(found.tensors(), plain.tensors(),
                     {"q_out", "k_out", "q_norm", "k_norm", "dq", "dk", "dq_weight"});
  }
  cpu::rope(expected.turn);
  cpu::qk_norm_rope(expected.forward);
  cpu::qk_norm_rope_bwd(expected.backward);
  const auto near = [](const char* name, const Tensor& a, const Tensor& b, double factor) {
    expect_near(name, a, b, sizes_of(b, factor));
  };
  near("q_out", found.q_out, expected.q_out, 1.0);
  near("k_out", found.k_out, expected.k_out, 1.0);
  near("q_norm", found.q_norm, expected.q_norm, 1.0);
  near("k_norm", found.k_norm, expected.k_norm, 1.0);
  near("dq", found.dq, expected.dq, 4.0);
  near("dk", found.dk, expected.dk, 4.0);
  const double terms =
      std::sqrt(static_cast<double>(c.batch * c.tokens * std::max(c.heads, c.k_heads)));
  if (!c.weights) return;
  near("dq_weight", found.dq_weight, expected.dq_weight, 4.0 * terms);
  if (c.k_heads > 0) near("dk_weight", found.dk_weight, expected.dk_weight, 4.0 * terms);
}

struct Shape {
  std::int64_t n, turned;
};

/// Heads in packs and not, all of them turned and some columns kept, up to a warp of lanes.
constexpr Shape kShapes[] = {{2, 2},     {8, 6},    {16, 16},   {20, 10},   {64, 64},
                             {64, 32},   {72, 72},  {80, 80},   {96, 96},   {96, 48},
                             {128, 128}, {128, 64}, {130, 126}, {160, 160}, {192, 128},
                             {256, 256}, {257, 34}, {512, 512}};

/// `turn` goes round through everything but shape and types.
RopeCase make_case(const Shape& shape, DType dtype, unsigned turn) {
  constexpr DType kTables[] = {DType::f32, DType::bf16, DType::f32};
  RopeCase c{.dtype = dtype, .table = kTables[turn % 3], .n = shape.n, .turned = shape.turned};
  c.place = static_cast<Place>(turn % 5);
  c.batch = c.place == Place::sequences ? 1 : 1 + turn % 3;
  c.tokens = 3 + turn % 7;
  c.heads = 1 + turn % 11, c.k_heads = turn % 4;
  if (turn % 23 == 0) (turn % 2 ? c.tokens : c.heads) = 0;
  c.interleaved = turn / 2 % 2, c.inverse = turn / 3 % 2, c.full = turn / 4 % 2;
  c.in_place = turn % 6 == 5, c.weights = turn % 5 != 2;
  c.gap = turn % 7 < 2 ? 3 : turn % 7 == 2 ? 16 : 0;
  c.shift = turn % 4 == 3 ? static_cast<int>(turn % 3) + 1 : 0;
  c.device = turn % 9 < 7 ? 0 : 4;
  return c;
}

}  // namespace

std::vector<Case> rope_cases(const Options& options) {
  std::vector<Case> cases;
  unsigned turn = options.seed * 7919;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (!FASTKERN_EMULATE_F16 && dtype == DType::f16) continue;
    if (!options.wants(name_of(dtype), {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
      continue;
    for (const Shape& shape : kShapes) {
      if (!options.sizes.empty() && options.sizes.count(shape.n) == 0) continue;
      for (int i = 0; i < (options.full ? 60 : 4 * options.per); ++i) {
        RopeCase c = make_case(shape, dtype, ++turn);
        c.device = options.device.value_or(c.device);
        const bool same_bits = options.same_bits;
        cases.push_back({c.text(), [c, same_bits] { check_rope(c, same_bits); }});
      }
    }
  }
  return cases;
}

}  // namespace emulator
