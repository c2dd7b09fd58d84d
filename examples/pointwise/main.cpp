// SPDX-License-Identifier: Apache-2.0
// Pointwise functions of one's own on the CPU: bf16 and f32 together, broadcast, a number, a
// scalar.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fastkern/scalar.h"
#include "silu_mul.h"

using namespace fastkern;

namespace {

int wrong = 0;

void expect(const char* what, double found, double expected) {
  if (std::abs(found - expected) <= 1e-6 + 0.01 * std::abs(expected)) return;
  std::printf("%s is %g, expected %g\n", what, found, expected);
  ++wrong;
}

}  // namespace

int main() {
  constexpr std::int64_t kRows = 100, kColumns = 33;
  std::vector<bf16> x(kRows * kColumns), out(kRows * kColumns);
  std::vector<float> gate(kColumns), mixed(kRows * kColumns);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = from_float<bf16>(0.01f * (i % 997) - 5.0f);
  for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = 0.1f * i;
  const TensorRef tx = dense(x.data(), DType::bf16, kRows, kColumns);
  const TensorRef tgate = dense(gate.data(), DType::f32, kColumns);

  cpu::pointwise<silu_mul>(dense(out.data(), DType::bf16, kRows, kColumns), {tx, tgate});
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double a = to_float(x[i]);
    expect("silu_mul", to_float(out[i]), a / (1.0 + std::exp(-a)) * gate[i % kColumns]);
  }
  cpu::pointwise<squared_relu>(tx, {tx});  // in place
  cpu::pointwise<mix>(dense(mixed.data(), DType::f32, kRows, kColumns), {tx, Number(2), tgate},
                      {Number(0.5)});
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double a = to_float(x[i]);
    expect("mix", mixed[i], a + 0.5 * gate[i % kColumns] * (2.0 - a));
  }
  std::puts(wrong ? "wrong" : "all as expected");
  return wrong != 0;
}
