// SPDX-License-Identifier: Apache-2.0
// The threads that own a row together: part of a block, a block, or a cluster of blocks. Their
// reductions take the same order whatever the batch.
#pragma once

#include <cstdint>

#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"

namespace fastkern::tile {

struct Team {
  int threads;  // of a block, for each row: a power of two, or all of the block's
  int blocks;   // of a cluster, for one row: a power of two; above 1 the whole block is one row's
  int rank;     // of this block among them
};

struct Sum {
  static constexpr std::uint32_t kIdentity = 0;  // bits of 0.0f
  static __device__ __forceinline__ std::uint32_t apply(std::uint32_t a, std::uint32_t b) {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
  }
};

/// Of magnitudes: the bits of non-negative floats are ordered like them, NaN above infinity.
struct Largest {
  static constexpr std::uint32_t kIdentity = 0;
  static __device__ __forceinline__ std::uint32_t apply(std::uint32_t a, std::uint32_t b) {
    return a > b ? a : b;
  }
};

/// A butterfly over groups of `width` lanes: every lane gets the same bits.
template <class Op>
__device__ __forceinline__ std::uint32_t lanes_reduce(std::uint32_t v, int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < width) v = Op::apply(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  return v;
}

/// Reduces kValues (1, 2 or 4) over a warp with few exchanges: at first each half, or quarter, of
/// the warp takes over one of them. Lane l gets value l / (32 / kValues).
template <class Op, int kValues>
__device__ __forceinline__ std::uint32_t warp_reduce(const std::uint32_t (&values)[kValues],
                                                     int lane) {
  std::uint32_t v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = values[i];
  int offset = 16;
#pragma unroll
  for (int count = kValues; count > 1; count /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const std::uint32_t keep = upper ? v[count / 2 + i] : v[i];
      const std::uint32_t give = upper ? v[i] : v[count / 2 + i];
      v[i] = Op::apply(keep, __shfl_xor_sync(0xffffffffu, give, offset));
    }
  }
#pragma unroll
  for (; offset > 0; offset /= 2)
    v[0] = Op::apply(v[0], __shfl_xor_sync(0xffffffffu, v[0], offset));
  return v[0];
}

/// Sums, or other reductions, over the threads of a team, in two steps: send() gives this thread's
/// values, receive() takes the team's, in the same order. What is done in between hides the way
/// there and back. All threads of the block, or of the cluster, make the same calls; receive() is
/// one barrier, none where a team lies within a warp.
///
/// kApart: each team of a block waits for itself alone, so that one computes while another waits.
/// But a kernel that numbers its barriers at run time has all 16 of a block, and a multiprocessor
/// runs no more than four such blocks: for kernels of few, large blocks.
///
/// kAhead (1 or 2): how many send() may wait for their receive(). 2: for teams above a warp.
template <class Op, int kValues, bool kApart = false, int kAhead = 1>
class Exchange {
 public:
  static constexpr int kShare = 32 / kValues;  // lanes of a value in a warp

  /// Shared memory: a multiple of 128, for what lies behind it. Rings that do not begin on 128
  /// bytes cost backward 8 % of its speed.
  static constexpr int bytes(int block, int cluster) {
    const int own = block / 32 * kValues * 4;
    const int all = cluster == 1 ? kSlots * own : kAhead * own + kSlots * cluster * kValues * 4;
    return (4 * kHeader + all + 127) / 128 * 128;
  }

  /// Followed by a cluster barrier if team.blocks > 1.
  __device__ __forceinline__ Exchange(const Team& team, void* shared)
      : team_(team),
        barriers_(static_cast<std::uint64_t*>(shared)),
        scratch_(static_cast<std::uint32_t*>(shared) + kHeader),
        words_(static_cast<int>(blockDim.x) / 32 * kValues) {
    if (team_.blocks > 1 && threadIdx.x == 0) {
      for (int i = 0; i < kSlots; ++i) {
        ptx::mbarrier_init(barriers_ + i, 1);
        ptx::mbarrier_expect(barriers_ + i, tx_bytes());
      }
      for (int i = 0; i < kAhead; ++i) ptx::mbarrier_init(barriers_ + kSlots + i, blockDim.x / 32);
      ptx::mbarrier_init_fence();
    }
  }

