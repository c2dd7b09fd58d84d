// SPDX-License-Identifier: Apache-2.0
// What the driver was asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "emulator.h"
#include "report.h"

namespace emulator {

struct Options {
  std::set<std::string> names;  // of operators, kinds and types; those not in use: all of them
  std::set<std::int64_t> sizes, rows;
  std::optional<int> layout, device, variant;
  std::optional<Order> order;
  std::optional<Arrival> arrival;
  std::optional<int> only;  // the case of this number
  unsigned seed = 1;
  int per = 1;        // variants of each
  bool full = false;  // all of them
  int most_failures = 20;
  double seconds = 600;
  bool same_bits = false, verbose = false, list = false;

  /// Whether `name`, one of `group`, was asked for; all of a group are if none is named.
  bool wants(const char* name, std::initializer_list<const char*> group) const;
};

/// Prints how it is used, and exits, where the arguments make no sense.
Options parse_options(int argc, char** argv);

/// The cases of each family, in the files of these names.
std::vector<Case> norm_cases(const Options& options);
std::vector<Case> group_norm_cases(const Options& options);
std::vector<Case> attention_cases(const Options& options);
std::vector<Case> attention_fp8_cases(const Options& options);
std::vector<Case> softmax_cases(const Options& options);
std::vector<Case> loss_cases(const Options& options);
std::vector<Case> activation_cases(const Options& options);
std::vector<Case> pointwise_cases(const Options& options);
std::vector<Case> rope_cases(const Options& options);
std::vector<Case> optim_cases(const Options& options);

}  // namespace emulator
