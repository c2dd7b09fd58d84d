// SPDX-License-Identifier: Apache-2.0
// Forward of row norms for rows of 16 to 64 KiB: what norm_fwd_kernel computes, with the row in
// shared memory.
//
//   work     a block owns a row. Pack i of thread t is columns (i · threads + t) · vector and the
//            vector − 1 after it, as in norm_fwd_kernel
//   memory   shared: the row, from its arrival to its scaling; h takes the place of x. A thread
//            reads what it has itself brought. Weight and bias come from the caches, row by row
//   sync     one barrier, two for layer in f32, one more for a dynamic scale. Three blocks of 512
//            threads share a multiprocessor, or more of fewer: while one waits for its row, others
//            write theirs
//   cost     reads and writes each operand once
#pragma once

#include "norm/norm_fwd.cuh"
#include "ptx/cp_async.cuh"

namespace fastkern::cuda::norm_detail {

inline constexpr int kSharedThreads = 512;
inline constexpr int kSharedPacks = 2;      // of a thread, at a time
inline constexpr int kSharedResiduals = 4;  // the same, of the residual on its way

/// Shared memory of norm_shared_kernel, in bytes.
constexpr std::size_t shared_bytes(int block, int packs) {
  return fwd_bytes(block) + 16 * static_cast<std::size_t>(packs) * block;
}

/// kPlain: as in norm_fwd_kernel.
template <class T, NormKind kNorm, Residual kResidual, bool kQuant, bool kPlain>
__global__ void __launch_bounds__(kSharedThreads,
                                  kPlain && !(kQuant && kResidual != Residual::none) ? 3 : 2)
    norm_shared_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>, kSums = kForwardSums<T, kNorm>;
  constexpr bool kLayer = kNorm == NormKind::layer, kAdd = kResidual != Residual::none;
  constexpr bool kShift = kShifted<T, kNorm>;
  extern __shared__ uint4 memory[];
  const int threads = p.threads, n = static_cast<int>(p.n);
  const Team team{threads, 1, 0};
  tile::Exchange<tile::Sum, kSums> exchange(team, memory);
  uint4* const sRow = memory + fwd_bytes(threads) / 16 + threadIdx.x;
  const std::int64_t row = blockIdx.x;
  const int apart = threads * kV;  // columns
  const auto mean_of = [&p](float sum) { return __fmul_rn(sum, p.inverse_n); };
  ptx::grid_wait();
  ptx::grid_launch_next();

