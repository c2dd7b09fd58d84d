// SPDX-License-Identifier: Apache-2.0
// What the tests of the pointwise functions share: a call in guarded memory, inputs that meet every
// special value, and the functions in plain double or integer arithmetic.
#pragma once

#include <complex>
#include <limits>
#include <optional>
#include <sstream>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise_plan.h"
#include "support.h"

namespace fastkern::test {

using C = std::complex<double>;

inline bool is_integer(DType t) {
  return t == DType::i8 || t == DType::u8 || t == DType::i16 || t == DType::i32 ||
         t == DType::i64 || t == DType::boolean;
}
inline bool is_complex(DType t) { return t == DType::c64 || t == DType::c128; }

/// Storage types of a compute type.
inline std::vector<DType> stored_as(unsigned types) {
  std::vector<DType> all;
  const auto add = [&](std::initializer_list<DType> some) { all.insert(all.end(), some); };
  if (types & kFloat) add({DType::f32, DType::bf16, DType::f16, DType::f64});
  if (types & kInt) add({DType::i64, DType::i32, DType::u8, DType::i8, DType::i16, DType::boolean});
  if (types & kComplex) add({DType::c64, DType::c128});
  return all;
}

/// The type of a result for inputs of one type.
inline DType result_type(Pointwise f, DType in) {
  switch (pointwise_info(f).promotion) {
    case Promotion::always_bool:
      return DType::boolean;
    case Promotion::int_to_float:
      return is_integer(in) ? DType::f32 : in;
    case Promotion::complex_to_float:
      return in == DType::c64 ? DType::f32 : in == DType::c128 ? DType::f64 : in;
    case Promotion::bool_to_long:
      return in == DType::boolean ? DType::i64 : in;
    default:
      return in;
  }
}

/// The function in f64 (and the value whose roundings its error may have), NaN where it has none.
struct Truth {
  C value;
  double scale = 0.0;  // error of an f32 or f64 computation, in units of this
};

inline Truth truth_of(Pointwise f, C x, C y, C z, const std::array<Number, kMaxScalars>& s) {
  const double a = x.real(), b = y.real(), c = z.real(), nan = std::nan("");
  const C alpha(s[0].real, s[0].imag);
  const auto of = [](C value, double scale = 0.0) {
    return Truth{value, std::max(scale, std::abs(value))};
  };
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  const auto larger = [&](double p, double q) {
    return std::isnan(p) || std::isnan(q) ? nan : std::max(p, q);
  };
  const auto smaller = [&](double p, double q) {
    return std::isnan(p) || std::isnan(q) ? nan : std::min(p, q);
  };
  const double k = std::sqrt(2.0 / M_PI), inner = k * (b + 0.044715 * b * b * b);
  const double cdf = 0.5 * (1.0 + std::erf(b / std::sqrt(2.0)));
  switch (f) {
    case Pointwise::copy:
      return of(x);
    case Pointwise::abs:
      return of(std::abs(x));
    case Pointwise::neg:
      return of(-x);
    case Pointwise::reciprocal:
      return of(1.0 / a);
    case Pointwise::sqrt:
      return of(std::sqrt(a));
    case Pointwise::rsqrt:
      return of(1.0 / std::sqrt(a));
    case Pointwise::exp:
      return of(std::exp(a));
    case Pointwise::sin:
      return of(std::sin(a));
    case Pointwise::cos:
      return of(std::cos(a));
    case Pointwise::tanh:
      return of(std::tanh(a));
    case Pointwise::sigmoid:
      return of(sigmoid(a));
    case Pointwise::silu:
      return of(a * sigmoid(a));
    case Pointwise::gelu:  // 1 + erf cancels below 0
      return of(0.5 * a * (1.0 + std::erf(a / std::sqrt(2.0))), std::abs(a));
    case Pointwise::gelu_tanh:
      return of(0.5 * a * (1.0 + std::tanh(k * (a + 0.044715 * a * a * a))), std::abs(a));
    case Pointwise::relu:
      return of(a < 0.0 ? 0.0 : a);
    case Pointwise::logical_not:
      return of(x == 0.0);
    case Pointwise::isnan:
      return of(std::isnan(a));
    case Pointwise::isinf:
      return of(std::isinf(a));
    case Pointwise::add:
      return of(x + alpha * y, std::abs(x) + std::abs(alpha * y));
    case Pointwise::sub:
      return of(x - alpha * y, std::abs(x) + std::abs(alpha * y));
    case Pointwise::rsub:
      return of(y - alpha * x, std::abs(y) + std::abs(alpha * x));
    case Pointwise::mul:
      return of(x * y);
    case Pointwise::div:
      return of(a / b);
    case Pointwise::div_trunc:
      return of(std::trunc(a / b));
    case Pointwise::div_floor:
      return of(std::floor(a / b));
    case Pointwise::pow:
      return of(std::pow(a, b));
    case Pointwise::maximum:
    case Pointwise::clamp_min:
      return of(larger(a, b));
    case Pointwise::minimum:
    case Pointwise::clamp_max:
      return of(smaller(a, b));
    case Pointwise::logical_and:
      return of(x != 0.0 && y != 0.0);
    case Pointwise::logical_or:
      return of(x != 0.0 || y != 0.0);
    case Pointwise::eq:
      return of(x == y);
    case Pointwise::ne:
      return of(x != y);
    case Pointwise::lt:
      return of(a < b);
    case Pointwise::le:
      return of(a <= b);
    case Pointwise::gt:
      return of(a > b);
    case Pointwise::ge:
      return of(a >= b);
    case Pointwise::where:
      return of(x != 0.0 ? y : z);
    case Pointwise::clamp:
      return of(smaller(larger(a, b), c));
    case Pointwise::relu_bwd:
      return of(b <= 0.0 ? 0.0 : a);
    case Pointwise::tanh_bwd:
      return of(a * (1.0 - b * b), std::abs(a) * (1.0 + b * b));
    case Pointwise::sigmoid_bwd:
      return of(a * (1.0 - b) * b, std::abs(a * b) * (1.0 + std::abs(b)));
    case Pointwise::silu_bwd:
      return of(a * sigmoid(b) * (1.0 + b * (1.0 - sigmoid(b))),
                std::abs(a) * sigmoid(b) * (1.0 + std::abs(b)));
    case Pointwise::gelu_bwd:
      return of(a * (cdf + b * std::exp(-0.5 * b * b) / std::sqrt(2.0 * M_PI)), std::abs(a));
    case Pointwise::gelu_tanh_bwd:
      return of(a * (0.5 * (1.0 + std::tanh(inner)) +
                     0.5 * b * (1.0 - std::tanh(inner) * std::tanh(inner)) * k *
                         (1.0 + 3 * 0.044715 * b * b)),
                std::abs(a) * (1.0 + std::abs(b) * (1.0 + b * b) *
                                         (1.0 - std::tanh(inner) * std::tanh(inner) + 1e-7)));
    default:
      return {nan};
  }
}

/// The function of integers, before it wraps around to a narrower type.
inline std::int64_t integer_truth(Pointwise f, std::int64_t a, std::int64_t b, std::int64_t c,
                                  std::int64_t alpha) {
  switch (f) {
    case Pointwise::bitwise_not:
      return ~a;
    case Pointwise::bitwise_and:
      return a & b;
    case Pointwise::bitwise_or:
      return a | b;
    case Pointwise::div_trunc:
      return a / b;
    case Pointwise::div_floor:
      return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
    case Pointwise::pow: {
      if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0;
      std::uint64_t product = 1;
      for (std::int64_t i = 0; i < b; ++i) product *= static_cast<std::uint64_t>(a);
      return static_cast<std::int64_t>(product);
    }
    default:
      return static_cast<std::int64_t>(truth_of(f, static_cast<double>(a), static_cast<double>(b),
                                                static_cast<double>(c), {Number(alpha)})
                                           .value.real());
  }
}

/// Fills with numbers of all sizes, some of them special.
inline void fill_values(Tensor& t, unsigned seed, bool special) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, 2.0);
  const double inf = std::numeric_limits<double>::infinity();
  const double specials[] = {0.0, -0.0, 1.0,   -1.0,  inf,  -inf,  std::nan(""), 2.0, -2.0,
                             0.5, 3.0,  1e-40, -30.0, 30.0, 100.0, -100.0,       3e4};
  for (std::int64_t i = 0; i < t.numel(); ++i) {
    if (t.dtype() == DType::boolean) {
      t.set(i, random() % 2);
    } else if (is_integer(t.dtype())) {
      const int range = t.dtype() == DType::i8 || t.dtype() == DType::u8 ? 128 : 2000;
      const int value =
          static_cast<int>(random() % range) - (t.dtype() == DType::u8 ? 0 : range / 2);
      t.set(i, random() % 4 == 0 ? value % 4 : value);
    } else if (special && random() % 3 == 0) {
      t.set(i, specials[random() % std::size(specials)],
            is_complex(t.dtype()) ? specials[random() % 4] : 0.0);
    } else {
      t.set(i, normal(random), normal(random));
    }
  }
}

