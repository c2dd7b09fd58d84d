// SPDX-License-Identifier: Apache-2.0
// RMSNorm, forward and backward.
//   y = x · rstd · w,  rstd = rsqrt(mean(x²) + eps)
//   dx = rstd · (g − x̂ · mean(g · x̂)),  dw = Σ_rows dy · x̂,  x̂ = x · rstd,  g = dy · w
//
//   shapes   x, y, dy, dx (M, N), any row strides;  w, dw (N)
//   work     a row belongs to 4..1024 threads of one block (rms_norm_plan), each holding its part
//            of x in registers: pack i of thread t is columns (i · threads + t) · vector.
//            Longer rows are read twice, out of L2 if all that are under way fit there.
//            backward: persistent blocks walk over the rows, the next ones on their way to shared
//            memory; dw adds up in registers, one partial row a block, and a last kernel sums the
//            partial rows in order. Longer rows are read three times: two reductions and dx, then
//            dw by columns.
//   memory   shared: one f32 per warp, sum and phase; backward: w as f32 and the ring of rows.
//            workspace (backward): partial rows of dw; rstd for long rows
//   sync     one barrier a row; none where a warp holds the row
//   cost     forward: reads M·N, writes M·N;  backward: reads 2·M·N, writes M·N;  bound by HBM
//   measured H200, 16384 x 4096 bf16: forward 91 %, backward 81 % of the bandwidth of a 1 GiB copy
//            (4245 GB/s), 2026-11-21, torch 2.11; all sizes in docs/benchmarks.md
#include <algorithm>

#include "dispatch.h"
#include "fastkern/norm.h"
#include "fastkern/rows.h"
#include "launch.cuh"
#include "tile/pack.cuh"
#include "tile/reduce.cuh"

namespace fastkern::cuda {
namespace {

using tile::ColumnView;
using tile::kVector;
using tile::Pack;
using tile::RowView;

constexpr int kBlockMin = 128;
constexpr int kBlockLong = 1024;
constexpr int kBlockColumns = 256;  // threads of a column block of the long-row weight gradient

template <class T>
struct Forward {
  RowView<T> x, y;
  ColumnView weight;
  std::int64_t rows, n;
  float eps;
};

template <class T>
struct Backward {
  RowView<T> dy, x, dx;  // dx.data == nullptr: not wanted
  ColumnView weight;
  float* partial;  // (blocks, N), nullptr: dweight not wanted
  float* rstd;     // (M), long rows only
  std::int64_t rows, n;
  float eps;
  int stages;  // rows of the ring
};

__device__ __forceinline__ float rstd_of(float sum_of_squares, float n, float eps) {
  return rsqrtf(sum_of_squares / n + eps);
}

template <class T, int kThreads, int kPacks>
__global__ void __launch_bounds__(std::max(kThreads, kBlockMin))
    rms_norm_fwd_kernel(const Forward<T> p) {
  constexpr int kBlock = std::max(kThreads, kBlockMin), kV = kVector<T>;
  __shared__ tile::RowSumScratch<kBlock, kThreads, 1> scratch;
  const int lane = threadIdx.x % kThreads, n = static_cast<int>(p.n);
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  const bool active = row < p.rows;

  Pack<T> x[kPacks];
  const T* const gX = active ? p.x.row(row) : nullptr;
#pragma unroll
  for (int i = 0; i < kPacks; ++i)
    x[i] = tile::load(gX, (i * kThreads + lane) * kV, active ? n : 0, p.x.whole);

  // Short rows fetch the weight while x is on its way; long ones have no registers to keep it in.
  constexpr bool kKeepWeight = kPacks <= 2;
  float weight[kPacks][kV];
  if constexpr (kKeepWeight) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) p.weight.load((i * kThreads + lane) * kV, n, weight[i]);
  }

  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kV];
    tile::unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[0] = fmaf(v[j], v[j], sum[0]);
  }
  tile::row_sum<kBlock, kThreads>(sum, scratch, 0);
  if (!active) return;
  const float rstd = rstd_of(sum[0], static_cast<float>(n), p.eps);

  T* const gY = p.y.row(row);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int column = (i * kThreads + lane) * kV;
    if constexpr (!kKeepWeight) p.weight.load(column, n, weight[i]);
    float v[kV], y[kV];
    tile::keep_packed(x[i]);
    tile::unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) y[j] = v[j] * rstd * weight[i][j];
    tile::store(gY, column, n, p.y.whole, tile::pack_of<T>(y));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockLong) rms_norm_fwd_long_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ tile::RowSumScratch<kBlockLong, kBlockLong, 1> scratch;
  const T* const gX = p.x.row(blockIdx.x);
  T* const gY = p.y.row(blockIdx.x);
  const std::int64_t first = threadIdx.x * kV, step = kBlockLong * kV;

  float sum[1] = {0.0f};
