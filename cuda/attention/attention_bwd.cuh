// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on tensor cores of a warp (sm_80 and later).
//
//   p = exp(s - lse)    dp = dout v^T    ds = p (dp - delta)
//   dv = p^T dout       dk = ds^T q      dq = ds k
//
//   work     a block has kN keys of one key head; it goes through the query heads that share them
//            and, kM at a time and the last ones first, through the queries that see them. kSplit
//            warps share kTiles * 16 keys: each has a part of the queries and of the columns of dk
//            and dv
//   memory   keys and values stay in shared memory, queries and dout go through a ring of two
//            stages; dk and dv stay in registers. Scores are transposed, keys x queries, so that p
//            and ds are in registers what the products with dout and q take; ds goes through shared
//            memory for dq. dq is summed in f32 in global memory, by additions in L2
//   sync     one barrier a stage, before which ds is written and after which dq is computed; p and
//            ds of the next stage go elsewhere. Blocks add to the same dq one after the other, by
//            their keys: a thread waits for the block before this one, another passes the turn on a
//            stage later, when what was added has long arrived. A block waits for blocks before it
//            alone, which have begun before it
//   cost     10 * S * T * D flops where all is seen; 4 bytes of dq added for 10 * kN flops
#pragma once

#include "attention/attention_bwd_blocks.cuh"
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"

