// SPDX-License-Identifier: Apache-2.0
// Gated activations: y = f(gate) * up, and backward dgate = dy * up * f'(gate), dup = dy * f(gate).
// activation_formula.h says what f is, activation.h which layouts there are.
//
//   work     elements on their own, shared out by extent.cuh
//   memory   all packs of a thread are under way before the first is used: 8 forward, 6 backward,
//            of pairs half as many. A pack of pairs has half a pack of results, which are read and
//            written 8 bytes at a time
//   kinds    dense operands have a kernel for each f. The others have one for all, which picks f
//            once a thread, between its loads and its stores
//   sync     none
//   cost     forward reads 2 and writes 1 number for each result, backward reads 3 and writes 2.
//            In 16-bit types exp is ex2.approx (2 ulp) of a rounded product, 1 / x rcp.approx
//            (1 ulp), and P of gelu is good to 5e-6: all far below a rounding to f16, 2.4e-4
#pragma once

#include "activation/extent.cuh"
#include "dispatch.h"
#include "fastkern/activation.h"
#include "fastkern/activation_formula.h"
#include "tile/quantise.cuh"

namespace fastkern::cuda::activation_detail {

inline constexpr int kForwardPacks = 4, kBackwardPacks = 2;

template <class T>
struct Gated {
  RowView<T> gate, up, dgate, dup;  // of pairs: x and its gradient in place of gate and dgate
  RowView<T> y, dy;                 // of pairs: `whole` at 8 bytes
  Extent extent;                    // of pairs: of x
  ActivationKind kind;
  ActivationNumbers numbers;
  const float* scale;
};

/// f<kKind>() with the kind of a kernel that has one, or with `kind`.
inline constexpr int kAnyKind = -1;
template <int kOnly, class F>
__device__ __forceinline__ void with_kind(ActivationKind kind, const F& f) {
  if constexpr (kOnly == kAnyKind) {
    formula::with_gate(kind, f);
  } else {
    f.template operator()<static_cast<ActivationKind>(kOnly)>();
  }
}

/// Blocks on a multiprocessor that registers are kept for. What would spill gets more of them,
/// which before sm_90 is more of the kernels.
template <int kOnly>
inline constexpr int kForwardBlocks =
    kOnly == static_cast<int>(ActivationKind::gelu) && !ptx::kHasClusters ? 2 : 4;
template <int kOnly>
inline constexpr int kBackwardBlocks =
    kOnly != kAnyKind && kOnly != static_cast<int>(ActivationKind::clamped_silu) ? 4
    : ptx::kHasClusters                                                          ? 3
                                                                                 : 2;

/// kPlain: rows are plain(), of one kind; kQuant: y has 8 bits.
template <class T, bool kPlain, bool kQuant, int kOnly>
__global__ void __launch_bounds__(kMostThreads, kForwardBlocks<kOnly>)
    gated_fwd_kernel(const __grid_constant__ Gated<T> p) {
  constexpr int kPacks = kForwardPacks, kV = kVector<T>;
  const Place<T, kPacks> at(p.extent);
  const auto columns = at.columns(p.extent);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at.row >= p.extent.rows) return;
  Pack<T> gate[kPacks], up[kPacks];
  load_packs<kPlain>(p.gate, at.template of<kPlain>(p.gate), p.extent, at, columns, gate);
  load_packs<kPlain>(p.up, at.template of<kPlain>(p.up), p.extent, at, columns, up);
  char* const gY = at.template of<kPlain>(p.y, kQuant ? 1 : sizeof(T));
  const float inverse = kQuant ? 1.0f / *p.scale : 1.0f;
  with_kind<kOnly>(p.kind, [&]<ActivationKind kKind>() {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float y[kV], u[kV];
      tile::unpack(gate[i], y);
      tile::unpack(up[i], u);
#pragma unroll
      for (int j = 0; j < kV; ++j) y[j] = formula::gated<kKind, Math<T>>(y[j], u[j], p.numbers);
      if constexpr (kQuant) {
        tile::store_quantised(p.y, gY, columns(i), at.n + p.extent.tail, y, inverse);
      } else {
        gate[i] = tile::pack_of<T>(y);
      }
    }
  });
  if constexpr (!kQuant) store_packs<kPlain>(p.y, gY, p.extent, at, columns, gate);
}