#pragma unroll 4
  for (std::int64_t column = first; column < p.n; column += step) {
    float x[kV];
    tile::unpack(tile::load(gX, column, p.n, p.x.whole), x);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[0] = fmaf(x[j], x[j], sum[0]);
  }
  tile::row_sum<kBlockLong, kBlockLong>(sum, scratch, 0);
  const float rstd = rstd_of(sum[0], static_cast<float>(p.n), p.eps);

#pragma unroll 2
  for (std::int64_t column = first; column < p.n; column += step) {
    float x[kV], weight[kV], y[kV];
    tile::unpack(tile::load(gX, column, p.n, p.x.whole), x);
    p.weight.load(column, p.n, weight);
#pragma unroll
    for (int j = 0; j < kV; ++j) y[j] = x[j] * rstd * weight[j];
    tile::store(gY, column, p.n, p.y.whole, tile::pack_of<T>(y));
  }
}

template <class T, int kThreads, int kPacks>
__global__ void __launch_bounds__(std::max(kThreads, kBlockMin))
    rms_norm_bwd_kernel(const Backward<T> p) {
  constexpr int kBlock = std::max(kThreads, kBlockMin), kRows = kBlock / kThreads, kV = kVector<T>;
  __shared__ tile::RowSumScratch<kBlock, kThreads, 2> scratch;
  // The weight as f32, in its readers' order: four columns of every lane. Behind it a ring of rows
  // on their way.
  extern __shared__ uint4 memory[];
  float4* const sWeight = reinterpret_cast<float4*>(memory);   // [kPacks][kV / 4][kThreads]
  uint4* const sRows = memory + kPacks * (kV / 4) * kThreads;  // [stages][x, dy][kPacks][kBlock]
  const int lane = threadIdx.x % kThreads, slot = threadIdx.x / kThreads, n = static_cast<int>(p.n);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kRows;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + slot;

  // A thread fetches what it will itself read: the ring needs no barrier.
  const auto slot_of = [&](int stage, int operand, int pack) {
    return sRows + ((stage * 2 + operand) * kPacks + pack) * kBlock + threadIdx.x;
  };
  const auto fetch = [&](std::int64_t r, int stage) {
    const bool active = r < p.rows;
    const T* const gX = p.x.row(active ? r : 0);
    const T* const gDy = p.dy.row(active ? r : 0);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (i * kThreads + lane) * kV;
      tile::load_async(slot_of(stage, 0, i), gX, column, active ? n : 0, p.x.whole);
      tile::load_async(slot_of(stage, 1, i), gDy, column, active ? n : 0, p.dy.whole);
    }
    ptx::cp_async_commit();
  };
  for (int stage = 0; stage < p.stages - 1; ++stage) fetch(row + stage * stride, stage);

  for (int i = slot; i < kPacks; i += kRows) {
    float weight[kV];
    p.weight.load((i * kThreads + lane) * kV, n, weight);
#pragma unroll
    for (int s = 0; s < kV; s += 4) {
      sWeight[(i * (kV / 4) + s / 4) * kThreads + lane] = {weight[s], weight[s + 1], weight[s + 2],
                                                           weight[s + 3]};
    }
  }
  const auto weight_of = [&](int pack, int step, float (&out)[4]) {
    const float4 w = sWeight[(pack * (kV / 4) + step / 4) * kThreads + lane];
    out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w;
  };

  float dweight[kPacks][kV] = {};
  __syncthreads();
  // All rows of a block take the same number of steps: the barrier in row_sum is for everybody.
  int phase = 0, stage = 0;
  for (std::int64_t first = row - slot; first < p.rows;
       first += stride, row += stride, phase ^= 1) {
    fetch(row + (p.stages - 1) * stride, stage == 0 ? p.stages - 1 : stage - 1);
    if (p.stages == 4) {
      ptx::cp_async_wait<3>();
    } else if (p.stages == 3) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    struct {
      Pack<T> x[kPacks], dy[kPacks];
    } now;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      now.x[i].bits = *slot_of(stage, 0, i);
      now.dy[i].bits = *slot_of(stage, 1, i);
    }
    stage = stage == p.stages - 1 ? 0 : stage + 1;
    float sums[2] = {0.0f, 0.0f};  // Σ x², Σ dy · w · x
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float x[kV], dy[kV];
      tile::unpack(now.x[i], x);
      tile::unpack(now.dy[i], dy);
