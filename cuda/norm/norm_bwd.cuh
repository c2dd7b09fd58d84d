// SPDX-License-Identifier: Apache-2.0
// Backward of the row norms. norm.h says what is computed; with g = Σ dy · (weight + offset):
//   rms    d = rstd · (g − x̂ · mean(g · x̂))
//   layer  d = rstd · (g − mean(g) − x̂ · mean(g · x̂))
//
//   work     persistent teams (a part of a block, a block, a cluster of blocks) walk over the rows;
//            a thread keeps its columns, and with them its part of dweight and dbias, in registers
//   memory   shared: a ring of rows of x, dy, dy2, dh on their way, and the weights (enum Weights)
//   sync     one barrier a row and team; between its two sides lies the second pass over the row
//            before. layer in f32: with the sums of a row goes Σ x of the row
//            after it, whose mean is then known before its squares are taken
//   cost     reads 2 · M · N, writes M · N; each dy2, dh, dbranch one more
#pragma once

#include "norm/norm_ring.cuh"

namespace fastkern::cuda::norm_detail {

template <class T>
struct Backward {
  RowView<T> dy, x, dx, dh, dbranch, dy2;
  ColumnView weight, weight2, rowscale;
  tile::DropoutView dropout;
  float* partial;  // [dweight, dbias, dweight2, dbias2][partial_rows][N]; nullptr: not wanted
  std::int64_t partial_rows;
  int sums;            // that are wanted: the first ones of the four
  std::int64_t slots;  // teams, or less: a multiple of heads
  bool merge;          // the teams of a block write one partial row together
  bool finished;       // which is the only one, and goes where the gradients go
  Finish finish;
  std::int64_t rows, n, heads;
  float inverse_n, eps, weight_offset;
  int threads, blocks;  // of a team
};

/// rms: Σ x², Σ g · x.  layer: Σ (x − centre)², Σ g · (x − centre), Σ g, and Σ (x − centre), or Σ x
/// of the row after.
constexpr int bwd_values(NormKind norm) { return norm == NormKind::layer ? 4 : 2; }

/// Rows of the ring: the one whose gradient is written, the one whose sums are taken, for layer in
/// f32 the one whose mean is, and one on its way.
template <class T, NormKind kNorm>
inline constexpr int kBackwardStages = kNorm == NormKind::layer && !kShifted<T, kNorm> ? 4 : 3;

/// Where the weights of a thread's columns are: as f32 in shared memory; in registers, if they have
/// the type of the rows and no offset; or in the L2 cache, read twice a row, to leave the room to
/// the ring of the longest rows.
enum class Weights { shared, registers, cache };

/// Shared memory of norm_bwd_kernel, in bytes.
template <class T, int kPacks, NormKind kNorm, Sums kSums, int kBlock, Weights kWeights>
constexpr std::size_t bwd_bytes(int threads, int blocks, bool add) {
  constexpr bool kTwo = kSums == Sums::two_outputs;
  constexpr int kStages = kBackwardStages<T, kNorm>;
  const int heads =
      kNorm == NormKind::layer && threads > 32 ? (kStages * kBlock / 32 * 16 + 127) / 128 * 128 : 0;
  return tile::Exchange<tile::Sum, bwd_values(kNorm)>::bytes(kBlock, blocks) + heads +
         sizeof(float4) * Vectors<T, kPacks, kBlock>::kCount *
             (kWeights == Weights::shared ? 1 + kTwo : 0) +
         16 * static_cast<std::size_t>(kStages) * (2 + kTwo + add) * kPacks * kBlock;
}

/// kPlain: the rows of x, dy, dx and dh are whole, at one stride; the vectors have one head.
template <class T, int kPacks, NormKind kNorm, Residual kResidual, Sums kSums, int kBlock,
          Weights kWeights, bool kPlain>
__global__ void __launch_bounds__(kBlock) norm_bwd_kernel(const Backward<T> p) {
  constexpr int kV = kVector<T>;
  constexpr bool kLayer = kNorm == NormKind::layer, kTwo = kSums == Sums::two_outputs;
  constexpr bool kBias = kSums != Sums::weight, kAdd = kResidual != Residual::none;
  constexpr bool kShift = kShifted<T, kNorm>, kInShared = kWeights == Weights::shared;
  constexpr int kOperands = 2 + kTwo + kAdd, kDy2 = 2, kDh = 2 + kTwo;
  constexpr int kValues = bwd_values(kNorm), kStages = kBackwardStages<T, kNorm>;
  extern __shared__ uint4 memory[];
  const Team team{p.threads, p.blocks, p.blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0};
  using Sent = tile::Exchange<tile::Sum, kValues, true>;
  Sent exchange(team, memory);
  // First packs of rows, one for each warp and stage.
  uint4* const sHeads = memory + Sent::bytes(kBlock, team.blocks) / 16 + threadIdx.x / 32;
  const bool head_in_ring = kLayer && team.threads > 32;
  using Columns = Vectors<T, kPacks, kBlock>;
  const Columns sWeight{
      reinterpret_cast<float4*>(memory + Sent::bytes(kBlock, team.blocks) / 16 +
                                (head_in_ring ? (kStages * kBlock / 32 + 7) / 8 * 8 : 0))};
  const Columns sWeight2{sWeight.at + (kTwo && kInShared ? Columns::kCount : 0)};
  uint4* const sRing = reinterpret_cast<uint4*>(sWeight2.at + (kInShared ? Columns::kCount : 0));

  const int lane = threadIdx.x & (team.threads - 1), n = static_cast<int>(p.n);
  const int rows_per_block = kBlock / team.threads;
  using Row = std::conditional_t<kPlain, int, std::int64_t>;
  const Row rows = static_cast<Row>(p.rows);
  const auto slot_of = [&](int thread) {
    return static_cast<Row>(blockIdx.x / team.blocks) * rows_per_block + thread / team.threads;
  };
  const Row slot = slot_of(threadIdx.x);
  // A multiple of heads: the rows of a slot are of one head.
  const Row stride = static_cast<Row>(p.slots);
  const tile::ThreadColumns<T, kPacks> column_of(team.threads, team.rank * team.threads + lane, n);
  Row row = slot < stride ? slot : rows;
  // The first row of the warp, whose teams take the same number of steps. None: an idle team.
  Row first = slot_of(threadIdx.x & ~31);
  first = first < stride ? first : rows;
  // Warps beyond the end of the row add nothing to its sums.
  const bool beyond = team.threads >= 32 && column_of.first - lane % 32 * kV >= n;
  if (team.blocks > 1) ptx::cluster_arrive();
  const auto mean_of = [&p](float sum) { return __fmul_rn(sum, p.inverse_n); };
  ptx::grid_wait();
  ptx::grid_launch_next();

  // A thread fetches what it will itself read: the ring needs no barrier.
  const auto in_ring = [&](int stage, int operand) {
    return sRing + (stage * kOperands + operand) * kPacks * kBlock + threadIdx.x;
  };
  const Row begin = row < rows ? row : 0;
  using Walk = tile::RowWalk<T, kPlain>;
  Walk gX(p.x, begin, stride), gDy(p.dy, begin, stride), gDx(p.dx, begin, stride);
  Row ahead = row;  // the row to fetch next
  const auto fetch = [&](int stage) {
    const int columns = ahead < rows ? n : 0;
    const auto bring = [&](const RowView<T>& view, const char* at, int operand) {
      view.template load_async<kPacks, kPlain>(in_ring(stage, operand), kBlock,
                                               columns ? at : view.data, column_of, columns);
    };
    if (!beyond) {
      bring(p.x, gX.at, 0);
      if constexpr (kLayer) {
        if (head_in_ring && threadIdx.x % 32 == 0) {
          p.x.template load_async<1, kPlain>(
              sHeads + stage * (kBlock / 32), 0, columns ? gX.at : p.x.data, [](int) { return 0; },
              columns);
        }
      }
      bring(p.dy, gDy.at, 1);
      if constexpr (kTwo) bring(p.dy2, p.dy2.row(columns ? ahead : 0), kDy2);
      if constexpr (kAdd) {
        if (p.dh.data) bring(p.dh, p.dh.template row<kPlain>(columns ? ahead : 0), kDh);
      }
    }
    ptx::cp_async_commit();
    ahead += stride;
    gX.next(ahead), gDy.next(ahead);
  };
  if (first < rows) {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);
  }

