// SPDX-License-Identifier: Apache-2.0
// cuda::pointwise in the emulator against cpu::: results that no order of operations changes, so
// every bit of them.
#include <cmath>
#include <cstring>
#include <sstream>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise_layout.h"
#include "options.h"

namespace emulator {
namespace {

using namespace fastkern;

struct Layout {
  Sizes sizes, strides;
  std::int64_t shift = 0;
};

Layout dense_layout(const Sizes& sizes, std::int64_t shift = 0) {
  Layout layout{sizes, Sizes(sizes.size(), 1), shift};
  for (int d = static_cast<int>(sizes.size()) - 2; d >= 0; --d)
    layout.strides[d] = layout.strides[d + 1] * sizes[d + 1];
  return layout;
}

/// Shapes of the result and of two inputs.
struct Shapes {
  Layout out, a, b;
};

struct PointwiseCase {
  Pointwise function = Pointwise::add;
  DType compute = DType::f32, out = DType::f32;
  std::vector<DType> in;
  Shapes shapes;
  bool number = false;  // instead of the last input
  std::string text() const;
};

std::string PointwiseCase::text() const {
  std::ostringstream text;
  const auto layout = [&](const Layout& l) {
    text << " (";
    for (const std::int64_t n : l.sizes) text << n << ' ';
    text << "by ";
    for (const std::int64_t n : l.strides) text << n << ' ';
    text << '+' << l.shift << ')';
  };
  text << "pointwise " << pointwise_info(function).name << " in " << name_of(compute) << " of";
  for (const DType t : in) text << ' ' << name_of(t);
  text << " to " << name_of(out);
  layout(shapes.out), layout(shapes.a), layout(shapes.b);
  if (number) text << " number";
  return text.str();
}

char* element(const Tensor& t, std::int64_t i) {
  const TensorRef& ref = t.ref();
  std::int64_t at = 0;
  for (int d = ref.ndim - 1; d >= 0; i /= ref.sizes[d], --d)
    at += i % ref.sizes[d] * ref.strides[d];
  return static_cast<char*>(ref.data) + at * size_of(ref.dtype);
}

/// Small numbers of both signs; quarters in types that have them, never 0 where `divisor`.
void fill_numbers(const Tensor& t, unsigned seed, bool divisor) {
  std::uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    double v = static_cast<double>(static_cast<std::int64_t>(state >> 40) % 97 - 48) / 4;
    if (divisor && std::abs(v) < 1) v = 1;
    char* const p = element(t, i);
    const auto put = [&](auto value, int offset = 0) {
      std::memcpy(p + offset, &value, sizeof value);
    };
    switch (t.dtype()) {
      case DType::f32:
        put(static_cast<float>(v));
        break;
      case DType::f16: {  // a quarter more than 1, or its power of two
        put(static_cast<std::uint16_t>(0x3c00 + (state >> 40) % 2048 + ((state >> 60) & 8) * 4096));
        break;
      }
      case DType::bf16: {
        const float f = static_cast<float>(v);
        std::uint32_t bits;
        std::memcpy(&bits, &f, 4);
        put(static_cast<std::uint16_t>(bits >> 16));
        break;
      }
      case DType::f64:
        put(v);
        break;
      case DType::boolean:
        put(static_cast<std::uint8_t>(v > 0));
        break;
      case DType::i8:
      case DType::u8:
        put(static_cast<std::int8_t>(v));
        break;
      case DType::i16:
        put(static_cast<std::int16_t>(v));
        break;
      case DType::i32:
        put(static_cast<std::int32_t>(v * 1000));
        break;
      case DType::i64:
        put(static_cast<std::int64_t>(v * 1e6));
        break;
      case DType::c64:
        put(static_cast<float>(v)), put(static_cast<float>(v - 3), 4);
        break;
      case DType::c128:
        put(v), put(v - 3, 8);
        break;
      default:
        break;
    }
  }
}

void check_pointwise(const PointwiseCase& c) {
  const auto tensor = [](DType dtype, const Layout& l) {
    return Tensor(dtype, l.sizes, l.strides, l.shift);
  };
  Tensor found = tensor(c.out, c.shapes.out), expected = tensor(c.out, c.shapes.out);
  found.allow_writes(), expected.allow_writes();
  std::vector<Tensor> in;
  const std::size_t count = c.in.size();
  for (std::size_t i = 0; i < count; ++i) {
    in.push_back(tensor(c.in[i], i == 1 ? c.shapes.b : i == 0 ? c.shapes.a : c.shapes.out));
    fill_numbers(in[i], static_cast<unsigned>(3 + i), i == 1);
  }
  PointwiseCall call{.function = c.function, .out = found.ref(), .in = {}, .compute = c.compute};
  for (std::size_t i = 0; i < count; ++i) call.in[i] = in[i].ref();
  if (c.number) call.in[count - 1] = Number(2.5);
  NamedTensors tensors{{"out", &found}};
  constexpr const char* kNames[] = {"a", "b", "c"};
  for (std::size_t i = 0; i < count; ++i) tensors.push_back({kNames[i], &in[i]});
  if (!run_guarded(tensors, [&] { cuda::pointwise(call, {nullptr, 0}); })) return;
  call.out = expected.ref();
  cpu::pointwise(call);
  const std::size_t size = static_cast<std::size_t>(size_of(c.out));
  for (std::int64_t i = 0; i < found.numel(); ++i) {
    if (std::memcmp(element(found, i), element(expected, i), size) == 0) continue;
    std::ostringstream bytes;
    bytes << "element " << i << " is 0x" << std::hex;
    for (const Tensor* t : {&found, &expected}) {
      for (std::size_t b = size; b > 0; --b)
        bytes << (element(*t, i)[b - 1] >> 4 & 15) << (element(*t, i)[b - 1] & 15);
      bytes << (t == &found ? ", expected 0x" : "");
    }
    return fail_case("out", bytes.str());
  }
}

std::vector<Shapes> shapes() {
  std::vector<Shapes> all;
  const auto d = [](const Sizes& sizes, std::int64_t shift = 0) {
    return dense_layout(sizes, shift);
  };
  for (const std::int64_t n : {1, 3, 4, 7, 8, 9, 16, 31, 127, 1024, 2048, 2049, 4099, 8192})
    all.push_back({d({n}), d({n}), d({n})});
  for (std::int64_t shift = 0; shift < 16; ++shift) {
    all.push_back({d({531}, shift), d({531}, shift), d({531}, shift)});
    all.push_back({d({531}, shift), d({531}), d({531}, 3)});
    all.push_back({d({531}), d({531}, shift), d({531}, 1)});
  }
  for (const std::int64_t n : {1, 3, 4, 8, 12, 40, 64, 67, 257}) {
    all.push_back({d({9, n}), d({9, n}), d({n})});
    all.push_back({d({9, n}), d({9, n}), d({9, 1})});
    all.push_back({d({9, n}, 1), d({9, n}, 1), d({n}, 2)});
    all.push_back({d({9, n}), d({9, 1}), d({n})});
    all.push_back({d({5, 3, n}), d({5, 1, n}), d({5, 3, n})});
    all.push_back({d({5, 3, n}), d({1, 3, 1}), d({5, 1, n})});
    all.push_back({{{9, n}, {n + 5, 1}}, {{9, n}, {n + 8, 1}}, d({n})});
    all.push_back({{{9, n}, {n + 8, 1}}, {{9, n}, {n + 8, 1}}, d({9, n})});
    all.push_back({d({9, n}), {{9, n}, {2 * n, 2}, 1}, d({9, n})});
  }
  all.push_back({d({4, 8, 6, 6}), d({4, 8, 6, 6}), d({8, 1, 1})});
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{64, 64},
                             {128, 192},
                             {68, 132},
                             {33, 65},
                             {4, 8},
                             {1, 5},
                             {100, 7},
                             {20, 16}}) {
    all.push_back({d({m, n}), {{m, n}, {1, m}}, d({m, n})});
    all.push_back({d({m, n}), {{m, n}, {1, m}, 1}, {{m, n}, {1, m + 4}, 4}});
    all.push_back({{{m, n}, {1, m}}, d({m, n}), d({n})});
    all.push_back({d({3, m, n}), {{3, m, n}, {m * n, 1, m}}, d({3, m, n})});
    all.push_back({d({m, 3, n}), {{m, 3, n}, {1, m, 3 * m}}, d({3, 1})});
  }
  all.push_back({{{7, 9, 11}, {400, 40, 3}, 2}, {{7, 9, 11}, {2, 500, 40}, 1}, {{9, 11}, {1, 20}}});
  all.push_back(
      {d({2, 3, 2, 3, 2, 3}), {{2, 3, 2, 3, 2, 3}, {1, 2, 6, 12, 36, 72}}, d({3, 1, 3, 1, 3})});
  all.push_back({d({5, 7}), d({1}), d({5, 7})});
  return all;
}

