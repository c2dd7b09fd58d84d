// SPDX-License-Identifier: Apache-2.0
// The softmax family over the middle dimension of a dense (A, N, C). softmax.h says what is
// computed.
//
//   work     a block has 32 neighbouring columns of one of the A, its 16 warps every 16th of the N
//            lines each. What a block has does not depend on C, so neither do the bits of a column.
//   memory   nothing waits: the numbers are read once for the sum and once for the result
//   sync     two barriers around the exchange of the warps' terms
//   cost     forward 2 reads and a write of each number, backward 4 and 1; of 16-bit types a warp
//            reads 64 bytes at a time. C below 32 leaves lanes idle.
#include "softmax/softmax_terms.cuh"

namespace fastkern::cuda::softmax_detail {
namespace {

constexpr int kColumns = 32, kWarps = 16, kBatch = 4;  // lines a thread reads at once

/// A sum of many numbers: of parts of 64, so that none is lost beside what is there already.
struct LongSum {
  float all = 0.0f, part = 0.0f;
  int added = 0;

  __device__ __forceinline__ void count(int more) {
    added += more;
    if (added < 64) return;
    all += part, part = 0.0f, added = 0;
  }
  __device__ __forceinline__ float total() const { return all + part; }
};

struct MiddleFwd {
  const void* x;
  void* y;
  DType x_type, y_type, narrow;
  SoftmaxKind kind;
  std::int64_t n, c, column_blocks;
};

struct MiddleBwd {
  const void *y, *dy, *lse;
  void* dx;
  DType y_type, dy_type, lse_type, dx_type;
  SoftmaxKind kind;
  float scale;
  std::int64_t n, c, column_blocks;
};

/// Where a thread's numbers lie.
struct Place {
  std::int64_t column, start, row;
  bool inside;

