// SPDX-License-Identifier: Apache-2.0
// Attention of f32, backward; the formulas are those of attention_bwd.cuh.
//
//   work     dk and dv: a block has 128 keys of one key head and goes through the query heads that
//            share them and, 32 at a time, through the queries that see them. dq: a block has 128
//            queries of one head and goes through the keys they see. Either has kColumns columns of
//            its gradients; where there are more, other blocks compute the same p and ds for those.
//            bias: a block has 128 keys and 32 queries of an entry and a head of the bias, as in
//            attention_bwd_bias.cuh
//   memory   three slices (attention_f32.cuh); p, ds and gradients in registers, none elsewhere
//   cost     42 * S * T * D flops where all is seen
#pragma once

#include "attention/attention_bwd_bias.cuh"
#include "attention/attention_f32.cuh"

namespace fastkern::cuda::attention_detail {

inline constexpr int kF32Others = 32;  // rows of the matrix that the block goes through
inline constexpr int kF32Stage = (kF32Rows + kF32Others) * kSliceRow;

/// What queries i0 to i1 of head h of an entry and keys j0 to j1 are multiplied from.
struct F32Pairs {
  int h, i0, i1, j0, j1;
};

/// From the products q . k and dout . v to p, as dropout leaves it, and the gradient of q . k *
/// scale or, for a bias, of what is added to that. kWhole: all keys are seen.
template <bool kExtras, bool kWhole>
__device__ __forceinline__ void f32_pair(const Forward& f, const Job& job, int h, float slope,
                                         int i, int j, float2 of_query, bool of_bias, float& s,
                                         float& dp) {
  float capped = 0.0f, score = s * f.scale_log2;
  if constexpr (kExtras) {
    score = score_of(f, job, h, slope, i, j, s, &capped);
  } else if (!kWhole && !(j >= job.sight.low(i) && j < job.sight.high(i))) {
    score = -INFINITY;
  }
  // Nothing was seen, whatever the products are.
  const bool nothing = of_query.x == INFINITY || score == -INFINITY;
  const float probability = nothing ? 0.0f : ptx::exp2_approx(score - of_query.x);
  s = probability;
  if constexpr (kExtras) {
    if (f.dropout.threshold > 0) {
      const float factor = dropout_factor(f, job.b, h, i, j);
      s *= factor, dp *= factor;
    }
  }
  dp = nothing ? 0.0f : probability * (dp - of_query.y);
  if (kExtras && f.softcap > 0.0f && !of_bias) dp *= 1.0f - capped * capped;
}

/// What a block does.
struct F32Job {
  Job job;
  AttentionSequence<int> at;
  int g, j0, j1, stored;  // j0, j1: of keys, if it has some
  int begin, each;        // blocks of the others: from where, how many of each head
};

/// For a whole warp.
template <int kM, int kN, bool kKeys>
__device__ __forceinline__ F32Job f32_job_of(const Backward& p, int id) {
  const Forward& f = p.f;
  F32Job a{};
  if constexpr (kKeys) {
    const Unit unit = unit_of(f.lengths, id, p.key_blocks, p.kv_heads, f.batch,
                              [&](int b) { return (stored_keys(f, b) + kM - 1) / kM; });
    a.job.b = unit.b, a.g = unit.h, a.j0 = unit.index * kM;
  } else {
    a.job = job_of<kM>(f, id);
    a.g = a.job.h / f.group, a.stored = a.job.stored;
  }
  if (a.job.b < 0) return a;
  a.at = attention_sequence(f.lengths, a.job.b, f.queries, f.keys);
  int end = 0;
  if constexpr (kKeys) {
    a.job.sight = attention_sight(f.mask, a.at, a.job.b);
    a.j1 = max(a.j0, min(a.j0 + kM, a.at.keys));
    a.stored = min(kM, stored_keys(f, a.job.b) - a.j0);
    a.begin = a.job.sight.first_query(a.j0) / kN;
    const int last = a.j1 > a.j0 ? a.job.sight.last_query(a.j1, a.at.queries) : 0;
    end = (last + kN - 1) / kN;
  } else {
    a.begin = a.job.begin<kN>(), end = a.job.end<kN>();
  }
  a.each = max(end - a.begin, 0);
  return a;
}

/// Rows are keys or queries, the others what they are multiplied with: the products are
/// rows x others, in both cases.
template <int kColumns, bool kKeys>
__global__ void __launch_bounds__(kF32Threads, 1)
    attention_f32_bwd_kernel(const __grid_constant__ Backward p, bool extras) {
  constexpr int kM = kF32Rows, kN = kF32Others, kTiles = kN / 8, kColumnTiles = kColumns / 8;
  extern __shared__ __align__(128) uint4 memory[];
  __shared__ F32Job shared_job[1];
  __shared__ float2 of_others[kN];  // of queries
  F32Job& own = shared_job[0];
  Job& job = own.job;
  const AttentionSequence<int>& at = own.at;
  const Forward& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const int width = kKeys ? max(f.d, f.dv) : f.d;
  const int parts = (width + kColumns - 1) / kColumns;
  const int column = static_cast<int>(blockIdx.x) % parts * kColumns;

  ptx::grid_wait();
  ptx::grid_launch_next();
  if (warp == 0) {
    const F32Job found = f32_job_of<kM, kN, kKeys>(p, static_cast<int>(blockIdx.x) / parts);
    if (lane == 0) own = found;
  }
  __syncthreads();
  if (job.b < 0) return;

  // Steps through the others: of keys, blocks of queries of each head one after the other.
  const int total = own.each * (kKeys ? f.group : 1);
  const auto pairs_of = [&](int step) -> F32Pairs {
    if constexpr (kKeys) {
      const int i0 = (own.begin + step % own.each) * kN;
      return {own.g * f.group + step / own.each, i0, min(i0 + kN, at.queries), own.j0, own.j1};
    } else {
      const int j0 = (own.begin + step) * kN;
      return {job.h, job.i0, job.i1, j0, min(j0 + kN, at.keys)};
    }
  };
  const auto next = [&](int step) {
    while (step < total) {
      const F32Pairs o = pairs_of(step);
      if (!job.sight.none(o.i0, o.i1, o.j0, o.j1) && listed_block(f, o.h, o.i0, o.i1, o.j0, o.j1)) {
        break;
      }
      ++step;
    }
    return step;
  };
  const auto index_of = [&](int h, int i) {  // where lse has it
    const std::int64_t row = f.lengths.start_q ? h : static_cast<std::int64_t>(job.b) * f.heads + h;
    return row * f.queries + at.first_q + i;
  };

  // Slices of a step: rows and others for q . k, for dout . v, and others for the gradients.
  const int columns_1 = min(kColumns, f.d - column);
  const int columns_2 = kKeys ? min(kColumns, f.dv - column) : 0;
  const auto slices_of = [](int columns) { return max(0, (columns + kSlice - 1) / kSlice); };
  const int of_d = slices_of(f.d), of_dv = slices_of(f.dv);
  const int of_1 = slices_of(columns_1), of_all = of_d + of_dv + of_1 + slices_of(columns_2);
  int step = next(0), ahead = step, slice = 0;
  F32Pairs o{};        // of `ahead`
  bool alive = false;  // the query that this thread fetches: 0 times what it has may be NaN if not
  const auto aim = [&] {
    if (ahead >= total) return;
    o = pairs_of(ahead);
    if constexpr (kKeys) {
      const int i = o.i0 + static_cast<int>(threadIdx.x) / Slice::kChunks;
      alive = i < o.i1 && f.lse[index_of(o.h, i)] != -INFINITY;
    }
  };
  aim();
  const auto fetch_next = [&](char* stage) {
    if (ahead >= total) return;
    const auto key_there = [&](int row) { return o.j0 + row < o.j1; };
    const bool products = slice < of_d + of_dv;
    const bool first = slice < of_d || (!products && slice < of_d + of_dv + of_1);
    const int c = products ? (slice - (first ? 0 : of_d)) * kSlice
                           : column + (slice - of_d - of_dv - (first ? 0 : of_1)) * kSlice;
    const int w = first ? f.d : f.dv;
    const View& of_q = first ? f.q : p.dout;
    const View& of_k = first ? f.k : f.v;
    const char* const q = of_q.at(job.b, at.first_q + o.i0, o.h);
    const char* const k = of_k.at(job.b, at.first_k + o.j0, own.g);
    char* const others = stage + kM * kSliceRow;
    if constexpr (kKeys) {
      if (products) fetch_slice<kM>(stage, k, of_k.row, c, w, f.vectors, key_there);
      fetch_slice<kN>(others, q, of_q.row, c, w, f.vectors, [&](int) { return alive; });
    } else {
      if (products) {
        fetch_slice<kM>(stage, q, of_q.row, c, w, f.vectors,
                        [&](int row) { return o.i0 + row < o.i1; });
      }
      fetch_slice<kN>(others, k, of_k.row, c, w, f.vectors, key_there);
    }
    if (++slice == of_all) {
      slice = 0, ahead = next(ahead + 1);
      aim();
    }
  };
  Slices<kF32Stage, decltype(fetch_next)> slices{reinterpret_cast<char*>(memory), fetch_next};
  slices.begin();

  const int warp_row = warp * 16;
  const auto of_query = [&](int h, int i, int i1) {
    return i < i1 ? p.rows[index_of(h, i)] : float2{INFINITY, 0.0f};
  };
  float2 of_rows[2];  // of queries
  if constexpr (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of_rows[half] = of_query(job.h, job.i0 + warp_row + quad + half * 8, job.i1);
    }
  }
  float sums_1[kColumnTiles][4] = {}, sums_2[kKeys ? kColumnTiles : 1][4] = {};
  const float same[2] = {1.0f, 1.0f};

