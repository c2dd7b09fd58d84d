// SPDX-License-Identifier: Apache-2.0
// What happens later: cp.async, and st.async with the mbarriers that count its bytes. From issue to
// arrival the target is poisoned: who reads it too early gets NaN.
#include <cstring>

#include "state.h"

namespace emulator {
namespace {

void perform(const Copy& copy) {
  char value[16] = {};
  if (copy.bytes > 0) std::memcpy(value, copy.from, copy.bytes);
  std::memcpy(copy.to, value, copy.size);
}

/// An mbarrier's word is this and its number, so that one that was overwritten is noticed.
constexpr std::uint64_t kMark = 0xebebebebull;

Mbarrier& mbarrier_at(const void* p, const char* what) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  const std::uint64_t number = word & 0xffffffffu;
  if (word >> 32 != kMark || number >= state.mbarriers.size() || state.mbarriers[number].at != p)
    fault("%s: no mbarrier at %p: not initialised, or overwritten", what, p);
  return state.mbarriers[number];
}

void check_mbarrier(Mbarrier& barrier) {
  constexpr long kMostBytes = 1 << 20;
  if (barrier.bytes <= -kMostBytes || barrier.bytes >= kMostBytes)
    fault("mbarrier: %ld bytes are out of the range of its count", barrier.bytes);
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  wake_all(barrier.waiting);
}

}  // namespace

void cp_async(void* shared, const void* global, int size, int bytes) {
  check_aligned(shared, size);
  check_load(global, size);
  const Copy copy{in_block(shared, size, running->rank, "cp.async"),
                  static_cast<const char*>(global), size, bytes};
  // Traps where the address is bad, not where somebody waits for it.
  if (bytes > 0) static_cast<void>(*static_cast<const volatile char*>(global));
  if (settings.arrival == Arrival::early ||
      (settings.arrival == Arrival::random && random() % 2 == 0)) {
    perform(copy);
  } else {
    std::memset(shared, kPoison, size);
    self().open.push_back(copy);
  }
  may_switch();
}

void cp_async_commit() { self().groups.push_back(std::exchange(self().open, {})); }

void cp_async_wait(int pending) {
  auto& groups = self().groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) perform(copy);
  }
}

void box_arrives(void* shared, long size, std::function<void()> write, void* barrier) {
  const int rank = running->rank;
  in_block(shared, static_cast<int>(size), rank, "cp.async.bulk.tensor");
  mbarrier_at(barrier, "cp.async.bulk.tensor");
  std::memset(shared, kPoison, size);
  state.stores.push_back({rank, std::move(write), size, static_cast<char*>(barrier)});
  if (settings.arrival == Arrival::early) deliver(state.stores.size() - 1);
  may_switch();
}

void later(Later what, std::function<void()> action) {
  // In order: what comes later may need what comes first.
  Thread& thread = self();
  if (settings.arrival == Arrival::early) return action();
  (what == Later::bulk ? thread.open_bulk : thread.open_products).push_back(std::move(action));
}

void later_commit(Later what) {
  Thread& thread = self();
  const bool bulk = what == Later::bulk;
  (bulk ? thread.bulk : thread.products)
      .push_back(std::exchange(bulk ? thread.open_bulk : thread.open_products, {}));
  may_switch();
}

void later_wait(Later what, int pending) {
  auto& groups = what == Later::bulk ? self().bulk : self().products;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const auto& action : groups.front()) action();
  }
  may_switch();
}

/// Copies that a thread never waited for still write.
void finish_copies(Thread& thread) {
  for (const auto& group : thread.bulk) {
    if (!group.empty()) fault("a thread ends with stores of the copy engine under way");
  }
  for (const auto& group : thread.groups) {
    for (const Copy& copy : group) perform(copy);
  }
  for (const Copy& copy : thread.open) perform(copy);
  thread.groups.clear(), thread.open.clear();
}

void mbarrier_init(void* barrier, int arrivals) {
  check_aligned(barrier, 8);
  char* const at = in_block(barrier, 8, running->rank, "mbarrier.init");
  const std::uint64_t word = kMark << 32 | state.mbarriers.size();
  std::memcpy(at, &word, sizeof word);
  state.mbarriers.push_back({at, arrivals, arrivals, 0, 0, {}});
}

void mbarrier_expect(void* barrier, unsigned bytes) {
  Mbarrier& b = mbarrier_at(barrier, "mbarrier.arrive.expect_tx");
  if (b.pending == 0) fault("mbarrier: more arrivals in a phase than expected");
  b.bytes += bytes;
  --b.pending;
  check_mbarrier(b);
  may_switch();
}

/// Sleeps until the phase changes, so that a loop around it is no busy loop.
bool mbarrier_try_wait(void* barrier, unsigned parity) {
  Mbarrier& b = mbarrier_at(barrier, "mbarrier.try_wait");
  if ((b.phase & 1) != parity) {
    may_switch();
    return true;
  }
  b.waiting.push_back(self().index);
  sleep("mbarrier");
  return (mbarrier_at(barrier, "mbarrier.try_wait").phase & 1) != parity;
}

void st_async(void* shared, std::uint32_t value, void* barrier, unsigned rank) {
  check_aligned(shared, 4);
  char* const to = in_block(shared, 4, rank, "st.async");
  const Store store{static_cast<int>(rank), [=] { std::memcpy(to, &value, 4); }, 4,
                    in_block(barrier, 8, rank, "st.async")};
  if (state.blocks[rank].live == 0)
    fault("st.async to block %u of the cluster, which has ended", rank);
  mbarrier_at(store.barrier, "st.async");
  std::memset(to, kPoison, 4);  // it may arrive at once
  state.stores.push_back(store);
  if (settings.arrival == Arrival::early) deliver(state.stores.size() - 1);
  may_switch();
}

void deliver(std::size_t number) {
  const Store store = state.stores[number];
  state.stores[number] = state.stores.back();
  state.stores.pop_back();
  if (state.blocks[store.rank].live == 0)
    fault("st.async arrives at block %d of the cluster, which has ended", store.rank);
  store.write();
  Mbarrier& b = mbarrier_at(store.barrier, "st.async");
  b.bytes -= store.bytes;
  check_mbarrier(b);
}

}  // namespace emulator
