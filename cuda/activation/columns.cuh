// SPDX-License-Identifier: Apache-2.0
// Rows with a bias for their columns, and sums over the rows of a column.
//
//   bias_act              y = f(x + bias)                   reads 1, writes 1 number for each
//   bias_act_bwd          dx = dy * f'(x + bias)            reads 2, writes 1
//   bias_dropout_add      y = residual + dropout(x + bias)  reads 2, writes 1
//   bias_dropout_add_bwd  dx = dropout(dy)                  reads 1, writes 1
//
//   work     a block has a strip of columns and a slice of rows (column_plan). A thread has one
//   pack
//            of columns, and with it the bias and the sums of those columns in registers, and
//            walks over rows, kAtOnce of them under way
//   sums     of numbers not rounded: a thread over its rows in turn, the block's threads of a
//   column
//            in turn (shared memory), then column_sums_kernel over the slices. The split depends on
//            sizes and types alone
//   sync     one barrier, for sums
//   cost     as above, and the sums of the slices, 1 to 4 % of that
#pragma once

#include <bit>

#include "activation/extent.cuh"
#include "dispatch.h"
#include "fastkern/activation.h"
#include "fastkern/activation_formula.h"
#include "fastkern/dropout.h"
#include "tile/dropout.cuh"

namespace fastkern::cuda::activation_detail {

enum class ColumnOp { bias_act, bias_act_bwd, bias_dropout_add, bias_dropout_add_bwd };

inline constexpr bool sums_up(ColumnOp op) {
  return op == ColumnOp::bias_act_bwd || op == ColumnOp::bias_dropout_add_bwd;
}
inline constexpr bool has_second(ColumnOp op) {
  return op == ColumnOp::bias_act_bwd || op == ColumnOp::bias_dropout_add;
}
inline constexpr bool drops(ColumnOp op) {
  return op == ColumnOp::bias_dropout_add || op == ColumnOp::bias_dropout_add_bwd;
}
/// Rows that a thread has under way.
inline constexpr int at_once(ColumnOp op) { return op == ColumnOp::bias_act ? 8 : 4; }

template <class T>
struct Columns {
  RowView<T> first, second, out;  // dy or x; x or residual; y or dx, which may be not given
  tile::ColumnView bias;
  tile::DropoutView dropout;
  ActivationKind kind;
  std::int64_t m, n;
  std::int64_t slice;          // rows
  int strips, columns, shift;  // columns of a block; log2 of the threads of a row
  float* sums;                 // [slices][n]; nullptr: not wanted
};

/// Bytes of an element.
template <class T>
__device__ __forceinline__ int width_of(const RowView<T>& view) {
  if constexpr (std::is_same_v<T, tile::Mixed>) return view.dtype == DType::f32 ? 4 : 2;
  return kVector<T> == 4 ? 4 : 2;
}

/// One pack of results, as f32.
template <ColumnOp kOp, ActivationKind kKind, class T, int kV>
__device__ __forceinline__ void column_values(const Columns<T>& p, const float (&a)[kV],
                                              const float (&b)[kV], const float (&bias)[kV],
                                              std::int64_t element, std::uint64_t seed,
                                              std::uint64_t offset, float (&out)[kV]) {
  using M = Math<tile::Own<T>>;
  if constexpr (kOp == ColumnOp::bias_act) {
#pragma unroll
    for (int j = 0; j < kV; ++j) out[j] = formula::value<kKind, M>(a[j] + bias[j], {});
  } else if constexpr (kOp == ColumnOp::bias_act_bwd) {
#pragma unroll
    for (int j = 0; j < kV; ++j) out[j] = formula::gradient<kKind, M>(a[j], b[j] + bias[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kV; ++j) out[j] = kOp == ColumnOp::bias_dropout_add ? a[j] + bias[j] : a[j];
    if (p.dropout.seed) p.dropout.apply(seed, offset, element, out);
    if constexpr (kOp == ColumnOp::bias_dropout_add) {
#pragma unroll
      for (int j = 0; j < kV; ++j) out[j] = __fadd_rn(out[j], b[j]);  // on its own, as on the CPU
    }
  }
}

template <class T, ColumnOp kOp, bool kPlain>
__global__ void __launch_bounds__(kColumnThreads,
                                  kPlain && !drops(kOp) && ptx::kHasClusters ? 3 : 2)
    columns_kernel(const __grid_constant__ Columns<T> p) {
  constexpr int kV = kVector<T>, kRows = at_once(kOp), kSecondRows = has_second(kOp) ? kRows : 1;
  constexpr bool kSums = sums_up(kOp), kSecond = has_second(kOp);
  const int lane = threadIdx.x & ((1 << p.shift) - 1), groups = kColumnThreads >> p.shift;
  const unsigned slice = blockIdx.x / static_cast<unsigned>(p.strips);
  const std::int64_t strip = static_cast<std::int64_t>(blockIdx.x - slice * p.strips) * p.columns;
  const std::int64_t left = p.n - strip;
  const int n = left < p.columns ? static_cast<int>(left) : p.columns, column = lane * kV;
  const std::int64_t begin = slice * p.slice, last = begin + p.slice, end = last < p.m ? last : p.m;
  ptx::grid_wait();
  ptx::grid_launch_next();
  float bias[kV], sums[kV] = {};
  p.bias.load(0, strip + column, p.n, 0.0f, bias);
  std::uint64_t seed = 0, offset = 0;
  if constexpr (drops(kOp)) {
    if (p.dropout.seed) seed = *p.dropout.seed, offset = *p.dropout.offset;
  }
  const auto column_of = [&](int) { return column; };
  const auto run = [&]<ActivationKind kKind>() {
    for (std::int64_t row = begin + (threadIdx.x >> p.shift); row < end; row += kRows * groups) {
      Pack<T> a[kRows][1];
      [[maybe_unused]] Pack<T> b[kSecondRows][1];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const std::int64_t r = row + i * groups;
        const char* const from = p.first.template row<kPlain>(r < end ? r : begin);
        p.first.template load<kPlain>(from + strip * width_of(p.first), column_of, r < end ? n : 0,
                                      a[i]);
      }
      if constexpr (kSecond) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const std::int64_t r = row + i * groups;
          const char* const from = p.second.template row<kPlain>(r < end ? r : begin);
          p.second.template load<kPlain>(from + strip * width_of(p.second), column_of,
                                         r < end ? n : 0, b[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const std::int64_t r = row + i * groups;
        float va[kV], vb[kV] = {}, out[kV];
        p.first.unpack(a[i][0], va);
        if constexpr (kSecond) p.second.unpack(b[i][0], vb);
        column_values<kOp, kKind>(p, va, vb, bias, r * p.n + strip + column, seed, offset, out);
        if constexpr (kSums) {
#pragma unroll
          for (int j = 0; j < kV; ++j) sums[j] += r < end ? out[j] : 0.0f;
        }
        if (!kSums || p.out.data) {
          const Pack<T> packs[1] = {p.out.pack(out)};
          char* const to = p.out.template row<kPlain>(r < end ? r : begin);
          p.out.template store<kPlain>(to + strip * width_of(p.out), column_of, r < end ? n : 0,
                                       packs);
        }
      }
    }
  };
  if constexpr (drops(kOp)) {
    run.template operator()<ActivationKind::relu>();  // which there is none of
  } else {
    formula::with_activation(p.kind, run);
  }
  if constexpr (kSums) {
    if (!p.sums) return;
    __shared__ float sSums[kColumnThreads * kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) sSums[threadIdx.x * kV + j] = sums[j];
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += kColumnThreads) {
      float total = 0.0f;
      for (int g = 0; g < groups; ++g) total += sSums[g * p.columns + c];
      p.sums[slice * p.n + strip + c] = total;
    }
  }
}

template <class T>
Columns<T> column_params(const TensorRef& x, const ColumnPlan& plan) {
  const std::int64_t n = x.sizes[x.ndim - 1];
  return {.m = x.numel() / n,
          .n = n,
          .slice = plan.rows,
          .strips = static_cast<int>(plan.strips),
          .columns = static_cast<int>(plan.columns),
          .shift = std::countr_zero(static_cast<unsigned>(plan.lanes))};
}

/// The type of a kernel's operands: their own, or any.
inline bool is_mixed(std::initializer_list<const TensorRef*> operands) {
  const DType type = (*operands.begin())->dtype;
  for (const TensorRef* t : operands) {
    if (t->given() && t->dtype != type) return true;
  }
  return false;
}

template <ColumnOp kOp, class T>
void launch_columns(const Columns<T>& p, const ColumnPlan& plan, const char* op, Stream stream) {
  const auto plain = [](const RowView<T>& view) { return !view.data || view.plain(); };
  const Launch shape{
      .op = op, .grid = plan.strips * plan.slices, .block = kColumnThreads, .overlap = true};
  dispatch_bool(plain(p.first) && plain(p.second) && plain(p.out),
                [&]<bool kPlain>() { launch(columns_kernel<T, kOp, kPlain>, shape, stream, p); });
}

/// dbias = sums over the slices.
void launch_column_sums(const float* sums, const TensorRef& dbias, std::int64_t slices,
                        const char* op, Stream stream);

}  // namespace fastkern::cuda::activation_detail
