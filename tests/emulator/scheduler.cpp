// SPDX-License-Identifier: Apache-2.0
// Fibers, shared memory, and who runs next.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "state.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

// Saves the registers that a call keeps and the stack pointer, and goes on from another stack.
extern "C" void emulator_switch(void** save, void* to);
__asm__(R"(
.text
.globl emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {

Settings settings;
Counts counts;
State state;
Running* running = nullptr;
dim3 block_size, grid_size;
int device = 0;
void (*on_fault)() = nullptr;

namespace {

constexpr long kPage = 4096;
constexpr long kStack = 64 * 1024;
constexpr long kRegion = 256 * 1024;  // dynamic shared memory of a block, between two traps
constexpr long kFixed = 48 * 1024;    // static shared memory of a block
constexpr int kMaxBlocks = 16;        // of a cluster
constexpr int kMaxThreads = kMaxBlocks * 1024;
constexpr int kSavedRegisters = 6;  // of emulator_switch

std::uint64_t random_state = 1;
void* outside = nullptr;  // the stack of run_grid
char* regions = nullptr;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
int last = -1;  // the thread that ran before

/// The threads that can run, as bits.
class ReadySet {
 public:
  void resize(int threads) {
    words_.assign((threads + 63) / 64, 0);
    threads_ = threads, count_ = 0;
  }
  int count() const { return count_; }
  void insert(int i) {
    count_ += !(words_[i / 64] & bit(i));
    words_[i / 64] |= bit(i);
  }
  void erase(int i) {
    count_ -= (words_[i / 64] & bit(i)) != 0;
    words_[i / 64] &= ~bit(i);
  }
  /// The first one at or after i, or at or before i; round in a circle. There must be one.
  int up_from(int i) const {
    if (i >= threads_) i = 0;
    std::size_t w = i / 64;
    std::uint64_t word = words_[w] & (~0ull << i % 64);
    while (word == 0) {
      w = (w + 1) % words_.size();
      word = words_[w];
    }
    return static_cast<int>(w) * 64 + __builtin_ctzll(word);
  }
  int down_from(int i) const {
    if (i < 0) i = threads_ - 1;
    std::size_t w = i / 64;
    std::uint64_t word = words_[w] & (~0ull >> (63 - i % 64));
    while (word == 0) {
      w = (w + words_.size() - 1) % words_.size();
      word = words_[w];
    }
    return static_cast<int>(w) * 64 + 63 - __builtin_clzll(word);
  }

 private:
  static std::uint64_t bit(int i) { return 1ull << i % 64; }
  std::vector<std::uint64_t> words_;
  int threads_ = 0, count_ = 0;
};
ReadySet ready;

int choose() {
  switch (settings.order) {
    case Order::forward:
      return ready.up_from(last + 1);
    case Order::backward:
      return ready.down_from(last - 1);
    case Order::lowest:
      return ready.up_from(0);
    case Order::highest:
      return ready.down_from(state.total - 1);
    default:
      return ready.up_from(static_cast<int>(random() % state.total));
  }
}

/// Some of the stores under way arrive; if nobody can run, as many as it takes.
void deliver_some() {
  std::vector<Store>& stores = state.stores;
  if (settings.arrival == Arrival::random) {
    while (!stores.empty() && random() % 4 == 0) deliver(random() % stores.size());
  }
  while (ready.count() == 0 && !stores.empty()) {
    switch (settings.order) {
      case Order::forward:
        deliver(0);
        break;
      case Order::backward:
        deliver(stores.size() - 1);
        break;
      default:
        deliver(random() % stores.size());
    }
  }
}

/// To the next thread that can run, or to run_grid when all have ended.
void switch_from(void** save) {
  deliver_some();
  ++counts.switches;
  if (ready.count() == 0) {
    if (state.live > 0) fault("deadlock: %d threads wait", state.live);
    running = nullptr;
    emulator_switch(save, outside);
    return;
  }
  Thread& next = state.threads[choose()];
  last = next.index;
  if (&next.stack_pointer == save) return;
  running = &next;
  emulator_switch(save, next.stack_pointer);
}

/// Where a fiber begins; it has nowhere to return to.
void thread_main() {
  kernel_body(kernel_context);
  Thread& thread = self();
  finish_copies(thread);
  thread.ended = true, thread.waits_for = "ended";
  ready.erase(thread.index);
  --state.live;
  --own_block().live;
  leave_barriers(thread);
  switch_from(&thread.stack_pointer);
  __builtin_trap();
}

char* map_memory(long size, int protection) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const p = mmap(nullptr, size, protection, kFlags, -1, 0);
  if (p == MAP_FAILED) {
    perror("emulator: mmap");
    std::exit(2);
  }
  return static_cast<char*>(p);
}

/// Stacks end in a page that traps; so does dynamic shared memory, at either end.
void map_everything() {
  if (regions) return;
  state.threads.resize(kMaxThreads);
  state.blocks.resize(kMaxBlocks);
  char* const stacks = map_memory(kMaxThreads * kStack, PROT_READ | PROT_WRITE);
  for (int i = 0; i < kMaxThreads; ++i) {
    state.threads[i].stack = stacks + i * kStack;
    mprotect(state.threads[i].stack, kPage, PROT_NONE);
  }
  regions = map_memory(kMaxBlocks * kRegion, PROT_NONE);
  char* const fixed = map_memory(kMaxBlocks * kFixed, PROT_READ | PROT_WRITE);
  for (int rank = 0; rank < kMaxBlocks; ++rank) {
    mprotect(regions + rank * kRegion + kPage, kRegion - 2 * kPage, PROT_READ | PROT_WRITE);
    state.blocks[rank].fixed = fixed + rank * kFixed;
  }
}

void begin_thread(int rank, int i, long block) {
  const int index = rank * state.grid.threads + i;
  Thread& thread = state.threads[index];
  thread.thread = {static_cast<unsigned>(i), 0, 0};
  thread.block = {static_cast<unsigned>(block), 0, 0};
  thread.rank = rank;
  thread.waited = !state.grid.overlap;
  thread.index = index;
  thread.ended = thread.arrived = false;
  thread.waits_for = "has not begun";
  thread.open.clear(), thread.groups.clear();
  thread.open_bulk.clear(), thread.open_products.clear();
  thread.bulk.clear(), thread.products.clear();
  // As if emulator_switch had left the fiber just before thread_main.
  void** top = reinterpret_cast<void**>(thread.stack + kStack) - 2;
  *top = reinterpret_cast<void*>(&thread_main);
  top -= kSavedRegisters;
  std::memset(top, 0, kSavedRegisters * sizeof(void*));
  thread.stack_pointer = top;
  ready.insert(index);
}

void begin_block(int rank, long block) {
  Block& b = state.blocks[rank];
  char* const region = regions + rank * kRegion;
  b.dynamic_size = state.grid.shared;
  b.dynamic = region + kRegion - kPage - (b.dynamic_size + 15) / 16 * 16;
  std::memset(region + kPage, kPoison, kRegion - 2 * kPage);
  std::memset(b.fixed, kPoison, kFixed);
  b.live = state.grid.threads;
  b.waiting.clear();
  for (int id = 0; id < 16; ++id) b.named[id].clear(), b.named_arrived[id] = 0;
  b.warps.assign(state.grid.threads / 32, {});
  for (int i = 0; i < state.grid.threads; ++i) begin_thread(rank, i, block);
}

void run_cluster(long cluster) {
  state.total = state.live = state.grid.threads * state.grid.cluster;
  state.mbarriers.clear(), state.stores.clear();
  state.number_waiting.clear();
  state.cluster_waiting.clear(), state.cluster_arrived = 0, state.cluster_phase = 0;
  ready.resize(state.total);
  for (int rank = 0; rank < state.grid.cluster; ++rank)
    begin_block(rank, cluster * state.grid.cluster + rank);
  last = settings.order == Order::backward ? 0 : -1;
  switch_from(&outside);
}

}  // namespace

unsigned random() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<unsigned>(random_state >> 33);
}

