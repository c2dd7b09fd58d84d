// SPDX-License-Identifier: Apache-2.0
// What the kernels of the softmax family share: the pair of a largest value and a sum of
// exponentials, results made of it, masks, parameters.
//
// Arithmetic that two kernels must do with the same bits is written out to the rounding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dispatch.h"
#include "fastkern/softmax.h"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "ptx/math.cuh"
#include "softmax/softmax_launch.h"
#include "tile/pack.cuh"
#include "tile/team.cuh"

namespace fastkern::cuda::softmax_detail {

using tile::kVector;
using tile::Mixed;
using tile::Pack;
using tile::RowView;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

/// exp(v) for values of 16 bits: within 2 ulp around 0, and |v| / 20 more below. The multiplication
/// rounds on its own: exp(0) is 1. Denormal results are 0.
__device__ __forceinline__ float quick_exp(float v) {
  return ptx::exp2_approx(__fmul_rn(v, 1.4426950408889634f));
}

/// exp(v) within 2 ulp for any v: what rounding took from the exponent goes to the result.
__device__ __forceinline__ float exp_of(float v) {
  constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  const float exponent = __fmul_rn(v, kLog2e);
  const float rest = __fmaf_rn(v, kLog2eRest, __fmaf_rn(v, kLog2e, -exponent));
  const float power = ptx::exp2_approx(exponent);
  // Beyond that the result is 0, infinite or NaN.
  return fabsf(exponent) < 127.0f ? __fmaf_rn(power, __fmul_rn(rest, kLn2), power) : power;
}

/// Whichever is enough for results of T.
template <class T>
__device__ __forceinline__ float exp_for(float v) {
  return sizeof(T) == 2 ? quick_exp(v) : exp_of(v);
}

/// The larger one, NaN left out.
struct Max {
  static __device__ __forceinline__ std::uint32_t apply(std::uint32_t a, std::uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

template <class Op>
__device__ __forceinline__ float lanes(float v, int width) {
  return __uint_as_float(tile::lanes_reduce<Op>(__float_as_uint(v), width));
}

/// What exponents are taken around: the largest value or, where that is infinite, 0: inf - inf
/// must not come up in the sum. So the sum is infinite where a value is inf, and nowhere else.
__device__ __forceinline__ float shift_of(float max) {
  return fabsf(max) == infinity() ? 0.0f : max;
}

/// Of some of a row's values: the largest one, and the sum of exp(value - shift_of(max)).
struct Terms {
  float max, sum;
};
__device__ __forceinline__ Terms nothing() { return {-infinity(), 0.0f}; }

/// What a sum around shift_of(from) is multiplied with to be one around shift_of(to), to >= from.
/// One of nothing but -inf is 0, or NaN, and stays that.
__device__ __forceinline__ float factor_of(float from, float to) {
  return from == to ? 1.0f : exp_of(__fsub_rn(from, to));
}

__device__ __forceinline__ Terms merged(Terms a, Terms b) {
  const float max = fmaxf(a.max, b.max);
  return {max, __fmaf_rn(a.sum, factor_of(a.max, max), __fmul_rn(b.sum, factor_of(b.max, max)))};
}

/// Of all lanes of a warp; every lane gets the same bits.
__device__ __forceinline__ Terms warp_merged(Terms mine) {
  const float max = lanes<Max>(mine.max, 32);
  return {max, lanes<tile::Sum>(__fmul_rn(mine.sum, factor_of(mine.max, max)), 32)};
}

/// Of `count` terms in memory that the whole warp reads, each lane every 32nd.
__device__ __forceinline__ Terms all_merged(const Terms* terms, int count) {
  const int lane = threadIdx.x % 32;
  Terms mine = nothing();
  for (int i = lane; i < count; i += 32) mine = merged(mine, terms[i]);
  return warp_merged(mine);
}

/// The same of at most kMost (a power of two) terms, with fewer exchanges.
template <int kMost>
__device__ __forceinline__ Terms few_merged(const Terms* terms, int count) {
  const int lane = threadIdx.x % kMost;
  const Terms mine = lane < count ? terms[lane] : nothing();
  const float max = lanes<Max>(mine.max, kMost);
  return {max, lanes<tile::Sum>(__fmul_rn(mine.sum, factor_of(mine.max, max)), kMost)};
}

/// What a result is made of beside the value itself:
///   softmax      y = exp(z - shift) * rest
///   log_softmax  y = (z - shift) - rest
///   logsumexp    y = shift + rest
struct RowTerms {
  float shift, rest;
};

__device__ __forceinline__ RowTerms row_terms(SoftmaxKind kind, Terms all, bool masked) {
  const float shift = shift_of(all.max);
  const bool infinite = all.sum == infinity();
  if (kind == SoftmaxKind::softmax) {
    const float inverse = masked && all.sum == 0.0f ? 0.0f : __frcp_rn(all.sum);
    return {shift, infinite ? not_a_number() : inverse};
  }
  const bool log = kind == SoftmaxKind::log_softmax;
  return {shift, infinite && log ? not_a_number() : logf(all.sum)};
}

/// One result of softmax or log_softmax.
template <class T>
__device__ __forceinline__ float result_of(SoftmaxKind kind, float z, RowTerms r) {
  const float d = __fsub_rn(z, r.shift);
  return kind == SoftmaxKind::softmax ? __fmul_rn(exp_for<T>(d), r.rest) : __fsub_rn(d, r.rest);
}

/// One gradient: `sum` is that of dy * y or of dy.
template <class T>
__device__ __forceinline__ float gradient_of(SoftmaxKind kind, float y, float dy, float sum,
                                             float scale) {
  if (kind == SoftmaxKind::softmax) return __fmul_rn(__fmul_rn(scale, y), __fsub_rn(dy, sum));
  return __fmaf_rn(-exp_for<T>(y), sum, dy);
}
/// What that sum is of.
__device__ __forceinline__ float added_term(SoftmaxKind kind, float y, float dy, float sum) {
  return kind == SoftmaxKind::softmax ? __fmaf_rn(dy, y, sum) : __fadd_rn(sum, dy);
}

__device__ __forceinline__ float load_as(const void* from, DType dtype, std::int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(from)[at];
  if (dtype == DType::f16) return tile::to_float(static_cast<const __half*>(from)[at]);
  return tile::to_float(static_cast<const __nv_bfloat16*>(from)[at]);
}

/// v rounded to a narrow type.
__device__ __forceinline__ float rounded_to(DType dtype, float v) {
  if (dtype == DType::f32) return v;
  return dtype == DType::f16 ? tile::to_float(tile::from_float<__half>(v))
                             : tile::to_float(tile::from_float<__nv_bfloat16>(v));
}

/// A mask on the device.
struct MaskView {
  const char* data;  // nullptr: none
  MaskRows rows;     // strides in elements
  DType dtype;       // i8: not 0 where a value takes part; else it is added
  bool whole;        // every row may be accessed in packs

  __device__ __forceinline__ const char* row(std::int64_t r) const {
    const std::int64_t inner = rows.sizes[1], middle = rows.sizes[0];
    const std::int64_t outer = r / inner;
    const std::int64_t at = outer / middle * rows.strides[0] + outer % middle * rows.strides[1] +
                            r % inner * rows.strides[2];
    return data + at * (dtype == DType::i8 ? 1 : dtype == DType::f32 ? 4 : 2);
  }

  /// z under the mask, for the columns below n of a pack's worth from `column` on.
  template <int kCount>
  __device__ __forceinline__ void apply(const char* row, std::int64_t column, std::int64_t n,
                                        float (&z)[kCount]) const {
    if (column >= n) return;
    if (dtype == DType::i8) {
      if (whole) {
        std::uint32_t words[kCount / 4];
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i)
          words[i] = reinterpret_cast<const std::uint32_t*>(row + column)[i];
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          if ((words[j / 4] >> (j % 4 * 8) & 0xffu) == 0) z[j] = -infinity();
        return;
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (column + j < n && row[(column + j) * rows.column_stride] == 0) z[j] = -infinity();
      return;
    }
    float added[kCount] = {};
    if (whole && dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 v = ptx::ld_global_nc(row + 4 * (column + i));
        const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) added[i + j] = __uint_as_float(words[j]);
      }
    } else if (whole) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint2 v = ptx::ld_global_nc_8_if(row + 2 * (column + i), true);
        const float2 low = pair(v.x), high = pair(v.y);
        added[i] = low.x, added[i + 1] = low.y, added[i + 2] = high.x, added[i + 3] = high.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (column + j < n) added[j] = load_as(row, dtype, (column + j) * rows.column_stride);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) z[j] = __fadd_rn(z[j], added[j]);
  }

