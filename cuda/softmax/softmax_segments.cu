// SPDX-License-Identifier: Apache-2.0
// The softmax family for rows that no cluster of blocks can hold, and the gradient of logsumexp,
// which has no sum to wait for. softmax.h says what is computed.
//
//   work     softmax_segments_kernel: a block has a segment of a row, 512 * 8 packs of four
//            columns, and leaves its terms (backward: its sum) in the workspace;
//            softmax_combine_kernel: a block a row adds those up in a fixed order;
//            softmax_apply_kernel: a block a segment reads the row again and writes the result. So
//            one row is many blocks' work.
//   memory   each operand in its own type; 64-bit columns
//   sync     none between the blocks of a launch; three launches one after the other
//   cost     forward 2 N reads and N writes a row, backward 4 N and N
#include "softmax/softmax_terms.cuh"

namespace fastkern::cuda::softmax_detail {
namespace {

constexpr int kThreads = 512, kPacks = 8;
constexpr int kSegment = kThreads * kPacks * kVector<Mixed>;  // columns

constexpr std::int64_t segments_of(std::int64_t n) { return (n + kSegment - 1) / kSegment; }

/// A block's segment, as a row of its own.
struct Segment {
  std::int64_t row, first;
  int columns;  // of it that are there

  __device__ __forceinline__ Segment(std::int64_t segments, std::int64_t n)
      : row(blockIdx.x / segments), first(blockIdx.x % segments * kSegment) {
    columns = static_cast<int>(n - first < kSegment ? n - first : kSegment);
  }
  /// Of `threads` threads, kCount packs from `from` on each.
  __device__ __forceinline__ int column(int i) const {
    return (i * kThreads + static_cast<int>(threadIdx.x)) * kVector<Mixed>;
  }
};

template <class T>
__device__ __forceinline__ int element_bytes(const RowView<T>& view) {
  return view.dtype == DType::f32 ? 4 : 2;
}

/// What lies at column `first` of a row.
template <class T>
__device__ __forceinline__ char* at_column(const RowView<T>& view, std::int64_t row,
                                           std::int64_t first) {
  return view.row(row) + first * element_bytes(view);
}

/// The block's sum or terms; all of its threads get them.
__device__ __forceinline__ Terms block_merged(Terms mine) {
  __shared__ Terms shared[kThreads / 32];
  mine = warp_merged(mine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  return all_merged(shared, kThreads / 32);
}

__global__ void __launch_bounds__(kThreads)
    softmax_segments_kernel(const Forward<Mixed> p, std::int64_t segments, Terms* parts) {
  constexpr int kV = kVector<Mixed>;
  const Segment s(segments, p.n);
  ptx::grid_wait();
  ptx::grid_launch_next();
  const Row<Mixed, false, std::int64_t> values(p, s.row, p.n);
  const std::int64_t seen = values.seen - s.first;
  const int columns = static_cast<int>(seen < 0 ? 0 : seen < s.columns ? seen : s.columns);
  const auto column_of = [&](int i) { return s.column(i); };
  Pack<Mixed> x[kPacks];
  p.x.load(at_column(p.x, s.row, s.first), column_of, columns, x);
  float z[kPacks][kV], max = -infinity();
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    values.values(x[i], s.first + column_of(i), z[i]);
#pragma unroll
    for (int j = 0; j < kV; ++j) max = fmaxf(max, z[i][j]);
  }
  Terms terms{max, 0.0f};
  const float shift = shift_of(max);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) terms.sum += exp_of(__fsub_rn(z[i][j], shift));
  }
  terms = block_merged(terms);
  if (threadIdx.x == 0) parts[blockIdx.x] = terms;
}

__global__ void __launch_bounds__(kThreads)
    softmax_bwd_segments_kernel(const Backward<Mixed> p, std::int64_t segments, Terms* parts) {
  constexpr int kV = kVector<Mixed>;
  const Segment s(segments, p.n);
  ptx::grid_wait();
  ptx::grid_launch_next();
  const std::int64_t seen = seen_columns(p, s.row, p.n) - s.first;
  const int columns = static_cast<int>(seen < 0 ? 0 : seen < s.columns ? seen : s.columns);
  const auto column_of = [&](int i) { return s.column(i); };
  Pack<Mixed> y[kPacks], dy[kPacks];
  p.y.load(at_column(p.y, s.row, s.first), column_of, columns, y);
  p.dy.load(at_column(p.dy, s.row, s.first), column_of, columns, dy);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float a[kV], b[kV];
    p.y.unpack(y[i], a);
    p.dy.unpack(dy[i], b);
#pragma unroll
    for (int j = 0; j < kV; ++j) sum = added_term(p.kind, a[j], b[j], sum);
  }
  const Terms terms = block_merged({0.0f, sum});  // plain sums: all around the same value
  if (threadIdx.x == 0) parts[blockIdx.x] = terms;
}

