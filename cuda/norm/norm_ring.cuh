// SPDX-License-Identifier: Apache-2.0
// Forward of row norms for long rows: what norm_fwd_kernel computes, with persistent teams.
//
//   work     a block, or a cluster of blocks, owns a row; it walks over the rows.
//            tile::ThreadColumns says which columns are a thread's
//   memory   shared: a ring of rows of x (and residual) on their way; the weight as f32. The row is
//            read from the ring as often as needed; h takes the place of x there. Registers: bias
//   sync     one barrier a row, with an iteration and a half between the two sides of it (half of
//            one with a residual): a row's sums are taken two rows before it is written. layer in
//            f32 one more, around which its mean becomes known; a dynamic scale one more
//   cost     reads and writes each operand once
#pragma once

#include "norm/norm_fwd.cuh"
#include "ptx/cp_async.cuh"

namespace fastkern::cuda::norm_detail {

/// How many rows ahead of the one that is written sums are sent. With a residual one: a block that
/// writes h over it must know that the others have read the first pack of that row.
template <Residual kResidual>
inline constexpr int kRingAhead = kResidual == Residual::none ? 2 : 1;
inline constexpr int kRingPacks = 4;  // of a thread

/// Shared memory for the vectors of one thread's columns, as f32, in their readers' order:
/// [kPacks][kVector / 4][kBlock] quads. For the thread's own use.
template <class T, int kPacks, int kBlock>
struct Vectors {
  static constexpr int kQuads = kVector<T> / 4;
  static constexpr int kCount = kPacks * kQuads * kBlock;  // float4
  float4* at;

  template <class ColumnOf>
  __device__ __forceinline__ void fill(const ColumnView& view, std::int64_t head,
                                       const ColumnOf& column_of, int n, float missing,
                                       float offset) const {
    const float add = view.data ? offset : 0.0f;
    const auto put = [&](int i, const float (&v)[kVector<T>]) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        at[(i * kQuads + q) * kBlock + threadIdx.x] = {v[4 * q] + add, v[4 * q + 1] + add,
                                                       v[4 * q + 2] + add, v[4 * q + 3] + add};
      }
    };
    // All packs are asked for before the first is waited for: no row can be finished without them.
    const auto together = [&]<class W>(W) {
      tile::ColumnPack<T, W> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) packs[i].load(view, head, column_of(i), n);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float v[kVector<T>];
        packs[i].unpack(v);
        put(i, v);
      }
    };
    if (view.whole && view.dtype == DType::f32) return together(float{});
    if constexpr (sizeof(T) == 2) {
      if (view.whole && view.dtype == dtype_of(T{})) return together(T{});
    }
    for (int i = 0; i < kPacks; ++i) {
      float v[kVector<T>];
      view.load(head, column_of(i), n, missing, v);
      put(i, v);
    }
  }
  __device__ __forceinline__ void quad(int pack, int q, float (&out)[4]) const {
    const float4 v = at[(pack * kQuads + q) * kBlock + threadIdx.x];
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
  __device__ __forceinline__ void pack(int pack, float (&out)[kVector<T>]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      float v[4];
      quad(pack, q, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * q + j] = v[j];
    }
  }
};

/// The same in registers, which leaves the room to the ring.
template <class T, int kPacks>
struct VectorsInRegisters {
  float values[kPacks][kVector<T>];

  template <class ColumnOf>
  __device__ __forceinline__ void fill(const ColumnView& view, std::int64_t head,
                                       const ColumnOf& column_of, int n, float missing, float) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) view.load(head, column_of(i), n, missing, values[i]);
  }
  __device__ __forceinline__ void quad(int pack, int q, float (&out)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = values[pack][4 * q + j];
  }
};

template <int kAhead>
constexpr int ring_exchange_bytes(int block, int blocks) {
  return tile::Exchange<tile::Sum, 2, false, kAhead>::bytes(block, blocks);
}

