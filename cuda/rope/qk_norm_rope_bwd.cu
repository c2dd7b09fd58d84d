// SPDX-License-Identifier: Apache-2.0
// The gradients of qk_norm_rope: dy turned back is g, xhat = x * rstd,
//
//   dx = rstd * (g w - xhat * mean(g w xhat)),  dweight = sum over tokens and heads of g xhat
//
//   work     as qk_norm_rope.cu, but blocks stay: three or four a multiprocessor, some of them for
//            q and the rest for k, as they have heads. A thread walks through tokens with two heads
//            at a time (f32: one) and keeps the sums of its sixteen columns
//   memory   rstd is found again from x. Sums of a block go to its row of the workspace, f32; a
//            second kernel adds up the rows, four parts of them for each column, then the parts
//   sync     shuffles within the threads of a head; one barrier a block at the end, one in the
//   second
//            kernel; both overlap the launch before them
//   cost     reads x and dy and writes dx once: 3 * B * S * (H + G) * D elements
#include <algorithm>

#include "rope/qk_norm_rope.cuh"

namespace fastkern::cuda {
namespace rope_detail {
namespace {

constexpr int kBwdBlock = 128, kWarps = kBwdBlock / 32;

/// Registers allow so many; interleaved pairs take a few more.
template <bool kInterleaved>
inline constexpr int kBlocks = kInterleaved ? 3 : 4;

template <class T>
inline constexpr int kHeadsBwd = kHeads<T> / 2;

/// q or k, and the blocks that work on it.
struct SideBwd {
  HeadsView x, dy, dx;  // dx: no data if not wanted
  Side side;
  std::uint32_t units;  // groups of heads of all tokens; 0: nobody wants a gradient
  Divider groups;
  int first_block, blocks;
  float* sums;  // (blocks, D); nullptr: not wanted
};

struct BwdParams {
  SideBwd q, k;
  AnglesView angles;
  Split split;
  int width;
  Divider tokens;
  float eps, weight_offset, count;
};

/// Sums of the block's threads with the same columns, to its row of the workspace.
__device__ __forceinline__ void store_sums(const Columns& c, int width, int n, float (&a)[kColumns],
                                           float (&b)[kColumns], float* row) {
  __shared__ float sums[kWarps * 2 * kColumns * 32];
  // Over the heads that a warp works on at the same time.
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < width) continue;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      a[j] += __shfl_xor_sync(0xffffffffu, a[j], offset);
      b[j] += __shfl_xor_sync(0xffffffffu, b[j], offset);
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < width) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (c.a + j < c.a_end) sums[warp * n + c.a + j] = a[j];
      if (c.b + j < c.b_end) sums[warp * n + c.b + j] = b[j];
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < n; column += kBwdBlock) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += sums[i * n + column];
    row[column] = sum;
  }
}

