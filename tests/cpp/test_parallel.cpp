// SPDX-License-Identifier: Apache-2.0
// How CPU kernels share work. The default pool is not exported, so its source is compiled into this
// test.
#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "../../cpp/cpu/core.cpp"
#include "support.h"

namespace fastkern {
namespace {

/// Runs with the default pool again once the test is over.
class Parallel : public testing::Test {
 protected:
  void TearDown() override { set_parallel_for(nullptr); }
};

TEST_F(Parallel, EveryItemIsVisitedOnce) {
  for (const std::int64_t count : {1, 2, 3, 7, 64, 1000, 100'003}) {
    for (const std::int64_t grain : {0, 1, 2, 50, 1'000'000}) {
      std::vector<std::atomic<int>> visits(count);
      cpu::parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
        ASSERT_LE(0, begin);
        ASSERT_LE(begin, end);
        ASSERT_LE(end, count);
        for (std::int64_t i = begin; i < end; ++i) ++visits[i];
      });
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(visits[i], 1) << i << " of " << count;
    }
  }
}

TEST_F(Parallel, NothingRunsForNoItems) {
  bool ran = false;
  cpu::parallel_for(0, 1, [&](std::int64_t, std::int64_t) { ran = true; });
  cpu::parallel_for(-1, 1, [&](std::int64_t, std::int64_t) { ran = true; });
  EXPECT_FALSE(ran);
}

TEST_F(Parallel, SmallWorkStaysOnTheCallingThread) {
  std::set<std::thread::id> threads;
  cpu::parallel_for(
      10, 10, [&](std::int64_t, std::int64_t) { threads.insert(std::this_thread::get_id()); });
  EXPECT_EQ(threads, std::set{std::this_thread::get_id()});
}

TEST_F(Parallel, LargeWorkIsSpreadOverTheCores) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  cpu::parallel_for(1000, 1, [&](std::int64_t, std::int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(threads.size(), std::max(1u, std::thread::hardware_concurrency()));
}

TEST_F(Parallel, ExceptionOfAnyPieceReachesTheCaller) {
  for (const std::int64_t bad : {0, 999}) {  // the caller's own piece, a worker's
    const std::string message = test::error_of([&] {
      cpu::parallel_for(1000, 1, [&](std::int64_t begin, std::int64_t end) {
        if (begin <= bad && bad < end) fail("item ", bad);
      });
    });
    EXPECT_EQ(message, "item " + std::to_string(bad));
  }
}

TEST_F(Parallel, OtherPiecesFinishBeforeAnExceptionIsThrown) {
  std::atomic<std::int64_t> items = 0;
  EXPECT_THROW(cpu::parallel_for(1000, 1,
                                 [&](std::int64_t begin, std::int64_t end) {
                                   items += end - begin;
                                   if (begin == 0) fail("first piece");
                                 }),
               Error);
  EXPECT_EQ(items, 1000);
}

TEST_F(Parallel, CallsMayNest) {
  std::atomic<int> items = 0;
  cpu::parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      cpu::parallel_for(8, 1,
                        [&](std::int64_t first, std::int64_t last) { items += last - first; });
    }
  });
  EXPECT_EQ(items, 64);
}

std::int64_t installed_count = 0, installed_grain = 0;

void one_by_one(std::int64_t count, std::int64_t grain, ParallelBody body, void* context) {
  installed_count = count;
  installed_grain = grain;
  for (std::int64_t i = count - 1; i >= 0; --i) body(context, i, i + 1);
}

TEST_F(Parallel, AnInstalledPoolTakesOver) {
  set_parallel_for(one_by_one);
  std::vector<std::int64_t> order;
  cpu::parallel_for(4, 3, [&](std::int64_t begin, std::int64_t) { order.push_back(begin); });
  EXPECT_EQ(installed_count, 4);
  EXPECT_EQ(installed_grain, 3);
  EXPECT_EQ(order, (std::vector<std::int64_t>{3, 2, 1, 0}));
  EXPECT_EQ(test::error_of([] {
              cpu::parallel_for(
                  4, 1, [](std::int64_t begin, std::int64_t) { FK_CHECK(begin != 2, "piece 2"); });
            }),
            "piece 2");
}

TEST_F(Parallel, NullRestoresTheDefault) {
  set_parallel_for(one_by_one);
  set_parallel_for(nullptr);
  installed_count = 0;
  cpu::parallel_for(4, 1, [](std::int64_t, std::int64_t) {});
  EXPECT_EQ(installed_count, 0);
}

}  // namespace
}  // namespace fastkern
