// SPDX-License-Identifier: Apache-2.0
// Forward of the row norms, for rows that lie in the registers of a block. norm.h says what is
// computed.
//
//   work     a row belongs to a team of threads of one block (norm_plan). Pack i of thread t is
//            columns (i · threads + t) · vector and the vector − 1 after it.
//   memory   the row waits in registers, as packs, between its reduction and its scaling
//   sync     one barrier, two for layer in f32, one more for a dynamic scale; none where a team
//            lies within a warp
//   cost     reads and writes each operand once: 2 · M · N elements, with a residual stream 4
#pragma once

#include "dispatch.h"
#include "fastkern/norm.h"
#include "launch.cuh"
#include "norm/norm_launch.h"
#include "tile/dropout.cuh"
#include "tile/pack.cuh"
#include "tile/quantise.cuh"
#include "tile/team.cuh"

namespace fastkern::cuda::norm_detail {

using tile::ColumnView;
using tile::kLargestF8;
using tile::kLargestI8;
using tile::kVector;
using tile::Pack;
using tile::RowView;
using tile::store_quantised;
using tile::Team;

template <class T>
struct Forward {
  RowView<T> x, y, residual, h, y2;
  ColumnView weight, bias, weight2, bias2;
  ColumnView rowscale;  // of length 1, one a row
  tile::DropoutView dropout;
  float* scale;  // of quantised y
  bool static_scale;
  std::int64_t rows, n;
  std::int64_t heads;
  float inverse_n, eps;
  float weight_offset;  // -0 for 0, which changes no bit
  int threads, blocks;  // of a team; `blocks` of norm_ring_kernel alone
};

/// Layer norm of 16-bit rows takes its sums around the mean of the row's first pack, which no more
/// than sqrt(N / 8) standard deviations part from the mean: what cancels is far below a 16-bit
/// result. In f32 the mean comes first, and then the squares around it, with one more barrier.
template <class T, NormKind kNorm>
inline constexpr bool kShifted = kNorm == NormKind::layer && sizeof(T) == 2;

template <class T, NormKind kNorm>
inline constexpr int kForwardSums = kNorm == NormKind::layer ? 2 : 1;

/// The mean of the elements of a row's first pack.
template <class T>
__device__ __forceinline__ float head_mean(const float (&v)[kVector<T>], int n) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) sum += v[j];
  return n >= kVector<T> ? sum * (1.0f / kVector<T>) : sum / static_cast<float>(n);
}

/// x̂ = ((x − centre) − rest) · rstd
struct Moments {
  float centre, rest, rstd;
};

/// From Σ (x − centre) and Σ (x − centre)²; `mean_of` divides a sum by N. Written out to the
/// rounding.
template <class T, NormKind kNorm, class MeanOf>
__device__ __forceinline__ Moments moments_of(const float (&sums)[kForwardSums<T, kNorm>],
                                              float centre, const MeanOf& mean_of, float eps) {
  if constexpr (kNorm == NormKind::rms) {
    return {0.0f, 0.0f, rsqrtf(__fadd_rn(mean_of(sums[0]), eps))};
  } else {
    const float m = mean_of(sums[0]);
    const float variance = __fmaf_rn(-m, m, mean_of(sums[1]));
    const float rstd = rsqrtf(__fadd_rn(variance < 0.0f ? 0.0f : variance, eps));  // NaN stays NaN
    if constexpr (kShifted<T, kNorm>) return {__fadd_rn(centre, m), 0.0f, rstd};
    return {centre, m, rstd};
  }
}

template <class T, NormKind kNorm>
__device__ __forceinline__ float normalised(float x, const Moments& m) {
  if constexpr (kNorm == NormKind::rms) return __fmul_rn(x, m.rstd);
  const float d = __fsub_rn(x, m.centre);
  return __fmul_rn(kShifted<T, kNorm> ? d : __fsub_rn(d, m.rest), m.rstd);
}

