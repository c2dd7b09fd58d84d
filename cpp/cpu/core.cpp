// SPDX-License-Identifier: Apache-2.0
#include "fastkern/core.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "parallel.h"

namespace fastkern {
namespace {

void run_threads(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::int64_t pieces =
      std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, cores);
  std::vector<std::exception_ptr> errors(pieces);
  const auto piece = [&](std::int64_t i) {
    try {
      body(context, count * i / pieces, count * (i + 1) / pieces);
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(pieces);
  for (std::int64_t i = 1; i < pieces; ++i) {
    try {
      threads.emplace_back(piece, i);
    } catch (const std::system_error&) {  // no more threads to be had: the work is still done
      piece(i);
    }
  }
  piece(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

std::atomic<ParallelFor> installed{run_threads};

}  // namespace

void set_parallel_for(ParallelFor run) { installed = run ? run : run_threads; }

void cpu::run_parallel(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  installed.load()(count, grain, body, context);
}

}  // namespace fastkern
