// SPDX-License-Identifier: Apache-2.0
// Group normalisation, forward, channels-first; and the choice between the layouts.
//   z = (x − mean) · rstd · w[c] + b[c],  y = z or z · sigmoid(z),  rstd = rsqrt(var + eps)
//   mean, var over the L = C/G · positions adjacent elements of a group
//
//   shapes   x, y (N, C, positions), dense;  w, b (C);  stats (N, G, 2): mean, rstd
//   work     up to 512 KiB (64 KiB before sm_90) a group lies in registers: 4..512 threads, or a
//            cluster of 2, 4 or 8 blocks of 512, with up to 8 packs each. Pack i of thread t of
//            block r is elements ((i · blocks + r) · threads + t) · vector.
//            Larger groups are cut into chunks of 64 KiB (at most 256, then larger ones): one
//            kernel finds their moments, a second one, last chunk first and out of L2 as far as
//            that goes, scales them. The cut depends on L and the type alone.
//   moments  mean first, then squared distances from it, both from registers, and a correction of
//            the mean; those of blocks or chunks are combined about the mean of all (Chan, Golub
//            and LeVeque, 1983)
//   memory   shared: three f32 a warp, two a block of the cluster; workspace: two f32 a chunk
//   sync     two barriers a block, and two of the cluster; none where a warp holds the group
//   cost     reads N·C·positions once, twice where a group is in chunks; writes it once; HBM bound
//   measured not yet
#include <algorithm>
#include <bit>

#include "dispatch.h"
#include "norm/group_norm_fwd.cuh"

namespace fastkern::cuda {
namespace group_detail {
namespace {

template <class T, bool kSilu>
__device__ __forceinline__ Pack<T> apply(const Forward<T>& p, const Pack<T>& in, Place at,
                                         int channel, float mean, float rstd) {
  constexpr int kV = kVector<T>;
  float v[kV];
  tile::unpack(in, v);
  if (p.planes.even) {
    const int c = min(at.channel, p.group_channels - 1);  // beyond the end: any
    const float scale = rstd * p.weight.at(channel + c, 1.0f), shift = p.bias.at(channel + c, 0.0f);
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = activate<T, kSilu>(fmaf(v[j] - mean, scale, shift));
  } else {
    p.planes.template for_channels<kV>(at, p.group_channels, [&](int j, int c) {
      const float scale = rstd * p.weight.at(channel + c, 1.0f);
      v[j] = activate<T, kSilu>(fmaf(v[j] - mean, scale, p.bias.at(channel + c, 0.0f)));
    });
  }
  return tile::pack_of<T>(v);
}

/// Moments of `count` elements that the threads of a team hold in packs of n elements in all; the
/// mean from `pivot`.
template <class T, int kPacks>
__device__ __forceinline__ Moments team_moments(Pack<T> (&x)[kPacks], int first, int step, int n,
                                                float count, float pivot, int team,
                                                float (&scratch)[2][32]) {
  constexpr int kV = kVector<T>;
  float sum[1] = {0.0f}, distances[2] = {0.0f, 0.0f};  // and their squares
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kV];
    tile::unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[0] += v[j];
  }
  team_sum(sum, team, scratch[0]);
  const float rough = sum[0] / count;     // good to some ulps; the second pass mends that
  const int begin = tile::opaque(first);  // nothing made of it is kept from above
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kV];
    tile::keep_packed(x[i]);
    tile::unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float distance = begin + i * step + j < n ? v[j] - rough : 0.0f;
      distances[0] += distance;
      distances[1] = fmaf(distance, distance, distances[1]);
    }
  }
  team_sum(distances, team, scratch[1]);
  const float off = distances[0] / count;
  return {(rough - pivot) + off, corrected(distances[1], off, count)};
}

template <class T, bool kSilu, int kPacks>
__device__ __forceinline__ void apply_and_store(const Forward<T>& p, Pack<T> (&x)[kPacks], T* gY,
                                                int first, int step, int n, Place at, int channel,
                                                float mean, float rstd) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = first + i * step;
    tile::keep_packed(x[i]);
    const Pack<T> y = apply<T, kSilu>(p, x[i], at, channel, mean, rstd);
    tile::store(gY, p.whole ? column : tile::opaque(column), n, p.whole, y);
    if (i + 1 < kPacks) p.planes.step(at);
  }
}

