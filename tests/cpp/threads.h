// SPDX-License-Identifier: Apache-2.0
// A pool for set_parallel_for() whose parts are unequal: what must not change a result.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "fastkern/core.h"

namespace fastkern::test {

inline int pieces = 1;
inline int calls = 0;

/// `pieces` unequal parts, on threads of their own.
inline void split(std::int64_t count, std::int64_t, ParallelBody body, void* context) {
  ++calls;
  const int parts = static_cast<int>(std::min<std::int64_t>(pieces, count));
  const auto cut = [&](std::int64_t i) {
    return i == parts ? count : count * i * i / (parts * parts);
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < parts; ++i)
    threads.emplace_back([&, i] { body(context, cut(i), cut(i + 1)); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fastkern::test