template <class T, bool kPlain, int kOnly>
__global__ void __launch_bounds__(kMostThreads, kBackwardBlocks<kOnly>)
    gated_bwd_kernel(const __grid_constant__ Gated<T> p) {
  constexpr int kPacks = kBackwardPacks, kV = kVector<T>;
  const Place<T, kPacks> at(p.extent);
  const auto columns = at.columns(p.extent);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at.row >= p.extent.rows) return;
  Pack<T> dy[kPacks], gate[kPacks], up[kPacks];
  load_packs<kPlain>(p.dy, at.template of<kPlain>(p.dy), p.extent, at, columns, dy);
  load_packs<kPlain>(p.gate, at.template of<kPlain>(p.gate), p.extent, at, columns, gate);
  load_packs<kPlain>(p.up, at.template of<kPlain>(p.up), p.extent, at, columns, up);
  with_kind<kOnly>(p.kind, [&]<ActivationKind kKind>() {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float d[kV], g[kV], u[kV];
      tile::unpack(dy[i], d);
      tile::unpack(gate[i], g);
      tile::unpack(up[i], u);
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const auto slopes = formula::gated_slopes<kKind, Math<T>>(d[j], g[j], u[j], p.numbers);
        g[j] = slopes.gate, u[j] = slopes.up;
      }
      gate[i] = tile::pack_of<T>(g);
      up[i] = tile::pack_of<T>(u);
    }
  });
  if (p.dgate.data)
    store_packs<kPlain>(p.dgate, at.template of<kPlain>(p.dgate), p.extent, at, columns, gate);
  if (p.dup.data)
    store_packs<kPlain>(p.dup, at.template of<kPlain>(p.dup), p.extent, at, columns, up);
}

/// Half a pack from `column` on of a row of n.
template <class T>
__device__ __forceinline__ void load_half(const RowView<T>& view, const char* row, int column,
                                          int n, float (&out)[kVector<T> / 2]) {
  constexpr int kH = kVector<T> / 2;
  const T* const from = reinterpret_cast<const T*>(row) + column;
  if (view.whole && column + kH <= n) {
    const uint2 words = ptx::ld_global_nc_8_if(from, true);
    float v[kVector<T>];
    tile::unpack(Pack<T>{{words.x, words.y, 0, 0}}, v);
#pragma unroll
    for (int j = 0; j < kH; ++j) out[j] = v[j];
    return;
  }
#pragma unroll
  for (int j = 0; j < kH; ++j) out[j] = column + j < n ? tile::to_float(from[j]) : 0.0f;
}
template <class T>
__device__ __forceinline__ void store_half(const RowView<T>& view, char* row, int column, int n,
                                           const float (&v)[kVector<T> / 2]) {
  constexpr int kH = kVector<T> / 2;
  T* const to = reinterpret_cast<T*>(row) + column;
  if (view.whole && column + kH <= n) {
    float all[kVector<T>] = {};
#pragma unroll
    for (int j = 0; j < kH; ++j) all[j] = v[j];
    const uint4 words = tile::pack_of<T>(all).bits;
    ptx::st_global_8(to, {words.x, words.y});
    return;
  }
#pragma unroll
  for (int j = 0; j < kH; ++j) {
    if (column + j < n) to[j] = tile::from_float<T>(v[j]);
  }
}
/// The same in 8 bits each; of two f32 the word is half empty.
template <class T>
__device__ __forceinline__ void store_half_quantised(const RowView<T>& view, char* row, int column,
                                                     int n, const float (&v)[kVector<T> / 2],
                                                     float inverse) {
  constexpr int kH = kVector<T> / 2;
  float four[4] = {};
#pragma unroll
  for (int j = 0; j < kH; ++j) four[j] = v[j];
  std::uint32_t words[1];
  tile::quantise<4>(four, inverse, view.dtype, words);
  if (kH == 4 && view.whole && column + kH <= n) {
    *reinterpret_cast<std::uint32_t*>(row + column) = words[0];
    return;
  }
#pragma unroll
  for (int j = 0; j < kH; ++j) {
    if (column + j < n) row[column + j] = static_cast<char>(words[0] >> 8 * j);
  }
}