/// h = residual + dropout(x) · rowscale of one pack, rounded to the type of h.
template <Residual kResidual, class T>
__device__ __forceinline__ Pack<T> add_residual(const Forward<T>& p, const Pack<T>& x,
                                                const Pack<T>& residual, std::int64_t row,
                                                std::int64_t column, float rowscale) {
  constexpr int kV = kVector<T>;
  float h[kV];
  p.x.unpack(x, h);
  if constexpr (kResidual == Residual::dropout) {
    if (p.dropout.seed) p.dropout.apply(row * p.n + column, h);
#pragma unroll
    for (int j = 0; j < kV; ++j) h[j] = __fmul_rn(h[j], rowscale);  // on its own, everywhere
  }
  if (p.residual.data) {
    float r[kV];
    p.residual.unpack(residual, r);
#pragma unroll
    for (int j = 0; j < kV; ++j) h[j] = __fadd_rn(h[j], r[j]);
  }
  return p.h.pack(h);
}

/// Σ f(v) over the elements of a pack that lie within the row.
template <int kV, class Column, class F>
__device__ __forceinline__ void within(Column column, Column n, F&& f) {
  if (column + kV <= n) {
#pragma unroll
    for (int j = 0; j < kV; ++j) f(j);
  } else {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      if (column + j < n) f(j);
    }
  }
}

template <class T>
__host__ __device__ constexpr DType dtype_of(T) {
  return std::is_same_v<T, __half>          ? DType::f16
         : std::is_same_v<T, __nv_bfloat16> ? DType::bf16
                                            : DType::f32;
}

/// The bias where none is given: adding it keeps the sign of zero.
inline constexpr float kNothing = -0.0f;

/// y = normal · (weight + offset) + bias for all packs of a thread. `normal(i, v)` gives the
/// normalised values of pack i, `put(i, v)` takes the result. The vectors are read all at once
/// where they have the types that most calls have. kPlain: of rms without a bias, of layer without
/// an offset. kInside: all packs lie within the row.
template <class T, int kPacks, bool kBias, bool kPlain, bool kInside, class ColumnOf, class Normal,
          class Put>
__device__ __forceinline__ void affine(const ColumnView& weight, const ColumnView& bias,
                                       float offset, std::int64_t head, const ColumnOf& column_of,
                                       int n, const Normal& normal, const Put& put) {
  constexpr int kV = kVector<T>;
  // kMore, of plain calls: with the bias, or the offset, that their kind of norm may have.
  const auto quick = [&]<class W, bool kMore>(W, std::bool_constant<kMore>) {
    constexpr bool kRead = kBias && (kMore || !kPlain), kAdd = !kPlain || (!kBias && kMore);
    tile::ColumnPack<T, W> w[kPacks], b[kRead ? kPacks : 1];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) w[i].template load<kInside>(weight, head, column_of(i), n);
    if constexpr (kRead) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        b[i].template load<kInside && kPlain>(bias, head, column_of(i),
                                              kPlain || bias.data ? n : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV], scale[kV], shift[kV];
      normal(i, v);
      w[i].unpack(scale);
      if constexpr (kRead) b[i].unpack(shift);
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        if constexpr (kAdd) scale[j] += offset;
        v[j] = fmaf(v[j], scale[j], kRead && (kPlain || bias.data) ? shift[j] : kNothing);
      }
      put(i, v);
    }
  };
  const auto typed = [&](auto more) {
    if (weight.dtype == DType::f32) {
      quick(float{}, more);
      return true;
    }
    if constexpr (kV == 8) {
      if (kPlain || weight.dtype == dtype_of(T{})) {
        quick(T{}, more);
        return true;
      }
    }
    return false;
  };
  if constexpr (kPlain) {
    if (kBias ? bias.data != nullptr : offset != 0.0f) {
      typed(std::true_type{});
    } else {
      typed(std::false_type{});
    }
    return;
  }
  if (weight.whole && (!bias.data || (kBias && bias.whole && bias.dtype == weight.dtype))) {
    if (typed(std::true_type{})) return;
  }
  const float add = weight.data ? offset : 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kV], scale[kV], shift[kV];
    normal(i, v);
    weight.load(head, column_of(i), n, 1.0f, scale);
    bias.load(head, column_of(i), n, kNothing, shift);
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = fmaf(v[j], scale[j] + add, shift[j]);
    put(i, v);
  }
}

__device__ __forceinline__ float rowscale_of(const ColumnView& rowscale, std::int64_t row) {
  float v[4];
  rowscale.load(row, 0, 1, 1.0f, v);
  return v[0];
}

