// SPDX-License-Identifier: Apache-2.0
// Row norms of rows that no other kernel takes: longer than what lies on a cluster, or than a block
// of a GPU without clusters holds. Every operand in its own type, every feature at run time.
//
//   work     forward: a block a row. backward: a block a row for d, then a block for some columns
//            and one group of rows for the sums over the rows
//   memory   rows are read as often as needed: out of the L2 cache if those under way fit there.
//            layer takes its squares around the mean, so after it
//   cost     forward: reads 2 to 3 · M · N; backward: reads 6 · M · N, writes M · N
#include "norm/norm_launch.cuh"

namespace fastkern::cuda::norm_detail {
namespace {

using tile::Mixed;

constexpr int kBlock = 512, kV = kVector<Mixed>;
constexpr int kBlockColumns = 256;

/// One pack of a row at a 64-bit column.
__device__ __forceinline__ Pack<Mixed> at(const RowView<Mixed>& view, const char* row,
                                          std::int64_t column, std::int64_t n) {
  Pack<Mixed> pack[1];
  const std::int64_t size = view.dtype == DType::f32 ? 4 : 2;
  const int left = static_cast<int>(min(n - column, static_cast<std::int64_t>(kV)));
  view.load(row + column * size, [](int) { return 0; }, left, pack);
  return pack[0];
}
__device__ __forceinline__ void put(const RowView<Mixed>& view, char* row, std::int64_t column,
                                    std::int64_t n, const float (&v)[kV]) {
  const std::int64_t size = view.dtype == DType::f32 ? 4 : 2;
  const int left = static_cast<int>(min(n - column, static_cast<std::int64_t>(kV)));
  const Pack<Mixed> pack[1] = {view.pack(v)};
  view.store(row + column * size, [](int) { return 0; }, left, pack);
}

template <int kValues>
__device__ __forceinline__ void block_sum(float (&values)[kValues],
                                          tile::Exchange<tile::Sum, kValues>& exchange) {
  exchange.send(values);
  exchange.receive(values);
}

template <class F>
__device__ __forceinline__ void each_column(std::int64_t n, F&& f) {
#pragma unroll 2
  for (std::int64_t column = threadIdx.x * kV; column < n; column += kBlock * kV) f(column);
}

__global__ void __launch_bounds__(kBlock) norm_fwd_long_kernel(const Forward<Mixed> p, bool layer) {
  using Sent = tile::Exchange<tile::Sum, 2>;
  __shared__ uint4 memory[Sent::bytes(kBlock, 1) / 16];
  const Team team{kBlock, 1, 0};
  Sent exchange(team, memory);
  const std::int64_t row = blockIdx.x, head = row % p.heads * p.n;
  const char* gX = p.x.row(row);
  if (p.h.data) {
    const float rowscale = rowscale_of(p.rowscale, row);
    char* const gH = p.h.row(row);
    const char* const gR = p.residual.data ? p.residual.row(row) : nullptr;
    each_column(p.n, [&](std::int64_t column) {
      const Pack<Mixed> residual = gR ? at(p.residual, gR, column, p.n) : Pack<Mixed>{};
      float h[kV];
      p.h.unpack(add_residual<Residual::dropout>(p, at(p.x, gX, column, p.n), residual, row, column,
                                                 rowscale),
                 h);
      put(p.h, gH, column, p.n, h);
    });
    gX = gH;
  }
  const RowView<Mixed>& source = p.h.data ? p.h : p.x;
  // What this thread wrote, it reads: no barrier, but not through the read-only path.
  const auto read = [&](std::int64_t column, float (&v)[kV]) {
    if (!p.h.data) return source.unpack(at(source, gX, column, p.n), v);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      v[j] = 0.0f;
      if (column + j >= p.n) continue;
      if (source.dtype == DType::f32) {
        v[j] = reinterpret_cast<const volatile float*>(gX)[column + j];
      } else {
        const std::uint32_t bits = reinterpret_cast<const volatile std::uint16_t*>(gX)[column + j];
        v[j] = source.dtype == DType::f16 ? tile::unpack_pair(bits, __half{}).x
                                          : tile::unpack_pair(bits, __nv_bfloat16{}).x;
      }
    }
  };
  float sums[2] = {}, mean = 0.0f;
  if (layer) {
    // Sums around an element of the row: a constant row has exactly that mean. h: this thread may
    // not have written that element.
    if (p.h.data) __syncthreads();
    float v[kV];
    read(0, v);
    const float head = v[0];
    each_column(p.n, [&](std::int64_t column) {
      read(column, v);
      within<kV>(column, p.n, [&](int j) { sums[0] += v[j] - head; });
    });
    block_sum(sums, exchange);
    mean = __fadd_rn(head, __fmul_rn(sums[0], p.inverse_n));
    sums[0] = 0.0f;
  }
  each_column(p.n, [&](std::int64_t column) {
    float v[kV];
    read(column, v);
    within<kV>(column, p.n, [&](int j) {
      const float d = v[j] - mean;
      sums[0] += d;
      sums[1] = fmaf(d, d, sums[1]);
    });
  });
  block_sum(sums, exchange);
  // What the first sum, of so many terms, has left of the mean.
  const float rest = layer ? sums[0] * p.inverse_n : 0.0f;
  const float rstd = rsqrtf(fmaf(-rest, rest, sums[1] * p.inverse_n) + p.eps);

