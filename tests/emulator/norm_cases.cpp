// SPDX-License-Identifier: Apache-2.0
// Which calls of the row norms are checked.
#include <algorithm>
#include <array>

#include "norm_case.h"

namespace emulator {

using namespace fastkern;

namespace {

constexpr DType kF32 = DType::f32, kBf16 = DType::bf16, kF16 = DType::f16;
constexpr NormTypes kTypes[] = {
    {"f32", kF32, kF32, kF32, kF32},       {"bf16", kBf16, kBf16, kBf16, kBf16},
    {"mixed", kBf16, kF32, kBf16, kF32},   {"mixed2", kBf16, kBf16, kF32, kBf16},
    {"mixed3", kF32, kBf16, kBf16, kBf16}, {"f16", kF16, kF16, kF16, kF16},
};

/// Both sides of changes of plan, and sizes in use.
const std::int64_t kSizes[] = {1,     2,     7,     8,     64,    96,    127,  128,
                               129,   256,   512,   760,   768,   1024,  1025, 2048,
                               3000,  3072,  4096,  4100,  8191,  8192,  8200, 9007,
                               12288, 16384, 20000, 24583, 32768, 33000, 70000};

const std::vector<NormCase> kForward = {
    {},
    {.bias = true},
    {.weight = false, .bias = true},
    {.weight_offset = 1.0, .other_weight_type = true},
    {.stream = true, .residual = true},
    {.weight = false},
    {.bias = true, .stream = true, .residual = true, .in_place = true},
    {.weight_offset = 1.0, .rowscale = true, .dropout = 0.3, .stream = true, .residual = true},
    {.bias = true, .two = true, .dropout = 0.1, .stream = true, .residual = true},
    {.bias = true, .heads = 3},
    {.bias = true, .dropout = 0.5, .stream = true, .odd_vectors = true},
    {.weight = false, .two = true, .stream = true, .residual = true, .in_place = true},
    {.heads = 2, .two = true, .stream = true, .residual = true, .other_weight_type = true},
    {.bias = true, .odd_vectors = true, .other_weight_type = true},
    {.rowscale = true, .stream = true, .residual = true, .in_place = true},
    {.weight = false, .stream = true},
};

const std::vector<NormCase> kQuantised = {
    {.quantised = Quantised::f8_dynamic},
    {.bias = true, .quantised = Quantised::i8_dynamic},
    {.weight_offset = 1.0, .quantised = Quantised::f8_static},
    {.weight = false, .quantised = Quantised::i8_static},
    {.stream = true, .residual = true, .quantised = Quantised::f8_dynamic},
    {.bias = true,
     .heads = 3,
     .stream = true,
     .residual = true,
     .in_place = true,
     .quantised = Quantised::i8_dynamic},
    {.bias = true, .stream = true, .quantised = Quantised::f8_static, .odd_vectors = true},
};

const std::vector<NormCase> kBackward = {
    {},
    {.bias = true},
    {.weight = false},
    {.weight_offset = 1.0, .dh = true},
    {.bias = true, .dh = true},
    {.bias = true, .rowscale = true, .dropout = 0.3, .dh = true, .dbranch = true},
    {.bias = true, .two = true, .dropout = 0.1, .dh = true, .dbranch = true},
    {.bias = true, .heads = 3},
    {.two = true},
    {.dropout = 0.5, .dbranch = true, .odd_vectors = true},
    {.bias = true, .dx = false, .other_weight_type = true},
    {.bias = true, .heads = 2, .two = true, .dh = true, .odd_vectors = true},
    {.bias = true, .dweight = false, .odd_vectors = true},
    {.dh = true, .dweight = false},
    {.heads = 2, .dh = true, .other_weight_type = true},
    {.bias = true, .two = true, .rowscale = true, .dbranch = true, .dbias = false},
    {.eps = 0.0},
};

/// Rows of n elements: few where each is long, and up to several for each slot of the grid.
std::int64_t rows_for(std::int64_t n, unsigned turn) {
  const std::int64_t most = std::max<std::int64_t>(2, 100000 / n);
  if (n >= 3000) {
    const std::int64_t few = std::array{1, 2, 3, 5, 9, 14}[turn % 6];
    return std::min(std::max<std::int64_t>(most, n > 16384 ? 5 : 9), few);
  }
  const std::array<std::int64_t, 8> rows = {1, 2, 3, 5, 17, 40, 60000 / n + 1, 20000 / n + 3};
  return std::min(rows[turn / 3 % 8], most);
}

/// One operator, and what of it is to be checked. `turn` goes round through everything else.
struct Selection {
  const Options& options;
  unsigned turn;
  std::vector<Case> cases;

  void add(NormCase c, bool backward) {
    c.backward = backward;
    c.layout = options.layout.value_or(turn % 3 == 0 ? 0 : static_cast<int>(turn / 2 % 7));
    c.device = options.device.value_or(std::array{1, 0, 2, 1, 4, 1, 3, 5}[turn / 5 % 8]);
    std::vector<std::int64_t> rows(options.rows.begin(), options.rows.end());
    if (rows.empty()) rows = {rows_for(c.n, turn)};
    for (const std::int64_t m : rows) {
      const std::int64_t heads = std::max<std::int64_t>(c.heads, 1);
      c.m = (m + heads - 1) / heads * heads;
      const bool same_bits = options.same_bits;
      cases.push_back({c.text(), [c, same_bits] {
                         c.backward ? check_norm_bwd(c, same_bits) : check_norm(c, same_bits);
                       }});
    }
  }

  void add_variants(const std::vector<NormCase>& variants, NormKind kind, const NormTypes& types,
                    std::int64_t n, bool backward) {
    const int all = static_cast<int>(variants.size());
    const int count = options.variant ? 1 : options.full ? all : std::min(options.per, all);
    for (int i = 0; i < count; ++i) {
      ++turn;
      const int rotating = static_cast<int>((turn * 5 + i) % all);
      const int number = options.variant.value_or(options.full ? i : rotating);
      if (number >= all) continue;
      NormCase c = variants[number];
      c.kind = kind, c.types = &types, c.n = n;
      add(c, backward);
    }
  }
};

}  // namespace

std::vector<Case> norm_cases(const Options& options) {
  struct Operator {
    const char* name;
    const std::vector<NormCase>& variants;
    bool backward, layer;
  };
  const Operator operators[] = {{"fwd", kForward, false, true},
                                {"bwd", kBackward, true, true},
                                {"quant", kQuantised, false, false}};
  std::vector<std::int64_t> sizes(options.sizes.begin(), options.sizes.end());
  if (sizes.empty()) sizes.assign(std::begin(kSizes), std::end(kSizes));

  Selection selection{options, options.seed * 7919, {}};
  for (const Operator& op : operators) {
    if (!options.wants(op.name, {"fwd", "bwd", "quant", "group"})) continue;
    for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
      const char* const name = kind == NormKind::rms ? "rms" : "layer";
      if (!options.wants(name, {"rms", "layer"}) || (kind == NormKind::layer && !op.layer))
        continue;
      for (const NormTypes& types : kTypes) {
        if (!FASTKERN_EMULATE_F16 && types.x == kF16) continue;
        if (!options.wants(types.name, {"f32", "bf16", "mixed", "mixed2", "mixed3", "f16"}))
          continue;
        for (const std::int64_t n : sizes)
          selection.add_variants(op.variants, kind, types, n, op.backward);
      }
    }
  }
  return std::move(selection.cases);
}

}  // namespace emulator