void wake(int thread) { ready.insert(thread); }

void wake_all(std::vector<int>& waiting) {
  for (const int thread : waiting) wake(thread);
  waiting.clear();
}

void sleep(const char* waits_for) {
  Thread& thread = self();
  thread.waits_for = waits_for;
  ready.erase(thread.index);
  switch_from(&thread.stack_pointer);
  thread.waits_for = "runs";
}

void may_switch() {
  if (settings.order == Order::random && random() % 32 == 0) switch_from(&self().stack_pointer);
}

char* dynamic_shared() { return own_block().dynamic; }

void* static_shared(std::size_t size, const void* variable) {
  for (const auto& [known, place] : state.variables) {
    if (known == variable) return own_block().fixed + place;
  }
  const long place = state.fixed_size;
  state.fixed_size += (static_cast<long>(size) + 127) / 128 * 128;
  if (state.fixed_size > kFixed) fault("more than %ld bytes of static shared memory", kFixed);
  state.variables.emplace_back(variable, place);
  return own_block().fixed + place;
}

char* in_block(const void* p, int size, unsigned rank, const char* what) {
  if (static_cast<int>(rank) >= state.grid.cluster)
    fault("%s: block %u of a cluster of %d", what, rank, state.grid.cluster);
  const Block &own = own_block(), &other = state.blocks[rank];
  const long in_dynamic = static_cast<const char*>(p) - own.dynamic;
  if (in_dynamic >= 0 && in_dynamic + size <= own.dynamic_size) return other.dynamic + in_dynamic;
  const long in_fixed = static_cast<const char*>(p) - own.fixed;
  if (in_fixed >= 0 && in_fixed + size <= state.fixed_size) return other.fixed + in_fixed;
  fault("%s: %p is not in shared memory, %ld bytes from the begin of %ld", what, p, in_dynamic,
        own.dynamic_size);
}