/// Units in the last place that results of a function in f32 may be off, in fractions of the scale.
inline double noise_of(Pointwise f) { return pointwise_info(f).types & kInt ? 1.0 : 4.0; }

inline double epsilon_of(DType t) {
  switch (t) {
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
    case DType::f64:
    case DType::c128:
      return 0x1p-52;
    default:
      return 0x1p-23;
  }
}

/// Whether element i of `out` is the function of those of the inputs.
inline testing::AssertionResult matches(const PointwiseCall& call, const Tensor& out,
                                        std::int64_t i, const std::array<C, 3>& x) {
  const auto wrong = [&](C expected) {
    return testing::AssertionFailure()
           << pointwise_info(call.function).name << " in " << name_of(call.compute) << " to "
           << name_of(out.dtype()) << " of " << x[0] << ' ' << x[1] << ' ' << x[2] << " is ("
           << out.get(i) << ',' << out.get_part(i, 1) << "), expected " << expected;
  };
  if (call.compute == DType::i64 || call.compute == DType::boolean) {
    const auto integer = [](C v) { return static_cast<std::int64_t>(v.real()); };
    const Pointwise f = call.compute == DType::boolean && call.function == Pointwise::bitwise_not
                            ? Pointwise::logical_not
                            : call.function;
    std::int64_t value =
        integer_truth(f, integer(x[0]), integer(x[1]), integer(x[2]), call.scalars[0].integer);
    Tensor wrapped(out.dtype(), {1});
    if (out.dtype() == DType::boolean) value = value != 0;
    if (out.dtype() == DType::i8) value = static_cast<std::int8_t>(value);
    if (out.dtype() == DType::u8) value = static_cast<std::uint8_t>(value);
    if (out.dtype() == DType::i16) value = static_cast<std::int16_t>(value);
    if (out.dtype() == DType::i32) value = static_cast<std::int32_t>(value);
    if (out.get(i) == static_cast<double>(value)) return testing::AssertionSuccess();
    return wrong(static_cast<double>(value));
  }
  const Truth truth = truth_of(call.function, x[0], x[1], x[2], call.scalars);
  for (int part = 0; part < (is_complex(out.dtype()) ? 2 : 1); ++part) {
    const double expected = part ? truth.value.imag() : truth.value.real();
    const double found = out.get_part(i, part);
    if (std::isnan(expected) && std::isnan(found)) continue;
    // The largest of the type: what rounds beyond it is infinite.
    const double most = out.dtype() == DType::f16         ? 65504.0
                        : epsilon_of(out.dtype()) < 1e-10 ? 1e300
                                                          : 3.3e38;
    if (std::abs(expected) > most && std::isinf(found) && (found > 0) == (expected > 0)) continue;
    if (found == expected) continue;
    const double compute = epsilon_of(call.compute) * noise_of(call.function) * truth.scale;
    const double rounding = epsilon_of(out.dtype()) * std::abs(expected);
    const double least = out.dtype() == DType::f16 ? 0x1p-24 : 0x1p-126;
    if (!(std::abs(found - expected) <= compute + rounding + least)) return wrong(truth.value);
  }
  return testing::AssertionSuccess();
}

