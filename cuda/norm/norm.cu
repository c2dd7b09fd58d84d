// SPDX-License-Identifier: Apache-2.0
// The row norms on CUDA: which kernel a call takes, and the end of the sums over the rows.
// What is computed: norm.h. The kernels: norm_fwd.cuh (rows that fit in the registers of a block),
// norm_shared.cuh (in its shared memory), norm_ring.cuh (on a cluster), norm_bwd.cuh, norm_long.cu
// (any row).
//
//   sync     the sums over the rows end in a launch of their own, which is already waiting on the
//            multiprocessors while the one before it ends (Launch::overlap)
//   cost     of that: partial rows x N x 4 bytes, written and read in the L2 cache
#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "fastkern/norm.h"
#include "fastkern/rows.h"
#include "launch.cuh"
#include "norm/norm_launch.h"
#include "ptx/cluster.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda {
namespace norm_detail {
namespace {

constexpr int kBlockColumns = 256;  // threads of a column block of long rows, four columns each

constexpr int kFinishThreads = 256, kFinishBatch = 5;

/// to[k][head][c] = Σ over the head's slots of partial[k][slot][c]. A thread sums every rows-th
/// slot of four columns; then the `rows` sums of a column are added as a tree. The blocks are small
/// enough to take their places while the kernel before them still has its own.
__global__ void __launch_bounds__(kFinishThreads)
    norm_bwd_finish_kernel(const float* partial, std::int64_t slots, std::int64_t n,
                           std::int64_t heads, std::int64_t column_blocks, int rows,
                           const Finish finish) {
  __shared__ float4 sums[kFinishThreads];
  const int quads = kFinishThreads / rows;
  const int x = threadIdx.x % quads, y = threadIdx.x / quads;
  const std::int64_t column = 4 * (blockIdx.x % column_blocks * quads + x);
  const std::int64_t head = blockIdx.x / column_blocks % heads;
  const int which = static_cast<int>(blockIdx.x / column_blocks / heads);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (!finish.to[which]) return;
  float4 sum{};
  if (column < n) {
    const float* const from = partial + which * slots * n + column;
    for (std::int64_t slot = head + y * heads; slot < slots; slot += kFinishBatch * rows * heads) {
      float4 v[kFinishBatch] = {};
#pragma unroll
      for (int i = 0; i < kFinishBatch; ++i) {
        const std::int64_t at = slot + i * rows * heads;
        if (at >= slots) continue;
        if (n % 4 == 0) {
          v[i] = *reinterpret_cast<const float4*>(from + at * n);
        } else {
          v[i].x = from[at * n];
          if (column + 1 < n) v[i].y = from[at * n + 1];
          if (column + 2 < n) v[i].z = from[at * n + 2];
          if (column + 3 < n) v[i].w = from[at * n + 3];
        }
      }
#pragma unroll
      for (int i = 0; i < kFinishBatch; ++i) sum = tile::add(sum, v[i]);
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y >= half) continue;
    sum = tile::add(sum, sums[threadIdx.x + half * quads]);
    sums[threadIdx.x] = sum;
  }
  if (y > 0 || column >= n) return;
  const std::int64_t first = head * n;
  const std::int64_t size = finish.dtype[which] == DType::f32 ? 4 : 2;
  tile::store_as(static_cast<char*>(finish.to[which]) + first * size, finish.dtype[which], column,
                 n, sum);
}

/// The element type of a call's kernel, and whether its operands keep their own.
struct Type {
  DType type;
  bool mixed;
};

Type type_of(std::initializer_list<const TensorRef*> operands) {
  Type result{DType::f32, false};
  bool first = true;
  for (const TensorRef* t : operands) {
    if (!t->given()) continue;
    if (!first && t->dtype != result.type) return {DType::f32, true};
    result.type = t->dtype, first = false;
  }
  return result;
}

int sums_of(const NormBwd& a) {
  if (a.dy2.given()) return 4;
  if (a.dbias.given()) return 2;
  return a.dweight.given() ? (a.kind == NormKind::layer ? 2 : 1) : 0;
}

Split split_of(const NormBwd& args, int device) {
  const Rows x = rows_of(args.x, args.op, "x");
  const Type type = type_of({&args.x, &args.dy, &args.dx, &args.dh, &args.dbranch, &args.dy2});
  Split split;
  split.type = type.type, split.mixed = type.mixed;
  split.rows = x.count, split.n = x.length;
  split.heads = heads_of(
      {&args.weight, &args.weight2, &args.dweight, &args.dbias, &args.dweight2, &args.dbias2});
  split.sums = sums_of(args);
  const int shared_limit =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, args.op);
  const std::int64_t sms = device_attribute(cudaDevAttrMultiProcessorCount, device, args.op);
  const bool add = args.dh.given() || args.dbranch.given();
  const bool own = args.weight.given() && !type.mixed && args.weight.dtype == type.type &&
                   args.weight_offset == 0.0 && split.heads == 1;
  split.plan = norm_bwd_plan(args.kind, x.length, type.type, has_clusters(device, args.op),
                             shared_limit, add || args.dy2.given(), args.dy2.given(), own);
  split.own_weight = own && tile::column_view(args.weight, x.length).whole;
  const Plan& plan = split.plan;
  if (plan.resident) {
    const std::int64_t most = plan.blocks_per_sm * sms / plan.blocks_per_row * plan.rows_per_block;
    split.teams = std::min(ceil_div(x.count, plan.rows_per_block) * plan.rows_per_block, most);
    split.slots =
        split.heads == 1 ? split.teams : std::min(split.teams, x.count) / split.heads * split.heads;
    // Fewer clusters than planned may fit on the device: too few for several heads, perhaps.
    const bool enough = split.slots > 0 && (split.heads == 1 || plan.blocks_per_row == 1);
    if (enough || x.count == 0) {
      split.partial_rows = plan.rows_per_block > 1 && split.heads == 1
                               ? split.teams / plan.rows_per_block
                               : split.slots;
      return split;
    }
    split.plan = {"norm_bwd_long_kernel", 512, 1, 512, 4, false};  // more heads than teams
  }
  split.statistics = split.sums > 0 ? ceil_div(2 * x.count, 4) * 4 : 0;
  split.column_blocks = ceil_div(x.length, 4 * kBlockColumns);
  split.partial_rows =
      split.heads * std::clamp<std::int64_t>(4 * sms / (split.column_blocks * split.heads), 1,
                                             std::max<std::int64_t>(x.count / split.heads, 1));
  return split;
}

}  // namespace