template <class T, bool kInterleaved, bool kWhole>
__global__ void __launch_bounds__(kBwdBlock, kWhole ? kBlocks<kInterleaved> : 1)
    qk_norm_rope_bwd_kernel(const BwdParams p) {
  constexpr int kMost = kHeadsBwd<T>;
  ptx::grid_wait();
  ptx::grid_launch_next();
  const bool of_k = static_cast<int>(blockIdx.x) >= p.k.first_block;
  const HeadsView x_of = pick(of_k, p.q.x, p.k.x), dy_of = pick(of_k, p.q.dy, p.k.dy);
  const HeadsView dx_of = pick(of_k, p.q.dx, p.k.dx);
  const int heads = of_k ? p.k.side.heads : p.q.side.heads;
  const int groups = of_k ? p.k.side.groups : p.q.side.groups;
  const Divider by_groups = of_k ? p.k.groups : p.q.groups;
  const std::uint32_t units = of_k ? p.k.units : p.q.units;
  float* const sums = of_k ? p.k.sums : p.q.sums;
  const std::uint32_t blocks = of_k ? p.k.blocks : p.q.blocks;
  const std::uint32_t block = blockIdx.x - (of_k ? p.k.first_block : 0);

  const int width = p.width, lane = threadIdx.x & (width - 1);
  const std::uint32_t slots = kBwdBlock / width, slot = threadIdx.x / width;
  const Columns c = Columns::of<kInterleaved>(p.split, lane);
  Weights weight;
  weight.load(of_k ? p.k.side.weight : p.q.side.weight, c, p.weight_offset);
  float sum_a[kColumns] = {}, sum_b[kColumns] = {};
#pragma unroll 1
  for (std::uint32_t begin = block * slots; begin < units; begin += blocks * slots) {
    const bool active = begin + slot < units;
    std::uint32_t group, s;
    const std::uint32_t token = by_groups(active ? begin + slot : 0, group);
    const std::uint32_t b = p.tokens(token, s);
    Eight<T> x_first[kMost], x_second[kMost], dy_first[kMost], dy_second[kMost];
    const char* x_from = x_of.data + b * x_of.batch + s * x_of.token + group * x_of.head;
    const char* dy_from = dy_of.data + b * dy_of.batch + s * dy_of.token + group * dy_of.head;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const bool inside = active && static_cast<int>(group) + i * groups < heads;
      const int a_end = inside ? c.a_end : 0, b_end = inside ? c.b_end : 0;
      x_first[i] = load<T, kWhole>(x_from, c.a, a_end);
      x_second[i] = load<T, kWhole>(x_from, c.b, b_end);
      dy_first[i] = load<T, kWhole>(dy_from, c.a, a_end);
      dy_second[i] = load<T, kWhole>(dy_from, c.b, b_end);
      x_from += groups * x_of.head;
      dy_from += groups * dy_of.head;
    }
    Turn<kInterleaved> turn;
    const std::int64_t row = row_of(p.angles, b, s);
    turn.load(p.angles, b, row, c, p.split.half);
    const bool turned = c.turned && row != kNoSequence;
    char* dx_to = dx_of.data + b * dx_of.batch + s * dx_of.token + group * dx_of.head;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const bool inside = active && static_cast<int>(group) + i * groups < heads;
      float x[kColumns], y[kColumns], g[kColumns], h[kColumns];
      unpack(x_first[i], x), unpack(x_second[i], y);
      unpack(dy_first[i], g), unpack(dy_second[i], h);
      if (turned) turn.apply(g, h);
      float both[2] = {dot(y, y, dot(x, x, 0.0f)), 0.0f};
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        both[1] = fmaf(__fmul_rn(g[j], weight.a[j]), x[j], both[1]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        both[1] = fmaf(__fmul_rn(h[j], weight.b[j]), y[j], both[1]);
      sum_lanes(both, width);
      const float rstd = rsqrtf(__fmaf_rn(both[0], p.count, p.eps));
      const float mean = __fmul_rn(__fmul_rn(both[1], rstd), p.count);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float xhat = __fmul_rn(x[j], rstd), yhat = __fmul_rn(y[j], rstd);
        // Heads beyond the last have a rstd that may be infinite, and nothing to add.
        sum_a[j] = inside ? fmaf(g[j], xhat, sum_a[j]) : sum_a[j];
        sum_b[j] = inside ? fmaf(h[j], yhat, sum_b[j]) : sum_b[j];
        x[j] = __fmul_rn(rstd, fmaf(-xhat, mean, __fmul_rn(g[j], weight.a[j])));
        y[j] = __fmul_rn(rstd, fmaf(-yhat, mean, __fmul_rn(h[j], weight.b[j])));
      }
      const bool wanted = inside && dx_of.data != nullptr;
      store<T, kWhole>(dx_to, c.a, wanted ? c.a_end : 0, pack<T>(x));
      store<T, kWhole>(dx_to, c.b, wanted ? c.b_end : 0, pack<T>(y));
      dx_to += groups * dx_of.head;
    }
  }
  if (sums)
    store_sums(c, width, p.split.n, sum_a, sum_b,
               sums + static_cast<std::int64_t>(block) * p.split.n);
}

// ---- the weight gradients -----------------------------------------------------------------------

struct Total {
  const float* sums;
  int blocks;
  void* out;  // nullptr: not wanted
  DType dtype;
};

/// Blocks of 32 columns, of q's weight and of k's.
__global__ void __launch_bounds__(kBwdBlock)
    qk_norm_rope_weights_kernel(const Total q, const Total k, int n) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  __shared__ float parts[kBwdBlock];
  const int halves = gridDim.x / 2;
  const bool of_k = static_cast<int>(blockIdx.x) >= halves;
  const float* const sums = of_k ? k.sums : q.sums;
  if (!(of_k ? k.out : q.out)) return;
  const int blocks = of_k ? k.blocks : q.blocks;
  const int column = (blockIdx.x - (of_k ? halves : 0)) * 32 + threadIdx.x % 32;
  const int part = threadIdx.x / 32;
  float sum = 0.0f;
  if (column < n) {
#pragma unroll 8
    for (int i = part; i < blocks; i += kWarps)
      sum += sums[static_cast<std::int64_t>(i) * n + column];
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part > 0 || column >= n) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += parts[i * 32 + threadIdx.x];
  tile::store_as(of_k ? k.out : q.out, of_k ? k.dtype : q.dtype, column, sum);
}

// ---- host ---------------------------------------------------------------------------------------

/// Blocks for q and for k: those of the device as they have heads, no more than there is work for.
struct Blocks {
  std::int64_t q = 0, k = 0;
};

int heads_a_thread(DType dtype) {
  return size_of(dtype) == 2 ? kHeadsBwd<__half> : kHeadsBwd<float>;
}