#pragma unroll
      for (int s = 0; s < kV; s += 4) {
        float w[4];
        weight_of(i, s, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[0] = fmaf(x[s + j], x[s + j], sums[0]);
          sums[1] = fmaf(dy[s + j] * w[j], x[s + j], sums[1]);
        }
      }
    }
    tile::row_sum<kBlock, kThreads>(sums, scratch, phase);
    const bool active = row < p.rows;
    // 0 for a row that is none: with eps = 0 its zeros would make NaN, and NaN would stay in dw.
    const float rstd = active ? rstd_of(sums[0], static_cast<float>(n), p.eps) : 0.0f;
    const float mean = sums[1] * rstd / static_cast<float>(n);
    T* const gDx = p.dx.data && active ? p.dx.row(row) : nullptr;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int column = (i * kThreads + lane) * kV;
      float x[kV], dy[kV], dx[kV];
      tile::keep_packed(now.x[i]);
      tile::keep_packed(now.dy[i]);
      tile::unpack(now.x[i], x);
      tile::unpack(now.dy[i], dy);
#pragma unroll
      for (int s = 0; s < kV; s += 4) {
        float w[4];
        weight_of(i, s, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float xhat = x[s + j] * rstd;
          dx[s + j] = rstd * (dy[s + j] * w[j] - xhat * mean);
          dweight[i][s + j] = fmaf(dy[s + j], xhat, dweight[i][s + j]);
        }
      }
      if (gDx) tile::store(gDx, column, n, p.dx.whole, tile::pack_of<T>(dx));
    }
  }

  if (!p.partial) return;
  float* const gPartial = p.partial + static_cast<std::int64_t>(blockIdx.x) * n;
  if constexpr (kRows > 1) {  // rows side by side: their sums meet in shared memory, in slot order
    constexpr int kColumns = kThreads * kPacks * kV;
    __shared__ float sums[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < kV; ++j) sums[slot][(i * kThreads + lane) * kV + j] = dweight[i][j];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < n; column += kBlock) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kRows; ++s) sum += sums[s][column];
      gPartial[column] = sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const int column = (i * kThreads + lane) * kV + j;
        if (column < n) gPartial[column] = dweight[i][j];
      }
    }
  }
}

/// dx of a row too long for registers, and its rstd for the weight gradient.
template <class T>
__global__ void __launch_bounds__(kBlockLong) rms_norm_bwd_long_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>;
  __shared__ tile::RowSumScratch<kBlockLong, kBlockLong, 2> scratch;
  const T* const gX = p.x.row(blockIdx.x);
  const T* const gDy = p.dy.row(blockIdx.x);
  const std::int64_t first = threadIdx.x * kV, step = kBlockLong * kV;

  float sums[2] = {0.0f, 0.0f};
#pragma unroll 2
  for (std::int64_t column = first; column < p.n; column += step) {
    float x[kV], dy[kV], weight[kV];
    tile::unpack(tile::load(gX, column, p.n, p.x.whole), x);
    tile::unpack(tile::load(gDy, column, p.n, p.dy.whole), dy);
    p.weight.load(column, p.n, weight);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      sums[0] = fmaf(x[j], x[j], sums[0]);
      sums[1] = fmaf(dy[j] * weight[j], x[j], sums[1]);
    }
  }
  tile::row_sum<kBlockLong, kBlockLong>(sums, scratch, 0);
  const float rstd = rstd_of(sums[0], static_cast<float>(p.n), p.eps);
  const float mean = sums[1] * rstd / static_cast<float>(p.n);
  if (p.rstd && threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
  if (!p.dx.data) return;

  T* const gDx = p.dx.row(blockIdx.x);
  for (std::int64_t column = first; column < p.n; column += step) {
    float x[kV], dy[kV], weight[kV], dx[kV];
    tile::unpack(tile::load(gX, column, p.n, p.x.whole), x);
    tile::unpack(tile::load(gDy, column, p.n, p.dy.whole), dy);
    p.weight.load(column, p.n, weight);
#pragma unroll
    for (int j = 0; j < kV; ++j) dx[j] = rstd * (dy[j] * weight[j] - x[j] * rstd * mean);
    tile::store(gDx, column, p.n, p.dx.whole, tile::pack_of<T>(dx));
  }
}

