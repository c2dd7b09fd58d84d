// SPDX-License-Identifier: Apache-2.0
// Group normalisation, backward, channels-first: groups that are held; else partial sums of dweight
// and dbias, and dx. The formula, who calls which, and memory are in group_norm_bwd.cu.
//
//   work     held: pack i of thread t of block r is elements ((i · blocks + r) · threads + t) ·
//            vector of its group; partial sums: up to 256 threads a part of a channel; dx: up to
//            512 threads a chunk of a group
//   sync     one barrier a block; held: two of the cluster
//   measured not yet
#include "dispatch.h"
#include "norm/group_norm_bwd.cuh"

namespace fastkern::cuda::group_detail {
namespace {

template <class T>
__device__ __forceinline__ ChannelScale scale_of(const Backward<T>& p, float2 stats, int channel) {
  return {stats.x, stats.y, p.weight.at(channel, 1.0f), p.bias.at(channel, 0.0f)};
}

/// f(j, scale of the channel) for the elements of a pack.
template <class T, class F>
__device__ __forceinline__ void for_pack(const Backward<T>& p, Place at, int channel, float2 stats,
                                         const F& f) {
  if (p.planes.even) {
    const ChannelScale scale = scale_of(p, stats, channel + min(at.channel, p.group_channels - 1));
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) f(j, scale);
  } else {
    p.planes.template for_channels<kVector<T>>(
        at, p.group_channels, [&](int j, int c) { f(j, scale_of(p, stats, channel + c)); });
  }
}

/// A group in registers. All its packs are full and each lies, like the warp's, in one channel.
template <class T, bool kSilu>
__global__ void __launch_bounds__(kBlock, 2) group_norm_bwd_held_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>, kPacks = kHeldPacks;
  __shared__ float scratch[2 * kBlock / kWarp];
  __shared__ float2 sPeers[kClusterBlocks];
  // Shared memory of a peer exists once it has begun.
  if (p.blocks > 1 && p.dx) ptx::cluster_arrive();
  const int lane = threadIdx.x & (p.team - 1), n = static_cast<int>(p.group_size);
  const int rank = p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const std::uint32_t group = blockIdx.x / p.blocks * (blockDim.x / p.team) + threadIdx.x / p.team;
  const bool active = group < p.group_count;
  const int first = (rank * p.team + lane) * kV, step = p.blocks * p.team * kV;
  const std::int64_t start = active ? group * p.group_size : 0;
  const float2 stats = active ? p.stats[group] : float2{0.0f, 0.0f};
  const int channel = static_cast<int>(group % p.groups) * p.group_channels;

  Pack<T> x[kPacks], dy[kPacks];
  load_packs(p.x + start, first, step, active ? n : 0, p.whole, x);
  load_packs(p.dy + start, first, step, active ? n : 0, p.whole, dy);

  float sums[2] = {0.0f, 0.0f};
  Place at = p.planes.place(first);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = first + i * step;
    float dz = 0.0f, xhat = 0.0f;
    const ChannelScale scale = scale_of(p, stats, channel + min(at.channel, p.group_channels - 1));
    if (active && column < n) {
      float v[kV], g[kV];
      tile::unpack(x[i], v);
      tile::unpack(dy[i], g);
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const Grad grad = grad_of<T, kSilu>(v[j], g[j], scale);
        dz += grad.dz;
        xhat = fmaf(grad.dz, grad.xhat, xhat);
      }
      sums[0] = fmaf(dz, scale.weight, sums[0]);
      sums[1] = fmaf(xhat, scale.weight, sums[1]);
    }
    if (p.partial) {
      dz = warp_sum(dz), xhat = warp_sum(xhat);
      if (active && column < n && threadIdx.x % kWarp == 0)
        p.partial[(start + column) / (kWarp * kV)] = {dz, xhat};
    }
    if (i + 1 < kPacks) p.planes.step(at);
  }
  if (!p.dx) return;
  team_sum(sums, p.team, scratch);
  if (p.blocks > 1) {
    ptx::cluster_wait();
    if (threadIdx.x < p.blocks) store_to_block(&sPeers[rank], threadIdx.x, {sums[0], sums[1]});
    ptx::cluster_arrive();
    ptx::cluster_wait();
    sums[0] = sums[1] = 0.0f;
    for (int r = 0; r < p.blocks; ++r) {
      sums[0] += sPeers[r].x;
      sums[1] += sPeers[r].y;
    }
  }
  if (!active) return;
  const float2 means{sums[0] / static_cast<float>(n), sums[1] / static_cast<float>(n)};
  const int again = tile::opaque(first);  // nothing made of it is kept from above
  at = p.planes.place(again);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const ChannelScale scale = scale_of(p, stats, channel + min(at.channel, p.group_channels - 1));
    float v[kV], g[kV];
    tile::keep_packed(x[i]);
    tile::keep_packed(dy[i]);
    tile::unpack(x[i], v);
    tile::unpack(dy[i], g);
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = dx_of(grad_of<T, kSilu>(v[j], g[j], scale), scale, means);
    const int column = again + i * step;
    tile::store(p.dx + start, p.whole ? column : tile::opaque(column), n, p.whole,
                tile::pack_of<T>(v));
    if (i + 1 < kPacks) p.planes.step(at);
  }
}

