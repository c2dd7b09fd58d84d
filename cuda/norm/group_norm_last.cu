// SPDX-License-Identifier: Apache-2.0
// Group normalisation, forward, channels-last: x (N, positions, C) in memory. The formula is in
// group_norm.cu.
//
//   work     a thread keeps one pack of channels and walks through positions: accesses of 16 bytes
//            along C, sums for each channel in registers. Channels are cut into slabs of whole
//            groups, 128 bytes wide or so; a cluster of 1, 2, 4 or 8 blocks of 256 threads holds
//            all positions of a slab in registers, 64 KiB a block.
//            More positions than that: three kernels, moments of each channel in tiles of 16
//            positions a thread; those of each group; and, last tile first, y. Slabs are then cut
//            without regard to groups.
//   moments  of a thread's values of a channel about their own mean; then of channels, of groups,
//            and of a cluster's blocks or of tiles, each time about the mean of all
//   memory   shared: two f32 for each thread's channel; workspace: two f32 a channel and tile, two
//            a group
//   sync     three barriers a block, two of the cluster
//   cost     as channels-first; tiles add 8 bytes written and read for 16 · rows elements, 1.6 % in
//            16-bit types
//   measured not yet
#include <algorithm>

#include "dispatch.h"
#include "norm/group_norm_fwd.cuh"
#include "norm/group_rows.cuh"

namespace fastkern::cuda::group_detail {
namespace {

/// Moments of every channel of the slab over this block's positions, into `out` (all channels of
/// the slab), the means as distances from `pivots`, this thread's channels at the sample's first
/// position; there is memory for rows * row_pitch float2's in `shared`.
template <class T, int kPacks>
__device__ __forceinline__ void channel_moments(Pack<T> (&x)[kPacks], const Pack<T>& pivots,
                                                const Cell& cell, int first, int step,
                                                int positions, const Turns& turns, int first_row,
                                                float* shared, float2* out) {
  constexpr int kV = kVector<T>;
  const int channels = cell.packs * kV, pitch = row_pitch(channels);
  float* const sMean = shared;
  float* const sM2 = shared + cell.rows * pitch;
  // Distances from the thread's first value: at most 16 of them, so that the difference of squares
  // below loses some bits at worst, and packs are unpacked once.
  float shift[kV], mean[kV] = {}, m2[kV] = {};
  tile::unpack(x[0], shift);
#pragma unroll
  for (int i = 1; i < kPacks; ++i) {
    float v[kV];
    tile::unpack(x[i], v);
    if (first + i * step < positions) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const float distance = v[j] - shift[j];
        mean[j] += distance;
        m2[j] = fmaf(distance, distance, m2[j]);
      }
    }
  }
  const int own = turns.of(first_row + cell.y);
  const float scale = own > 0 ? 1.0f / static_cast<float>(own) : 0.0f;
  float pivot[kV];
  tile::unpack(pivots, pivot);
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    const float distance = mean[j] * scale;
    m2[j] = fmaf(-distance, mean[j], m2[j]);
    m2[j] = m2[j] < 0.0f ? 0.0f : m2[j];  // NaN stays
    mean[j] = (shift[j] - pivot[j]) + distance;
  }
  if (cell.y < cell.rows) {
    put(sMean + cell.y * pitch + cell.x * kV, mean);
    put(sM2 + cell.y * pitch + cell.x * kV, m2);
  }
  __syncthreads();
  const float total = static_cast<float>(turns.of(first_row, cell.rows));
  for_slab_channels(channels, [&](int channel, int part, bool inside) {
    float sum = 0.0f, squares = 0.0f;
    const float near = inside ? sMean[channel] : 0.0f;
    for (int y = part; inside && y < cell.rows; y += 4) {
      sum =
          fmaf(static_cast<float>(turns.of(first_row + y)), sMean[y * pitch + channel] - near, sum);
    }
    const float of_all = near + sum_of_four(sum) / total;
    for (int y = part; inside && y < cell.rows; y += 4) {
      const float distance = sMean[y * pitch + channel] - of_all;
      squares += fmaf(static_cast<float>(turns.of(first_row + y)) * distance, distance,
                      sM2[y * pitch + channel]);
    }
    squares = sum_of_four(squares);
    if (inside && part == 0) out[channel] = {of_all, squares};
  });
}