void check_aligned(const void* p, int size) {
  if (reinterpret_cast<std::uintptr_t>(p) % size != 0)
    fault("misaligned access of %d bytes at %p", size, p);
}

void check_load(const void* p, int size) {
  check_aligned(p, size);
  if (running->waited) return;
  const bool input = std::any_of(state.inputs.begin(), state.inputs.end(), [&](const Range& range) {
    return std::less_equal<>()(range.first, p) && std::less<>()(p, range.second);
  });
  if (!input || !state.inputs_settled)
    fault("load before grid_wait() of what a kernel before this one may still write");
}

void check_store(const void* p, int size) {
  check_aligned(p, size);
  if (!running->waited) fault("store before grid_wait()");
}

void begin_call(std::vector<Range> inputs) {
  state.inputs = std::move(inputs), state.inputs_settled = false;
  state.launches = 0;
}

void fault(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fflush(stdout);
  std::fprintf(stderr, "\nFAULT in %s: %s\n", state.grid.op, text);
  if (running) {
    std::fprintf(stderr, "  block %u (rank %d), thread %u\n", running->block.x, running->rank,
                 running->thread.x);
  }
  // Neighbours that wait for the same thing make one line.
  constexpr int kMostLines = 24;
  for (int i = 0, lines = 0; i < state.total && lines < kMostLines; ++i) {
    const Thread& thread = state.threads[i];
    const bool first = i % state.grid.threads == 0;
    if (!first && thread.waits_for == state.threads[i - 1].waits_for) continue;
    std::fprintf(stderr, "  rank %d, from thread %u: %s\n", thread.rank, thread.thread.x,
                 thread.waits_for);
    ++lines;
  }
  for (const Mbarrier& b : state.mbarriers) {
    std::fprintf(stderr, "  mbarrier %p: phase %u, %d arrivals and %ld bytes pending, %zu wait\n",
                 static_cast<void*>(b.at), b.phase, b.pending, b.bytes, b.waiting.size());
  }
  if (on_fault) on_fault();
  std::fflush(nullptr);
  std::abort();
}

void run_grid(const Grid& grid, void (*body)(void*), void* context) {
  const Device& on = kDevices[device];
  state.grid = grid, state.total = 0;
  ++counts.launches, ++state.launches;
  counts.cluster_launches += grid.cluster > 1;
  if (settings.trace) {
    std::fprintf(stderr, "%s: %ld blocks of %d threads, %ld bytes, cluster %d\n", grid.op,
                 grid.blocks, grid.threads, grid.shared, grid.cluster);
  }
  const bool power_of_two = (grid.cluster & (grid.cluster - 1)) == 0;
  if (grid.threads % 32 != 0 || grid.threads < 1 || grid.threads > 1024 || !power_of_two ||
      grid.shared > on.shared_limit || grid.cluster > kMaxBlocks ||
      grid.blocks % grid.cluster != 0 || (grid.cluster > 1 && on.capability < 90)) {
    fault("bad launch: %ld blocks of %d threads, %ld bytes of %d, cluster %d, capability %d",
          grid.blocks, grid.threads, grid.shared, on.shared_limit, grid.cluster, on.capability);
  }
  map_everything();
  block_size = dim3(grid.threads), grid_size = dim3(static_cast<unsigned>(grid.blocks));
  kernel_body = body, kernel_context = context;
  state.variables.clear(), state.fixed_size = 0;
  random_state = settings.seed * 0x9e3779b97f4a7c15ull + state.launches;
  const bool down = settings.order == Order::backward || settings.order == Order::highest;
  const long clusters = grid.blocks / grid.cluster;
  for (long i = 0; i < clusters; ++i) run_cluster(down ? clusters - 1 - i : i);
  state.total = 0;
  state.inputs_settled |= !grid.overlap;
}

}  // namespace emulator