/// Where element `i` of an output of `sizes` lies in a tensor of `own` sizes, broadcast to it.
inline std::int64_t source(const Sizes& sizes, const Sizes& own, std::int64_t i) {
  std::int64_t element = 0, stride = 1;
  for (int d = static_cast<int>(sizes.size()) - 1; d >= 0; --d) {
    const std::int64_t at = i % sizes[d];
    i /= sizes[d];
    const int o = d - static_cast<int>(sizes.size() - own.size());
    if (o < 0) continue;
    element += (own[o] == 1 ? 0 : at) * stride;
    stride *= own[o];
  }
  return element;
}

/// A call with its tensors: sizes and layouts of the result and of each input.
struct PointwiseProblem {
  Pointwise function = Pointwise::add;
  DType compute = DType::f32;
  Layout out;
  DType out_type = DType::f32;
  std::vector<Layout> in;  // of no dimensions: a number
  std::vector<DType> types;
  std::array<Number, kMaxScalars> scalars{1};
  bool special = false;

  std::string text() const {
    std::ostringstream text;
    const auto layout = [&](const Layout& l, DType t) {
      text << ' ' << name_of(t) << " (";
      for (const auto n : l.sizes) text << n << ' ';
      text << "| ";
      for (const auto n : l.strides) text << n << ' ';
      text << "| " << l.offset << ')';
    };
    text << pointwise_info(function).name << " in " << name_of(compute);
    for (std::size_t i = 0; i < in.size(); ++i) layout(in[i], types[i]);
    text << " ->";
    layout(out, out_type);
    return text.str();
  }
};