std::int64_t units_of(const QkNormRopeBwd& a, const TensorRef& t, const TensorRef& dx,
                      const TensorRef& dweight) {
  if (!t.given() || (!dx.given() && !dweight.given())) return 0;
  return t.sizes[0] * t.sizes[1] * ceil_div(t.sizes[2], heads_a_thread(a.q.dtype));
}

Blocks blocks_of(const QkNormRopeBwd& a, int width, int device) {
  const std::int64_t q = units_of(a, a.q, a.dq, a.dq_weight);
  const std::int64_t k = units_of(a, a.k, a.dk, a.dk_weight);
  if (q + k == 0) return {};
  const std::int64_t slots = kBwdBlock / width;
  const std::int64_t all = std::int64_t{a.angles.interleaved ? kBlocks<true> : kBlocks<false>} *
                           device_attribute(cudaDevAttrMultiProcessorCount, device, a.op);
  std::int64_t for_k = k == 0 ? 0 : std::max<std::int64_t>(all * k / (q + k), 1);
  if (q > 0) for_k = std::min(for_k, all - 1);
  return {std::min(all - for_k, ceil_div(q, slots)), std::min(for_k, ceil_div(k, slots))};
}

std::size_t bytes_of(const Blocks& blocks, std::int64_t n) {
  return static_cast<std::size_t>((blocks.q + blocks.k) * n * 4);
}

}  // namespace
}  // namespace rope_detail

std::size_t qk_norm_rope_bwd_workspace(const QkNormRopeBwd& args, int device) {
  using namespace rope_detail;  // NOLINT: all of it is about this
  if (!args.dq_weight.given() && !args.dk_weight.given()) return 0;
  const std::int64_t n = args.q.sizes[3];
  return bytes_of(blocks_of(args, width_of(split_of(n, args.angles, true), args.op), device), n);
}

void qk_norm_rope_bwd(const QkNormRopeBwd& args, Stream stream) {
  using namespace rope_detail;  // NOLINT: all of it is about this
  const char* const op = args.op;
  const std::int64_t tokens = args.q.sizes[1], n = args.q.sizes[3];
  RopeAngles back = args.angles;
  back.inverse = !back.inverse;
  BwdParams p{};
  p.split = split_of(n, back, true);
  p.angles = angles_view(back, tokens, op);
  p.width = width_of(p.split, op);
  p.tokens = divider(tokens);
  p.eps = static_cast<float>(args.eps), p.weight_offset = static_cast<float>(args.weight_offset);
  p.count = 1.0f / static_cast<float>(n);
  const Blocks blocks = blocks_of(args, p.width, stream.device);
  const bool weights = args.dq_weight.given() || args.dk_weight.given();
  FK_CHECK(!weights || args.workspace_size >= bytes_of(blocks, n), op,
           ": workspace must be at least ", bytes_of(blocks, n), " bytes, got ",
           args.workspace_size);
  float* const sums = static_cast<float*>(args.workspace);
  const auto fill = [&](SideBwd& side, const TensorRef& x, const TensorRef& dy, const TensorRef& dx,
                        const TensorRef& weight, const TensorRef& dweight, std::int64_t first,
                        std::int64_t count, const char* name) {
    side.x = heads_view(x, op, name), side.dy = heads_view(dy, op, name);
    side.dx = heads_view(dx, op, name);
    side.side = side_of(x, weight, p.split, heads_a_thread(args.q.dtype));
    side.units = counted(units_of(args, x, dx, dweight), op);
    side.groups = divider(side.side.groups);
    side.first_block = static_cast<int>(first), side.blocks = static_cast<int>(count);
    side.sums = dweight.given() ? sums + first * n : nullptr;
  };
  fill(p.q, args.q, args.dq_out, args.dq, args.q_weight, args.dq_weight, 0, blocks.q, "q");
  fill(p.k, args.k, args.dk_out, args.dk, args.k_weight, args.dk_weight, blocks.q, blocks.k, "k");
  bool packs = in_packs(p.split);
  for (const TensorRef* t : {&args.q, &args.k, &args.dq_out, &args.dk_out, &args.dq, &args.dk})
    packs = packs && whole(*t);
  dispatch_heads(args.q.dtype, args.angles.interleaved, packs,
                 [&]<class T, bool kInterleaved, bool kWhole>() {
                   const Launch shape{
                       .op = op, .grid = blocks.q + blocks.k, .block = kBwdBlock, .overlap = true};
                   launch(qk_norm_rope_bwd_kernel<T, kInterleaved, kWhole>, shape, stream, p);
                 });
  if (!weights) return;
  const auto total = [](const SideBwd& side, const TensorRef& out) {
    return Total{side.sums, side.blocks, out.data, out.dtype};
  };
  launch(qk_norm_rope_weights_kernel,
         {.op = op, .grid = 2 * ceil_div(n, 32), .block = kBwdBlock, .overlap = true}, stream,
         total(p.q, args.dq_weight), total(p.k, args.dk_weight), static_cast<int>(n));
}

}  // namespace fastkern::cuda