std::int64_t resident_clusters(const void* kernel, int cluster, int block, std::size_t shared,
                               Stream stream, const char* op) {
  struct Entry {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<std::uint64_t> key{0}, value{0};
  };
  // Asked of the driver once for each kernel and shape; a lost race asks again.
  static Entry entries[256];
  const std::uint64_t key = static_cast<std::uint64_t>(shared) << 16 |
                            static_cast<std::uint64_t>(cluster) << 8 |
                            static_cast<std::uint64_t>(stream.device + 1);
  Entry& entry =
      entries[(reinterpret_cast<std::uintptr_t>(kernel) / 16 + key * 31 + (key >> 16)) % 256];
  if (entry.kernel.load(std::memory_order_acquire) == kernel && entry.key.load() == key) {
    const std::uint64_t value = entry.value.load();
    if (value >> 32 == (key & 0xffffffffu)) return static_cast<std::int64_t>(value & 0xffffffffu);
  }
  const DeviceGuard guard(stream.device, op);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        op, "raising the shared-memory limit");
  int count = 0;
  if (cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, block, shared), op,
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    count *= device_attribute(cudaDevAttrMultiProcessorCount, stream.device, op);
  } else {
    if (cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), op,
            "allowing clusters of 16");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute, config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), op,
          "cudaOccupancyMaxActiveClusters");
  }
  count = std::max(count, 1);
  entry.key.store(key);
  entry.value.store((key & 0xffffffffu) << 32 | static_cast<std::uint64_t>(count));
  entry.kernel.store(kernel, std::memory_order_release);
  return count;
}

}  // namespace norm_detail

