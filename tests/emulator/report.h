// SPDX-License-Identifier: Apache-2.0
// Cases, their failures, and comparisons with the CPU kernels.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "tensor.h"

namespace emulator {

/// A call to check: its name for messages, and what checks it.
struct Case {
  std::string text;
  std::function<void()> check;
};

using NamedTensors = std::vector<std::pair<const char*, Tensor*>>;

extern std::string current_case;
extern int failures;

void fail_case(const std::string& what, const std::string& why);

/// Fails unless found is expected but for a rounding of its type and kNoise of `scale`, the size of
/// the terms that a result is a sum of. Of 16-bit results few may differ at all: they are rounded
/// from float32 that differ in the last bits.
inline constexpr double kNoise = 4e-6;
void expect_near(const char* name, const Tensor& found, const Tensor& expected,
                 const std::vector<double>& scale, double noise = kNoise);

/// Calls `run`; fails if it throws, or writes what is not an output's. Whether all is well.
bool run_guarded(const NamedTensors& tensors, const std::function<void()>& run);

/// Fails unless `names` have the same bits in both.
void expect_same_bits(const NamedTensors& found, const NamedTensors& expected,
                      std::initializer_list<const char*> names);

/// The simplest settings for a scope.
class PlainSettings {
 public:
  PlainSettings() : kept_(settings) {
    settings.order = Order::forward, settings.arrival = Arrival::late;
  }
  ~PlainSettings() { settings = kept_; }
  PlainSettings(const PlainSettings&) = delete;
  PlainSettings& operator=(const PlainSettings&) = delete;

 private:
  Settings kept_;
};

}  // namespace emulator