 private:
  __device__ __forceinline__ float2 pair(std::uint32_t word) const {
    return dtype == DType::f16 ? tile::unpack_pair(word, __half{})
                               : tile::unpack_pair(word, __nv_bfloat16{});
  }
};

/// A mask for kernels that take `vector` columns at a time.
inline MaskView mask_view(const TensorRef& t, int vector, const char* op) {
  if (!t.given()) return {};
  MaskView view{static_cast<const char*>(t.data), {}, t.dtype, false};
  FK_CHECK(as_mask_rows(t, view.rows), op,
           ": mask must have leading dimensions that merge into at most three strides, got shape ",
           t.shape());
  const std::int64_t pack = vector * size_of(t.dtype) < 16 ? vector * size_of(t.dtype) : 16;
  const auto aligned = [&](std::int64_t elements) {
    return elements * size_of(t.dtype) % pack == 0;
  };
  const std::int64_t n = t.sizes[t.ndim - 1];
  view.whole = view.rows.column_stride == 1 && n % vector == 0 &&
               reinterpret_cast<std::uintptr_t>(t.data) % pack == 0 &&
               aligned(view.rows.strides[0]) && aligned(view.rows.strides[1]) &&
               aligned(view.rows.strides[2]);
  return view;
}

template <class T>
struct Forward {
  RowView<T> x, y;
  void* lse;  // of logsumexp, one for each row
  DType lse_type;
  DType narrow;  // what x is rounded to first, f32: nothing
  SoftmaxKind kind;
  MaskView mask;
  bool masked, causal;
  float scale;
  std::int64_t rows, n, queries;
  int threads, blocks;  // that share a row
};