struct PointwiseTensors {
  Tensor out;
  std::vector<Tensor> in;

  explicit PointwiseTensors(const PointwiseProblem& p) : out(p.out_type, p.out) {
    for (std::size_t i = 0; i < p.in.size(); ++i) {
      in.push_back(p.in[i].sizes.empty() ? Tensor() : Tensor(p.types[i], p.in[i]));
      if (in[i].given()) fill_values(in[i], 7 + 3 * i, p.special);
    }
    // Integers are not divided by zero, and powers stay in reach.
    const bool divides = p.function == Pointwise::div_trunc || p.function == Pointwise::div_floor;
    for (std::int64_t i = 0; in.size() > 1 && in[1].given() && i < in[1].numel(); ++i) {
      if (is_integer(in[1].dtype()) && divides && in[1].get(i) == 0) in[1].set(i, 1);
      if (is_integer(in[1].dtype()) && p.function == Pointwise::pow)
        in[1].set(i, static_cast<int>(in[1].get(i)) % 5);
    }
  }

  template <class RefOf>
  PointwiseCall call(const PointwiseProblem& p, const RefOf& ref_of) {
    PointwiseCall call{.op = "test",
                       .function = p.function,
                       .out = ref_of(out),
                       .in = {},
                       .scalars = p.scalars,
                       .compute = p.compute};
    for (std::size_t i = 0; i < in.size(); ++i)
      call.in[i] = in[i].given() ? Operand(ref_of(in[i])) : Operand(Number(1.5));
    return call;
  }
  PointwiseCall call(const PointwiseProblem& p) {
    return call(p, [](Tensor& t) { return t.ref(); });
  }
};

/// Every element of the result, and the memory around it.
inline testing::AssertionResult all_match(const PointwiseProblem& p, PointwiseTensors& t) {
  const PointwiseCall call = t.call(p);
  for (std::int64_t i = 0; i < t.out.numel(); ++i) {
    std::array<C, 3> x{};
    for (std::size_t k = 0; k < t.in.size(); ++k) {
      const std::int64_t from = t.in[k].given() ? source(p.out.sizes, p.in[k].sizes, i) : 0;
      x[k] = t.in[k].given() ? C(t.in[k].get(from), t.in[k].get_part(from, 1)) : C(1.5);
    }
    const auto result = matches(call, t.out, i, x);
    if (!result) return testing::AssertionFailure() << "element " << i << ": " << result.message();
  }
  return t.out.gaps_intact();
}

/// Dense operands of n elements of one type.
inline PointwiseProblem dense_problem(Pointwise f, DType type, std::int64_t n) {
  const PointwiseInfo& info = pointwise_info(f);
  PointwiseProblem p{.function = f, .out = dense_layout({n}), .in = {}, .types = {}};
  p.compute = compute_type(type);
  if (info.promotion == Promotion::int_to_float && is_integer(type)) p.compute = DType::f32;
  p.out_type = result_type(f, type);
  for (int i = 0; i < info.inputs; ++i) {
    p.in.push_back(dense_layout({n}));
    p.types.push_back(f == Pointwise::where && i == 0 ? DType::boolean : type);
  }
  return p;
}

