// SPDX-License-Identifier: Apache-2.0
// Group normalisation, backward: channels-first, what both layouts share, and the order of
// launches.
//   dz = dy · act'(z),  g = dz · w,  x̂ = (x − mean) · rstd
//   dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dw[c] = Σ dz · x̂,  db[c] = Σ dz
//
//   shapes   dy, x, dx (N, C, positions), dense;  w, b, dw, db (C);  stats (N, G, 2): mean, rstd
//   work     up to 256 KiB (32 KiB before sm_90), and channels of a multiple of a warp's 512 bytes:
//            a group's x and dy lie in registers, 4 packs of each in 32..512 threads or a cluster
//            of up to 8 blocks of 512: one kernel, one reduction. Each warp also writes the sums of
//            its packs, which lie in one channel: the parts of dw and db.
//            Otherwise two passes: sums of every channel of every sample, in parts of at most
//            64 KiB; and, from the means of the groups, dx, last chunk first: out of L2 as far as
//            that goes.
//            In between, a block a group adds parts to channels and, weighted, channels to the
//            group. At last dw and db: sums over samples, in order.
//   memory   shared: two f32 a warp, two a block of the cluster; workspace: two f32 a part, channel
//            and group
//   sync     one barrier a block, two of the cluster
//   cost     reads 2·N·C·positions, twice where a group is not held; writes it once; HBM bound
//   measured not yet
#include <algorithm>
#include <bit>

#include "dispatch.h"
#include "norm/group_norm_bwd.cuh"