template <class T>
Forward<T> forward_params(const SoftmaxFwd& a, const Plan& plan) {
  const Rows x = rows_of(a.x, a.op, "x");
  const bool lse = a.kind == SoftmaxKind::logsumexp;
  const bool narrow = !lse && a.y.dtype != DType::f32 && a.y.dtype != a.x.dtype;
  return {.x = tile::row_view<T>(a.x, a.op, "x"),
          .y = lse ? RowView<T>{} : tile::row_view<T>(a.y, a.op, "y"),
          .lse = lse ? a.y.data : nullptr,
          .lse_type = a.y.dtype,
          .narrow = narrow ? a.y.dtype : DType::f32,
          .kind = a.kind,
          .mask = mask_view(a.mask, kVector<T>, a.op),
          .masked = a.masked,
          .causal = a.causal,
          .scale = static_cast<float>(a.scale),
          .rows = x.count,
          .n = x.length,
          .queries = queries_of(a.x),
          .threads = plan.threads_per_row,
          .blocks = plan.blocks_per_row};
}

template <class T>
struct Backward {
  RowView<T> y, dy, dx;
  SoftmaxKind kind;
  bool causal;
  float scale;
  std::int64_t rows, n, queries;
  int threads, blocks;  // that share a row
};

template <class T>
Backward<T> backward_params(const SoftmaxBwd& a, const Plan& plan) {
  const Rows y = rows_of(a.y, a.op, "y");
  return {.y = tile::row_view<T>(a.y, a.op, "y"),
          .dy = tile::row_view<T>(a.dy, a.op, "dy"),
          .dx = tile::row_view<T>(a.dx, a.op, "dx"),
          .kind = a.kind,
          .causal = a.causal,
          .scale = static_cast<float>(a.scale),
          .rows = y.count,
          .n = y.length,
          .queries = queries_of(a.y),
          .threads = plan.threads_per_row,
          .blocks = plan.blocks_per_row};
}