/// Layouts of operands that meet every path of a plan: shapes (result, first and second input),
/// with strides and offsets.
inline std::vector<PointwiseProblem> layout_problems(DType a, DType b, DType out) {
  std::vector<PointwiseProblem> all;
  const auto add = [&](const Layout& o, const Layout& x, const Layout& y) {
    PointwiseProblem p{
        .function = Pointwise::add, .out = o, .out_type = out, .in = {x, y}, .types = {a, b}};
    p.compute = a == DType::c64 || a == DType::c128 ? a : DType::f32;
    all.push_back(p);
  };
  const auto d = [](const Sizes& sizes, std::int64_t offset = 0) {
    return dense_layout(sizes, offset);
  };
  for (const std::int64_t n :
       {1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 33, 127, 1025, 4095, 4096, 4099, 12289})
    add(d({n}), d({n}), d({n}));
  for (std::int64_t off = 0; off < 16; ++off) {
    add(d({1037}, off), d({1037}, off), d({1037}, off));
    add(d({1037}, off), d({1037}), d({1037}, 3));
    add(d({1037}), d({1037}, off), d({1037}, 1));
  }
  // Bias along rows and along columns, in rows that are packs and that are not.
  for (const std::int64_t n : {1, 3, 4, 8, 12, 40, 64, 67, 256, 1000, 1001}) {
    add(d({17, n}), d({17, n}), d({n}));
    add(d({17, n}), d({17, n}), d({17, 1}));
    add(d({17, n}, 1), d({17, n}, 1), d({n}, 2));
    add(d({17, n}), d({17, 1}), d({n}));
    add(d({5, 3, n}), d({5, 1, n}), d({5, 3, n}));
    add(d({5, 3, n}), d({1, 3, 1}), d({5, 1, n}));
    add({"padded", {17, n}, {n + 5, 1}, 0}, {"padded", {17, n}, {n + 8, 1}, 0}, d({n}));
    add({"padded", {17, n}, {n + 8, 1}, 0}, {"padded", {17, n}, {n + 8, 1}, 0}, d({17, n}));
    add(d({17, n}), {"every other", {17, n}, {2 * n, 2}, 1}, d({17, n}));
  }
  add(d({4, 8, 6, 6}), d({4, 8, 6, 6}), d({8, 1, 1}));
  // Transposed: of whole tiles, of parts, in batches, and both at once.
  for (const auto& [m, n] : {std::pair<std::int64_t, std::int64_t>{64, 64},
                             {128, 192},
                             {68, 132},
                             {33, 65},
                             {4, 8},
                             {1, 5},
                             {200, 7}}) {
    add(d({m, n}), {"transposed", {m, n}, {1, m}, 0}, d({m, n}));
    add(d({m, n}), {"transposed", {m, n}, {1, m}, 1}, {"transposed", {m, n}, {1, m + 4}, 4});
    add({"transposed", {m, n}, {1, m}, 0}, d({m, n}), d({n}));
    add(d({3, m, n}), {"transposed", {3, m, n}, {m * n, 1, m}, 0}, d({3, m, n}));
    add(d({m, 3, n}), {"outermost last", {m, 3, n}, {1, m, 3 * m}, 0}, d({3, 1}));
  }
  // Everything strided, and six dimensions of which none merge.
  add({"strided", {7, 9, 11}, {400, 40, 3}, 2}, {"strided", {7, 9, 11}, {2, 500, 40}, 1},
      {"strided", {9, 11}, {1, 20}, 0});
  add({"gaps", {2, 3, 2, 3, 2, 3}, {3000, 800, 300, 80, 30, 2}, 0}, d({2, 3, 2, 3, 2, 3}),
      d({3, 1, 3, 1, 3}));
  add(d({2, 3, 2, 3, 2, 3}), {"permuted", {2, 3, 2, 3, 2, 3}, {1, 2, 6, 12, 36, 72}, 0},
      d({3, 1, 3, 1, 3}));
  add(d({5, 7}), d({1}), {"", {}, {}, 0});
  add(d({1}), d({1}), {"", {}, {}, 0});
  add(d({5, 8}), {"", {}, {}, 0}, d({5, 8}));
  return all;
}

/// check(problem) for every function and type, with and without special values, until one fails.
template <class Check>
void every_function(const Check& check) {
  for (int f = 0; f < kPointwiseCount; ++f) {
    const auto function = static_cast<Pointwise>(f);
    const PointwiseInfo& info = pointwise_info(function);
    for (const DType type : stored_as(info.types)) {
      if (type == DType::boolean && (info.promotion == Promotion::standard)) continue;
      for (const bool special : {false, true}) {
        // C++ has other infinities and NaN for products of complex numbers.
        if (special && (is_complex(type) || is_integer(type))) continue;
        // f32 finds infinities on the way that f64 does not.
        if (special && (function == Pointwise::div_floor || function == Pointwise::div_trunc ||
                        function >= Pointwise::relu_bwd))
          continue;
        PointwiseProblem p = dense_problem(function, type, 1003);
        p.special = special;
        if (function == Pointwise::add || function == Pointwise::rsub)
          p.scalars[0] = is_integer(type) ? Number(3) : Number(special ? 1.0 : 0.75);
        check(p);
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace fastkern::test