  const auto value = [&](std::int64_t column, const ColumnView& weight, const ColumnView& bias,
                         float (&v)[kV]) {
    float w[kV], b[kV];
    read(column, v);
    weight.load(head, column, p.n, 1.0f, w);
    bias.load(head, column, p.n, kNothing, b);
    const float offset = weight.data ? p.weight_offset : 0.0f;
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = fmaf(((v[j] - mean) - rest) * rstd, w[j] + offset, b[j]);
  };
  if (p.scale) {
    float inverse = p.static_scale ? 1.0f / *p.scale : 0.0f;
    if (!p.static_scale) {
      __shared__ uint4 more[tile::Exchange<tile::Largest, 1>::bytes(kBlock, 1) / 16];
      tile::Exchange<tile::Largest, 1> magnitudes(team, more);
      std::uint32_t bits = 0;
      each_column(p.n, [&](std::int64_t column) {
        float v[kV];
        value(column, p.weight, p.bias, v);
        within<kV>(column, p.n,
                   [&](int j) { bits = tile::Largest::apply(bits, __float_as_uint(fabsf(v[j]))); });
      });
      float largest[1] = {__uint_as_float(bits)};
      magnitudes.send(largest);
      magnitudes.receive(largest);
      inverse = dynamic_scale(p, largest[0], row, threadIdx.x == 0);
    }
    char* const gY = p.y.row(row);
    each_column(p.n, [&](std::int64_t column) {
      float v[kV];
      value(column, p.weight, p.bias, v);
      store_quantised(p.y, gY, column, p.n, v, inverse);
    });
    return;
  }
  const auto write = [&](const RowView<Mixed>& view, const ColumnView& weight,
                         const ColumnView& bias) {
    char* const to = view.row(row);
    each_column(p.n, [&](std::int64_t column) {
      float v[kV];
      value(column, weight, bias, v);
      put(view, to, column, p.n, v);
    });
  };
  write(p.y, p.weight, p.bias);
  if (p.y2.data) write(p.y2, p.weight2, p.bias2);
}

/// d of a row, and its mean and rstd for the sums over the rows.
__global__ void __launch_bounds__(kBlock)
    norm_bwd_long_kernel(const Backward<Mixed> p, bool layer, float* statistics) {
  using Sent = tile::Exchange<tile::Sum, 4>;
  __shared__ uint4 memory[Sent::bytes(kBlock, 1) / 16];
  const Team team{kBlock, 1, 0};
  Sent exchange(team, memory);
  const std::int64_t row = blockIdx.x, head = row % p.heads * p.n;
  const char *const gX = p.x.row(row), *const gDy = p.dy.row(row);
  const char* const gDy2 = p.dy2.data ? p.dy2.row(row) : nullptr;
  const auto gradient = [&](std::int64_t column, float (&g)[kV]) {
    float w[kV];
    p.dy.unpack(at(p.dy, gDy, column, p.n), g);
    p.weight.load(head, column, p.n, 1.0f, w);
    const float offset = p.weight.data ? p.weight_offset : 0.0f;
#pragma unroll
    for (int j = 0; j < kV; ++j) g[j] *= w[j] + offset;
    if (!gDy2) return;
    float g2[kV];
    p.dy2.unpack(at(p.dy2, gDy2, column, p.n), g2);
    p.weight2.load(head, column, p.n, 1.0f, w);
    const float offset2 = p.weight2.data ? p.weight_offset : 0.0f;
#pragma unroll
    for (int j = 0; j < kV; ++j) g[j] = fmaf(g2[j], w[j] + offset2, g[j]);
  };

  float mean = 0.0f;
  if (layer) {
    float sums[4] = {}, x[kV];
    p.x.unpack(at(p.x, gX, 0, p.n), x);
    const float first = x[0];  // sums around an element of the row, as in forward
    each_column(p.n, [&](std::int64_t column) {
      p.x.unpack(at(p.x, gX, column, p.n), x);
      within<kV>(column, p.n, [&](int j) { sums[0] += x[j] - first; });
    });
    block_sum(sums, exchange);
    mean = __fadd_rn(first, __fmul_rn(sums[0], p.inverse_n));
  }
  float sums[4] = {};
  each_column(p.n, [&](std::int64_t column) {
    float x[kV], g[kV];
    p.x.unpack(at(p.x, gX, column, p.n), x);
    gradient(column, g);
    within<kV>(column, p.n, [&](int j) {
      const float d = x[j] - mean;
      sums[0] = fmaf(d, d, sums[0]);
      sums[1] = fmaf(g[j], d, sums[1]);
      sums[2] += g[j];
      sums[3] += d;
    });
  });
  block_sum(sums, exchange);
  if (layer) {  // what the first sum, of so many terms, has left of the mean
    const float rest = sums[3] * p.inverse_n;
    mean = __fadd_rn(mean, rest);
    sums[0] = fmaf(-rest, sums[3], sums[0]);
    sums[1] = fmaf(-rest, sums[2], sums[1]);
  }
  const float rstd = rsqrtf(sums[0] * p.inverse_n + p.eps);
  const float slope = sums[1] * rstd * p.inverse_n * rstd * rstd;
  const float shift = layer ? sums[2] * p.inverse_n * rstd : 0.0f;
  if (statistics && threadIdx.x == 0) statistics[2 * row] = mean, statistics[2 * row + 1] = rstd;
  if (!p.dx.data && !p.dbranch.data) return;

  const float rowscale = rowscale_of(p.rowscale, row);
  char* const gDx = p.dx.data ? p.dx.row(row) : nullptr;
  char* const gBranch = p.dbranch.data ? p.dbranch.row(row) : nullptr;
  each_column(p.n, [&](std::int64_t column) {
    float x[kV], g[kV], d[kV];
    p.x.unpack(at(p.x, gX, column, p.n), x);
    gradient(column, g);
#pragma unroll
    for (int j = 0; j < kV; ++j) d[j] = fmaf(g[j], rstd, fmaf(-slope, x[j] - mean, -shift));
    if (p.dh.data) {
      float dh[kV];
      p.dh.unpack(at(p.dh, p.dh.row(row), column, p.n), dh);
#pragma unroll
      for (int j = 0; j < kV; ++j) d[j] += dh[j];
    }
    if (gDx) put(p.dx, gDx, column, p.n, d);
    if (!gBranch) return;
    if (p.dropout.seed) p.dropout.apply(row * p.n + column, d);
#pragma unroll
    for (int j = 0; j < kV; ++j) d[j] *= rowscale;
    put(p.dbranch, gBranch, column, p.n, d);
  });
}

/// Partial sums over the rows: a block owns some columns and, of one head, one group of rows.
/// Partial row `group * heads + head` of each sum.
__global__ void __launch_bounds__(kBlockColumns)
    norm_bwd_sums_long_kernel(const Backward<Mixed> p, const float* statistics,
                              std::int64_t column_blocks, int sums) {
  const std::int64_t column = (blockIdx.x % column_blocks * kBlockColumns + threadIdx.x) * kV;
  const std::int64_t partial = blockIdx.x / column_blocks, groups = p.partial_rows / p.heads;
  const std::int64_t head = partial % p.heads, group = partial / p.heads, rows = p.rows / p.heads;
  if (column >= p.n) return;
  float weight[kV] = {}, bias[kV] = {}, weight2[kV] = {}, bias2[kV] = {};
#pragma unroll 2
  for (std::int64_t r = rows * group / groups; r < rows * (group + 1) / groups; ++r) {
    const std::int64_t row = r * p.heads + head;
    float x[kV], dy[kV], dy2[kV] = {};
    p.x.unpack(at(p.x, p.x.row(row), column, p.n), x);
    p.dy.unpack(at(p.dy, p.dy.row(row), column, p.n), dy);
    if (p.dy2.data) p.dy2.unpack(at(p.dy2, p.dy2.row(row), column, p.n), dy2);
    const float mean = statistics[2 * row], rstd = statistics[2 * row + 1];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float normal = (x[j] - mean) * rstd;
      weight[j] = fmaf(dy[j], normal, weight[j]), bias[j] += dy[j];
      weight2[j] = fmaf(dy2[j], normal, weight2[j]), bias2[j] += dy2[j];
    }
  }
  const auto put_sum = [&](int which, const float (&sum)[kV]) {
    if (which >= sums) return;
    float* const to = p.partial + (which * p.partial_rows + partial) * p.n + column;
    within<kV>(column, p.n, [&](int j) { to[j] = sum[j]; });
  };
  put_sum(0, weight), put_sum(1, bias), put_sum(2, weight2), put_sum(3, bias2);
}

}  // namespace

void launch_fwd_long(const NormFwd& args, Stream stream) {
  const Forward<Mixed> p = forward_params<Mixed>(args);
  launch(norm_fwd_long_kernel, {args.op, p.rows, kBlock}, stream, p, args.kind == NormKind::layer);
}

std::int64_t launch_bwd_long(const NormBwd& args, const Split& split, Stream stream) {
  Backward<Mixed> p = backward_params<Mixed>(args);
  p.heads = split.heads, p.partial_rows = split.partial_rows;
  float* const statistics = split.sums > 0 ? static_cast<float*>(args.workspace) : nullptr;
  p.partial = split.sums > 0 ? statistics + split.statistics : nullptr;
  launch(norm_bwd_long_kernel, {args.op, p.rows, kBlock}, stream, p, args.kind == NormKind::layer,
         statistics);
  if (split.sums > 0) {
    launch(norm_bwd_sums_long_kernel,
           {args.op, split.column_blocks * split.partial_rows, kBlockColumns}, stream, p,
           static_cast<const float*>(statistics), split.column_blocks, split.sums);
  }
  return split.partial_rows;
}

}  // namespace fastkern::cuda::norm_detail
