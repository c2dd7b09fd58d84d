// SPDX-License-Identifier: Apache-2.0
// Sums of exponentials with a running maximum, and their reduction over the threads that own a row:
// a warp, a block or a cluster, in an order that does not depend on the batch.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"

namespace fastkern::tile {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();

/// sum = Σ exp2((v − top) · unit) over some values v, of which `top` is the largest. NaN makes the
/// sum NaN, and so does +inf.
struct LogSum {
  float top = kMinusInfinity, sum = 0.0f;

  /// What differences are taken from: 0 as long as there is nothing but −inf.
  static __device__ __forceinline__ float base(float top) {
    return top == kMinusInfinity ? 0.0f : top;
  }

  /// Goes over to a maximum of at least `top`.
  __device__ __forceinline__ void raise(float to, float unit) {
    // Before the first finite value there is nothing to be scaled, and −inf − −inf would be NaN.
    sum *= ptx::exp2_approx((top - base(to)) * unit);
    top = to;
  }

  /// Adds kCount values.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&v)[kCount], float unit) {
    float largest = v[0];
#pragma unroll
    for (int j = 1; j < kCount; ++j) largest = fmaxf(largest, v[j]);
    raise(fmaxf(top, largest), unit);
    const float from = base(top);
    float part[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) part[j] = ptx::exp2_approx((v[j] - from) * unit);
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) part[j] += part[j + half];
    }
    sum += part[0];
  }

  /// Over a warp; every lane gets the same bits.
  __device__ __forceinline__ void reduce(float unit) {
    float largest = top;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    raise(largest, unit);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
};

/// A LogSum and kMore plain sums of a row.
template <int kMore>
struct RowLogSums {
  LogSum exponentials;
  float more[kMore] = {};

  __device__ __forceinline__ void reduce(float unit) {
    exponentials.reduce(unit);
#pragma unroll
    for (int k = 0; k < kMore; ++k) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        more[k] += __shfl_xor_sync(0xffffffffu, more[k], offset);
    }
  }
  __device__ __forceinline__ void put(float* to) const {
    to[0] = exponentials.top, to[1] = exponentials.sum;
#pragma unroll
    for (int k = 0; k < kMore; ++k) to[2 + k] = more[k];
  }
  /// What lane l of a warp takes of slot l; nothing beyond `count` slots.
  __device__ __forceinline__ void take(const float* slots, int lane, int count) {
    *this = {};
    if (lane >= count) return;
    const float* const from = slots + lane * kSlot;
    exponentials.top = from[0], exponentials.sum = from[1];
#pragma unroll
    for (int k = 0; k < kMore; ++k) more[k] = from[2 + k];
  }

  static constexpr int kSlot = 8;  // words of one in memory
  static_assert(2 + kMore <= kSlot);
};

/// Shared memory of a reduction over a block, or a cluster of up to 16.
inline constexpr int kLogSumBytes = 1152;

/// The reduction of one row by a block, or by a cluster; used once.
///
///   block      each warp leaves its sums, one barrier, every warp adds all of them up
///   cluster    after that one warp of each block sends the block's to every block by st.async,
///              which reports to an mbarrier there; everybody waits for that alone
template <int kMore>
class LogSumExchange {
 public:
  using Sums = RowLogSums<kMore>;

  /// `shared`: kLogSumBytes, aligned to 16. By all threads; of a cluster of several blocks too.
  __device__ __forceinline__ LogSumExchange(void* shared, int blocks, int rank)
      : barrier_(static_cast<std::uint64_t*>(shared)),
        own_(static_cast<float*>(shared) + 4),
        arrived_(own_ + 16 * Sums::kSlot),
        blocks_(blocks),
        rank_(rank) {
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barrier_, 1);
      ptx::mbarrier_expect(barrier_, blocks_ * (2 + kMore) * 4);
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_arrive();
  }

  __device__ __forceinline__ void reduce(Sums& sums, float unit) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    sums.reduce(unit);
    if (warps > 1) {
      if (lane == 0) sums.put(own_ + warp * Sums::kSlot);
      __syncthreads();
      sums.take(own_, lane, warps);
      sums.reduce(unit);
    }
    if (blocks_ == 1) return;
    ptx::cluster_wait();  // everybody's mbarrier is ready
    if (warp == 0 && lane < blocks_) {
      float values[Sums::kSlot];
      sums.put(values);
#pragma unroll
      for (int k = 0; k < 2 + kMore; ++k)
        ptx::st_async(arrived_ + rank_ * Sums::kSlot + k, __float_as_uint(values[k]), barrier_,
                      lane);
    }
    while (!ptx::mbarrier_try_wait(barrier_, 0)) {
    }
    sums.take(arrived_, lane, blocks_);
    sums.reduce(unit);
  }

 private:
  std::uint64_t* barrier_;
  float *own_, *arrived_;
  int blocks_, rank_;
};

}  // namespace fastkern::tile