/// Partial weight gradients of long rows: a block owns some columns and one contiguous group of
/// rows.
template <class T>
__global__ void __launch_bounds__(kBlockColumns)
    rms_norm_bwd_dweight_long_kernel(const Backward<T> p, std::int64_t column_blocks,
                                     std::int64_t groups) {
  constexpr int kV = kVector<T>;
  const std::int64_t group = blockIdx.x / column_blocks;
  const std::int64_t column = (blockIdx.x % column_blocks * kBlockColumns + threadIdx.x) * kV;
  float sum[kV] = {};
#pragma unroll 4
  for (std::int64_t row = p.rows * group / groups; row < p.rows * (group + 1) / groups; ++row) {
    float x[kV], dy[kV];
    tile::unpack(tile::load(p.x.row(row), column, p.n, p.x.whole), x);
    tile::unpack(tile::load(p.dy.row(row), column, p.n, p.dy.whole), dy);
    const float rstd = p.rstd[row];
#pragma unroll
    for (int j = 0; j < kV; ++j) sum[j] = fmaf(dy[j], x[j] * rstd, sum[j]);
  }
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    if (column + j < p.n) p.partial[group * p.n + column + j] = sum[j];
  }
}

constexpr int kFinishColumns = 32, kFinishRows = 16;

/// dweight[c] = Σ partial[·][c]: each of 16 warps sums every sixteenth partial row, then they are
/// added in order.
template <class W>
__global__ void __launch_bounds__(kFinishColumns* kFinishRows)
    rms_norm_bwd_dweight_kernel(const float* partial, std::int64_t partial_rows, std::int64_t n,
                                W* dweight) {
  __shared__ float sums[kFinishRows][kFinishColumns];
  const int x = threadIdx.x % kFinishColumns, y = threadIdx.x / kFinishColumns;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kFinishColumns + x;
  float sum = 0.0f;
  if (column < n) {
#pragma unroll 4
    for (std::int64_t row = y; row < partial_rows; row += kFinishRows)
      sum += partial[row * n + column];
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0 || column >= n) return;
#pragma unroll
  for (int i = 1; i < kFinishRows; ++i) sum += sums[i][x];
  dweight[column] = tile::from_float<W>(sum);
}

// ---- host ----------------------------------------------------------------------------------

constexpr const char* kForward = "fastkern::rms_norm";
constexpr const char* kBackward = "fastkern::rms_norm_bwd";

/// Calls f<kThreads, kPacks>() with the plan's register-resident configuration.
template <class T, class F>
void dispatch_resident(const Plan& plan, F&& f) {
  const int packs = plan.elements_per_thread / kVector<T>;
  if (packs > 4) {
    dispatch_ceil<512, 1024>(plan.threads_per_row,
                             [&]<int kThreads>() { f.template operator()<kThreads, 8>(); });
  } else if (packs > 2) {
    f.template operator()<512, 4>();
  } else {
    dispatch_ceil<4, 8, 16, 32, 64, 128, 256, 512, 1024>(
        plan.threads_per_row, [&]<int kThreads>() { f.template operator()<kThreads, 2>(); });
  }
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// How the weight gradient of a call is split, and where its workspace lies.
struct Split {
  Plan plan;
  std::int64_t blocks = 0;         // of the main kernel
  std::int64_t column_blocks = 0;  // long rows: of the weight kernel
  std::int64_t partial_rows = 0;
  std::int64_t rstd_floats = 0;  // padded so that what follows is 16-byte aligned
  std::size_t bytes(std::int64_t n) const {
    return sizeof(float) * static_cast<std::size_t>(rstd_floats + partial_rows * n);
  }
};

Split split_of(const RmsNormBwd& args, const Rows& x, int device) {
  const int shared_limit =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, kBackward);
  Split split{.plan = rms_norm_bwd_plan(x.length, args.x.dtype, shared_limit)};
  const bool want_dweight = args.dweight.given();
  const std::int64_t sms = device_attribute(cudaDevAttrMultiProcessorCount, device, kBackward);
  if (!split.plan.resident) {
    split.blocks = x.count;
    if (want_dweight) {
      split.rstd_floats = ceil_div(x.count, 4) * 4;
      split.column_blocks = ceil_div(x.length, kBlockColumns * 16 / size_of(args.x.dtype));
      split.partial_rows = std::clamp<std::int64_t>(4 * sms / split.column_blocks, 1,
                                                    std::max<std::int64_t>(x.count, 1));
    }
  } else {
    split.blocks =
        std::min(ceil_div(x.count, split.plan.rows_per_block), split.plan.blocks_per_sm * sms);
    if (want_dweight) split.partial_rows = split.blocks;
  }
  return split;
}

}  // namespace