namespace fastkern::cuda {
namespace group_detail {
namespace {

constexpr int kFinishBlock = 128;

/// From the parts of a group: the sums of its channels, and its means. A warp a channel at a time.
template <class T>
__global__ void __launch_bounds__(kFinishBlock) group_norm_bwd_finish_kernel(const Backward<T> p) {
  constexpr int kWarps = kFinishBlock / kWarp;
  __shared__ float2 sWarps[kWarps];
  ptx::grid_launch_next();
  ptx::grid_wait();
  const std::uint32_t group = blockIdx.x, sample = group / p.groups;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint32_t first = group % p.groups * p.group_channels;
  // Each thread adds some weighted channels up: a lane in turn, or all at once.
  float2 own{0.0f, 0.0f};
  const auto add = [&](std::uint32_t channel, float2 sum) {
    const float weight = p.weight.at(channel, 1.0f);
    own.x = fmaf(sum.x, weight, own.x), own.y = fmaf(sum.y, weight, own.y);
    p.totals[sample * p.channels + channel] = sum;
  };
  const float2* const partial = p.partial + sample * p.partial_sample;
  if (p.parts == 1) {
    for (int i = threadIdx.x; i < p.group_channels; i += kFinishBlock)
      add(first + i, partial[(first + i) * p.partial_channel]);
  } else {
    for (int i = warp; i < p.group_channels; i += kWarps) {
      const float2* const parts = partial + (first + i) * p.partial_channel;
      float2 sum{0.0f, 0.0f};
      for (std::uint32_t part = lane; part < p.parts; part += kWarp) {
        const float2 of = parts[part * p.partial_step];
        sum.x += of.x, sum.y += of.y;
      }
      sum.x = warp_sum(sum.x), sum.y = warp_sum(sum.y);
      if (lane == i / kWarps % kWarp) add(first + i, sum);
    }
  }
  own.x = warp_sum(own.x), own.y = warp_sum(own.y);
  if (lane == 0) sWarps[warp] = own;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float2 all{0.0f, 0.0f};
  for (int i = 0; i < kWarps; ++i) all.x += sWarps[i].x, all.y += sWarps[i].y;
  const float size = static_cast<float>(p.group_size);
  p.means[group] = {all.x / size, all.y / size};
}

constexpr int kSumColumns = 32, kSumRows = 16;

/// dweight and dbias: each of 16 warps sums every sixteenth sample, then they are added in order.
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    group_norm_bwd_dweight_kernel(const float2* totals, std::int64_t batch, std::int64_t channels,
                                  TensorRef dweight, TensorRef dbias) {
  __shared__ float2 sums[kSumRows][kSumColumns];
  const int x = threadIdx.x % kSumColumns, y = threadIdx.x / kSumColumns;
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kSumColumns + x;
  ptx::grid_wait();
  float2 sum{0.0f, 0.0f};
  if (channel < channels) {
#pragma unroll 4
    for (std::int64_t n = y; n < batch; n += kSumRows) {
      const float2 of = totals[n * channels + channel];
      sum.x += of.x, sum.y += of.y;
    }
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0 || channel >= channels) return;
#pragma unroll
  for (int i = 1; i < kSumRows; ++i) sum.x += sums[i][x].x, sum.y += sums[i][x].y;
  const auto store = [&](const TensorRef& t, float v) {
    if (!t.data) return;
    if (t.dtype == DType::f32) {
      static_cast<float*>(t.data)[channel] = v;
    } else if (t.dtype == DType::f16) {
      static_cast<__half*>(t.data)[channel] = tile::from_float<__half>(v);
    } else {
      static_cast<__nv_bfloat16*>(t.data)[channel] = tile::from_float<__nv_bfloat16>(v);
    }
  };
  store(dweight, sum.y);
  store(dbias, sum.x);
}

// ---- host -----------------------------------------------------------------------------------

/// How a call is cut, and what lies in its workspace.
struct Cut {
  bool held = false;
  int team = kBlock, blocks = 1;
  int part_team = kPartBlock;
  std::int64_t part_size = 0, parts = 0, chunks = 1;
  std::int64_t stats = 0, means = 0, totals = 0, partial = 0, end = 0;  // float2's
};

int team_of(std::int64_t vectors, int packs, int least, int most) {
  const auto needed = static_cast<std::uint64_t>(ceil_div(vectors, packs));
  return static_cast<int>(std::clamp<std::uint64_t>(std::bit_ceil(needed), least, most));
}

GroupNormFwd statistics_of(const GroupNormBwd& args) {
  GroupNormFwd forward;
  forward.x = args.x;
  forward.num_groups = args.num_groups, forward.eps = args.eps;
  return forward;
}

Cut cut_of(const GroupNormBwd& args, const GroupShape& shape, int device) {
  const int vector = static_cast<int>(16 / size_of(args.x.dtype));
  const bool want_sums = args.dweight.given() || args.dbias.given();
  const std::int64_t vectors = ceil_div(shape.group_size(), vector);
  Cut cut;
  if (shape.channels_last) {
    cut.parts = last_tiles(shape, args.x.dtype);
  } else if (shape.positions % (kWarp * vector) == 0) {
    const int most = capability(device, kBackward) >= 90 ? kClusterBlocks : 1;
    cut.team = team_of(vectors, kHeldPacks, kWarp, kBlock);
    while (static_cast<std::int64_t>(cut.blocks) * cut.team * kHeldPacks < vectors &&
           cut.blocks < most)
      cut.blocks *= 2;
    cut.held = static_cast<std::int64_t>(cut.blocks) * cut.team * kHeldPacks >= vectors;
    cut.parts = shape.positions / (kWarp * vector);
  }
  if (!cut.held && !shape.channels_last) {
    constexpr int kLoops = 4;
    cut.blocks = 1;
    cut.part_team = team_of(ceil_div(shape.positions, vector), kPartPacks, 4, kPartBlock);
    cut.part_size = static_cast<std::int64_t>(cut.part_team) * kPartPacks * vector *
                    (cut.part_team == kPartBlock ? kLoops : 1);
    cut.parts = ceil_div(shape.positions, cut.part_size);
    cut.team = team_of(vectors, kDxPacks, 4, kBlock);
    cut.chunks = ceil_div(vectors, static_cast<std::int64_t>(cut.team) * kDxPacks);
  }
  cut.means = args.stats.given() ? 0 : shape.group_count();
  cut.totals = cut.means + shape.group_count();
  cut.partial = cut.totals + shape.batch * shape.channels;
  cut.end = cut.partial;
  if (!cut.held || want_sums) cut.end += shape.batch * shape.channels * cut.parts;
  if (!args.stats.given()) {
    const std::size_t forward = group_norm_workspace(statistics_of(args), device);
    cut.end = std::max(cut.end,
                       cut.partial + ceil_div(static_cast<std::int64_t>(forward), sizeof(float2)));
  }
  return cut;
}

bool all_in_packs(const GroupNormBwd& args, std::int64_t row) {
  return in_packs(args.x, row) && in_packs(args.dy, row) && in_packs(args.dx, row);
}

template <class T>
Backward<T> backward_params(const GroupNormBwd& args, const GroupShape& shape, const Cut& cut) {
  Backward<T> p{};
  float2* const workspace = static_cast<float2*>(args.workspace);
  p.x = static_cast<const T*>(args.x.data), p.dy = static_cast<const T*>(args.dy.data);
  p.dx = args.dx.given() ? static_cast<T*>(args.dx.data) : nullptr;
  p.stats = args.stats.given() ? static_cast<const float2*>(args.stats.data) : workspace;
  p.means = workspace + cut.means;
  p.totals = workspace + cut.totals;
  p.partial = workspace + cut.partial;
  p.weight = channel_vector(args.weight), p.bias = channel_vector(args.bias);
  p.group_size = shape.group_size(), p.positions = shape.positions, p.channels = shape.channels;
  p.group_count = static_cast<std::uint32_t>(shape.group_count());
  p.groups = static_cast<std::uint32_t>(shape.groups);
  p.group_channels = static_cast<std::int32_t>(shape.group_channels());
  p.team = cut.team, p.blocks = cut.blocks, p.part_team = cut.part_team;
  p.part_size = cut.part_size;
  p.chunks = static_cast<std::uint32_t>(cut.chunks);
  p.parts = static_cast<std::uint32_t>(cut.parts);
  // Of a group that is held, as its warps write them; else part after part of all channels.
  p.partial_sample = shape.channels * cut.parts;
  p.partial_channel = cut.held ? cut.parts : 1;
  p.partial_step = cut.held ? 1 : shape.channels;
  const std::int64_t step = static_cast<std::int64_t>(cut.blocks) * cut.team * kVector<T>;
  p.planes = planes_of(shape, kVector<T>, step);
  const std::int64_t row = shape.channels_last ? shape.channels
                           : cut.held          ? shape.group_size()
                                               : shape.positions;
  p.whole = all_in_packs(args, row);
  return p;
}

template <class T>
void backward(const GroupNormBwd& args, const GroupShape& shape, const Cut& cut, Stream stream) {
  const bool want_sums = args.dweight.given() || args.dbias.given();
  Backward<T> p = backward_params<T>(args, shape, cut);
  Launch finish{kBackward, shape.group_count(), kFinishBlock};
  if (cut.held) {  // that kernel does not say when it is nearly done: no overlap
    if (!want_sums) p.partial = nullptr;
    held_first(p, args.activation, stream);
    if (want_sums) launch(group_norm_bwd_finish_kernel<T>, finish, stream, p);
    return;
  }
  if (shape.channels_last) {
    sums_last(p, shape, args.activation, stream);
  } else {
    sums_first(p, args.activation, stream);
  }
  finish.overlap = true;
  launch(group_norm_bwd_finish_kernel<T>, finish, stream, p);
  if (!p.dx) return;
  if (shape.channels_last) return dx_last(p, shape, args.activation, stream);
  p.whole = all_in_packs(args, shape.group_size());  // its rows are groups, not channels
  dx_first(p, args.activation, stream);
}

}  // namespace
}  // namespace group_detail

std::size_t group_norm_bwd_workspace(const GroupNormBwd& args, int device) {
  using namespace group_detail;
  const GroupShape shape = group_shape(args.x, args.num_groups, kBackward);
  if (shape.numel() == 0) return 0;
  return sizeof(float2) * cut_of(args, shape, device).end;
}

void group_norm_bwd(const GroupNormBwd& args, Stream stream) {
  using namespace group_detail;
  const GroupShape shape = group_shape(args.x, args.num_groups, kBackward);
  check_group_layout(args.dy, args.x, kBackward, "dy");
  if (args.dx.given()) check_group_layout(args.dx, args.x, kBackward, "dx");
  const bool want_sums = args.dweight.given() || args.dbias.given();
  if (!want_sums && !args.dx.given()) return;
  const float2* totals = nullptr;
  if (shape.numel() > 0) {
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    FK_CHECK(shape.batch * shape.channels < kMost, kBackward,
             ": x must have less than 2^31 channels in all samples, got ", args.x.shape());
    const Cut cut = cut_of(args, shape, stream.device);
    const std::size_t needed = sizeof(float2) * cut.end;
    FK_CHECK(args.workspace_size >= needed, kBackward, ": workspace must have at least ", needed,
             " bytes, got ", args.workspace_size);
    float2* const workspace = static_cast<float2*>(args.workspace);
    totals = workspace + cut.totals;
    if (!args.stats.given()) {
      GroupNormFwd forward = statistics_of(args);
      forward.stats = dense(workspace, DType::f32, shape.batch, shape.groups, 2);
      forward.workspace = workspace + cut.partial;
      forward.workspace_size = args.workspace_size - sizeof(float2) * cut.partial;
      group_norm(forward, stream);
    }
    dispatch(args.x.dtype, [&]<class T>() { backward<T>(args, shape, cut, stream); });
  }
  if (!want_sums) return;
  Launch sums{kBackward, ceil_div(shape.channels, kSumColumns), kSumColumns * kSumRows};
  sums.overlap = shape.numel() > 0;
  launch(group_norm_bwd_dweight_kernel, sums, stream, totals,
         shape.numel() > 0 ? shape.batch : std::int64_t{0}, shape.channels, args.dweight,
         args.dbias);
}

}  // namespace fastkern::cuda