namespace fastkern::cuda::attention_detail {

/// Whose turn is to be passed on.
struct Turn {
  int* at;  // nullptr: nobody's
};

/// Of shared memory.
constexpr int bwd_bytes(int columns, int queries, int keys, int split) {
  const int regions = split > 1 ? 3 : 2;
  return (2 * keys + 4 * queries) * columns * 2 + regions * keys * queries * 2 + 2 * queries * 8;
}

/// kTiles: of 16 keys, a warp. kSplit: warps that share them. kInstead: taken_somewhere().
template <class T, int kD, int kM, int kN, int kTiles, int kSplit, int kInstead, bool kExtras>
__global__ void __launch_bounds__(kN / 16 / kTiles * kSplit * 32, 1)
    attention_bwd_kernel(const __grid_constant__ Backward p) {
  if constexpr (!taken_somewhere<bwd_bytes(kD, kM, kN, kSplit), kInstead, kExtras>()) return;
  constexpr int kWarps = kN / 16 / kTiles * kSplit, kThreads = kWarps * 32;
  constexpr int kQueryTiles = kM / 8 / kSplit, kColumnTiles = kD / 8 / kSplit;
  constexpr int kTilesOfOwn = kM / 16 / kSplit;  // tiles of 16 queries of a warp
  // dq: a warp has kDqTiles tiles of 16 queries and kPartTiles of 8 columns.
  constexpr int kDqTiles = kD / 8 % (2 * kWarps / (kM / 16 / kTiles)) == 0 ? kTiles : 1;
  constexpr int kParts = kWarps / (kM / 16 / kDqTiles);
  constexpr int kPartTiles = kD / 8 / kParts;
  static_assert(kM % (16 * kDqTiles) == 0 && kWarps % (kM / 16 / kDqTiles) == 0);
  static_assert(kPartTiles % 2 == 0 && kQueryTiles % 2 == 0 && kColumnTiles % 2 == 0);
  using S = Swizzled<kD>;
  using D = Swizzled<kM>;
  constexpr int kRows = kM * kD * 2;  // bytes of a stage
  extern __shared__ __align__(128) uint4 memory[];
  char* const sK = reinterpret_cast<char*>(memory);
  char* const sV = sK + kN * kD * 2;
  char* const sQ = sV + kN * kD * 2;
  char* const sDout = sQ + 2 * kRows;
  // ds and, if warps share keys, p, keys x queries: by turns, as ds of a stage is read during the
  // next.
  constexpr int kRegion = kN * kM * 2, kRegions = kSplit > 1 ? 3 : 2;
  char* const sDs = sDout + 2 * kRows;
  float2* const sRows =
      reinterpret_cast<float2*>(sDs + kRegions * kRegion);  // two stages of lse and delta
  __shared__ KeyJob shared_job[1];
  __shared__ Turn behind[1];
  const Forward& f = p.f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;

  ptx::grid_wait();
  ptx::grid_launch_next();
  if (warp == 0) {
    const KeyJob found = key_job_of<kN>(p, draw_key_block(p));
    if (lane == 0) shared_job[0] = found, behind[0].at = nullptr;
  }
  __syncthreads();
  const KeyJob& k = shared_job[0];
  if (k.job.b < 0) return;

  // Blocks of queries that may see these keys, of all heads one after the other.
  const int n = k.j0 / kN;
  int m_begin = 0, m_end = 0;
  if (k.j1 > k.j0) {
    m_begin = k.job.sight.first_query(k.j0) / kM;
    m_end = (k.job.sight.last_query(k.j1, k.queries) + kM - 1) / kM;
  }
  const int total = max(m_end - m_begin, 0) * f.group;

  // Queries and dout of block m of query head h, to a stage.
  const auto fetch_queries = [&](int h, int m, int stage) {
    const int i0 = m * kM, rows = k.queries - i0;
    fetch<kM, kD, kThreads>(sQ + stage * kRows, f.q.at(k.job.b, k.job.first_q + i0, h), f.q.row,
                            rows, f.d, f.vectors);
    fetch<kM, kD, kThreads>(sDout + stage * kRows, p.dout.at(k.job.b, k.job.first_q + i0, h),
                            p.dout.row, rows, f.dv, f.vectors);
    if (threadIdx.x < kM) {
      const std::int64_t head =
          f.lengths.start_q ? h : static_cast<std::int64_t>(k.job.b) * f.heads + h;
      const int i = static_cast<int>(threadIdx.x);
      ptx::cp_async_8(sRows + stage * kM + i,
                      p.rows + (head * f.queries + k.job.first_q + i0 + min(i, rows - 1)),
                      i < rows ? 8 : 0);  // of a row that is not there, all is 0
    }
  };

  float rDk[kTiles][kColumnTiles][4], rDv[kTiles][kColumnTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rDk[t][c][e] = rDv[t][c][e] = 0.0f;
    }
  }
  const int share = warp % kSplit, warp_key = warp / kSplit * (kTiles * 16);
  const int dq_query = warp / kParts * (kDqTiles * 16), dq_part = warp % kParts * kPartTiles;
  // What is fetched next, and what is computed: the last queries first.
  int next_h = k.g * f.group, next_m = m_end - 1;
  const auto fetch_next = [&](int stage) {
    fetch_queries(next_h, next_m, stage);
    if (--next_m < m_begin) ++next_h, next_m = m_end - 1;
  };
  int h = next_h, m = next_m;
  if (total > 0) {
    const int rows = k.j1 - k.j0;
    fetch<kN, kD, kThreads>(sK, f.k.at(k.job.b, k.first_k + k.j0, k.g), f.k.row, rows, f.d,
                            f.vectors);
    fetch<kN, kD, kThreads>(sV, f.v.at(k.job.b, k.first_k + k.j0, k.g), f.v.row, rows, f.dv,
                            f.vectors);
    fetch_next(0);
    ptx::cp_async_commit();
    if (total > 1) fetch_next(1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
  }
  __syncthreads();
  // Keys and values as a; rows of q and dout as b; as b transposed; keys as b of dq; ds as a of dq.
  const ptx::SharedAddress key_address =
      ptx::shared_address(sK) + S::at(warp_key + (lane & 15), lane >> 4);
  const ptx::SharedAddress value_address = key_address + kN * kD * 2;
  const ptx::SharedAddress row_address =
      ptx::shared_address(sQ) +
      S::at(share * (kQueryTiles * 8) + (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const Columns<kD, kColumnTiles> columns(share);
  const ptx::SharedAddress column_address =
      columns.begin(ptx::shared_address(sQ) + S::at(lane & 15, lane >> 4));
  const Columns<kD, kPartTiles> dq_columns(warp % kParts);
  const ptx::SharedAddress dq_key_address =
      dq_columns.begin(ptx::shared_address(sK) + S::at(lane & 15, lane >> 4));
  const ptx::SharedAddress dq_ds_address =
      ptx::shared_address(sDs) +
      D::at((lane & 7) + (lane >> 4) * 8, dq_query / 8 + ((lane >> 3) & 1));

  // p and ds of these keys: a warp's own ones, and as a of the products with dout and q.
  static_assert((kQueryTiles & (kQueryTiles - 1)) == 0);
  const ptx::SharedAddress own_address =
      ptx::shared_address(sDs) + D::at(warp_key + quad, share * kQueryTiles) + pair * 4;
  const ptx::SharedAddress shared_keys_address =
      ptx::shared_address(sDs) + D::at(warp_key + (lane & 15), lane >> 4);
  const AttentionSight<int> sight = k.job.sight;
  const int queries = k.queries, key_end = k.j1, key_begin = k.j0;
  // To be called after a barrier after which there were additions.
  const auto pass_on = [&] {
    if (threadIdx.x == kThreads - 32 && behind[0].at) ptx::pass_on(behind[0].at);
  };
  for (int step = 0, region = 0; step < total; ++step) {
    const int stage = step & 1;
    const int i0 = m * kM, i1 = min(i0 + kM, queries);
    // Whether this block has a turn at these queries, and whether there is anything to compute.
    const int first = static_cast<unsigned>(sight.begin(i0)) / kN;
    const int last = static_cast<int>(static_cast<unsigned>(sight.end(i1) + kN - 1) / kN) - 1;
    const bool active = n >= first && n <= last;
    bool compute = active && !sight.none(i0, i1, key_begin, key_end);
    if constexpr (kExtras) compute = compute && listed_block(f, h, i0, i1, key_begin, key_end);
    const std::int64_t block =
        f.lengths.start_q
            ? static_cast<std::int64_t>(h) * p.blocks + k.job.first_q / kM + k.job.b + m
            : (static_cast<std::int64_t>(k.job.b) * f.heads + h) * p.blocks + m;
    int* const turn = p.turns + block;
    const bool waits = p.dq.data && active && n > first;
    int seen = 0;
    if (threadIdx.x == 0 && waits) seen = ptx::ld_global_relaxed(turn);
    if (compute) {  // of a query that saw nothing 0 times what there is may be NaN: make it 0
      bool dead = false;
#pragma unroll
      for (int i = 0; i < kM; i += 32) dead |= sRows[stage * kM + i + lane].x == INFINITY;
      if (__ballot_sync(~0u, dead)) {
        for (int e = threadIdx.x; e < kM * S::kChunks; e += kThreads) {
          const int row = e / S::kChunks, at = stage * kRows + S::at(row, e % S::kChunks);
          if (sRows[stage * kM + row].x != INFINITY) continue;
          *reinterpret_cast<uint4*>(sQ + at) = uint4{};
          *reinterpret_cast<uint4*>(sDout + at) = uint4{};
        }
        __syncthreads();
      }
    }
    if (compute) {
      float rS[kTiles][kQueryTiles][4], rDp[kTiles][kQueryTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int c = 0; c < kQueryTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) rS[t][c][e] = rDp[t][c][e] = 0.0f;
        }
      }
      // Both products, operands loaded one tile of 16 columns ahead.
      std::uint32_t rA[2][kTiles][4], rB[2][kQueryTiles / 2][4];
      const auto load = [&](int at) {
        const int of_dp = at / (kD / 16), kk = at % (kD / 16);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          ptx::ldmatrix_4(rA[at % 2][t],
                          S::right(of_dp ? value_address : key_address, kk) + t * (16 * kD * 2));
        }
#pragma unroll
        for (int c = 0; c < kQueryTiles; c += 2) {
          ptx::ldmatrix_4(
              rB[at % 2][c / 2],
              S::right(row_address + (2 * of_dp + stage) * kRows, kk) + c * (8 * kD * 2));
        }
      };
      load(0);
#pragma unroll
      for (int at = 0; at < kD / 8; ++at) {
        if (at + 1 < kD / 8) load(at + 1);
#pragma unroll
        for (int c = 0; c < kQueryTiles; ++c) {
          const std::uint32_t* const b = &rB[at % 2][c / 2][c % 2 * 2];
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            ptx::mma_16x8x16(at < kD / 16 ? rS[t][c] : rDp[t][c], rA[at % 2][t], b[0], b[1], T{});
          }
        }
      }

      if (!kExtras && !sight.all(i0, i1, key_begin, key_begin + kN)) {
        const int j = key_begin + warp_key + quad;
#pragma unroll
        for (int c = 0; c < kQueryTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = i0 + (share * kQueryTiles + c) * 8 + pair * 2 + e;
            const int from = sight.low(i) - j, to = sight.high(i) - j;
#pragma unroll
            for (int x = 0; x < 2 * kTiles; ++x) {
              if (x * 8 < from || x * 8 >= to) rS[x / 2][c][x % 2 * 2 + e] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kQueryTiles; ++c) {
        const int query = (share * kQueryTiles + c) * 8 + pair * 2;
        const float4 of_rows = *reinterpret_cast<const float4*>(sRows + stage * kM + query);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float &s = rS[t][c][e], &dp = rDp[t][c][e];
            const float minus = e % 2 ? of_rows.z : of_rows.x;
            const float delta = e % 2 ? of_rows.w : of_rows.y;
            const int i = i0 + query + e % 2, j = key_begin + warp_key + t * 16 + quad + e / 2 * 8;
            if constexpr (kExtras) {
              float capped = 0.0f;
              const float slope =
                  f.slopes.at(static_cast<std::int64_t>(k.job.b) * f.slopes_batch + h, 0.0f);
              const float score = i < i1 && j < key_end
                                      ? score_of(f, k.job, h, slope, i, j, s, &capped)
                                      : -INFINITY;
              const float probability = ptx::exp2_approx(score - minus);
              const float slope_of_cap = f.softcap > 0.0f ? 1.0f - capped * capped : 1.0f;
              const float factor =
                  f.dropout.threshold > 0 ? dropout_factor(f, k.job.b, h, i, j) : 1.0f;
              s = probability * factor;
              dp = probability * (dp * factor - delta) * slope_of_cap;
            } else {
              s = ptx::exp2_approx(fmaf(s, f.scale_log2, -minus));
              dp = s * (dp - delta);
            }
          }
        }
      }

      const int p_region = region + 1 < kRegions ? region + 1 : 0;
      const ptx::SharedAddress to_ds = own_address + region * kRegion;
      const ptx::SharedAddress to_p = own_address + p_region * kRegion;
      // To shared memory, keys x queries: ds for dq, and both for the warps that share these keys.
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int c = 0; c < kQueryTiles; ++c) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = (t * 16 + half * 8) * (kM * 2);
            ptx::st_shared_4((to_ds ^ c * 16) + at,
                             ptx::pack_2(rDp[t][c][half * 2], rDp[t][c][half * 2 + 1], T{}));
            if constexpr (kSplit > 1) {
              ptx::st_shared_4((to_p ^ c * 16) + at,
                               ptx::pack_2(rS[t][c][half * 2], rS[t][c][half * 2 + 1], T{}));
            }
          }
        }
      }
      const ptx::SharedAddress aQ = column_address + stage * kRows, aDout = aQ + 2 * kRows;
      const auto accumulate = [&](const std::uint32_t (&rP)[kTiles][4],
                                  const std::uint32_t (&rDs)[kTiles][4], int kk) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; c += 2) {
          std::uint32_t rB[4];
          ptx::ldmatrix_4_transposed(rB, columns.at(aDout, c) + kk * (16 * kD * 2));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            ptx::mma_16x8x16(rDv[t][c], rP[t], rB[0], rB[1], T{});
            ptx::mma_16x8x16(rDv[t][c + 1], rP[t], rB[2], rB[3], T{});
          }
          ptx::ldmatrix_4_transposed(rB, columns.at(aQ, c) + kk * (16 * kD * 2));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            ptx::mma_16x8x16(rDk[t][c], rDs[t], rB[0], rB[1], T{});
            ptx::mma_16x8x16(rDk[t][c + 1], rDs[t], rB[2], rB[3], T{});
          }
        }
      };