/// This thread's channels at the first position of a sample, whose slab begins at `slab`.
template <bool kWhole, class T>
__device__ __forceinline__ Pack<T> pivots_of(const T* slab, const Cell& cell) {
  Pack<T> pivots[1];
  load_cells<kWhole>(slab, cell, 0, 0, 1, pivots);
  return pivots[0];
}

/// This thread's channels: y = act((x - mean) * scale + shift).
template <class T>
struct Scaling {
  static constexpr int kV = kVector<T>;
  float mean[kV], scale[kV], shift[kV];

  /// `stats_of(channel of the slab)`: mean and rstd.
  template <class StatsOf>
  __device__ __forceinline__ Scaling(const Forward<T>& p, const Cell& cell,
                                     const StatsOf& stats_of) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const int channel =
          tile::opaque(min(cell.x * kV + j, cell.width - 1));  // beyond the end: any
      const float2 stats = stats_of(channel);
      mean[j] = stats.x;
      scale[j] = stats.y * p.weight.at(cell.channel + channel, 1.0f);
      shift[j] = p.bias.at(cell.channel + channel, 0.0f);
    }
  }
  template <bool kSilu>
  __device__ __forceinline__ Pack<T> apply(const Pack<T>& in) const {
    float v[kV];
    tile::unpack(in, v);
#pragma unroll
    for (int j = 0; j < kV; ++j)
      v[j] = activate<T, kSilu>(fmaf(v[j] - mean[j], scale[j], shift[j]));
    return tile::pack_of<T>(v);
  }
};

template <class T, bool kSilu, int kPacks, bool kWhole>
__global__ void __launch_bounds__(kLastBlock, kWhole ? 2 : 1)
    group_norm_last_fwd_kernel(const Forward<T> p, const Slabs slabs) {
  constexpr int kV = kVector<T>;
  extern __shared__ float4 memory[];
  if (p.blocks > 1) ptx::cluster_arrive();  // shared memory of a peer exists once it has begun
  const int rank = p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const unsigned index = blockIdx.x / p.blocks;
  const std::int64_t sample = index / slabs.count;
  const Cell cell = Cell::of<kV>(slabs, index % slabs.count);
  const int positions = static_cast<int>(p.positions), d = p.group_channels;
  const int first_row = rank * cell.rows, lap = p.blocks * cell.rows;
  const int channels = cell.packs * kV, most_groups = channels / d, groups = cell.width / d;
  const std::int64_t start = sample * p.positions * slabs.channels + cell.channel;

  Pack<T> x[kPacks];
  load_cells<kWhole>(p.x + start, cell, first_row + cell.y, lap, positions, x);
  const Pack<T> pivots = pivots_of<kWhole>(p.x + start, cell);

  float* const sRows = reinterpret_cast<float*>(memory);
  float2* const sChannels = reinterpret_cast<float2*>(sRows + 2 * cell.rows * row_pitch(channels));
  float2* const sPeers = sChannels + channels;             // [block][group]
  float2* const sStats = sPeers + p.blocks * most_groups;  // [group]
  const Turns turns(positions, lap);
  channel_moments(x, pivots, cell, first_row + cell.y, lap, positions, turns, first_row, sRows,
                  sChannels);
  __syncthreads();
  if (p.blocks > 1) ptx::cluster_wait();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto count_of = [&](int r) {  // elements of a group in block r
    return static_cast<float>(turns.of(r * cell.rows, cell.rows)) * static_cast<float>(d);
  };
  for (int g = warp; g < groups; g += kLastBlock / kWarp) {
    const float own = count_of(rank), of_channel = own / static_cast<float>(d);
    const T* const gPivots = p.x + start + g * d;
    const float pivot = tile::to_float(gPivots[0]);
    const Moments of_group = combine(
        d, own,
        [&](int i) {
          const float2 part = sChannels[g * d + i];
          return float2{(tile::to_float(gPivots[i]) - pivot) + part.x, part.y};
        },
        [&](int) { return of_channel; });
    float2* const place = sPeers + rank * most_groups + g;
    if (p.blocks == 1) {
      if (lane == 0) *place = {of_group.mean, of_group.m2};
    } else if (lane < p.blocks) {
      store_to_block(place, lane, {of_group.mean, of_group.m2});
    }
  }
  if (p.blocks > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  for (int g = warp; g < groups; g += kLastBlock / kWarp) {
    const float total = static_cast<float>(p.group_size);
    const Moments all =
        combine(p.blocks, total, [&](int r) { return sPeers[r * most_groups + g]; }, count_of);
    if (lane == 0) {
      sStats[g] = {tile::to_float(p.x[start + g * d]) + all.mean, rstd_of(all.m2, total, p.eps)};
      if (p.stats && rank == 0) p.stats[sample * p.groups + cell.channel / d + g] = sStats[g];
    }
  }
  if (!p.y) return;
  __syncthreads();
  const Scaling<T> scaling(p, cell, [&](int channel) { return sStats[channel / d]; });
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    tile::keep_packed(x[i]);
    store_cell<kWhole>(p.y + start, cell, first_row + cell.y + i * lap, positions,
                       scaling.template apply<kSilu>(x[i]));
  }
}