  for (; step < total; step = next(step + 1)) {
    const F32Pairs now = pairs_of(step);
    if constexpr (kKeys) {  // all threads have done the step before
      if (threadIdx.x < kN) {
        of_others[threadIdx.x] = of_query(now.h, now.i0 + static_cast<int>(threadIdx.x), now.i1);
      }
    }
    float rS[kTiles][4] = {}, rDp[kTiles][4] = {};
    for (int s = 0; s < of_d; ++s) {
      const char* const stage = slices.next();
      multiply_rows(rS, stage + warp_row * kSliceRow, stage + kM * kSliceRow);
    }
    for (int s = 0; s < of_dv; ++s) {
      const char* const stage = slices.next();
      multiply_rows(rDp, stage + warp_row * kSliceRow, stage + kM * kSliceRow);
    }
    const auto finish = [&]<bool kExtras, bool kWhole>() {
      const float slope =
          kExtras ? f.slopes.at(static_cast<std::int64_t>(job.b) * f.slopes_batch + now.h, 0.0f)
                  : 0.0f;
#pragma unroll
      for (int c = 0; c < kTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int other = c * 8 + pair * 2 + e % 2, row = warp_row + quad + e / 2 * 8;
          const int i = now.i0 + (kKeys ? other : row), j = now.j0 + (kKeys ? row : other);
          if (!kWhole && (i >= now.i1 || j >= now.j1)) {
            rS[c][e] = rDp[c][e] = 0.0f;
            continue;
          }
          f32_pair<kExtras, kWhole>(f, job, now.h, slope, i, j,
                                    kKeys ? of_others[other] : of_rows[e / 2], false, rS[c][e],
                                    rDp[c][e]);
        }
      }
    };
    if (extras) {
      finish.template operator()<true, false>();
    } else if (now.i0 + (kKeys ? kN : kM) <= now.i1 && now.j0 + (kKeys ? kM : kN) <= now.j1 &&
               job.sight.all(now.i0, now.i1, now.j0, now.j1)) {
      finish.template operator()<false, true>();
    } else {
      finish.template operator()<false, false>();
    }
    // Loops that know which columns they are at, so that fetching is there once in each.
    for (int x = 0; x < columns_1; x += kSlice) {
      const char* const stage = slices.next();
#pragma unroll
      for (int c = 0; c < kColumns; c += kSlice) {
        if (x == c) multiply_columns(sums_1, c / 8, same, rDp, stage + kM * kSliceRow);
      }
    }
    if constexpr (kKeys) {
      for (int x = 0; x < columns_2; x += kSlice) {
        const char* const stage = slices.next();
#pragma unroll
        for (int c = 0; c < kColumns; c += kSlice) {
          if (x == c) multiply_columns(sums_2, c / 8, same, rS, stage + kM * kSliceRow);
        }
      }
    }
  }

  const auto store = [&](const View& to, int columns, float scale, const auto& sums) {
    if (!to.data) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + quad + half * 8;
      if (row >= own.stored) continue;
      const int first = kKeys ? at.first_k + own.j0 : at.first_q + job.i0;
      float* const line =
          reinterpret_cast<float*>(to.at(job.b, first + row, kKeys ? own.g : job.h)) + column;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int x = c * 8 + pair * 2 + e;
          if (x < columns) line[x] = sums[c][half * 2 + e] * scale;
        }
      }
    }
  };
  store(kKeys ? p.dk : p.dq, columns_1, f.scale, sums_1);
  if constexpr (kKeys) store(p.dv, columns_2, 1.0f, sums_2);
}