#pragma unroll
      for (int own = 0; own < kTilesOfOwn; ++own) {
        std::uint32_t rP[kTiles][4], rDs[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = 2 * own + e / 2, at = e % 2 * 2;
            rP[t][e] = ptx::pack_2(rS[t][c][at], rS[t][c][at + 1], T{});
            rDs[t][e] = ptx::pack_2(rDp[t][c][at], rDp[t][c][at + 1], T{});
          }
        }
        accumulate(rP, rDs, share * kTilesOfOwn + own);
      }
      if constexpr (kSplit > 1) {
        ptx::bar_sync(2 + warp / kSplit, kSplit * 32);
#pragma unroll
        for (int other = kTilesOfOwn; other < kM / 16; ++other) {
          const int kk = (share * kTilesOfOwn + other) % (kM / 16);
          std::uint32_t rP[kTiles][4], rDs[kTiles][4];
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const ptx::SharedAddress from = D::right(shared_keys_address, kk) + t * (16 * kM * 2);
            ptx::ldmatrix_4(rP[t], from + p_region * kRegion);
            ptx::ldmatrix_4(rDs[t], from + region * kRegion);
          }
          accumulate(rP, rDs, kk);
        }
      }
    }
    if (threadIdx.x == 0 && waits) {
      // Additions in L2 come after those of whoever counted up; reading takes more.
      while (seen < n - first) seen = ptx::ld_global_relaxed(turn);
      if (n == last) ptx::fence_acquire();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (p.dq.data) {
      pass_on();
      if (threadIdx.x == kThreads - 32) behind[0].at = active && n < last ? turn : nullptr;
    }
    if (step + 2 < total) fetch_next(stage);
    ptx::cp_async_commit();
    const int of_h = h;
    if (--m < m_begin) ++h, m = m_end - 1;
    const ptx::SharedAddress of_ds = dq_ds_address + region * kRegion;
    region = region + 1 < kRegions ? region + 1 : 0;
    if (!active || !p.dq.data) continue;

    float4* const sums = reinterpret_cast<float4*>(p.dq_sums + block * (kM * kD)) +
                         warp * (kDqTiles * kPartTiles * 32) + lane;
    // What was added before, asked for before the products if registers are left for it.
    constexpr bool kAhead = kDqTiles * kPartTiles <= 8;
    float4 before[kDqTiles * kPartTiles];
    const auto load_before = [&] {
      if (n < last || n == first) return;
#pragma unroll
      for (int c = 0; c < kDqTiles * kPartTiles; ++c) before[c] = ptx::ld_global_cg(sums + c * 32);
    };
    if (kAhead) load_before();
    float rDq[kDqTiles][kPartTiles][4];
#pragma unroll
    for (int t = 0; t < kDqTiles; ++t) {
#pragma unroll
      for (int c = 0; c < kPartTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rDq[t][c][e] = 0.0f;
      }
    }
    if (compute) {
      std::uint32_t rDs[2][kDqTiles][4], rK[2][kPartTiles / 2][4];
      const auto load = [&](int kk) {
#pragma unroll
        for (int t = 0; t < kDqTiles; ++t)
          ptx::ldmatrix_4_transposed(rDs[kk % 2][t], D::right(of_ds, t) + kk * (16 * kM * 2));
#pragma unroll
        for (int c = 0; c < kPartTiles; c += 2) {
          ptx::ldmatrix_4_transposed(rK[kk % 2][c / 2],
                                     dq_columns.at(dq_key_address, c) + kk * (16 * kD * 2));
        }
      };
      load(0);
#pragma unroll
      for (int kk = 0; kk < kN / 16; ++kk) {
        if (kk + 1 < kN / 16) load(kk + 1);
#pragma unroll
        for (int c = 0; c < kPartTiles; ++c) {
          const std::uint32_t* const b = &rK[kk % 2][c / 2][c % 2 * 2];
#pragma unroll
          for (int t = 0; t < kDqTiles; ++t)
            ptx::mma_16x8x16(rDq[t][c], rDs[kk % 2][t], b[0], b[1], T{});
        }
      }
    }
    const auto each_sum = [&](auto&& f) {
#pragma unroll
      for (int t = 0; t < kDqTiles; ++t) {
#pragma unroll
        for (int c = 0; c < kPartTiles; ++c) f(rDq[t][c], t * kPartTiles + c);
      }
    };
    if (n < last) {
      if (n == first) {
        each_sum([&](const float (&v)[4], int c) {
          ptx::st_global_cg(sums + c * 32, make_float4(v[0], v[1], v[2], v[3]));
        });
      } else if (compute) {
        each_sum([&](const float (&v)[4], int c) {
          ptx::red_add_global(sums + c * 32, make_float4(v[0], v[1], v[2], v[3]));
        });
      }
      continue;
    }
    if (n > first) {
      if (!kAhead) load_before();
      each_sum([&](float (&v)[4], int c) {
        v[0] += before[c].x, v[1] += before[c].y, v[2] += before[c].z, v[3] += before[c].w;
      });
    }
#pragma unroll
    for (int t = 0; t < kDqTiles; ++t) {
      store_rows(p.dq, p.fours, k.job.b, k.job.first_q + i0, of_h, dq_query + t * 16, i1 - i0,
                 dq_part * 8, f.d, f.scale, rDq[t], T{});
    }
  }
  __syncthreads();
  pass_on();

#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int first = warp_key + t * 16, column = share * (kColumnTiles * 8);
    if (p.dk.data) {
      store_rows(p.dk, p.fours, k.job.b, k.first_k + key_begin, k.g, first, k.stored, column, f.d,
                 f.scale, rDk[t], T{});
    }
    if (p.dv.data) {
      store_rows(p.dv, p.fours, k.job.b, k.first_k + key_begin, k.g, first, k.stored, column, f.dv,
                 1.0f, rDv[t], T{});
    }
  }
}

}  // namespace fastkern::cuda::attention_detail