/// A row of a forward call: how much of it is seen, and its values z. Column: int, or std::int64_t.
template <class T, bool kPlain, class Column = int>
struct Row {
  static constexpr int kV = kVector<T>;
  const Forward<T>& p;
  const char* x;
  const char* mask = nullptr;
  Column seen;  // columns, those that a causal mask hides left out

  __device__ __forceinline__ Row(const Forward<T>& params, std::int64_t row, Column n)
      : p(params), x(n > 0 ? p.x.template row<kPlain>(row) : nullptr), seen(n) {
    if constexpr (!kPlain) {
      if (p.causal && n > 0) seen = seen_of(row % p.queries);
      if (p.mask.data && n > 0) mask = p.mask.row(row);
    }
  }

  /// z of a pack; -inf beyond what is seen. kInside: all of it is seen.
  template <bool kInside = false>
  __device__ __forceinline__ void values(const Pack<T>& pack, Column column, float (&z)[kV]) const {
    p.x.unpack(pack, z);
    if constexpr (!kPlain) {
      if (std::is_same_v<T, Mixed> && p.narrow != DType::f32) {
#pragma unroll
        for (int j = 0; j < kV; ++j) z[j] = rounded_to(p.narrow, z[j]);
      }
      if (p.masked) {
#pragma unroll
        for (int j = 0; j < kV; ++j) z[j] = __fmul_rn(z[j], p.scale);
        if (mask) p.mask.apply(mask, column, seen, z);
      }
    }
    // Plain packs lie inside as a whole, or outside.
    if (!kInside && (kPlain ? column >= seen : column + kV > seen)) {
#pragma unroll
      for (int j = 0; j < kV; ++j)
        if (kPlain || column + j >= seen) z[j] = -infinity();
    }
  }

 private:
  __device__ __forceinline__ Column seen_of(std::int64_t query) const {
    const std::int64_t columns = p.n - p.queries + query + 1;
    return static_cast<Column>(columns < 0 ? 0 : columns > p.n ? p.n : columns);
  }
};

/// A pack of a row into shared memory, and out: for a thread's own use. In plain calls nothing is
/// asked.
template <bool kPlain, class T>
__device__ __forceinline__ void fetch(const RowView<T>& view, uint4* place, const char* row,
                                      int column, int n) {
  if constexpr (kPlain) {
    ptx::cp_async_16(place, row + column * (16 / kVector<T>), 16);
  } else {
    view.template load_async<1>(place, 0, row, [&](int) { return column; }, n);
  }
}
template <bool kPlain, class T>
__device__ __forceinline__ void put(const RowView<T>& view, char* row, int column, int n,
                                    const float (&v)[kVector<T>]) {
  const Pack<T> pack[1] = {view.pack(v)};
  if constexpr (kPlain) {
    ptx::st_global(row + column * (16 / kVector<T>), pack[0].bits);
  } else {
    view.store(row, [&](int) { return column; }, n, pack);
  }
}

/// Columns of a row of a backward call that a causal mask does not hide.
template <class T>
__device__ __forceinline__ std::int64_t seen_columns(const Backward<T>& p, std::int64_t row,
                                                     std::int64_t n) {
  if (!p.causal || n == 0) return n;
  const std::int64_t columns = n - p.queries + row % p.queries + 1;
  return columns < 0 ? 0 : columns > n ? n : columns;
}

/// Calls f with std::integral_constant<SoftmaxKind, ...>.
template <class F>
void dispatch_kind(SoftmaxKind kind, F&& f) {
  switch (kind) {
    case SoftmaxKind::softmax:
      return f(std::integral_constant<SoftmaxKind, SoftmaxKind::softmax>{});
    case SoftmaxKind::log_softmax:
      return f(std::integral_constant<SoftmaxKind, SoftmaxKind::log_softmax>{});
    case SoftmaxKind::logsumexp:
      return f(std::integral_constant<SoftmaxKind, SoftmaxKind::logsumexp>{});
  }
}

}  // namespace fastkern::cuda::softmax_detail