/// A block's tile where groups are not held: sample, slab, and positions.
struct Tile {
  std::int64_t sample, index;
  std::int64_t first;  // position
  int positions;
  unsigned slab;

  template <class T>
  static __device__ __forceinline__ Tile of(const Forward<T>& p, const Slabs& slabs,
                                            unsigned block) {
    const unsigned row = block / slabs.count, tile = row % p.tiles;
    const int size = kLastBlock / slabs.packs * kLastPacks;
    const std::int64_t first = static_cast<std::int64_t>(tile) * size;
    return {row / p.tiles, row, first,
            static_cast<int>(min(p.positions - first, static_cast<std::int64_t>(size))),
            block % slabs.count};
  }
};

/// Moments of each channel of a slab in a tile.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kLastBlock, kWhole ? 2 : 1)
    group_norm_last_stats_kernel(const Forward<T> p, const Slabs slabs) {
  constexpr int kV = kVector<T>;
  extern __shared__ float4 memory[];
  ptx::grid_launch_next();
  const Tile tile = Tile::of(p, slabs, blockIdx.x);
  const Cell cell = Cell::of<kV>(slabs, tile.slab);
  const int channels = cell.packs * kV;
  const std::int64_t start =
      (tile.sample * p.positions + tile.first) * slabs.channels + cell.channel;
  Pack<T> x[kLastPacks];
  load_cells<kWhole>(p.x + start, cell, cell.y, cell.rows, tile.positions, x);
  const Pack<T> pivots =
      pivots_of<kWhole>(p.x + tile.sample * p.positions * slabs.channels + cell.channel, cell);
  float* const sRows = reinterpret_cast<float*>(memory);
  float2* const sChannels = reinterpret_cast<float2*>(sRows + 2 * cell.rows * row_pitch(channels));
  channel_moments(x, pivots, cell, cell.y, cell.rows, tile.positions,
                  Turns(tile.positions, cell.rows), 0, sRows, sChannels);
  __syncthreads();
  float2* const partial = p.partial + tile.index * slabs.channels + cell.channel;
  for (int c = threadIdx.x; c < cell.width; c += kLastBlock) partial[c] = sChannels[c];
}