void rms_norm(const RmsNormFwd& args, Stream stream) {
  const Rows x = rows_of(args.x, kForward, "x"), y = rows_of(args.y, kForward, "y");
  if (x.count * x.length == 0) return;
  const Plan plan = rms_norm_plan(x.length, args.x.dtype);
  dispatch(args.x.dtype, [&]<class T>() {
    const Forward<T> p{tile::row_view<T>(args.x, x, kForward),
                       tile::row_view<T>(args.y, y, kForward),
                       tile::column_view(args.weight),
                       x.count,
                       x.length,
                       static_cast<float>(args.eps)};
    const Launch shape{kForward, ceil_div(x.count, plan.rows_per_block), plan.threads_per_block};
    if (!plan.resident) return launch(rms_norm_fwd_long_kernel<T>, shape, stream, p);
    dispatch_resident<T>(plan, [&]<int kThreads, int kPacks>() {
      if constexpr (kThreads < 1024 || kPacks > 2)
        launch(rms_norm_fwd_kernel<T, kThreads, kPacks>, shape, stream, p);
    });
  });
}

std::size_t rms_norm_bwd_workspace(const RmsNormBwd& args, int device) {
  const Rows x = rows_of(args.x, kBackward, "x");
  return split_of(args, x, device).bytes(x.length);
}

void rms_norm_bwd(const RmsNormBwd& args, Stream stream) {
  const Rows x = rows_of(args.x, kBackward, "x"), dy = rows_of(args.dy, kBackward, "dy");
  const Rows dx = args.dx.given() ? rows_of(args.dx, kBackward, "dx") : x;
  if (x.length == 0) return;
  const Split split = split_of(args, x, stream.device);
  FK_CHECK(args.workspace_size >= split.bytes(x.length), kBackward,
           ": workspace must have at least ", split.bytes(x.length), " bytes, got ",
           args.workspace_size);
  const bool want_dweight = args.dweight.given();
  float* const rstd = static_cast<float*>(args.workspace);
  float* const partial = want_dweight ? rstd + split.rstd_floats : nullptr;
  dispatch(args.x.dtype, [&]<class T>() {
    const Backward<T> p{tile::row_view<T>(args.dy, dy, kBackward),
                        tile::row_view<T>(args.x, x, kBackward),
                        args.dx.given() ? tile::row_view<T>(args.dx, dx, kBackward) : RowView<T>{},
                        tile::column_view(args.weight),
                        partial,
                        split.rstd_floats > 0 ? rstd : nullptr,
                        x.count,
                        x.length,
                        static_cast<float>(args.eps),
                        split.plan.stages};
    const Launch shape{kBackward, split.blocks, split.plan.threads_per_block,
                       static_cast<std::size_t>(split.plan.shared_bytes)};
    if (!split.plan.resident) {
      launch(rms_norm_bwd_long_kernel<T>, shape, stream, p);
      if (want_dweight && x.count > 0) {
        launch(rms_norm_bwd_dweight_long_kernel<T>,
               {kBackward, split.column_blocks * split.partial_rows, kBlockColumns}, stream, p,
               split.column_blocks, split.partial_rows);
      }
    } else {
      dispatch_resident<T>(split.plan, [&]<int kThreads, int kPacks>() {
        if constexpr (kPacks <= 2)
          launch(rms_norm_bwd_kernel<T, kThreads, kPacks>, shape, stream, p);
      });
    }
  });
  if (!want_dweight) return;
  dispatch(args.dweight.dtype, [&]<class W>() {
    launch(rms_norm_bwd_dweight_kernel<W>,
           {kBackward, ceil_div(x.length, kFinishColumns), kFinishColumns * kFinishRows}, stream,
           static_cast<const float*>(partial), x.count > 0 ? split.partial_rows : 0, x.length,
           static_cast<W*>(args.dweight.data));
  });
}

}  // namespace fastkern::cuda