  __device__ __forceinline__ void send(const float (&values)[kValues]) {
    std::uint32_t v[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = __float_as_uint(values[i]);
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (kAhead == 1 && team_.threads < 32) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) kept_[i] = lanes_reduce<Op>(v[i], team_.threads);
      return;
    }
    const std::uint32_t mine = warp_reduce<Op>(v, lane);
    if (kAhead == 1 && team_.threads == 32) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) kept_[i] = __shfl_sync(0xffffffffu, mine, i * kShare);
      return;
    }
    // Word w holds value w % kValues of warp w / kValues.
    const unsigned own = sent_ % kAhead;
    std::uint32_t* const scratch = scratch_ + (team_.blocks == 1 ? sent_ % kSlots : own) * words_;
    if (lane % kShare == 0) scratch[warp * kValues + lane / kShare] = mine;
    const unsigned turn = sent_++;
    if (team_.blocks == 1) return;
    // One warp, each in its turn, adds up the block's and tells every block.
    __syncwarp();
    if (lane == 0) ptx::mbarrier_expect(barriers_ + kSlots + own, 0);
    if (warp != static_cast<int>(turn & (warps - 1))) return;
    wait(barriers_ + kSlots + own, turn / kAhead & 1);
    const std::uint32_t total = sum_of(scratch, words_, lane);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const std::uint32_t value = __shfl_sync(0xffffffffu, total, i);
      if (lane < team_.blocks) {
        ptx::st_async(arrived(turn) + team_.rank * kValues + i, value, barriers_ + turn % kSlots,
                      lane);
      }
    }
  }

  __device__ __forceinline__ void receive(float (&values)[kValues]) {
    if (kAhead == 1 && team_.threads <= 32) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = __uint_as_float(kept_[i]);
      return;
    }
    const int lane = threadIdx.x % 32, row_warps = team_.threads / 32;
    const unsigned turn = kAhead == 1 ? sent_ - 1 : received_++;
    std::uint32_t total = 0;
    if (team_.blocks == 1) {
      const int warp = threadIdx.x / 32,
                first = team_.threads == blockDim.x ? 0 : warp & -row_warps;
      if constexpr (kApart) {
        ptx::bar_sync(1 + first, team_.threads);
      } else {
        __syncthreads();
      }
      total =
          sum_of(scratch_ + turn % kSlots * words_ + first * kValues, row_warps * kValues, lane);
    } else {
      wait(barriers_ + turn % kSlots, turn / kSlots & 1);
      total = sum_of(arrived(turn), team_.blocks * kValues, lane);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      values[i] = __uint_as_float(kValues == 1 ? total : __shfl_sync(0xffffffffu, total, i));
    // Nobody sends to this turn's slot again before everybody has sent kAhead turns more, so after
    // having read this one.
    if (team_.blocks > 1 && threadIdx.x == 0)
      ptx::mbarrier_expect(barriers_ + turn % kSlots, tx_bytes());
  }

 private:
  static constexpr int kMost = 16;  // warps of a team within one block, blocks of a cluster
  static constexpr unsigned kSlots = 2 * kAhead;
  static constexpr int kHeader = 8 * kAhead;  // words: kSlots + kAhead barriers

  /// Of `count` words, a multiple of kValues: value i ends in lane i, and in those kValues apart.
  static __device__ __forceinline__ std::uint32_t sum_of(const std::uint32_t* words, int count,
                                                         int lane) {
    std::uint32_t total = Op::kIdentity;
#pragma unroll
    for (int word = 0; word < kMost * kValues; word += 32) {
      if (word + lane < count) total = Op::apply(total, words[word + lane]);
    }
#pragma unroll
    for (int offset = 16; offset >= kValues; offset /= 2)
      total = Op::apply(total, __shfl_xor_sync(0xffffffffu, total, offset));
    return total;
  }

  static __device__ __forceinline__ void wait(std::uint64_t* barrier, int parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
  }

  /// What the blocks of the cluster send in this turn.
  __device__ __forceinline__ std::uint32_t* arrived(unsigned turn) const {
    return scratch_ + kAhead * words_ + turn % kSlots * team_.blocks * kValues;
  }
  __device__ __forceinline__ std::uint32_t tx_bytes() const { return team_.blocks * kValues * 4; }

  Team team_;
  std::uint64_t* barriers_;  // of the slots of what arrives; of the block's own words
  std::uint32_t* scratch_;
  int words_;  // of the block's warps
  unsigned sent_ = 0, received_ = 0;
  std::uint32_t kept_[kValues] = {};
};

}  // namespace fastkern::tile