void check_triu(DType dtype, const Layout& x_layout, const Layout& out_layout,
                std::int64_t diagonal) {
  Tensor x(dtype, x_layout.sizes, x_layout.strides, x_layout.shift);
  Tensor found(dtype, out_layout.sizes, out_layout.strides, out_layout.shift);
  Tensor expected(dtype, out_layout.sizes, out_layout.strides, out_layout.shift);
  found.allow_writes(), expected.allow_writes();
  fill_numbers(x, 1, true);
  const Triangle call{.x = x.ref(), .out = found.ref(), .diagonal = diagonal};
  if (!run_guarded({{"x", &x}, {"out", &found}}, [&] { cuda::triu(call, {nullptr, 0}); })) return;
  cpu::triu({.x = x.ref(), .out = expected.ref(), .diagonal = diagonal});
  for (std::int64_t i = 0; i < found.numel(); ++i) {
    if (std::memcmp(element(found, i), element(expected, i), size_of(dtype)) != 0)
      return fail_case("out", "element " + std::to_string(i) + " differs");
  }
}

/// A plan cut into parts of at most `most` elements covers each element once, with the strides of
/// the whole.
void check_parts(std::int64_t most) {
  alignas(4) static char memory[190000];
  const TensorRef out = dense(memory, DType::f32, 7, 130, 50);
  const Operand operands[] = {dense(memory + 7 * 130 * 50 * 4, DType::f32, 130, 1)};
  const PointwisePlan plan = pointwise_plan("test", out, operands);
  std::int64_t elements = 0;
  split_plan(
      plan,
      [&](const PointwisePlan& part) {
        elements += part.numel;
        std::int64_t product = 1;
        for (int d = 0; d < part.ndim; ++d) product *= part.sizes[d];
        if (part.numel > most || product != part.numel) fail_case("parts", "a part is too large");
      },
      most);
  if (elements != plan.numel) fail_case("parts", "elements are missing");
}

}  // namespace