/// rows[r]: what the results of row r are made of. `backward`: {0, the sum}.
__global__ void __launch_bounds__(kThreads)
    softmax_combine_kernel(const Terms* parts, std::int64_t segments, RowTerms* rows, bool backward,
                           SoftmaxKind kind, bool masked, void* lse, DType lse_type) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  const std::int64_t row = blockIdx.x;
  Terms mine = backward ? Terms{0.0f, 0.0f} : nothing();
  for (std::int64_t i = threadIdx.x; i < segments; i += kThreads) {
    const volatile Terms* const from =
        parts + row * segments + i;  // not through the read-only path
    mine = merged(mine, {from->max, from->sum});
  }
  const Terms all = block_merged(mine);
  if (threadIdx.x > 0) return;
  const RowTerms r = backward ? RowTerms{0.0f, all.sum} : row_terms(kind, all, masked);
  if (lse) {
    tile::store_as(lse, lse_type, row, r.shift + r.rest);
  } else {
    rows[row] = r;
  }
}

__global__ void __launch_bounds__(kThreads)
    softmax_apply_kernel(const Forward<Mixed> p, std::int64_t segments, const RowTerms* rows) {
  constexpr int kV = kVector<Mixed>;
  const Segment s(segments, p.n);
  const auto column_of = [&](int i) { return s.column(i); };
  ptx::grid_wait();
  ptx::grid_launch_next();
  const Row<Mixed, false, std::int64_t> values(p, s.row, p.n);
  const std::int64_t seen = values.seen - s.first;
  const int columns = static_cast<int>(seen < 0 ? 0 : seen < s.columns ? seen : s.columns);
  Pack<Mixed> x[kPacks];
  p.x.load(at_column(p.x, s.row, s.first), column_of, columns, x);
  const volatile RowTerms* const from = rows + s.row;
  const RowTerms r{from->shift, from->rest};
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float z[kV];
    values.values(x[i], s.first + column_of(i), z);
#pragma unroll
    for (int j = 0; j < kV; ++j) z[j] = result_of<float>(p.kind, z[j], r);
    x[i] = p.y.pack(z);
  }
  p.y.store(at_column(p.y, s.row, s.first), column_of, s.columns, x);
}

__global__ void __launch_bounds__(kThreads)
    softmax_bwd_apply_kernel(const Backward<Mixed> p, std::int64_t segments, const RowTerms* rows) {
  constexpr int kV = kVector<Mixed>;
  const Segment s(segments, p.n);
  const auto column_of = [&](int i) { return s.column(i); };
  ptx::grid_wait();
  ptx::grid_launch_next();
  const std::int64_t seen = seen_columns(p, s.row, p.n) - s.first;
  const int columns = static_cast<int>(seen < 0 ? 0 : seen < s.columns ? seen : s.columns);
  Pack<Mixed> y[kPacks], dy[kPacks];
  p.y.load(at_column(p.y, s.row, s.first), column_of, columns, y);
  p.dy.load(at_column(p.dy, s.row, s.first), column_of, columns, dy);
  const volatile RowTerms* const from = rows + s.row;
  const float sum = from->rest;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float a[kV], b[kV];
    p.y.unpack(y[i], a);
    p.dy.unpack(dy[i], b);
#pragma unroll
    for (int j = 0; j < kV; ++j)
      a[j] =
          column_of(i) + j < columns ? gradient_of<float>(p.kind, a[j], b[j], sum, p.scale) : 0.0f;
    y[i] = p.dx.pack(a);
  }
  p.dx.store(at_column(p.dx, s.row, s.first), column_of, s.columns, y);
}

/// dx = dy * exp(x - lse). Rows of up to 128 packs share a block, longer ones are cut in segments
/// of 512 packs; no sum depends on either.
constexpr int kLseThreads = 128, kLsePacks = 4;

template <class T>
struct LogsumexpBwd {
  RowView<T> x, dx;
  const void *dy, *lse;
  DType dy_type, lse_type;
  std::int64_t rows, n, segments;
  int threads;  // that share a row
};

