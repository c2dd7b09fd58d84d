// SPDX-License-Identifier: Apache-2.0
// CUDA threads as fibers of one host thread: what the headers in include/ call, and what a driver
// sets. A cluster (or a block, which is a cluster of one) runs at a time.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace emulator {

// ---- what a driver sets -----------------------------------------------------------------------

/// Which of the threads that can run is next: the next one up, the next one down, always the
/// lowest, always the highest, or any; `random` also changes threads between accesses to memory.
enum class Order { forward, backward, lowest, highest, random };

/// When asynchronous copies and stores arrive: no sooner than they must, at once, or at any time.
enum class Arrival { late, early, random };

struct Settings {
  Order order = Order::forward;
  Arrival arrival = Arrival::late;
  unsigned seed = 1;
  bool trace = false;  // prints each launch
};
extern Settings settings;

struct Device {
  int processors;
  int shared_limit;  // bytes a block may have
  int capability;
};
/// Stream::device is an index. Few processors, so that plans that depend on them change early.
inline constexpr Device kDevices[] = {
    {6, 227 * 1024, 90}, {1, 227 * 1024, 90}, {2, 227 * 1024, 90}, {13, 227 * 1024, 90},
    {6, 163 * 1024, 80}, {1, 163 * 1024, 80}, {6, 99 * 1024, 89},  {16, 227 * 1024, 90},
};
extern int device;
inline constexpr int kThreadsPerProcessor = 2048;

struct Counts {
  long launches = 0, cluster_launches = 0, switches = 0;
};
extern Counts counts;

using Range = std::pair<const void*, const void*>;
/// Before a call of the library, which only reads `inputs`. Kernels launched with overlap may read
/// them before grid_wait() only if an earlier launch of the call was without: that one has waited
/// for whoever wrote them.
void begin_call(std::vector<Range> inputs);

/// Called by fault(), to name the case.
extern void (*on_fault)();

/// The kernel did what CUDA forbids or leaves undefined, or waits for ever: prints who waits for
/// what, and aborts.
[[noreturn, gnu::format(printf, 1, 2)]] void fault(const char* format, ...);

// ---- what kernels call, through include/ --------------------------------------------------------

struct Running {
  uint3 thread, block;
  int rank;     // of its block in the cluster
  bool waited;  // grid_wait() was called, or need not be
};
extern Running* running;  // the thread that runs; nullptr outside of kernels
extern dim3 block_size, grid_size;

struct Grid {
  const char* op;
  long blocks;
  int threads;
  long shared;  // bytes
  int cluster;
  bool overlap;
};
/// Runs body(context) in each thread of the grid, one cluster after another.
void run_grid(const Grid& grid, void (*body)(void*), void* context);

/// Dynamic shared memory of the running thread's block. Not aligned to more than 16 bytes; an
/// access behind it traps.
char* dynamic_shared();
void* static_shared(std::size_t size, const void* variable);
template <class>
inline constexpr char kVariable = 0;
/// A variable in static shared memory; a lambda's type tells one from another.
template <class T, class Lambda>
T& static_shared(Lambda) {
  return *static_cast<T*>(static_shared(sizeof(T), &kVariable<Lambda>));
}

void block_barrier();
void block_barrier(int id, int threads);
void block_arrive(int id, int threads);
void warp_barrier(unsigned mask);
std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int source);
void cluster_arrive();
void cluster_wait();
/// Waits until a number in global memory has changed; one has.
void await_number();
void number_changed();
void store_to_block(void* shared, unsigned rank, const void* value, int size);

void cp_async(void* shared, const void* global, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void mbarrier_init(void* barrier, int arrivals);
void mbarrier_expect(void* barrier, unsigned bytes);
bool mbarrier_try_wait(void* barrier, unsigned parity);
void st_async(void* shared, std::uint32_t value, void* barrier, unsigned rank);
/// A box of the copy engine: `write` fills it when it arrives, and the barrier hears of the bytes.
void box_arrives(void* shared, long size, std::function<void()> write, void* barrier);
/// What happens no sooner than when it is waited for, in groups, or at once: stores of the copy
/// engine, products of warpgroups.
enum class Later { bulk, products };
void later(Later what, std::function<void()> action);
void later_commit(Later what);
void later_wait(Later what, int pending);

/// With Order::random, perhaps another thread goes on from here.
void may_switch();
void check_aligned(const void* p, int size);
/// Before an access to global memory.
void check_load(const void* p, int size);
void check_store(const void* p, int size);

}  // namespace emulator