  const std::int64_t start = p.heads == 1 ? 0 : slot % p.heads * p.n;
  if (kInShared && first < rows) {
    sWeight.fill(p.weight, start, column_of, n, 1.0f, p.weight_offset);
    if constexpr (kTwo) sWeight2.fill(p.weight2, start, column_of, n, 1.0f, p.weight_offset);
  }
  tile::ColumnPack<T, tile::Own<T>> kept[kWeights == Weights::registers ? kPacks : 1] = {};
  if constexpr (kWeights == Weights::registers) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) kept[i].load(p.weight, start, column_of(i), n);
  }
  const auto weights = [&](int i, float (&w)[kV], float (&w2)[kTwo ? kV : 1]) {
    if constexpr (kInShared) {
      sWeight.pack(i, w);
      if constexpr (kTwo) sWeight2.pack(i, w2);
    } else if constexpr (kWeights == Weights::registers) {
      tile::keep_packed(kept[i].part[0]);
      kept[i].unpack(w);
    } else {
      p.weight.load(start, tile::opaque(column_of(i)), n, 1.0f, w);
      const float offset = p.weight.data ? p.weight_offset : 0.0f;
#pragma unroll
      for (int j = 0; j < kV; ++j) w[j] += offset;
    }
  };

  float dweight[kPacks][kV] = {}, dbias[kBias ? kPacks : 1][kV] = {};
  float dweight2[kTwo ? kPacks : 1][kV] = {}, dbias2[kTwo ? kPacks : 1][kV] = {};

  // Twice read from the ring instead of kept: the registers are the sums'.
  const auto read = [&](const RowView<T>& view, int stage, int operand, int i, float (&v)[kV]) {
    view.unpack({ptx::ld_shared(in_ring(stage, operand) + i * kBlock)}, v);
  };
  const auto centre_of_head = [&](int stage) {
    float v[kV];
    if (head_in_ring) {
      __syncwarp();  // lane 0 brought it
      p.x.unpack({ptx::ld_shared(sHeads + stage * (kBlock / 32))}, v);
      return head_mean<T>(v, kPlain ? kV : n);
    }
    read(p.x, stage, 0, 0, v);
    return __shfl_sync(0xffffffffu, head_mean<T>(v, kPlain ? kV : n),
                       threadIdx.x & 31 & ~(team.threads - 1));
  };
  // Σ (x − head) of a row, for its mean.
  const auto sum_of_row = [&](int stage, float head) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float x[kV];
      read(p.x, stage, 0, i, x);
      within<kV>(tile::opaque(column_of(i)), n, [&](int j) { sum += x[j] - head; });
    }
    return sum;
  };
  float next_head = 0.0f;
  // The first pass over a row; `after` is the stage of the row after it.
  const auto send_sums = [&](int stage, int after, float centre) {
    float sums[kValues] = {};
    // kWhole: packs lie within the row or beyond it. Beyond it x is 0, not the centre.
    const auto add_up = [&]<bool kWhole>() {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float vx[kV], vdy[kV], w[kV];
        [[maybe_unused]] float vdy2[kV], w2[kTwo ? kV : 1];
        const int column = tile::opaque(column_of(i));
        const float around = kWhole && column >= n ? 0.0f : centre;
        read(p.x, stage, 0, i, vx);
        read(p.dy, stage, 1, i, vdy);
        if constexpr (kTwo) read(p.dy2, stage, kDy2, i, vdy2);
        weights(i, w, w2);
#pragma unroll
        for (int j = 0; j < kV; ++j) {
          float g = __fmul_rn(vdy[j], w[j]);
          if constexpr (kTwo) g = fmaf(vdy2[j], w2[j], g);
          float d = kLayer ? vx[j] - around : vx[j];
          if constexpr (kLayer && !kWhole) d = column + j < n ? d : 0.0f;
          sums[0] = fmaf(d, d, sums[0]);
          sums[1] = fmaf(g, d, sums[1]);
          if constexpr (kLayer) sums[2] += g;
          if constexpr (kShift) sums[3] += d;
        }
      }
    };
    if (beyond) {
    } else if (!kLayer || kPlain || n % kV == 0) {
      add_up.template operator()<true>();
    } else if constexpr (kLayer && !kPlain) {
      add_up.template operator()<false>();
    }
    if constexpr (kLayer && !kShift) {
      if (!beyond) {
        next_head = centre_of_head(after);
        sums[3] = sum_of_row(after, next_head);
      }
    }
    exchange.send(sums);
  };

  if (team.blocks > 1) ptx::cluster_wait();
  constexpr int kUnderWay =
      kStages - 2 - (kLayer && !kShift);  // when the first pass needs its rows
  float centre = 0.0f;
  if (first < rows) {
    ptx::cp_async_wait<kUnderWay>();
    if constexpr (kShift) {
      if (!beyond) centre = centre_of_head(0);
    } else if constexpr (kLayer) {
      float sums[kValues] = {};
      const float head = beyond ? 0.0f : centre_of_head(0);
      if (!beyond) sums[3] = sum_of_row(0, head);
      exchange.send(sums);
      exchange.receive(sums);
      centre = __fadd_rn(head, mean_of(sums[3]));
    }
    send_sums(0, 1, centre);
  }
  for (int stage = 0; first < rows; stage = (stage + 1) % kStages, row += stride) {
    const auto later = [&](int steps) { return (stage + steps) % kStages; };
    fetch(later(kStages - 1));
    float sums[kValues];
    exchange.receive(sums);

    const bool active = row < rows;
    // Factors of 0 for a row that is none: with eps = 0 its zeros would make NaN, and NaN would
    // stay in the sums.
    float mean = 0.0f, rstd = 0.0f;
    if constexpr (kShift) {
      const float both[] = {sums[3], sums[0]};
      const Moments moments = moments_of<T, kNorm>(both, centre, mean_of, p.eps);
      mean = moments.centre, rstd = moments.rstd;
      sums[1] = fmaf(-mean_of(sums[3]), sums[2], sums[1]);  // now around the mean
    } else {
      mean = centre;
      rstd = rsqrtf(__fadd_rn(mean_of(sums[0]), p.eps));
    }
    // d = rstd · g − rstd · mean(g) + slope · (x − mean), with slope = −rstd · rstd · mean(g · x̂).
    // Of one column that is 0, or for rms, where the terms cancel but for eps, single · rstd · g.
    const bool lone = !kPlain && n == 1;
    rstd = !active || (kLayer && lone) ? 0.0f : rstd;
    const float mean_gx = mean_of(sums[1]) * rstd;  // mean(g · x̂)
    const float slope = !kLayer && lone ? 0.0f : -(mean_gx * rstd) * rstd;
    const float single = p.eps * rstd * rstd;
    const float shift = kLayer ? -mean_of(sums[2]) * rstd : 0.0f;
    first += stride;
    if (first < rows) {
      // After the barrier: warps whose row is there go on while others still wait for theirs.
      ptx::cp_async_wait<kUnderWay>();
      if (kShift && !beyond) centre = centre_of_head(later(1));
      if constexpr (kLayer && !kShift) centre = __fadd_rn(next_head, mean_of(sums[3]));
      send_sums(later(1), later(2), centre);
    }

    if (beyond) continue;
    const int columns = active ? n : 0;
    float rowscale = 1.0f;
    if constexpr (kResidual == Residual::dropout) {
      if (p.dbranch.data && active) rowscale = rowscale_of(p.rowscale, row);
    }
    Pack<T> dx[kPacks], branch[kResidual == Residual::dropout ? kPacks : 1];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float vx[kV], vdy[kV], w[kV], d[kV];
      [[maybe_unused]] float vdy2[kV], w2[kTwo ? kV : 1];
      read(p.x, stage, 0, i, vx);
      read(p.dy, stage, 1, i, vdy);
      if constexpr (kTwo) read(p.dy2, stage, kDy2, i, vdy2);
      weights(i, w, w2);
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const float deviation = kLayer ? vx[j] - mean : vx[j];
        const float scaled = vdy[j] * rstd;
        dweight[i][j] = fmaf(scaled, deviation, dweight[i][j]);
        if constexpr (kBias) dbias[i][j] += vdy[j];
        d[j] = fmaf(deviation, slope, kLayer ? fmaf(scaled, w[j], shift) : scaled * w[j]);
        if constexpr (kTwo) {
          const float scaled2 = vdy2[j] * rstd;
          dweight2[i][j] = fmaf(scaled2, deviation, dweight2[i][j]);
          dbias2[i][j] += vdy2[j];
          d[j] = fmaf(scaled2, w2[j], d[j]);
        }
      }
      if (!kLayer && lone) {
#pragma unroll
        for (int j = 0; j < kV; ++j) d[j] *= single;
      }
      if constexpr (kAdd) {
        if (p.dh.data) {
          float vdh[kV];
          read(p.dh, stage, kDh, i, vdh);
#pragma unroll
          for (int j = 0; j < kV; ++j) d[j] += vdh[j];
        }
      }
      dx[i] = p.dx.pack(d);
      if constexpr (kResidual == Residual::dropout) {
        if (p.dropout.seed) p.dropout.apply(row * p.n + column_of(i), d);
#pragma unroll
        for (int j = 0; j < kV; ++j) d[j] *= rowscale;
        branch[i] = p.dbranch.pack(d);
      }
    }
    if (kPlain || p.dx.data) p.dx.template store<kPlain>(gDx.at, column_of, columns, dx);
    gDx.next(row + stride);
    if constexpr (kResidual == Residual::dropout) {
      if (p.dbranch.data)
        p.dbranch.store(active ? p.dbranch.row(row) : nullptr, column_of, columns, branch);
    }
  }

  if (!p.partial) return;
  // The sums of the block's teams meet in shared memory, in the ring's place: [teams][columns].
  float* const sSums = reinterpret_cast<float*>(sRing);
  const int columns = kPacks * team.threads * kV, begin_column = team.rank * columns;
  const int teams = p.merge ? rows_per_block : 1;  // that are added up, in their order
  ptx::cp_async_wait<0>();                         // of rows beyond the last one
  const auto put = [&](int which, const float (&sum)[kPacks][kV]) {
    if (which >= p.sums || (p.finished && !p.finish.to[which])) return;
    __syncthreads();
    float* const mine = sSums + threadIdx.x / team.threads * columns - begin_column;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < kV; j += 4) {
        *reinterpret_cast<float4*>(mine + column_of(i) + j) = {sum[i][j], sum[i][j + 1],
                                                               sum[i][j + 2], sum[i][j + 3]};
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = 4 * threadIdx.x; at < rows_per_block / teams * columns; at += 4 * kBlock) {
      float4 total = *reinterpret_cast<const float4*>(sSums + at);
#pragma unroll 2
      for (int other = 1; other < teams; ++other)
        total = tile::add(total, *reinterpret_cast<const float4*>(sSums + other * columns + at));
      const int nth = kPacks == 3 ? at / columns : at >> (31 - __clz(columns));
      const int column = begin_column + at - nth * columns;
      const std::int64_t to_row =
          static_cast<std::int64_t>(blockIdx.x / team.blocks) * (rows_per_block / teams) + nth;
      if (p.finished) {
        tile::store_as(p.finish.to[which], p.finish.dtype[which], column, n, total);
      } else if (to_row < p.partial_rows) {
        tile::store_as(p.partial + (which * p.partial_rows + to_row) * p.n, DType::f32, column, n,
                       total);
      }
    }
  };
  put(0, dweight);
  if constexpr (kBias) put(1, dbias);
  if constexpr (kTwo) put(2, dweight2), put(3, dbias2);
}

}  // namespace fastkern::cuda::norm_detail