__global__ void __launch_bounds__(kF32Threads, 1)
    attention_f32_bwd_bias_kernel(const __grid_constant__ Backward p,
                                  const __grid_constant__ BiasGradient to) {
  constexpr int kM = kF32Rows, kN = kF32Others, kTiles = kN / 8;
  extern __shared__ __align__(128) uint4 memory[];
  const Forward& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  const int key_blocks = (f.keys + kM - 1) / kM, query_blocks = (f.queries + kN - 1) / kN;
  const int own_blocks = to.queries == 1 ? 1 : query_blocks;
  int rest = static_cast<int>(blockIdx.x);
  const int j0 = rest % key_blocks * kM;
  rest /= key_blocks;
  const int own_m = rest % own_blocks;
  rest /= own_blocks;
  const int own_h = rest % to.heads, own_b = rest / to.heads;
  ptx::grid_wait();
  ptx::grid_launch_next();

  // Steps: entries, heads and blocks of queries that share these sums.
  const int blocks = to.queries == 1 ? query_blocks : 1, heads = to.heads == 1 ? f.heads : 1;
  const int total = (to.batch == 1 ? f.batch : 1) * heads * blocks;
  struct Step {
    Job job;
    F32Pairs o;
    bool any;
  };
  const auto at_step = [&](int step) {
    Step s{};
    s.job.b = own_b + step / blocks / heads, s.job.h = own_h + step / blocks % heads;
    const AttentionSequence<int> at = attention_sequence(f.lengths, s.job.b, f.queries, f.keys);
    s.job.sight = attention_sight(f.mask, at, s.job.b);
    const int i0 = (own_m + step % blocks) * kN;
    s.o = {s.job.h, i0, min(i0 + kN, at.queries), j0, min(j0 + kM, at.keys)};
    s.any = s.o.i0 < s.o.i1 && s.o.j0 < s.o.j1 &&
            !s.job.sight.none(s.o.i0, s.o.i1, s.o.j0, s.o.j1) &&
            listed_block(f, s.o.h, s.o.i0, s.o.i1, s.o.j0, s.o.j1);
    return s;
  };
  const auto next = [&](int step) {
    while (step < total && !at_step(step).any) ++step;
    return step;
  };
  const int of_d = (f.d + kSlice - 1) / kSlice, of_dv = (f.dv + kSlice - 1) / kSlice;
  int step = next(0), ahead = step, slice = 0;
  const auto fetch_next = [&](char* stage) {
    if (ahead >= total) return;
    const Step s = at_step(ahead);
    const bool first = slice < of_d;
    const int c = (slice - (first ? 0 : of_d)) * kSlice, w = first ? f.d : f.dv;
    const View& of_q = first ? f.q : p.dout;
    const View& of_k = first ? f.k : f.v;
    fetch_slice<kM>(stage, of_k.at(s.job.b, j0, s.o.h / f.group), of_k.row, c, w, f.vectors,
                    [&](int row) { return j0 + row < s.o.j1; });
    fetch_slice<kN>(stage + kM * kSliceRow, of_q.at(s.job.b, s.o.i0, s.o.h), of_q.row, c, w,
                    f.vectors, [&](int row) { return s.o.i0 + row < s.o.i1; });
    if (++slice == of_d + of_dv) slice = 0, ahead = next(ahead + 1);
  };
  Slices<kF32Stage, decltype(fetch_next)> slices{reinterpret_cast<char*>(memory), fetch_next};
  slices.begin();

  float sums[kTiles][4] = {};
  const int warp_row = warp * 16;
  for (; step < total; step = next(step + 1)) {
    const Step at = at_step(step);
    float rS[kTiles][4] = {}, rDp[kTiles][4] = {};
    for (int s = 0; s < of_d; ++s) {
      const char* const stage = slices.next();
      multiply_rows(rS, stage + warp_row * kSliceRow, stage + kM * kSliceRow);
    }
    for (int s = 0; s < of_dv; ++s) {
      const char* const stage = slices.next();
      multiply_rows(rDp, stage + warp_row * kSliceRow, stage + kM * kSliceRow);
    }
    const std::int64_t first =
        (static_cast<std::int64_t>(at.job.b) * f.heads + at.job.h) * f.queries;
    const float slope =
        f.slopes.at(static_cast<std::int64_t>(at.job.b) * f.slopes_batch + at.job.h, 0.0f);
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = at.o.i0 + c * 8 + pair * 2 + e % 2, j = j0 + warp_row + quad + e / 2 * 8;
        if (i >= at.o.i1 || j >= at.o.j1) continue;
        f32_pair<true, false>(f, at.job, at.o.h, slope, i, j, p.rows[first + i], true, rS[c][e],
                              rDp[c][e]);
        sums[c][e] += rDp[c][e];
      }
    }
  }

  store_bias_gradient(f, to, own_b, own_h, own_m * kN, j0 + warp_row, sums);
}

}  // namespace fastkern::cuda::attention_detail
