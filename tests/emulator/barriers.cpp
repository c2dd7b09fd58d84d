// SPDX-License-Identifier: Apache-2.0
// Barriers of a block, a warp and a cluster; shuffles; plain stores to another block.
#include <cstring>

#include "state.h"

namespace emulator {
namespace {

/// Lanes of `mask` wait for each other and, in a shuffle, get each other's bits.
std::uint64_t meet(unsigned mask, bool is_shuffle, std::uint64_t bits, int source) {
  Thread& thread = self();
  const int lane = static_cast<int>(thread.thread.x % 32), first = thread.index - lane;
  if (!(mask >> lane & 1)) fault("lane %d is not in its own mask %08x", lane, mask);
  if (is_shuffle && !(mask >> source & 1))
    fault("shuffle from lane %d, which mask %08x lacks", source, mask);

  std::vector<Meeting>& meetings = own_block().warps[thread.thread.x / 32];
  Meeting* meeting = nullptr;
  for (Meeting& other : meetings) {
    if (other.mask == mask) {
      meeting = &other;
    } else if (other.mask & mask) {
      fault("lanes of a warp meet with masks %08x and %08x", other.mask, mask);
    }
  }
  if (!meeting) {
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1) && state.threads[first + i].ended)
        fault("mask %08x has lane %d, which has ended", mask, i);
    }
    meeting = &meetings.emplace_back(Meeting{mask, 0, is_shuffle, {}});
  }
  if (meeting->shuffle != is_shuffle) fault("lanes of a warp meet in a shuffle and in __syncwarp");

  meeting->values[lane] = bits;
  meeting->arrived |= 1u << lane;
  thread.source = source;
  if (meeting->arrived != mask) {
    sleep(is_shuffle ? "shuffle" : "__syncwarp");
    return thread.received;
  }
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = state.threads[first + i];
    other.received = meeting->values[other.source];
    wake(other.index);
  }
  meetings.erase(meetings.begin() + (meeting - meetings.data()));
  may_switch();
  return thread.received;
}

/// Counts the running thread; the last one wakes those that wait.
bool arrives_last(int id, int threads) {
  Block& block = own_block();
  if (block.named_arrived[id] > 0 && block.named_threads[id] != threads)
    fault("barrier %d with %d and with %d threads", id, block.named_threads[id], threads);
  block.named_threads[id] = threads;
  if (++block.named_arrived[id] < threads) return false;
  block.named_arrived[id] = 0;
  wake_all(block.named[id]);
  return true;
}

}  // namespace

void warp_barrier(unsigned mask) { meet(mask, false, 0, 0); }

std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int source) {
  return meet(mask, true, bits, source);
}

/// Threads that have ended count as arrived, as on the device.
void block_barrier() {
  Block& block = own_block();
  if (static_cast<int>(block.waiting.size()) + 1 == block.live) {
    wake_all(block.waiting);
    may_switch();
    return;
  }
  block.waiting.push_back(self().index);
  sleep("__syncthreads");
}

void block_barrier(int id, int threads) {
  Thread& thread = self();
  if (id < 1 || id > 15 || threads % 32 != 0) fault("bar.sync %d, %d", id, threads);
  if (arrives_last(id, threads)) return may_switch();
  own_block().named[id].push_back(thread.index);
  sleep("bar.sync");
}

void block_arrive(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32 != 0) fault("bar.arrive %d, %d", id, threads);
  arrives_last(id, threads);
  may_switch();
}

void await_number() {
  state.number_waiting.push_back(self().index);
  sleep("a number in global memory");
}

void number_changed() {
  wake_all(state.number_waiting);
  may_switch();
}

void check_cluster_barrier() {
  if (state.cluster_arrived != state.live || state.live == 0) return;
  ++state.cluster_phase;
  state.cluster_arrived = 0;
  wake_all(state.cluster_waiting);
}

void cluster_arrive() {
  Thread& thread = self();
  if (thread.arrived) fault("barrier.cluster.arrive twice without a wait");
  thread.arrived = true, thread.cluster_phase = state.cluster_phase;
  ++state.cluster_arrived;
  check_cluster_barrier();
  may_switch();
}

void cluster_wait() {
  Thread& thread = self();
  if (!thread.arrived) fault("barrier.cluster.wait without arrive");
  thread.arrived = false;
  if (state.cluster_phase != thread.cluster_phase) return;
  state.cluster_waiting.push_back(thread.index);
  sleep("cluster barrier");
}

void leave_barriers(Thread& thread) {
  Block& block = state.blocks[thread.rank];
  if (block.live > 0 && static_cast<int>(block.waiting.size()) == block.live)
    wake_all(block.waiting);
  check_cluster_barrier();
  const int lane = static_cast<int>(thread.thread.x % 32);
  for (const Meeting& meeting : block.warps[thread.thread.x / 32]) {
    if (meeting.mask >> lane & 1)
      fault("a thread ends for which its warp waits (mask %08x)", meeting.mask);
  }
}

void store_to_block(void* shared, unsigned rank, const void* value, int size) {
  check_aligned(shared, size);
  char* const to = in_block(shared, size, rank, "st.shared::cluster");
  if (state.blocks[rank].live == 0)
    fault("store to block %u of the cluster, which has ended", rank);
  std::memcpy(to, value, size);
  may_switch();
}

}  // namespace emulator