template <class T, bool kSilu, int kPacks>
__global__ void __launch_bounds__(kBlock, 2) group_norm_fwd_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ float scratch[2][32];
  __shared__ float2 sPeers[kClusterBlocks];
  if (p.blocks > 1) ptx::cluster_arrive();  // shared memory of a peer exists once it has begun
  const int lane = threadIdx.x & (p.team - 1), n = static_cast<int>(p.group_size);
  const int rank = p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const std::uint32_t group = blockIdx.x / p.blocks * (blockDim.x / p.team) + threadIdx.x / p.team;
  const bool active = group < p.group_count;
  const int first = (rank * p.team + lane) * kV, step = p.blocks * p.team * kV;
  const std::int64_t start = active ? group * p.group_size : 0;

  Pack<T> x[kPacks];
  load_packs(p.x + start, first, step, active ? n : 0, p.whole, x);
  const float pivot = tile::to_float(p.x[start]);

  const auto count_of = [&](int r) {  // elements in block r; team and blocks are powers of two
    const int share = p.team * kV, rest = n & (step - 1);
    return static_cast<float>((n - rest) / static_cast<std::uint32_t>(p.blocks) +
                              min(max(rest - r * share, 0), share));
  };
  Moments all = team_moments(x, first, step, n, count_of(rank), pivot, p.team, scratch);
  if (p.blocks > 1) {
    ptx::cluster_wait();
    if (threadIdx.x < p.blocks) store_to_block(&sPeers[rank], threadIdx.x, {all.mean, all.m2});
    ptx::cluster_arrive();
    ptx::cluster_wait();
    all = combine(p.blocks, static_cast<float>(n), [&](int r) { return sPeers[r]; }, count_of);
  }
  if (!active) return;
  all.mean += pivot;
  const float rstd = rstd_of(all.m2, static_cast<float>(n), p.eps);
  if (p.stats && first == 0) p.stats[group] = {all.mean, rstd};
  if (!p.y) return;
  const int channel = static_cast<int>(group % p.groups) * p.group_channels;
  apply_and_store<T, kSilu>(p, x, p.y + start, first, step, n, p.planes.place(first), channel,
                            all.mean, rstd);
}

/// Moments of a chunk of a group.
template <class T>
__global__ void __launch_bounds__(kBlock, 2) group_norm_fwd_stats_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>, kPacks = kChunkPacks, kTile = kBlock * kPacks * kV;
  __shared__ float scratch[2][32];
  ptx::grid_launch_next();
  const std::uint32_t group = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int first = threadIdx.x * kV, step = kBlock * kV;
  const std::int64_t begin = chunk * p.chunk_size;
  const std::int64_t end = min(begin + p.chunk_size, p.group_size);
  const float pivot = tile::to_float(p.x[group * p.group_size]);
  Moments all{0.0f, 0.0f};
  float seen = 0.0f;
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(min(end - at, static_cast<std::int64_t>(kTile)));
    Pack<T> x[kPacks];
    load_packs(p.x + group * p.group_size + at, first, step, n, p.whole, x);
    const float count = static_cast<float>(n), total = seen + count;
    const Moments tile = team_moments(x, first, step, n, count, pivot, kBlock, scratch);
    const float distance = tile.mean - all.mean;
    all.mean = fmaf(distance, count / total, all.mean);
    all.m2 += fmaf(distance * distance, seen * (count / total), tile.m2);
    seen = total;
  }
  if (threadIdx.x == 0) p.partial[blockIdx.x] = {all.mean, all.m2};
}

/// Combines the moments of a group's chunks and scales one of them, the last one first: what was
/// read last is still in L2.
template <class T, bool kSilu>
__global__ void __launch_bounds__(kBlock, 2) group_norm_fwd_apply_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>, kPacks = kChunkPacks / 2, kTile = kBlock * kPacks * kV;
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const std::uint32_t group = block / p.chunks, chunk = block % p.chunks;
  const int first = threadIdx.x * kV, step = kBlock * kV;
  const std::int64_t begin = chunk * p.chunk_size;
  const std::int64_t end = min(begin + p.chunk_size, p.group_size);
  const std::int64_t start = group * p.group_size;
  const int channel = static_cast<int>(group % p.groups) * p.group_channels;
  Moments all{};
  float rstd = 0.0f;
  for (std::int64_t at = begin; at < end; at += kTile) {
    const int n = static_cast<int>(min(end - at, static_cast<std::int64_t>(kTile)));
    Pack<T> x[kPacks];
    load_packs(p.x + start + at, first, step, p.y ? n : 0, p.whole, x);
    if (at == begin) {
      // x was there before the kernel that this one may overlap: its loads need not wait.
      ptx::grid_wait();
      all = combine(
          static_cast<int>(p.chunks), static_cast<float>(p.group_size),
          [&](int i) { return p.partial[group * p.chunks + i]; },
          [&](int i) {
            return static_cast<float>(min(p.chunk_size, p.group_size - i * p.chunk_size));
          });
      all.mean += tile::to_float(p.x[start]);
      rstd = rstd_of(all.m2, static_cast<float>(p.group_size), p.eps);
      if (p.stats && chunk == 0 && threadIdx.x == 0) p.stats[group] = {all.mean, rstd};
      if (!p.y) return;
    }
    apply_and_store<T, kSilu>(p, x, p.y + start + at, first, step, n, p.planes.place(at + first),
                              channel, all.mean, rstd);
  }
}