/// Statistics of a group from the moments of its channels in all tiles.
template <class T>
__global__ void __launch_bounds__(kLastBlock)
    group_norm_last_finish_kernel(const Forward<T> p, int tile_size) {
  __shared__ float scratch[2][kLastBlock / kWarp];
  ptx::grid_launch_next();
  ptx::grid_wait();
  const unsigned group = blockIdx.x;
  const std::int64_t channels = static_cast<std::int64_t>(p.groups) * p.group_channels;
  const float2* const partial = p.partial + group / p.groups * p.tiles * channels +
                                static_cast<std::int64_t>(group % p.groups) * p.group_channels;
  const T* const gPivots = p.x + group / p.groups * p.positions * channels +
                           static_cast<std::int64_t>(group % p.groups) * p.group_channels;
  const float pivot = tile::to_float(gPivots[0]);
  const auto for_parts = [&](const auto& body) {
    for (std::int64_t i = threadIdx.x; i < static_cast<std::int64_t>(p.tiles) * p.group_channels;
         i += kLastBlock) {
      const unsigned tile = static_cast<unsigned>(i) / p.group_channels;
      const unsigned c = static_cast<unsigned>(i) % p.group_channels;
      const std::int64_t left = p.positions - static_cast<std::int64_t>(tile) * tile_size;
      const float2 part = partial[tile * channels + c];
      body(float2{(tile::to_float(gPivots[c]) - pivot) + part.x, part.y},
           static_cast<float>(min(left, static_cast<std::int64_t>(tile_size))));
    }
  };
  const float total = static_cast<float>(p.group_size);
  float sum[1] = {0.0f}, m2[1] = {0.0f};
  const float near = partial->x;
  for_parts([&](float2 part, float count) { sum[0] = fmaf(count, part.x - near, sum[0]); });
  team_sum(sum, kLastBlock, scratch[0]);
  const float mean = near + sum[0] / total;
  for_parts([&](float2 part, float count) {
    const float distance = part.x - mean;
    m2[0] += fmaf(count * distance, distance, part.y);
  });
  team_sum(m2, kLastBlock, scratch[1]);
  if (threadIdx.x == 0) p.stats[group] = {pivot + mean, rstd_of(m2[0], total, p.eps)};
}

template <class T, bool kSilu, bool kWhole>
__global__ void __launch_bounds__(kLastBlock, kWhole ? 2 : 1)
    group_norm_last_apply_kernel(const Forward<T> p, const Slabs slabs) {
  constexpr int kV = kVector<T>;
  const Tile tile = Tile::of(p, slabs, gridDim.x - 1 - blockIdx.x);
  const Cell cell = Cell::of<kV>(slabs, tile.slab);
  const std::int64_t start =
      (tile.sample * p.positions + tile.first) * slabs.channels + cell.channel;
  ptx::grid_wait();
  const float2* const stats = p.stats + tile.sample * p.groups;
  const Scaling<T> scaling(p, cell, [&](int channel) {
    return stats[static_cast<std::uint32_t>(cell.channel + channel) /
                 static_cast<std::uint32_t>(p.group_channels)];
  });
  Pack<T> x[kLastPacks];
  load_cells<kWhole>(p.x + start, cell, cell.y, cell.rows, tile.positions, x);
#pragma unroll
  for (int i = 0; i < kLastPacks; ++i) {
    store_cell<kWhole>(p.y + start, cell, cell.y + i * cell.rows, tile.positions,
                       scaling.template apply<kSilu>(x[i]));
  }
}

// ---- host -----------------------------------------------------------------------------------

struct LastPlan {
  Slabs slabs{};
  int blocks = 0;          // of a cluster that holds a slab; 0: none does
  int packs = kLastPacks;  // positions of a thread
  std::int64_t tiles = 0;  // where it is not held
  int tile_size = 0;       // positions
};

/// A function of a sample's shape and type alone, and of whether there are clusters.
LastPlan last_plan(const GroupShape& shape, DType dtype, bool clusters) {
  constexpr std::int64_t kWide = 128, kNarrow = 32;  // bytes of a slab
  const int size = static_cast<int>(size_of(dtype)), vector = 16 / size;
  const std::int64_t d = shape.group_channels(), unit = std::lcm<std::int64_t>(d, vector);
  LastPlan plan;
  for (std::int64_t units = std::max<std::int64_t>(1, ceil_div(kWide, unit * size));
       units >= 1 && (units == 1 || units * unit * size >= kNarrow); units = units / 2) {
    const std::int64_t width = std::min(units * unit, shape.channels);
    const std::int64_t packs = ceil_div(width, vector);
    if (packs > kLastBlock) continue;
    plan.slabs = {shape.channels, static_cast<std::int32_t>(ceil_div(shape.channels, width)),
                  static_cast<std::int32_t>(packs)};
    const std::int64_t rows = plan.slabs.rows();
    for (int blocks = 1; blocks <= (clusters ? kClusterBlocks : 1); blocks *= 2) {
      if (blocks * rows * kLastPacks < shape.positions) continue;
      plan.blocks = blocks;
      plan.packs = static_cast<int>(ceil_div(shape.positions, blocks * rows));
      return plan;
    }
  }
  plan.slabs = narrow_slabs(shape.channels, vector);
  plan.tile_size = plan.slabs.rows() * kLastPacks;
  plan.tiles = ceil_div(shape.positions, plan.tile_size);
  return plan;
}