using namespace norm_detail;

void norm(const NormFwd& args, Stream stream) {
  const Rows x = rows_of(args.x, args.op, "x");
  if (x.count * x.length == 0) return;
  const bool add = args.h.given(), quant = args.scale.given();
  const bool drop = add && (args.dropout.p != 0.0 || args.rowscale.given());
  FK_CHECK(!quant || (args.kind == NormKind::rms && !drop && !args.y2.given()), args.op,
           ": y cannot be quantised with layer norm, dropout, rowscale or a second output");
  static const TensorRef kNone;
  const Type type = type_of({&args.x, &args.residual, &args.h, quant ? &kNone : &args.y, &args.y2});
  const Plan plan = norm_plan(args.kind, x.length, type.type, has_clusters(stream.device, args.op));
  if (!plan.resident) return launch_fwd_long(args, stream);
  const auto run = [&]<NormKind kNorm>() {
    if (drop)
      return launch_fwd<kNorm, Residual::dropout, false>(args, plan, type.type, type.mixed, stream);
    if (add)
      return launch_fwd<kNorm, Residual::add, false>(args, plan, type.type, type.mixed, stream);
    launch_fwd<kNorm, Residual::none, false>(args, plan, type.type, type.mixed, stream);
  };
  if (quant && add) {
    launch_fwd<NormKind::rms, Residual::add, true>(args, plan, type.type, type.mixed, stream);
  } else if (quant) {
    launch_fwd<NormKind::rms, Residual::none, true>(args, plan, type.type, type.mixed, stream);
  } else if (args.kind == NormKind::rms) {
    run.template operator()<NormKind::rms>();
  } else {
    run.template operator()<NormKind::layer>();
  }
}

std::size_t norm_bwd_workspace(const NormBwd& args, int device) {
  return split_of(args, device).bytes();
}

void norm_bwd(const NormBwd& args, Stream stream) {
  const Split split = split_of(args, stream.device);
  if (split.n == 0) return;
  FK_CHECK(args.workspace_size >= split.bytes(), args.op, ": workspace must have at least ",
           split.bytes(), " bytes, got ", args.workspace_size);
  std::int64_t partial_rows = 0;
  if (split.rows > 0) {
    const bool drop = args.dbranch.given(), add = args.dh.given();
    const auto run = [&]<NormKind kNorm>() -> std::int64_t {
      if (split.sums == 4)
        return launch_bwd<kNorm, Residual::dropout, Sums::two_outputs>(args, split, stream);
      if (drop) return launch_bwd<kNorm, Residual::dropout, Sums::affine>(args, split, stream);
      if constexpr (kNorm == NormKind::rms) {
        if (split.sums < 2) {
          return add ? launch_bwd<kNorm, Residual::add, Sums::weight>(args, split, stream)
                     : launch_bwd<kNorm, Residual::none, Sums::weight>(args, split, stream);
        }
      }
      if (add) return launch_bwd<kNorm, Residual::add, Sums::affine>(args, split, stream);
      return launch_bwd<kNorm, Residual::none, Sums::affine>(args, split, stream);
    };
    partial_rows = !split.plan.resident         ? launch_bwd_long(args, split, stream)
                   : args.kind == NormKind::rms ? run.template operator()<NormKind::rms>()
                                                : run.template operator()<NormKind::layer>();
  }
  if (split.sums == 0 || partial_rows == kFinished) return;
  // About one batch of loads for each thread.
  int rows = 1;
  while (rows < 32 && rows * kFinishBatch * split.heads < partial_rows) rows *= 2;
  const std::int64_t column_blocks = ceil_div(split.n, 4 * kFinishThreads / rows);
  launch(norm_bwd_finish_kernel,
         {.op = args.op,
          .grid = column_blocks * split.heads * split.sums,
          .block = kFinishThreads,
          .overlap = true},
         stream, static_cast<const float*>(args.workspace) + split.statistics, partial_rows,
         split.n, split.heads, column_blocks, rows, finish_of(args));
}

}  // namespace fastkern::cuda
