// SPDX-License-Identifier: Apache-2.0
// What the kernels of group normalisation share: channel vectors, SiLU, moments, and the way
// through a group whose channels lie one behind the other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastkern/group_norm.h"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "ptx/memory.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda::group_detail {

using tile::kVector;
using tile::Pack;

constexpr int kWarp = 32;
constexpr int kBlock = 512;            // threads, channels-first
constexpr int kLastBlock = 256;        // threads, channels-last, where a thread keeps its channels
constexpr int kClusterBlocks = 8;      // the largest portable cluster
constexpr std::int64_t kChunks = 256;  // of a group, at most

/// A vector of channels, of any float type.
struct ChannelVector {
  const void* data;  // nullptr: not given
  DType dtype;

  __device__ __forceinline__ float at(std::int64_t channel, float missing) const {
    if (!data) return missing;
    if (dtype == DType::f32) return static_cast<const float*>(data)[channel];
    if (dtype == DType::f16) return tile::to_float(static_cast<const __half*>(data)[channel]);
    return tile::to_float(static_cast<const __nv_bfloat16*>(data)[channel]);
  }
};

inline ChannelVector channel_vector(const TensorRef& t) {
  return {t.given() ? t.data : nullptr, t.dtype};
}

/// For results in 16 bit approximations will do, which are off by some ulps of a float32.
template <class T>
__device__ __forceinline__ float sigmoid(float z) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-z));
  return __frcp_rn(1.0f + expf(-z));
}

template <class T, bool kSilu>
__device__ __forceinline__ float activate(float z) {
  return kSilu ? z * sigmoid<T>(z) : z;
}

template <class T, bool kSilu>
__device__ __forceinline__ float activate_grad(float dy, float z) {
  if constexpr (!kSilu) return dy;
  const float s = sigmoid<T>(z);
  return dy * (s * fmaf(z, 1.0f - s, 1.0f));
}

// ---- sums -----------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float v, int width = kWarp) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < width) v += __shfl_xor_sync(0xffffffffu, v, offset);
  }
  return v;
}

/// Sums each value over `team` threads (a power of two) of the calling thread's block, in an order
/// that the team's size alone decides. All threads of the block call it; a scratch, one float for
/// each value and warp, may be used again after another barrier.
template <int kValues>
__device__ __forceinline__ void team_sum(float (&values)[kValues], int team, float* scratch) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i], team);
  if (team <= kWarp) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = team / kWarp;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) scratch[warp * kValues + i] = values[i];
  }
  __syncthreads();
  const int first = warp / warps * warps;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = warp_sum(lane < warps ? scratch[(first + lane) * kValues + i] : 0.0f);
  }
}

/// Mean, and sum of squared distances from it. Means of parts of a group are kept as distances from
/// one of its elements: where a group lies far from zero, they need the digits.
struct Moments {
  float mean, m2;
};

__device__ __forceinline__ float rstd_of(float m2, float count, float eps) {
  return rsqrtf(m2 / count + eps);
}

/// The sum of squared distances from the mean, from that of distances from a point `off` beside it.
__device__ __forceinline__ float corrected(float squares, float off, float count) {
  const float m2 = fmaf(-count * off, off, squares);
  return m2 < 0.0f ? 0.0f : m2;  // NaN stays
}

/// Moments of all from those of parts: `part(i)` and `count(i)` for i in [0, parts). A warp calls
/// it together and gets the same bits in every lane. Sums are of distances from the first mean, so
/// that equal means stay what they are.
template <class Part, class Count>
__device__ __forceinline__ Moments combine(int parts, float total, const Part& part,
                                           const Count& count) {
  const int lane = threadIdx.x % kWarp;
  const float near = part(0).x;
  float sum = 0.0f;
  for (int i = lane; i < parts; i += kWarp) sum = fmaf(count(i), part(i).x - near, sum);
  const float mean = near + warp_sum(sum) / total;
  float m2 = 0.0f;
  for (int i = lane; i < parts; i += kWarp) {
    const float2 of = part(i);
    const float distance = of.x - mean;
    m2 += fmaf(count(i) * distance, distance, of.y);
  }
  return {mean, warp_sum(m2)};
}