  // f(first columns of packs that begin within the row, their places) for all packs of the thread,
  // kAtOnce at a time as far as they go, then singly.
  const auto packs = [&]<int kAtOnce>(const auto& f) {
    uint4* place = sRow;
    int at = static_cast<int>(threadIdx.x) * kV;
    const auto column_of = [&](int i) { return at + i * apart; };
#pragma unroll 1
    for (; at + (kAtOnce - 1) * apart < n; at += kAtOnce * apart, place += kAtOnce * threads)
      f.template operator()<kAtOnce>(column_of, place);
    if constexpr (kAtOnce == 2) {  // not a loop: layer is 4 % faster
      if (at < n) f.template operator()<1>(column_of, place);
    } else {
#pragma unroll 1
      for (; at < n; at += apart, place += threads) f.template operator()<1>(column_of, place);
    }
  };
  const auto each = [&](const auto& f) { packs.template operator()<kSharedPacks>(f); };
  const char* const gX = p.x.template row<kPlain>(row);
  Pack<T> head[1];
  const auto first_column = [](int) { return 0; };
  each([&]<int kCount>(const auto& column_of, uint4* place) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        ptx::cp_async_16(place + i * threads, gX + column_of(i) * (16 / kV), 16);
    } else {
      p.x.template load_async<kCount>(place, threads, gX, column_of, n);
    }
  });
  ptx::cp_async_commit();
  if constexpr (kLayer) p.x.template load<kPlain>(gX, first_column, n, head);
  if constexpr (kAdd) {
    const char* const gR = p.residual.data ? p.residual.template row<kPlain>(row) : nullptr;
    const float rowscale = kResidual == Residual::dropout ? rowscale_of(p.rowscale, row) : 1.0f;
    if constexpr (kLayer) {
      Pack<T> residual[1] = {};
      if (gR) p.residual.template load<kPlain>(gR, first_column, n, residual);
      head[0] = add_residual<kResidual>(p, head[0], residual[0], row, 0, rowscale);
    }
    packs.template operator()<kResidual == Residual::add ? kSharedResiduals : 2>(
        [&]<int kCount>(const auto& column_of, uint4* place) {
          Pack<T> residual[kCount] = {};
          if (gR) p.residual.template load<kPlain>(gR, column_of, n, residual);
          ptx::cp_async_wait<0>();
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            uint4* const to = place + i * threads;
            *to = add_residual<kResidual>(p, {ptx::ld_shared(to)}, residual[i], row, column_of(i),
                                          rowscale)
                      .bits;
          }
        });
  }
  const RowView<T>& source = kAdd ? p.h : p.x;  // whose type the row now has
  const auto read = [&](const uint4* place, float (&v)[kV]) {
    source.unpack({ptx::ld_shared(place)}, v);
  };

  float centre = 0.0f;  // what the squares are taken around
  if constexpr (kLayer) {
    float v[kV];
    source.unpack(head[0], v);
    centre = head_mean<T>(v, kPlain ? kV : n);
  }
  ptx::cp_async_wait<0>();
  float sums[kSums];  // the last of them: the squares
  // kWhole: all packs lie within the row.
  const auto add_up = [&]<bool kWhole>() {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = 0.0f;
    each([&]<int kCount>(const auto& column_of, const uint4* place) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float v[kV];
        read(place + i * threads, v);
#pragma unroll
        for (int j = 0; j < kV; ++j) {
          float d = kLayer ? v[j] - centre : v[j];
          if constexpr (kLayer && !kWhole) d = column_of(i) + j < n ? d : 0.0f;
          if constexpr (kLayer) sums[0] += d;
          sums[kSums - 1] = fmaf(d, d, sums[kSums - 1]);
        }
      }
    });
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
  if constexpr (kLayer && !kShift) {  // now around the mean
    centre = __fadd_rn(centre, mean_of(sums[0]));
    add_up_row();
  }
  const Moments moments = moments_of<T, kNorm>(sums, centre, mean_of, p.eps);
  const std::int64_t start = p.heads == 1 ? 0 : row % p.heads * p.n;  // of the head's vectors
  const ColumnView weight = p.weight.from(start), bias = p.bias.from(start);
  const auto scaled = [&]<int kCount>(const ColumnView& weight, const ColumnView& bias,
                                      const auto& column_of, const uint4* place, const auto& put) {
    const auto normal = [&](int i, float (&v)[kV]) {
      read(place + i * threads, v);
#pragma unroll
      for (int j = 0; j < kV; ++j) v[j] = normalised<T, kNorm>(v[j], moments);
    };
    affine<T, kCount, kLayer, kPlain, kPlain>(weight, bias, p.weight_offset, 0, column_of, n,
                                              normal, put);
  };

  float inverse = 0.0f;
  if constexpr (kQuant) {
    if (p.static_scale) {
      inverse = 1.0f / *p.scale;
    } else {
      tile::Exchange<tile::Largest, 1> magnitudes(
          team, reinterpret_cast<char*>(memory) + fwd_bytes(threads) / 2);
      float largest[1] = {0.0f};
      each([&]<int kCount>(const auto& column_of, const uint4* place) {
        scaled.template operator()<kCount>(
            weight, bias, column_of, place, [&](int i, const float (&v)[kV]) {
              within<kV>(column_of(i), n, [&](int j) {
                largest[0] = __uint_as_float(tile::Largest::apply(__float_as_uint(largest[0]),
                                                                  __float_as_uint(fabsf(v[j]))));
              });
            });
      });
      magnitudes.send(largest);
      magnitudes.receive(largest);
      inverse = dynamic_scale(p, largest[0], row, threadIdx.x == 0);
    }
  }
  const auto store = [&]<int kCount>(const RowView<T>& view, char* to, const auto& column_of,
                                     const Pack<T>(&values)[kCount]) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        ptx::st_global(to + column_of(i) * (16 / kV), values[i].bits);
    } else {
      view.store(to, column_of, n, values);
    }
  };
  char* const gY = p.y.template row<kPlain>(row);
  char* const gH = kAdd ? p.h.template row<kPlain>(row) : nullptr;
  each([&]<int kCount>(const auto& column_of, const uint4* place) {
    // Not before the exchange: h may be the residual, whose first pack the whole block has read by
    // now.
    if constexpr (kAdd) {
      Pack<T> h[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) h[i].bits = ptx::ld_shared(place + i * threads);
      store(p.h, gH, column_of, h);
    }
    if constexpr (kQuant) {
      scaled.template operator()<kCount>(weight, bias, column_of, place,
                                         [&](int i, const float (&v)[kV]) {
                                           store_quantised(p.y, gY, column_of(i), n, v, inverse);
                                         });
    } else {
      const auto write = [&](const RowView<T>& view, char* to, const ColumnView& w,
                             const ColumnView& b) {
        Pack<T> y[kCount];
        scaled.template operator()<kCount>(
            w, b, column_of, place, [&](int i, const float (&v)[kV]) { y[i] = view.pack(v); });
        store(view, to, column_of, y);
      };
      write(p.y, gY, weight, bias);
      if constexpr (kAdd && !kPlain) {
        if (p.y2.data) write(p.y2, p.y2.row(row), p.weight2.from(start), p.bias2.from(start));
      }
    }
  });
}

}  // namespace fastkern::cuda::norm_detail