std::vector<Case> pointwise_cases(const Options& options) {
  std::vector<Case> cases;
  if (!options.wants("pointwise", {"fwd", "bwd", "quant", "group", "loss", "pointwise"}))
    return cases;
  struct Types {
    DType compute, a, b, out;
  };
  constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16, f64 = DType::f64;
  constexpr Types kTypes[] = {{f32, f32, f32, f32},
                              {f32, bf16, bf16, bf16},
                              {f32, bf16, f32, f32},
                              {f32, DType::boolean, bf16, bf16},
                              {f32, f16, f16, f16},
                              {f32, DType::i32, f64, bf16},
                              {f32, f32, bf16, DType::i64},
                              {DType::i64, DType::i64, DType::i64, DType::i64},
                              {DType::i64, DType::i32, DType::i32, DType::i32},
                              {DType::i64, DType::u8, DType::boolean, DType::u8},
                              {DType::i64, DType::i16, DType::i8, DType::i16},
                              {f64, f64, f32, f64},
                              {DType::c64, DType::c64, DType::c64, DType::c64},
                              {DType::c128, DType::c128, f32, DType::c128}};
  const std::vector<Shapes> all = shapes();
  const Pointwise binary[] = {Pointwise::add, Pointwise::sub, Pointwise::rsub, Pointwise::eq};
  unsigned turn = options.seed * 7919;
  const auto add = [&](const PointwiseCase& c) {
    cases.push_back({c.text(), [c] { check_pointwise(c); }});
  };
  for (const Types& t : kTypes) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      // All shapes of the first types, some of the others.
      if (&t >= kTypes + 3 && !options.full && (++turn * 2654435761u >> 8) % 3 != 0) continue;
      PointwiseCase c{.function = binary[turn++ % 4],
                      .compute = t.compute,
                      .out = t.out,
                      .in = {t.a, t.b},
                      .shapes = all[i]};
      if (c.function == Pointwise::eq && turn % 2) c.out = DType::boolean;
      c.number = turn % 16 == 5;
      add(c);
      if (turn % 4 == 1) {
        c.in = {t.a}, c.function = turn % 8 == 1 ? Pointwise::copy : Pointwise::neg, c.out = t.out;
        c.number = false;
        add(c);
      }
      if (turn % 4 == 3) {
        c.in = {DType::boolean, t.b, t.a}, c.function = Pointwise::where, c.out = t.out;
        c.number = false;
        add(c);
      }
    }
  }
  for (const DType dtype : {f32, bf16, DType::u8, f64, DType::c128}) {
    for (const auto& [m, n] :
         {std::pair<std::int64_t, std::int64_t>{5, 5}, {7, 3}, {40, 64}, {1, 32}}) {
      for (const std::int64_t diagonal : {0, 1, -1, 9, -99, 99}) {
        const Layout padded{{3, m, n}, {m * n + 48, n, 1}}, shifted = dense_layout({3, m, n}, 1);
        cases.push_back({std::string("pointwise triu ") + name_of(dtype) + " of " +
                             std::to_string(m) + "x" + std::to_string(n) + " from " +
                             std::to_string(diagonal),
                         [=] {
                           check_triu(dtype, dense_layout({3, m, n}), padded, diagonal);
                           check_triu(dtype, shifted, padded, diagonal);
                         }});
      }
    }
  }
  for (const std::int64_t most : {100000, 9000, 129, 64, 7, 1})
    cases.push_back({"pointwise parts of " + std::to_string(most), [most] { check_parts(most); }});
  return cases;
}

}  // namespace emulator