/// Shared memory of norm_ring_kernel, in bytes.
template <class T, Residual kResidual, int kBlock>
constexpr std::size_t ring_bytes(int blocks, bool two) {
  constexpr int kAhead = kRingAhead<kResidual>, kOperands = kResidual == Residual::none ? 1 : 2;
  return ring_exchange_bytes<kAhead>(kBlock, blocks) + ring_exchange_bytes<1>(kBlock, blocks) +
         sizeof(float4) * Vectors<T, kRingPacks, kBlock>::kCount * (1 + two) +
         16 * static_cast<std::size_t>(kAhead + 2) * kOperands * kRingPacks * kBlock;
}

/// Blocks that share a multiprocessor, as far as shared memory allows it.
template <int kBlock, Residual kResidual>
inline constexpr int kRingBlocks = kResidual == Residual::none && kBlock == 256 ? 2 : 1;

/// kPlain: the rows of x, y, residual and h are whole, at one stride; the vectors have one head;
/// there is one output.
template <class T, NormKind kNorm, Residual kResidual, bool kQuant, int kBlock, bool kPlain>
__global__ void __launch_bounds__(kBlock, kRingBlocks<kBlock, kResidual>)
    norm_ring_kernel(const Forward<T> p) {
  constexpr int kV = kVector<T>, kQuads = kV / 4, kPacks = kRingPacks;
  constexpr bool kLayer = kNorm == NormKind::layer, kAdd = kResidual != Residual::none;
  constexpr int kOperands = 1 + kAdd;
  constexpr int kSums = kForwardSums<T, kNorm>;
  constexpr bool kShift = kShifted<T, kNorm>;
  extern __shared__ uint4 memory[];
  char* const shared = reinterpret_cast<char*>(memory);
  constexpr int kAhead = kRingAhead<kResidual>;
  constexpr int kStages = kAhead + 2;  // a row is written, kAhead are summed, one is on its way
  const int first_bytes = ring_exchange_bytes<kAhead>(kBlock, p.blocks);
  const int exchange_bytes = first_bytes + ring_exchange_bytes<1>(kBlock, p.blocks);
  const Team team{kBlock, p.blocks, p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0};
  tile::Exchange<tile::Sum, kSums, false, kAhead> exchange(team, shared);
  // Of largest magnitudes, or of sums that lead to the mean.
  using Second = std::conditional_t<kQuant, tile::Exchange<tile::Largest, 1>,
                                    tile::Exchange<tile::Sum, kSums>>;
  Second second(team, shared + first_bytes);
  using Columns = Vectors<T, kPacks, kBlock>;
  using Biases = VectorsInRegisters<T, kPacks>;
  const bool has_two = kAdd && !kPlain && p.y2.data;
  const Columns sWeight{reinterpret_cast<float4*>(shared + exchange_bytes)};
  const Columns sWeight2{sWeight.at + Columns::kCount};
  Biases bias, bias2;
  uint4* const sRing = reinterpret_cast<uint4*>(sWeight.at + (has_two ? 2 : 1) * Columns::kCount);

  const int n = static_cast<int>(p.n);
  const std::int64_t stride = gridDim.x / team.blocks;
  std::int64_t row = blockIdx.x / team.blocks;
  const tile::ThreadColumns<T, kPacks> column_of(
      kBlock, team.rank * kBlock + static_cast<int>(threadIdx.x), n);
  // Warps beyond the end of the row add nothing to its sums.
  const bool beyond = column_of.first - static_cast<int>(threadIdx.x) % 32 * kV >= n;
  const auto mean_of = [&p](float sum) { return __fmul_rn(sum, p.inverse_n); };
  ptx::grid_wait();
  ptx::grid_launch_next();

  // A thread fetches what it will itself read: the ring needs no barrier.
  const auto in_ring = [&](int stage, int operand) {
    return sRing + (stage * kOperands + operand) * kPacks * kBlock + threadIdx.x;
  };
  tile::RowWalk<T, kPlain> gX(p.x, row, stride), gY(p.y, row, stride);
  std::int64_t ahead = row;  // the row to fetch next
  const auto fetch = [&](int stage) {
    const int columns = ahead < p.rows ? n : 0;
    if (!beyond) {
      p.x.template load_async<kPacks, kPlain>(in_ring(stage, 0), kBlock, columns ? gX.at : p.x.data,
                                              column_of, columns);
      if constexpr (kAdd) {
        if (p.residual.data) {
          p.residual.template load_async<kPacks, kPlain>(
              in_ring(stage, 1), kBlock, p.residual.template row<kPlain>(columns ? ahead : 0),
              column_of, columns);
        }
      }
    }
    ptx::cp_async_commit();
    ahead += stride;
    gX.next(ahead);
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
  // A block has one row at a time, whose head may change from row to row: with several heads the
  // vectors are read anew.
  const auto fill = [&](std::int64_t head) {
    sWeight.fill(p.weight, head, column_of, n, 1.0f, p.weight_offset);
    bias.fill(p.bias, head, column_of, n, kNothing, 0.0f);
    if (has_two) {
      sWeight2.fill(p.weight2, head, column_of, n, 1.0f, p.weight_offset);
      bias2.fill(p.bias2, head, column_of, n, kNothing, 0.0f);
    }
  };
  if (kPlain || p.heads == 1) fill(0);

  const RowView<T>& source = kAdd ? p.h : p.x;  // whose type the ring has
  const auto read = [&](int stage, int i, float (&v)[kV]) {
    source.unpack({ptx::ld_shared(in_ring(stage, 0) + i * kBlock)}, v);
  };
  // h of a row, in the place of x.
  const auto add = [&](std::int64_t r, int stage) {
    const float rowscale = kResidual == Residual::dropout ? rowscale_of(p.rowscale, r) : 1.0f;
    Pack<T> h[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      uint4* const at = in_ring(stage, 0) + i * kBlock;
      h[i] = add_residual<kResidual>(p, {*at}, {in_ring(stage, 1)[i * kBlock]}, r, column_of(i),
                                     rowscale);
      *at = h[i].bits;
    }
    p.h.template store<kPlain>(p.h.template row<kPlain>(r), column_of, n, h);
  };
  // The centre of a row's squares that is known without its sums: its first pack is read one row
  // ahead, and is there before this block sends anything that lets h take the residual's place.
  struct {
    Pack<T> x[1], residual[1];
  } head = {};
  const auto load_head = [&](std::int64_t r) {
    if (r >= p.rows || beyond) return;
    const auto first_column = [](int) { return 0; };
    p.x.template load<kPlain>(p.x.template row<kPlain>(r), first_column, n, head.x);
    if constexpr (kAdd) {
      if (p.residual.data) {
        p.residual.template load<kPlain>(p.residual.template row<kPlain>(r), first_column, n,
                                         head.residual);
      }
    }
  };
  const auto centre_of_head = [&](std::int64_t r) {
    float v[kV], centre;
    if constexpr (kAdd) {
      const float rowscale =
          kResidual == Residual::dropout && r < p.rows ? rowscale_of(p.rowscale, r) : 1.0f;
      const Pack<T> h = add_residual<kResidual>(p, head.x[0], head.residual[0], r, 0, rowscale);
      source.unpack(h, v);
    } else {
      source.unpack(head.x[0], v);
    }
    centre = head_mean<T>(v, kPlain ? kV : n);
    asm volatile("" : "+f"(centre));
    return centre;
  };
  const auto send_sums = [&](auto& to, int stage, float centre) {
    float sums[kSums] = {};  // the last of them: the squares
    // kWhole: packs lie within the row or beyond it. Beyond it x is 0, not the centre.
    const auto add_up = [&]<bool kWhole>() {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float v[kV];
        read(stage, i, v);
        const int column = tile::opaque(column_of(i));
        const float around = kWhole && column >= n ? 0.0f : centre;
#pragma unroll
        for (int j = 0; j < kV; ++j) {
          float d = kLayer ? v[j] - around : v[j];
          if constexpr (kLayer && !kWhole) d = column + j < n ? d : 0.0f;
          if constexpr (kLayer) sums[0] += d;
          sums[kSums - 1] = fmaf(d, d, sums[kSums - 1]);
        }
      }
    };
    if (beyond) {
    } else if (!kLayer || kPlain || n % kV == 0) {
      add_up.template operator()<true>();
    } else if constexpr (kLayer && !kPlain) {
      add_up.template operator()<false>();
    }
    to.send(sums);
  };
  // What a row needs kAhead rows before it is written: its sums sent; its centre is returned.
  float next_centre = 0.0f;
  const auto begin = [&](std::int64_t r, int stage) {
    if (kAdd && !beyond) add(r, stage);
    float centre = 0.0f;
    if constexpr (kLayer) {
      centre = next_centre;
      next_centre = centre_of_head(r + stride);
      load_head(r + 2 * stride);
    }
    if constexpr (kLayer && !kShift) {  // to the mean
      float sums[kSums];
      send_sums(second, stage, centre);
      second.receive(sums);
      centre = __fadd_rn(centre, mean_of(sums[0]));
    }
    send_sums(exchange, stage, centre);
    return centre;
  };

  if constexpr (kLayer) {
    load_head(row);
    next_centre = centre_of_head(row);
    load_head(row + stride);
  }
  // Nobody sends to a block that has not begun, nor lets h take the place of a residual whose first
  // pack others have still to read.
  if (team.blocks > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  float centres[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    // The oldest of the groups on their way is that of row i.
    if (i == 0) ptx::cp_async_wait<kStages - 2>();
    if (i == 1) ptx::cp_async_wait<kStages - 3>();
    if (row + i * stride < p.rows) centres[i] = begin(row + i * stride, i);
  }
  int stage = 0;
  for (; row < p.rows; row += stride) {
    const auto later = [&](int steps) { return (stage + steps) % kStages; };
    fetch(later(kStages - 1));
    float sums[kSums];
    exchange.receive(sums);
    const Moments moments = moments_of<T, kNorm>(sums, centres[0], mean_of, p.eps);
    if constexpr (kAhead == 2) centres[0] = centres[1];
    if (row + kAhead * stride < p.rows) {
      // After the barrier: warps whose row is there go on while others still wait for theirs.
      ptx::cp_async_wait<1>();
      centres[kAhead - 1] = begin(row + kAhead * stride, later(kAhead));
    }

    if (!kPlain && p.heads > 1) fill(row % p.heads * p.n);
    const auto value = [&](int i, const Columns& weight, const Biases& bias, float (&v)[kV]) {
      read(stage, i, v);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        float w[4], b[4];
        weight.quad(i, q, w);
        bias.quad(i, q, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[4 * q + j] = fmaf(normalised<T, kNorm>(v[4 * q + j], moments), w[j], b[j]);
        }
      }
    };
    if constexpr (kQuant) {
      float inverse = 0.0f;
      if (p.static_scale) {
        inverse = 1.0f / *p.scale;
      } else {
        std::uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          float v[kV];
          value(i, sWeight, bias, v);
          within<kV>(column_of(i), n, [&](int j) {
            largest = tile::Largest::apply(largest, __float_as_uint(fabsf(v[j])));
          });
        }
        float values[1] = {__uint_as_float(largest)};
        second.send(values);
        second.receive(values);
        inverse = dynamic_scale(p, values[0], row, threadIdx.x == 0 && team.rank == 0);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float v[kV];
        value(i, sWeight, bias, v);
        store_quantised(p.y, gY.at, column_of(i), n, v, inverse);
      }
    } else {
      const auto write = [&](const RowView<T>& view, char* to, const Columns& weight,
                             const Biases& bias) {
        Pack<T> y[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          float v[kV];
          value(i, weight, bias, v);
          y[i] = view.pack(v);
        }
        view.template store<kPlain>(to, column_of, n, y);
      };
      if (!beyond) write(p.y, gY.at, sWeight, bias);
      if (has_two) write(p.y2, p.y2.row(row), sWeight2, bias2);
    }
    gY.next(row + stride);
    stage = later(1);
  }
}
}  // namespace fastkern::cuda::norm_detail