/// A float2 of the shared memory of block `rank` of the cluster, at the place it has in one's own.
__device__ __forceinline__ void store_to_block(float2* shared, int rank, float2 v) {
  if constexpr (ptx::kHasClusters) {
    asm volatile(
        "{\n.reg .u32 to;\nmapa.shared::cluster.u32 to, %0, %1;\n"
        "st.shared::cluster.v2.f32 [to], {%2, %3};\n}" ::"r"(
            static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
        "r"(rank), "f"(v.x), "f"(v.y)
        : "memory");
  }
}

// ---- packs ----------------------------------------------------------------------------------

/// Packs first, first + step, ... of a row of n elements; zero beyond its end. All loads of 16
/// bytes are issued together.
template <class T, int kPacks>
__device__ __forceinline__ void load_packs(const T* row, int first, int step, int n, bool whole,
                                           Pack<T> (&out)[kPacks]) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = first + i * step;
      out[i].bits = ptx::ld_global_nc_if(row + column, column < n);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      out[i] = tile::load(row, tile::opaque(first + i * step), n, false);
  }
}

/// A place in a group whose channels lie one behind the other.
struct Place {
  std::int32_t channel;  // of the group
  std::int32_t left;     // elements up to the channel's end
};

/// Channels of `positions` elements each, walked through in steps of equal size. In 32 bits: a
/// channel longer than kFar counts as so long, which no walk within a tile gets to the end of.
struct Planes {
  static constexpr std::int64_t kFar = 1 << 30;

  std::int64_t positions;
  double inverse;  // 1 / positions
  std::int32_t length;
  std::int32_t step_channels, step_positions;
  bool even;  // no pack lies across the end of a channel

  __device__ __forceinline__ Place place(std::int64_t element) const {
    std::int64_t channel, left;
    if ((element | positions) >> 32 == 0) {
      const auto e = static_cast<std::uint32_t>(element);
      const auto p = static_cast<std::uint32_t>(positions);
      channel = e / p;
      left = p - (e - static_cast<std::uint32_t>(channel) * p);
    } else {  // a 64-bit division would be a call; this quotient may be off by one
      channel = static_cast<std::int64_t>(static_cast<double>(element) * inverse);
      left = positions - (element - channel * positions);
      if (left > positions) --channel, left -= positions;
      if (left <= 0) ++channel, left += positions;
    }
    return {static_cast<std::int32_t>(channel), static_cast<std::int32_t>(min(left, kFar))};
  }
  __device__ __forceinline__ void step(Place& at) const {
    at.channel += step_channels;
    at.left -= step_positions;
    if (at.left <= 0) {
      at.left += length;
      ++at.channel;
    }
  }
  /// body(j, channel) for the elements j of a pack, in order; any channel beyond the last one.
  template <int kV, class Body>
  __device__ __forceinline__ void for_channels(Place at, int channels, const Body& body) const {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      body(j, tile::opaque(min(at.channel, channels - 1)));
      if (--at.left == 0) {
        at.left = length;
        ++at.channel;
      }
    }
  }
};

inline Planes planes_of(const GroupShape& shape, int vector, std::int64_t step) {
  return {shape.positions,
          1.0 / static_cast<double>(shape.positions),
          static_cast<std::int32_t>(std::min(shape.positions, Planes::kFar)),
          static_cast<std::int32_t>(step / shape.positions),
          static_cast<std::int32_t>(step % shape.positions),
          shape.positions % vector == 0};
}

/// Whether x, and every stretch of `length` elements from its beginning, may be accessed in packs.
inline bool in_packs(const TensorRef& t, std::int64_t length) {
  return !t.given() || (reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 &&
                        length * size_of(t.dtype) % 16 == 0);
}

}  // namespace fastkern::cuda::group_detail
