// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>

namespace emulator {

using fastkern::DType;

std::string current_case;
int failures = 0;

void fail_case(const std::string& what, const std::string& why) {
  ++failures;
  std::printf("FAIL %s: %s\n     %s\n", what.c_str(), why.c_str(), current_case.c_str());
  std::fflush(stdout);
}

namespace {

/// The distance of a number from the next one of its type.
double ulp(DType dtype, double value) {
  const int digits = dtype == DType::f32 ? 23 : dtype == DType::f16 ? 10 : 7;
  const int lowest = dtype == DType::f16 ? -14 : -126;
  const bool ordinary = value != 0.0 && std::isfinite(value);
  return std::ldexp(1.0, (ordinary ? std::max(std::ilogb(value), lowest) : lowest) - digits);
}

/// First and last of rows or columns.
class Span {
 public:
  void add(std::int64_t i) {
    first_ = first_ < 0 ? i : std::min(first_, i);
    last_ = std::max(last_, i);
  }
  friend std::ostream& operator<<(std::ostream& to, const Span& span) {
    return to << span.first_ << ".." << span.last_;
  }

 private:
  std::int64_t first_ = -1, last_ = -1;
};

}  // namespace

void expect_near(const char* name, const Tensor& found, const Tensor& expected,
                 const std::vector<double>& scale, double noise) {
  if (!expected.given()) return;
  const std::int64_t n = expected.numel();
  std::int64_t wrong = 0, first = -1, nans = 0, rounded_otherwise = 0;
  Span rows, columns;
  for (std::int64_t i = 0; i < n; ++i) {
    const double a = found.get(i), b = expected.get(i);
    if (a == b) continue;
    const double distance = std::abs(a - b), terms = noise * scale[i];
    if (distance <= ulp(expected.dtype(), std::max(std::abs(a), std::abs(b))) + terms) {
      rounded_otherwise += distance > terms;
      continue;
    }
    if (wrong++ == 0) first = i;
    nans += std::isnan(a);
    rows.add(i / expected.columns()), columns.add(i % expected.columns());
  }
  if (expected.dtype() != DType::f32 && rounded_otherwise > 3 + n / 20) {
    fail_case(name, std::to_string(rounded_otherwise) + " of " + std::to_string(n) +
                        " are rounded otherwise");
  }
  if (wrong == 0) return;
  std::ostringstream why;
  why << wrong << " of " << n << " are wrong (" << nans << " NaN) in rows " << rows << ", columns "
      << columns << "; the first, element " << first << ", is " << found.get(first) << ", expected "
      << expected.get(first) << " (scale " << scale[first] << ")";
  fail_case(name, why.str());
}

bool run_guarded(const NamedTensors& tensors, const std::function<void()>& run) {
  std::vector<Range> inputs;
  for (const auto& [name, tensor] : tensors) {
    tensor->remember();
    if (tensor->given() && !tensor->writable()) inputs.push_back(tensor->range());
  }
  begin_call(std::move(inputs));
  try {
    run();
  } catch (const std::exception& error) {
    fail_case("exception", error.what());
    return false;
  }
  bool well = true;
  for (const auto& [name, tensor] : tensors) {
    const std::string damage = tensor->damage();
    if (damage.empty()) continue;
    fail_case(name, damage);
    well = false;
  }
  return well;
}

void expect_same_bits(const NamedTensors& found, const NamedTensors& expected,
                      std::initializer_list<const char*> names) {
  for (std::size_t i = 0; i < found.size(); ++i) {
    const bool wanted = std::any_of(names.begin(), names.end(), [&](const char* name) {
      return std::strcmp(name, found[i].first) == 0;
    });
    if (wanted && !found[i].second->same_bits(*expected[i].second))
      fail_case(found[i].first, "other bits than with dense operands and the plain order");
  }
}

}  // namespace emulator