/// Sums of dz and of dz * xhat over a part of a channel of a sample.
template <class T, bool kSilu>
__global__ void __launch_bounds__(kPartBlock, 3) group_norm_bwd_sums_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>, kPacks = kPartPacks;
  __shared__ float scratch[2 * kPartBlock / kWarp];
  ptx::grid_launch_next();
  const int lane = threadIdx.x & (p.part_team - 1);
  const std::uint32_t index = blockIdx.x * (kPartBlock / p.part_team) + threadIdx.x / p.part_team;
  const std::uint32_t plane = index / p.parts, part = index % p.parts;
  const bool active = plane < p.group_count * p.group_channels;
  const std::uint32_t group = plane / p.group_channels, channel = plane % p.channels;
  const std::int64_t begin = part * p.part_size, start = plane * p.positions + begin;
  const int n = active ? static_cast<int>(min(p.positions - begin, p.part_size)) : 0;
  const ChannelScale scale =
      active ? scale_of(p, p.stats[group], static_cast<int>(channel)) : ChannelScale{};
  const T* const gX = p.x + (active ? start : 0);
  const T* const gDy = p.dy + (active ? start : 0);
  float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int first = lane * kV; first < n; first += p.part_team * kPacks * kV) {
    Pack<T> x[kPacks], dy[kPacks];
    load_packs(gX, first, p.part_team * kV, n, p.whole, x);
    load_packs(gDy, first, p.part_team * kV, n, p.whole, dy);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV], g[kV];
      tile::unpack(x[i], v);
      tile::unpack(dy[i], g);
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        // Beyond the end dy is 0, but x may make that a NaN.
        if (first + i * p.part_team * kV + j >= n) continue;
        const Grad grad = grad_of<T, kSilu>(v[j], g[j], scale);
        sums[0] += grad.dz;
        sums[1] = fmaf(grad.dz, grad.xhat, sums[1]);
      }
    }
  }
  team_sum(sums, p.part_team, scratch);
  if (active && lane == 0) {
    p.partial[(plane / p.channels) * p.partial_sample + channel * p.partial_channel +
              part * p.partial_step] = {sums[0], sums[1]};
  }
}

/// dx of a chunk of a group, or of small groups side by side.
template <class T, bool kSilu>
__global__ void __launch_bounds__(kBlock, 2) group_norm_bwd_dx_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>, kPacks = kDxPacks / 2;
  const std::uint32_t block = gridDim.x - 1 - blockIdx.x;
  const int lane = threadIdx.x & (p.team - 1), step = p.team * kV;
  const std::uint32_t chunk = block % p.chunks;
  const std::uint32_t group = block / p.chunks * (blockDim.x / p.team) + threadIdx.x / p.team;
  const bool active = group < p.group_count;
  const std::int64_t begin = static_cast<std::int64_t>(chunk) * step * kDxPacks;
  const std::int64_t start = (active ? group * p.group_size : 0) + begin;
  const int n =
      active
          ? static_cast<int>(min(p.group_size - begin, static_cast<std::int64_t>(step) * kDxPacks))
          : 0;
  ptx::grid_wait();
  if (!active) return;
  const float2 stats = p.stats[group], means = p.means[group];
  const int channel = static_cast<int>(group % p.groups) * p.group_channels;
  Place at = p.planes.place(begin + lane * kV);
#pragma unroll 1
  for (int first = lane * kV; first < n; first += kPacks * step) {
    Pack<T> x[kPacks], dy[kPacks];
    load_packs(p.x + start, first, step, n, p.whole, x);
    load_packs(p.dy + start, first, step, n, p.whole, dy);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV], g[kV];
      tile::unpack(x[i], v);
      tile::unpack(dy[i], g);
      for_pack(p, at, channel, stats, [&](int j, const ChannelScale& scale) {
        v[j] = dx_of(grad_of<T, kSilu>(v[j], g[j], scale), scale, means);
      });
      const int column = first + i * step;
      tile::store(p.dx + start, p.whole ? column : tile::opaque(column), n, p.whole,
                  tile::pack_of<T>(v));
      p.planes.step(at);
    }
  }
}

}  // namespace

template <class T>
void held_first(const Backward<T>& p, Activation activation, Stream stream) {
  const int groups = groups_per_block(p.team);
  Launch shape{kBackward, ceil_div(p.group_count, groups) * p.blocks, groups * p.team};
  shape.cluster = p.blocks;
  dispatch_bool(activation == Activation::silu, [&]<bool kSilu>() {
    launch(group_norm_bwd_held_kernel<T, kSilu>, shape, stream, p);
  });
}

template <class T>
void sums_first(const Backward<T>& p, Activation activation, Stream stream) {
  const std::int64_t parts = static_cast<std::int64_t>(p.group_count) * p.group_channels * p.parts;
  dispatch_bool(activation == Activation::silu, [&]<bool kSilu>() {
    launch(group_norm_bwd_sums_kernel<T, kSilu>,
           {kBackward, ceil_div(parts, kPartBlock / p.part_team), kPartBlock}, stream, p);
  });
}

template <class T>
void dx_first(const Backward<T>& p, Activation activation, Stream stream) {
  const int groups = groups_per_block(p.team);
  Launch shape{kBackward, ceil_div(p.group_count, groups) * p.chunks, groups * p.team};
  shape.overlap = true;
  dispatch_bool(activation == Activation::silu, [&]<bool kSilu>() {
    launch(group_norm_bwd_dx_kernel<T, kSilu>, shape, stream, p);
  });
}

#define FASTKERN_INSTANTIATE(T)                                        \
  template void held_first<T>(const Backward<T>&, Activation, Stream); \
  template void sums_first<T>(const Backward<T>&, Activation, Stream); \
  template void dx_first<T>(const Backward<T>&, Activation, Stream)
FASTKERN_INSTANTIATE(float);
FASTKERN_INSTANTIATE(__half);
FASTKERN_INSTANTIATE(__nv_bfloat16);

}  // namespace fastkern::cuda::group_detail