template <class T, bool kQuant>
__global__ void __launch_bounds__(kMostThreads, 4)
    gated_pairs_fwd_kernel(const __grid_constant__ Gated<T> p) {
  constexpr int kPacks = kForwardPacks, kH = kVector<T> / 2;
  const Place<T, kPacks> at(p.extent);
  const auto columns = at.columns(p.extent);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at.row >= p.extent.rows) return;
  Pack<T> x[kPacks];
  load_packs<false>(p.gate, at.template of<false>(p.gate), p.extent, at, columns, x);
  char* const gY = p.y.row(at.row) + at.first / 2 * (kQuant ? 1 : sizeof(T));
  const int n = (at.n + p.extent.tail) / 2;
  const float inverse = kQuant ? 1.0f / *p.scale : 1.0f;
  formula::with_gate(p.kind, [&]<ActivationKind kKind>() {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[2 * kH], y[kH];
      tile::unpack(x[i], v);
#pragma unroll
      for (int j = 0; j < kH; ++j)
        y[j] = formula::gated<kKind, Math<T>>(v[2 * j], v[2 * j + 1], p.numbers);
      if constexpr (kQuant) {
        store_half_quantised(p.y, gY, columns(i) / 2, n, y, inverse);
      } else {
        store_half(p.y, gY, columns(i) / 2, n, y);
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 4)
    gated_pairs_bwd_kernel(const __grid_constant__ Gated<T> p) {
  constexpr int kPacks = kBackwardPacks, kH = kVector<T> / 2;
  const Place<T, kPacks> at(p.extent);
  const auto columns = at.columns(p.extent);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at.row >= p.extent.rows) return;
  Pack<T> x[kPacks];
  float dy[kPacks][kH];
  load_packs<false>(p.gate, at.template of<false>(p.gate), p.extent, at, columns, x);
  const char* const gDy = p.dy.row(at.row) + at.first / 2 * sizeof(T);
  const int n = (at.n + p.extent.tail) / 2;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) load_half(p.dy, gDy, columns(i) / 2, n, dy[i]);
  formula::with_gate(p.kind, [&]<ActivationKind kKind>() {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[2 * kH];
      tile::unpack(x[i], v);
#pragma unroll
      for (int j = 0; j < kH; ++j) {
        const auto slopes =
            formula::gated_slopes<kKind, Math<T>>(dy[i][j], v[2 * j], v[2 * j + 1], p.numbers);
        v[2 * j] = slopes.gate, v[2 * j + 1] = slopes.up;
      }
      x[i] = tile::pack_of<T>(v);
    }
  });
  store_packs<false>(p.dgate, at.template of<false>(p.dgate), p.extent, at, columns, x);
}

/// f<kPlain, kOnly>() for operands that are all plain, or not.
template <class F>
void dispatch_plain(bool plain, ActivationKind kind, const F& f) {
  if (!plain) return f.template operator()<false, kAnyKind>();
  const auto call = [&]<ActivationKind kKind>() {
    f.template operator()<true, static_cast<int>(kKind)>();
  };
  switch (kind) {
    case ActivationKind::silu:
      return call.template operator()<ActivationKind::silu>();
    case ActivationKind::gelu:
      return call.template operator()<ActivationKind::gelu>();
    case ActivationKind::gelu_tanh:
      return call.template operator()<ActivationKind::gelu_tanh>();
    case ActivationKind::relu:
      return call.template operator()<ActivationKind::relu>();
    case ActivationKind::sigmoid:
      return call.template operator()<ActivationKind::sigmoid>();
    default:
      return call.template operator()<ActivationKind::clamped_silu>();
  }
}

/// Rows that are accessed 8 bytes at a time (of 8-bit results 4).
template <class T>
RowView<T> half_view(TensorRef t, const Extent& e, const char* op, const char* argument) {
  if (e.chunks == 0) t.sizes[1] -= e.tail / 2;
  RowView<T> view = tile::row_view<T>(t, op, argument);
  const std::int64_t bytes = size_of(t.dtype) * kVector<T> / 2;
  const Rows rows = rows_of(t, op, argument);
  view.whole = reinterpret_cast<std::uintptr_t>(t.data) % bytes == 0 &&
               rows.length * size_of(t.dtype) % bytes == 0 && view.inner_stride % bytes == 0 &&
               view.outer_stride % bytes == 0;
  return view;
}

}  // namespace fastkern::cuda::activation_detail