  template <class P>
  __device__ __forceinline__ explicit Place(const P& p)
      : column(blockIdx.x % p.column_blocks * kColumns + threadIdx.x % kColumns),
        start(blockIdx.x / p.column_blocks * p.n * p.c + column),
        row(blockIdx.x / p.column_blocks * p.c + column),
        inside(column < p.c) {}
};

/// f(line, at) for the thread's lines, kBatch of them unrolled.
template <class F>
__device__ __forceinline__ void each_line(const Place& place, std::int64_t n, std::int64_t c,
                                          const F& f) {
  if (!place.inside) return;
#pragma unroll kBatch
  for (std::int64_t line = threadIdx.x / kColumns; line < n; line += kWarps)
    f(place.start + line * c);
}

__global__ void __launch_bounds__(kColumns* kWarps) softmax_middle_kernel(const MiddleFwd p) {
  __shared__ Terms shared[kWarps * kColumns];
  const Place place(p);
  ptx::grid_wait();
  ptx::grid_launch_next();
  const auto value = [&](std::int64_t at) {
    return rounded_to(p.narrow, load_as(p.x, p.x_type, at));
  };
  float max = -infinity();
  LongSum sum;
  if (place.inside) {
    const std::int64_t step = kWarps * p.c;
    std::int64_t line = threadIdx.x / kColumns, at = place.start + line * p.c;
    for (; line < p.n; line += kBatch * kWarps, at += kBatch * step) {
      float z[kBatch], most = max;
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        z[i] = line + i * kWarps < p.n ? value(at + i * step) : -infinity();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) most = fmaxf(most, z[i]);
      const float factor = factor_of(max, most);
      max = most;
      sum.all = __fmul_rn(sum.all, factor), sum.part = __fmul_rn(sum.part, factor);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum.part += exp_of(__fsub_rn(z[i], shift_of(max)));
      sum.count(kBatch);
    }
  }
  shared[threadIdx.x] = {max, sum.total()};
  __syncthreads();
  if (!place.inside) return;
  Terms terms = nothing();
  for (int i = 0; i < kWarps; ++i)
    terms = merged(terms, shared[i * kColumns + threadIdx.x % kColumns]);
  const RowTerms r = row_terms(p.kind, terms, false);
  if (p.kind == SoftmaxKind::logsumexp) {
    if (threadIdx.x < kColumns) tile::store_as(p.y, p.y_type, place.row, r.shift + r.rest);
    return;
  }
  each_line(place, p.n, p.c, [&](std::int64_t at) {
    tile::store_as(p.y, p.y_type, at, result_of<float>(p.kind, value(at), r));
  });
}

__global__ void __launch_bounds__(kColumns* kWarps) softmax_bwd_middle_kernel(const MiddleBwd p) {
  __shared__ float shared[kWarps * kColumns];
  const Place place(p);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (p.kind == SoftmaxKind::logsumexp) {
    if (!place.inside) return;
    const float dy = load_as(p.dy, p.dy_type, place.row);
    const float lse = load_as(p.lse, p.lse_type, place.row);
    each_line(place, p.n, p.c, [&](std::int64_t at) {
      const float x = load_as(p.y, p.y_type, at);
      tile::store_as(p.dx, p.dx_type, at, __fmul_rn(dy, exp_of(__fsub_rn(x, lse))));
    });
    return;
  }
  LongSum own;
  each_line(place, p.n, p.c, [&](std::int64_t at) {
    own.part =
        added_term(p.kind, load_as(p.y, p.y_type, at), load_as(p.dy, p.dy_type, at), own.part);
    own.count(1);
  });
  shared[threadIdx.x] = own.total();
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += shared[i * kColumns + threadIdx.x % kColumns];
  each_line(place, p.n, p.c, [&](std::int64_t at) {
    const float y = load_as(p.y, p.y_type, at), dy = load_as(p.dy, p.dy_type, at);
    tile::store_as(p.dx, p.dx_type, at, gradient_of<float>(p.kind, y, dy, sum, p.scale));
  });
}

Launch shape_of(const TensorRef& t, const char* op) {
  FK_CHECK(t.ndim == 3, op, ": a middle dimension is one of three, got shape ", t.shape());
  return {.op = op,
          .grid = t.sizes[0] * ceil_div(t.sizes[2], kColumns),
          .block = kColumns * kWarps,
          .overlap = true};
}

}  // namespace

void launch_fwd_middle(const SoftmaxFwd& a, Stream stream) {
  const Launch shape = shape_of(a.x, a.op);
  const bool narrow =
      a.kind != SoftmaxKind::logsumexp && a.y.dtype != DType::f32 && a.y.dtype != a.x.dtype;
  const MiddleFwd p{.x = a.x.data,
                    .y = a.y.data,
                    .x_type = a.x.dtype,
                    .y_type = a.y.dtype,
                    .narrow = narrow ? a.y.dtype : DType::f32,
                    .kind = a.kind,
                    .n = a.x.sizes[1],
                    .c = a.x.sizes[2],
                    .column_blocks = ceil_div(a.x.sizes[2], kColumns)};
  launch(&softmax_middle_kernel, shape, stream, p);
}

void launch_bwd_middle(const SoftmaxBwd& a, Stream stream) {
  const MiddleBwd p{.y = a.y.data,
                    .dy = a.dy.data,
                    .lse = a.lse.data,
                    .dx = a.dx.data,
                    .y_type = a.y.dtype,
                    .dy_type = a.dy.dtype,
                    .lse_type = a.lse.dtype,
                    .dx_type = a.dx.dtype,
                    .kind = a.kind,
                    .scale = static_cast<float>(a.scale),
                    .n = a.y.sizes[1],
                    .c = a.y.sizes[2],
                    .column_blocks = ceil_div(a.y.sizes[2], kColumns)};
  launch(&softmax_bwd_middle_kernel, shape_of(a.y, a.op), stream, p);
}

}  // namespace fastkern::cuda::softmax_detail