/// Bytes of shared memory for channel_moments and what follows it.
std::size_t shared_of(const LastPlan& plan, int vector, std::int64_t group_channels) {
  const std::size_t channels = plan.slabs.packs * vector;
  const std::size_t rows = 2 * sizeof(float) * plan.slabs.rows() * row_pitch(channels);
  const std::size_t groups = plan.blocks > 0 ? (plan.blocks + 1) * (channels / group_channels) : 0;
  return rows + sizeof(float2) * (channels + groups);
}

}  // namespace

std::size_t last_workspace(const GroupShape& shape, DType dtype, bool clusters) {
  const LastPlan plan = last_plan(shape, dtype, clusters);
  if (plan.blocks > 0) return 0;
  return sizeof(float2) * (shape.batch * plan.tiles * shape.channels + shape.group_count());
}

template <class T>
void forward_last(const GroupNormFwd& args, const GroupShape& shape, Stream stream) {
  const LastPlan plan = last_plan(shape, args.x.dtype, has_clusters(stream.device, kForward));
  Forward<T> p = forward_params<T>(args, shape);
  p.whole = rows_in_packs<T>(shape, {&args.x, &args.y});
  p.blocks = plan.blocks;
  p.tiles = static_cast<std::uint32_t>(plan.tiles);
  const std::size_t shared = shared_of(plan, kVector<T>, shape.group_channels());
  const bool silu = args.activation == Activation::silu;
  const auto run = [&]<bool kSilu, bool kWhole>() {
    if (plan.blocks > 0) {
      Launch shape_of{kForward, shape.batch * plan.slabs.count * plan.blocks, kLastBlock, shared};
      shape_of.cluster = plan.blocks;
      const auto held = [&]<int kPacks>() {
        launch(group_norm_last_fwd_kernel<T, kSilu, kPacks, kWhole>, shape_of, stream, p,
               plan.slabs);
      };
      if constexpr (kWhole) {
        return dispatch_ceil<2, 4, 8, kLastPacks>(plan.packs, held);
      } else {
        return held.template operator()<kLastPacks>();
      }
    }
    if (!p.stats) p.stats = p.partial + shape.batch * plan.tiles * shape.channels;
    Launch tiles{kForward, shape.batch * plan.tiles * plan.slabs.count, kLastBlock, shared};
    Launch groups{kForward, shape.group_count(), kLastBlock};
    launch(group_norm_last_stats_kernel<T, kWhole>, tiles, stream, p, plan.slabs);
    groups.overlap = true;
    launch(group_norm_last_finish_kernel<T>, groups, stream, p, plan.tile_size);
    tiles.overlap = true, tiles.shared = 0;
    if (p.y) launch(group_norm_last_apply_kernel<T, kSilu, kWhole>, tiles, stream, p, plan.slabs);
  };
  dispatch_bool(silu, [&]<bool kSilu>() {
    dispatch_bool(p.whole, [&]<bool kWhole>() { run.template operator()<kSilu, kWhole>(); });
  });
}

template void forward_last<float>(const GroupNormFwd&, const GroupShape&, Stream);
template void forward_last<__half>(const GroupNormFwd&, const GroupShape&, Stream);
template void forward_last<__nv_bfloat16>(const GroupNormFwd&, const GroupShape&, Stream);

}  // namespace fastkern::cuda::group_detail