/// The factor before rounding, from the largest magnitude of a row; `owner` writes the row's scale.
template <class T>
__device__ __forceinline__ float dynamic_scale(const Forward<T>& p, float largest, std::int64_t row,
                                               bool owner) {
  const float limit = p.y.dtype == DType::i8 ? kLargestI8 : kLargestF8;
  if (owner) p.scale[row] = largest / limit;
  if (largest == 0.0f) return 0.0f;
  return largest == largest ? fminf(limit / largest, 3.402823466e38f) : largest;
}

/// Shared memory of norm_fwd_kernel: two exchanges.
constexpr int fwd_bytes(int block) { return 2 * tile::Exchange<tile::Sum, 2>::bytes(block, 1); }

/// kPlain: the rows of x, y, residual and h are whole, at one stride; there is a weight, of the
/// type of the rows or f32, in packs; rms has no bias, layer one like the weight or none, and no
/// offset; there is one output.
/// kFewRows, of plain layer norm with a bias and vectors of the rows' type: they are read before
/// the sums, so that one way to memory is hidden behind the other. More registers; the same bits.
template <class T, int kPacks, NormKind kNorm, Residual kResidual, bool kQuant, int kBlockMax,
          bool kPlain, bool kFewRows = false>
__global__ void __launch_bounds__(kBlockMax) norm_fwd_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>, kSums = kForwardSums<T, kNorm>;
  constexpr bool kLayer = kNorm == NormKind::layer, kAdd = kResidual != Residual::none;
  constexpr bool kShift = kShifted<T, kNorm>;
  extern __shared__ uint4 memory[];
  const Team team{p.threads, 1, 0};
  tile::Exchange<tile::Sum, kSums> exchange(team, memory);
  const bool several = team.threads <= 64;  // rows a block
  const int lane = several ? threadIdx.x & (team.threads - 1) : threadIdx.x;
  const int n = static_cast<int>(p.n);
  const std::int64_t row = several ? static_cast<std::int64_t>(blockIdx.x) * (128 / team.threads) +
                                         threadIdx.x / team.threads
                                   : blockIdx.x;
  const bool active = row < p.rows;
  const int columns = active ? n : 0;
  const auto column_of = [&](int i) { return (i * team.threads + lane) * kV; };
  const auto first_column = [](int) { return 0; };
  ptx::grid_wait();
  ptx::grid_launch_next();

  Pack<T> x[kPacks], head[1];
  const char* const gX = active ? p.x.template row<kPlain>(row) : nullptr;
  p.x.template load<kPlain>(gX, column_of, columns, x);
  if constexpr (kLayer) p.x.template load<kPlain>(gX, first_column, columns, head);
  const std::int64_t start = p.heads == 1 ? 0 : row % p.heads * p.n;  // of the head's vectors
  if constexpr (kAdd) {
    Pack<T> residual[kPacks] = {}, residual_head[1] = {};
    if (p.residual.data) {
      const char* const gR = active ? p.residual.template row<kPlain>(row) : nullptr;
      p.residual.template load<kPlain>(gR, column_of, columns, residual);
      if constexpr (kLayer)
        p.residual.template load<kPlain>(gR, first_column, columns, residual_head);
    }
    const float rowscale =
        kResidual == Residual::dropout && active ? rowscale_of(p.rowscale, row) : 1.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      x[i] = add_residual<kResidual>(p, x[i], residual[i], row, column_of(i), rowscale);
    if constexpr (kLayer)
      head[0] = add_residual<kResidual>(p, head[0], residual_head[0], row, 0, rowscale);
  }
  const RowView<T>& source = kAdd ? p.h : p.x;  // whose type the packs now have
  tile::ColumnPack<T, tile::Own<T>> early_weight[kFewRows ? kPacks : 1] = {};
  tile::ColumnPack<T, tile::Own<T>> early_bias[kFewRows ? kPacks : 1] = {};
  if constexpr (kFewRows) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      early_weight[i].load(p.weight, start, column_of(i), n);
      early_bias[i].load(p.bias, start, column_of(i), n);
    }
  }

  float centre = 0.0f;  // what the squares are taken around
  if constexpr (kLayer) {
    float v[kV];
    source.unpack(head[0], v);
    centre = head_mean<T>(v, kPlain ? kV : n);
  }
  // A division may be a call, beyond which ptxas moves no load: weight and bias then come after the
  // reduction, in a third less registers. Multiplied with 1 / n they come before it.
  constexpr bool kEarly = !kLayer && kPacks == 4;
  const auto mean_of = [n, &p](float sum) {
    return kEarly ? __fmul_rn(sum, p.inverse_n) : __fdiv_rn(sum, static_cast<float>(n));
  };
  float sums[kSums];  // the last of them: the squares
  // kWhole: packs lie within the row or beyond it. Beyond it x is 0, not the centre.
  const auto add_up = [&]<bool kWhole>() {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV];
      if constexpr (kLayer) tile::keep_packed(x[i]);
      source.unpack(x[i], v);
      const float around = kWhole && column_of(i) >= n ? 0.0f : centre;
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        float d = kLayer ? v[j] - around : v[j];
        if constexpr (kLayer && !kWhole) d = column_of(i) + j < n ? d : 0.0f;
        if constexpr (kLayer) sums[0] += d;
        sums[kSums - 1] = fmaf(d, d, sums[kSums - 1]);
      }
    }
    exchange.send(sums);
    exchange.receive(sums);
  };
  const auto add_up_row = [&] {
    if (!kLayer || kPlain || n % kV == 0) {
      add_up.template operator()<true>();
    } else if constexpr (kLayer && !kPlain) {
      add_up.template operator()<false>();
    }
  };
  add_up_row();
  // Not before the exchange: h may be the residual, whose first pack the whole team has read by
  // now.
  if constexpr (kAdd)
    p.h.template store<kPlain>(active ? p.h.template row<kPlain>(row) : nullptr, column_of, columns,
                               x);
  if constexpr (kLayer && !kShift) {  // now around the mean
    centre = __fadd_rn(centre, mean_of(sums[0]));
    add_up_row();
  }
  const Moments moments = moments_of<T, kNorm>(sums, centre, mean_of, p.eps);

  const auto normal = [&](int i, float (&v)[kV]) {
    tile::keep_packed(x[i]);
    source.unpack(x[i], v);
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = normalised<T, kNorm>(v[j], moments);
  };
  const auto each = [&](const ColumnView& weight, const ColumnView& bias, const auto& put) {
    if constexpr (kFewRows) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float v[kV], scale[kV], shift[kV];
        normal(i, v);
        early_weight[i].unpack(scale);
        early_bias[i].unpack(shift);
#pragma unroll
        for (int j = 0; j < kV; ++j) v[j] = fmaf(v[j], scale[j], shift[j]);
        put(i, v);
      }
      return;
    }
    affine<T, kPacks, kLayer, kPlain, false>(weight, bias, p.weight_offset, start, column_of, n,
                                             normal, put);
  };

  if constexpr (kQuant) {
    float inverse = 0.0f;
    if (p.static_scale) {
      inverse = 1.0f / *p.scale;
    } else {
      tile::Exchange<tile::Largest, 1> magnitudes(
          team, reinterpret_cast<char*>(memory) + fwd_bytes(blockDim.x) / 2);
      float largest[1] = {0.0f};
      if (active) {
        each(p.weight, p.bias, [&](int i, const float (&v)[kV]) {
          within<kV>(column_of(i), n, [&](int j) {
            largest[0] = __uint_as_float(
                tile::Largest::apply(__float_as_uint(largest[0]), __float_as_uint(fabsf(v[j]))));
          });
        });
      }
      magnitudes.send(largest);
      magnitudes.receive(largest);
      inverse = dynamic_scale(p, largest[0], row, active && lane == 0);
    }
    if (!active) return;
    char* const gY = p.y.row(row);
    each(p.weight, p.bias, [&](int i, const float (&v)[kV]) {
      store_quantised(p.y, gY, column_of(i), n, v, inverse);
    });
  } else {
    if (!active) return;
    const auto write = [&](const RowView<T>& view, const ColumnView& weight,
                           const ColumnView& bias) {
      Pack<T> y[kPacks];
      each(weight, bias, [&](int i, const float (&v)[kV]) { y[i] = view.pack(v); });
      view.template store<kPlain>(view.template row<kPlain>(row), column_of, n, y);
    };
    write(p.y, p.weight, p.bias);
    if constexpr (kAdd && !kPlain) {
      if (p.y2.data) write(p.y2, p.weight2, p.bias2);
    }
  }
}
}  // namespace fastkern::cuda::norm_detail