// ---- host -----------------------------------------------------------------------------------

/// How a group is held: in one block or cluster, or, with chunks, in memory.
struct FirstPlan {
  int team = kBlock, blocks = 1, packs = kChunkPacks;
  std::int64_t chunks = 0, chunk_size = 0;
};

FirstPlan first_plan(const GroupShape& shape, DType dtype, bool clusters) {
  const int vector = static_cast<int>(16 / size_of(dtype));
  const std::int64_t vectors = ceil_div(shape.group_size(), vector);
  FirstPlan plan;
  if (vectors <= 2 * kBlock) {
    plan.packs = 2;
    plan.team = std::max(
        4, static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(ceil_div(vectors, 2)))));
    return plan;
  }
  const std::int64_t held = static_cast<std::int64_t>(kBlock) * kChunkPacks;
  while (plan.blocks * held < vectors && plan.blocks < (clusters ? kClusterBlocks : 1))
    plan.blocks *= 2;
  if (plan.blocks * held >= vectors) {
    if (plan.blocks * held >= 2 * vectors) plan.packs = kChunkPacks / 2;
    return plan;
  }
  const std::int64_t tile = held * vector;
  plan.blocks = 1;
  plan.chunk_size = tile * ceil_div(ceil_div(shape.group_size(), kChunks), tile);
  plan.chunks = ceil_div(shape.group_size(), plan.chunk_size);
  return plan;
}

template <class T>
void forward_first(const GroupNormFwd& args, const GroupShape& shape, Stream stream) {
  constexpr int kV = kVector<T>;
  const FirstPlan plan = first_plan(shape, args.x.dtype, has_clusters(stream.device, kForward));
  Forward<T> p = forward_params<T>(args, shape);
  p.whole = in_packs(args.x, shape.group_size()) && in_packs(args.y, shape.group_size());
  p.team = plan.team, p.blocks = plan.blocks;
  p.planes = planes_of(shape, kV, static_cast<std::int64_t>(plan.blocks) * plan.team * kV);
  p.chunks = static_cast<std::uint32_t>(plan.chunks), p.chunk_size = plan.chunk_size;
  dispatch_bool(args.activation == Activation::silu, [&]<bool kSilu>() {
    if (plan.chunks > 0) {
      Launch shape_of{kForward, shape.group_count() * plan.chunks, kBlock};
      launch(group_norm_fwd_stats_kernel<T>, shape_of, stream, p);
      shape_of.overlap = true;
      return launch(group_norm_fwd_apply_kernel<T, kSilu>, shape_of, stream, p);
    }
    const int block = std::max(128, plan.team);
    Launch shape_of{kForward, ceil_div(shape.group_count(), block / plan.team) * plan.blocks,
                    block};
    shape_of.cluster = plan.blocks;
    dispatch_ceil<2, 4, 8>(plan.packs, [&]<int kPacks>() {
      launch(group_norm_fwd_kernel<T, kSilu, kPacks>, shape_of, stream, p);
    });
  });
}

}  // namespace
}  // namespace group_detail

std::size_t group_norm_workspace(const GroupNormFwd& args, int device) {
  using namespace group_detail;
  const GroupShape shape = group_shape(args.x, args.num_groups, kForward);
  if (shape.numel() == 0) return 0;
  const bool clusters = has_clusters(device, kForward);
  if (shape.channels_last) return last_workspace(shape, args.x.dtype, clusters);
  return sizeof(float2) * shape.group_count() * first_plan(shape, args.x.dtype, clusters).chunks;
}

void group_norm(const GroupNormFwd& args, Stream stream) {
  using namespace group_detail;
  const GroupShape shape = group_shape(args.x, args.num_groups, kForward);
  if (args.y.given()) check_group_layout(args.y, args.x, kForward, "y");
  if (shape.numel() == 0) return;
  const std::size_t needed = group_norm_workspace(args, stream.device);
  FK_CHECK(args.workspace_size >= needed, kForward, ": workspace must have at least ", needed,
           " bytes, got ", args.workspace_size);
  dispatch(args.x.dtype, [&]<class T>() {
    if (shape.channels_last) {
      forward_last<T>(args, shape, stream);
    } else {
      forward_first<T>(args, shape, stream);
    }
  });
}

}  // namespace fastkern::cuda