template <class T>
__global__ void __launch_bounds__(kLseThreads) logsumexp_bwd_kernel(const LogsumexpBwd<T> p) {
  constexpr int kV = kVector<T>;
  const int teams = kLseThreads / p.threads, index = threadIdx.x % p.threads;
  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * teams + threadIdx.x / p.threads;
  const std::int64_t row = part / p.segments;
  const std::int64_t step = static_cast<std::int64_t>(p.threads) * kLsePacks * kV;
  const std::int64_t first = part % p.segments * step;
  const bool active = row < p.rows;
  const int columns = !active ? 0 : static_cast<int>(p.n - first < step ? p.n - first : step);
  const auto column_of = [&](int i) { return (i * p.threads + index) * kV; };
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (!active) return;
  Pack<T> x[kLsePacks];
  p.x.load(at_column(p.x, row, first), column_of, columns, x);
  const float dy = load_as(p.dy, p.dy_type, row), lse = load_as(p.lse, p.lse_type, row);
#pragma unroll
  for (int i = 0; i < kLsePacks; ++i) {
    float v[kV];
    p.x.unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = __fmul_rn(dy, exp_of(__fsub_rn(v[j], lse)));
    x[i] = p.dx.pack(v);
  }
  p.dx.store(at_column(p.dx, row, first), column_of, columns, x);
}

template <class T>
void launch_logsumexp_bwd_as(const SoftmaxBwd& a, Stream stream) {
  const Rows x = rows_of(a.y, a.op, "x");
  const std::int64_t vectors = ceil_div(x.length, kVector<T>);
  const std::int64_t needed = ceil_div(vectors, kLsePacks);
  const int threads =
      needed >= kLseThreads ? kLseThreads : static_cast<int>(std::bit_ceil<unsigned>(needed));
  const LogsumexpBwd<T> p{.x = tile::row_view<T>(a.y, a.op, "x"),
                          .dx = tile::row_view<T>(a.dx, a.op, "dx"),
                          .dy = a.dy.data,
                          .lse = a.lse.data,
                          .dy_type = a.dy.dtype,
                          .lse_type = a.lse.dtype,
                          .rows = x.count,
                          .n = x.length,
                          .segments = ceil_div(needed, threads),
                          .threads = threads};
  const Launch shape{.op = a.op,
                     .grid = ceil_div(p.rows * p.segments, kLseThreads / threads),
                     .block = kLseThreads,
                     .overlap = true};
  launch(&logsumexp_bwd_kernel<T>, shape, stream, p);
}

Plan no_plan() { return {.threads_per_row = kThreads}; }

void check_workspace(std::size_t given, std::size_t needed, const char* op) {
  FK_CHECK(given >= needed, op, ": workspace must be at least ", needed, " bytes, got ", given);
}

}  // namespace

std::size_t segments_bytes(std::int64_t rows, std::int64_t n) {
  return sizeof(Terms) * static_cast<std::size_t>(rows * (segments_of(n) + 1));
}

void launch_fwd_segments(const SoftmaxFwd& args, Stream stream) {
  const Forward<Mixed> p = forward_params<Mixed>(args, no_plan());
  const std::int64_t segments = segments_of(p.n);
  check_workspace(args.workspace_size, segments_bytes(p.rows, p.n), args.op);
  Terms* const parts = static_cast<Terms*>(args.workspace);
  RowTerms* const rows = reinterpret_cast<RowTerms*>(parts + p.rows * segments);
  const Launch all{.op = args.op, .grid = p.rows * segments, .block = kThreads, .overlap = true};
  const Launch one{.op = args.op, .grid = p.rows, .block = kThreads, .overlap = true};
  launch(&softmax_segments_kernel, all, stream, p, segments, parts);
  launch(&softmax_combine_kernel, one, stream, parts, segments, rows, false, p.kind, p.masked,
         p.lse, p.lse_type);
  if (!p.lse) launch(&softmax_apply_kernel, all, stream, p, segments, rows);
}

void launch_bwd_segments(const SoftmaxBwd& args, Stream stream) {
  const Backward<Mixed> p = backward_params<Mixed>(args, no_plan());
  const std::int64_t segments = segments_of(p.n);
  check_workspace(args.workspace_size, segments_bytes(p.rows, p.n), args.op);
  Terms* const parts = static_cast<Terms*>(args.workspace);
  RowTerms* const rows = reinterpret_cast<RowTerms*>(parts + p.rows * segments);
  const Launch all{.op = args.op, .grid = p.rows * segments, .block = kThreads, .overlap = true};
  const Launch one{.op = args.op, .grid = p.rows, .block = kThreads, .overlap = true};
  launch(&softmax_bwd_segments_kernel, all, stream, p, segments, parts);
  launch(&softmax_combine_kernel, one, stream, parts, segments, rows, true, p.kind, false,
         static_cast<void*>(nullptr), DType::f32);
  launch(&softmax_bwd_apply_kernel, all, stream, p, segments, rows);
}

void launch_logsumexp_bwd(const SoftmaxBwd& args, Stream stream) {
  if (args.y.dtype != args.dx.dtype) return launch_logsumexp_bwd_as<Mixed>(args, stream);
  dispatch(args.y.dtype, [&]<class T>() { launch_logsumexp_bwd_as<T>(args, stream); });
}

}  // namespace fastkern::cuda::softmax_detail
