// SPDX-License-Identifier: Apache-2.0
// The state of the cluster that runs. Internal to the emulator; drivers and kernels see emulator.h.
#pragma once

#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {

struct Copy {
  char* to;
  const char* from;
  int size, bytes;  // `bytes` are read, the rest of `size` becomes 0
};

struct Thread : Running {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  int index = 0;  // in the cluster
  bool ended = false;
  const char* waits_for = "";
  // the lane it shuffles from, and what it got
  int source = 0;
  std::uint64_t received = 0;
  // cp.async: copies not yet in a group, and groups not yet waited for
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  // the same of the copy engine's stores, and of products of warpgroups
  std::vector<std::function<void()>> open_bulk, open_products;
  std::deque<std::vector<std::function<void()>>> bulk, products;
  // cluster barrier: whether it has arrived, and in which phase
  bool arrived = false;
  long cluster_phase = 0;
};

/// Lanes of a warp that wait for each other.
struct Meeting {
  unsigned mask, arrived;
  bool shuffle;
  std::uint64_t values[32];
};

struct Block {
  char* dynamic = nullptr;
  long dynamic_size = 0;
  char* fixed = nullptr;  // static shared memory
  int live = 0;           // threads that have not ended
  std::vector<int> waiting;
  std::vector<int> named[16];  // who waits in bar.sync, by its number
  int named_threads[16] = {}, named_arrived[16] = {};
  std::vector<std::vector<Meeting>> warps;
};

struct Mbarrier {
  char* at;
  int expected, pending;
  long bytes;  // still to come; negative if they came before they were expected
  unsigned phase;
  std::vector<int> waiting;
};

/// A st.async, or a box of the copy engine, under way to a block.
struct Store {
  int rank;
  std::function<void()> write;
  long bytes;
  char* barrier;
};

struct State {
  Grid grid{};
  std::vector<Thread> threads;
  std::vector<Block> blocks;
  int total = 0, live = 0;  // threads of the cluster; of them those that have not ended
  std::vector<Mbarrier> mbarriers;
  std::vector<Store> stores;
  // cluster barrier
  int cluster_arrived = 0;
  long cluster_phase = 0;
  std::vector<int> cluster_waiting;
  std::vector<int> number_waiting;
  // variables in static shared memory, with their places
  std::vector<std::pair<const void*, long>> variables;
  long fixed_size = 0;
  // of the call
  std::vector<Range> inputs;
  long launches = 0;
  bool inputs_settled = false;  // a launch has waited for those that wrote them
};
extern State state;

inline Thread& self() { return static_cast<Thread&>(*running); }
inline Block& own_block() { return state.blocks[running->rank]; }

/// Not-a-number in every type, and no valid index.
inline constexpr int kPoison = 0xff;

// scheduler.cpp
unsigned random();
void wake(int thread);
void wake_all(std::vector<int>& waiting);
/// Other threads run until somebody wakes this one.
void sleep(const char* waits_for);
/// Where `p`, in the running thread's shared memory, lies in that of block `rank`.
char* in_block(const void* p, int size, unsigned rank, const char* what);

// barriers.cpp
void check_cluster_barrier();
void leave_barriers(Thread& thread);

// async.cpp
void finish_copies(Thread& thread);
/// Lets one of state.stores arrive.
void deliver(std::size_t store);

}  // namespace emulator
