// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper (sm_90a), above 128 columns: dk and dv.
//
//   work     a block of threads per 64 keys of one key head, against the query heads that share
//   them
//            and, 64 at a time and the last ones first, the queries that see them
//   split    the first warpgroup that computes has dv, from the scores, which it computes; the
//            second has dk, from dp, which it computes, and p, which the first one leaves in shared
//            memory in f32. All of it is transposed, keys x queries: p and ds are in registers what
//            the products with dout and q take as their left side
//   memory   keys and values stay in shared memory; queries and dout go through rings of kStages
//   overlap  a warpgroup computes p or ds during products of the other. The first one is ahead
//   warps    of the first warpgroup: 0 has everything fetched, 3 fetches lse and delta
//   sync     barrier          who arrives             who waits
//            keys_there, ...  copy engine, warp 0     the warpgroup that takes them
//            query_there,     copy engine, warp 0     who computes, warp 3
//            dout_there
//            rows_there       warp 3                  who computes: lse and delta, and rows that
//            saw
//                                                     nothing are zeros
//            query_free       who computes            warps 0 and 3: queries, lse, delta
//            dout_free        who computes            warp 0
//            p_there          the first warpgroup     the second
//            p_free           the second              the first
//   cost     8 * S * T * D flops where all is seen
#pragma once

#include "attention/attention_hopper_bwd_wide.cuh"
#include "attention/attention_hopper_scores.cuh"

namespace fastkern::cuda::attention_detail {

template <int kColumns, int kValueColumns, int kBlocks, bool kIssueAhead>
struct HopperKeysTile {
  static constexpr bool kAhead = kIssueAhead;
  static constexpr int kD = kColumns, kDv = kValueColumns, kStages = kBlocks, kM = 64, kN = 64;
  static constexpr int kThreads = 384, kRegisters = 240, kOtherRegisters = 24;
};

template <class Tile>
struct HopperKeysShared {
  static constexpr int kQuery = panels_of(Tile::kD) * kWidePanel;
  static constexpr int kDout = panels_of(Tile::kDv) * kWidePanel;

  alignas(1024) char keys[kQuery];
  alignas(1024) char values[kDout];
  alignas(1024) char query[Tile::kStages][kQuery];
  alignas(1024) char dout[Tile::kStages][kDout];
  alignas(16) float p[2][64 * 64];  // four of each thread at a time
  float lse[Tile::kStages][64], delta[Tile::kStages][64];
  std::uint64_t keys_there, values_there;
  std::uint64_t query_there[Tile::kStages], dout_there[Tile::kStages], rows_there[Tile::kStages];
  std::uint64_t query_free[Tile::kStages], dout_free[Tile::kStages];
  std::uint64_t p_there[2], p_free[2];
  HopperBwdJob job;
};

template <class Tile>
__device__ __forceinline__ void fetch_hopper_keys(const HopperBwdWide& all,
                                                  HopperKeysShared<Tile>& shared) {
  const HopperBwdJob& found = shared.job;
  const KeyJob& job = found.job;
  const int entry = all.p.f.lengths.start_q ? 0 : job.job.b;
  HopperMeetings<Tile> next(all.p, found);
  const int count = next.count();
  for (int t = 0; t < count; ++t, ++next) {
    const int stage = t % Tile::kStages, row = job.job.first_q + next.m * Tile::kM;
    const std::uint32_t parity = (t / Tile::kStages & 1) ^ 1;
    if (t == 0) {
      fetch_wide<Tile::kD>(shared.keys, &all.k, job.first_k + job.j0, job.g, entry,
                           &shared.keys_there, ptx::Keep::shortly);
    }
    ptx::mbarrier_wait(&shared.query_free[stage], parity);
    fetch_wide<Tile::kD>(shared.query[stage], &all.q, row, next.h, entry,
                         &shared.query_there[stage], ptx::Keep::long_);
    if (t == 0) {
      fetch_wide<Tile::kDv>(shared.values, &all.v, job.first_k + job.j0, job.g, entry,
                            &shared.values_there, ptx::Keep::shortly);
    }
    ptx::mbarrier_wait(&shared.dout_free[stage], parity);
    fetch_wide<Tile::kDv>(shared.dout[stage], &all.dout, row, next.h, entry,
                          &shared.dout_there[stage], ptx::Keep::long_);
  }
}

/// lse and delta; a warp.
template <class Tile>
__device__ __forceinline__ void fetch_hopper_keys_rows(const Backward& p,
                                                       HopperKeysShared<Tile>& shared) {
  const HopperBwdJob& found = shared.job;
  const KeyJob& job = found.job;
  const int lane = threadIdx.x % 32;
  HopperMeetings<Tile> next(p, found);
  const int count = next.count();
  for (int t = 0; t < count; ++t, ++next) {
    const int stage = t % Tile::kStages;
    const std::uint32_t parity = t / Tile::kStages & 1;
    const std::int64_t head =
        p.f.lengths.start_q ? next.h : static_cast<std::int64_t>(job.job.b) * p.f.heads + next.h;
    const float2* const from = p.rows + (head * p.f.queries + job.job.first_q + next.m * Tile::kM);
    const int rows = job.queries - next.m * Tile::kM;
    float2 row[2];  // on their way while others still read the ones before
    bool dead = false;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = lane + k * 32;
      row[k] = i < rows ? from[i] : make_float2(INFINITY, 0.0f);
      dead |= row[k].x == INFINITY;
    }
    ptx::mbarrier_wait(&shared.query_free[stage], parity ^ 1);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      shared.lse[stage][lane + k * 32] = row[k].x, shared.delta[stage][lane + k * 32] = row[k].y;
    }
    // Of a query that saw nothing, or is not there, 0 times what there is may be NaN: make it 0.
    if (__any_sync(~0u, dead)) {
      __syncwarp();  // what other lanes wrote
      ptx::mbarrier_wait(&shared.query_there[stage], parity);
      ptx::mbarrier_wait(&shared.dout_there[stage], parity);
      const auto clear = [&](char* panels, int bytes) {
        for (int at = lane * 16; at < bytes; at += 512) {
          if (shared.lse[stage][at / kPanelRow % 64] != INFINITY) continue;
          *reinterpret_cast<uint4*>(panels + at) = uint4{};
        }
      };
      clear(shared.query[stage], HopperKeysShared<Tile>::kQuery);
      clear(shared.dout[stage], HopperKeysShared<Tile>::kDout);
      ptx::fence_async();
    }
    ptx::mbarrier_arrive(&shared.rows_there[stage]);  // every lane: each has written
  }
}

/// kChanges: there is a soft cap or ALiBi. kStores: ds is left in memory, for dq.
template <class T, class Tile, bool kChanges, bool kStores>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_bwd_keys_kernel(const __grid_constant__ HopperBwdWide all) {
  using Shared = HopperKeysShared<Tile>;
  constexpr int kD = Tile::kD, kDv = Tile::kDv, kM = Tile::kM, kStages = Tile::kStages;
  extern __shared__ __align__(1024) char hopper_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(hopper_memory);
  const Backward& p = all.p;

  const int block_warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int warpgroup = block_warp / 4;
  if (threadIdx.x == 32) {
    ptx::prefetch_map(&all.q);
    ptx::prefetch_map(&all.k);
    ptx::prefetch_map(&all.v);
    ptx::prefetch_map(&all.dout);
    ptx::mbarrier_init(&shared.keys_there, 1);
    ptx::mbarrier_init(&shared.values_there, 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.query_there[s], 1);
      ptx::mbarrier_init(&shared.dout_there[s], 1);
      ptx::mbarrier_init(&shared.rows_there[s], 32);
      ptx::mbarrier_init(&shared.query_free[s], 8);
      ptx::mbarrier_init(&shared.dout_free[s], 8);
    }
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&shared.p_there[s], 4);
      ptx::mbarrier_init(&shared.p_free[s], 4);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (block_warp == 0) {
    const KeyJob found = key_job_of<Tile::kN>(p, static_cast<int>(blockIdx.x) + all.first_key_tile);
    if (threadIdx.x == 0) {
      shared.job.job = found;
      find_hopper_bwd_queries<Tile>(shared.job);
    }
  }
  __syncthreads();
  const HopperBwdJob& found = shared.job;
  const KeyJob& job = found.job;
  if (job.job.b < 0) return;

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (threadIdx.x == 0) fetch_hopper_keys<Tile>(all, shared);
    if (block_warp == 3) fetch_hopper_keys_rows<Tile>(p, shared);
    return;
  }
  ptx::registers_take<Tile::kRegisters>();
  const int thread = static_cast<int>(threadIdx.x % 128u), lane = thread % 32, warp = thread / 32;
  const int quad = lane / 4, pair = lane % 4;
  const auto arrive = [&](std::uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  };
  const ptx::SharedAddress aQ = ptx::shared_address(shared.query);
  const ptx::SharedAddress aDout = ptx::shared_address(shared.dout);
  const int row = job.first_k + job.j0, keys = job.j1 - job.j0;
  HopperMeetings<Tile> next(p, found);
  const int count = next.count();
  // Keys beyond the sequence have seen who knows what.
  const auto store = [&](auto& d, const View& to, int width, float scale) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(d) / 4); ++i) {
      if (warp * 16 + quad + i / 2 % 2 * 8 >= keys) d[i] = 0.0f;
    }
    store_rows(to, p.fours, job.job.b, row, job.g, warp * 16, job.stored, 0, width, scale,
               reinterpret_cast<const float (&)[sizeof(d) / 16][4]>(d), T{});
  };

  if (warpgroup == 1) {
    const float scale_log2 = p.f.scale_log2;
    const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
    float rDv[kDv / 2], rS[kM / 2];
    std::uint32_t rP[kM / 16][4];
#pragma unroll
    for (int i = 0; i < kDv / 2; ++i) rDv[i] = 0.0f;
    ptx::registers_arrived(rDv);
    const auto issue_scores = [&](int t) {
      const int stage = t % kStages;
      ptx::mbarrier_wait(&shared.rows_there[stage], t / kStages & 1);
      ptx::mbarrier_wait(&shared.query_there[stage], t / kStages & 1);
      issue_wide_scores<kD>(rS, aK, aQ + stage * Shared::kQuery, T{});
    };
    const auto issue_dv = [&](int t) {
      const int stage = t % kStages;
      ptx::mbarrier_wait(&shared.dout_there[stage], t / kStages & 1);
      issue_wide_gradient(rDv, rP, aDout + stage * Shared::kDout, T{});
      ptx::wgmma_commit();
    };
    const auto complete_dv = [&](int t) {
      ptx::wgmma_wait<0>();
      ptx::registers_arrived(rDv);
      arrive(&shared.dout_free[t % kStages]);
    };
    float rCap[kChanges ? kM / 2 : 1];
    const auto make_p = [&](int t) {
      const int stage = t % kStages, i0 = next.m * kM, i1 = min(i0 + kM, job.queries);
      const AttentionSight<int> sight = job.job.sight;
      if constexpr (kChanges) {
        const float slope =
            all.over_scale *
            p.f.slopes.at(static_cast<std::int64_t>(job.job.b) * p.f.slopes_batch + next.h, 0.0f);
        const int distance = i0 + pair * 2 + sight.shift - job.j0 - warp * 16 - quad;
#pragma unroll
        for (int i = 0; i < kM / 2; ++i) {
          rCap[i] = 1.0f;
          rS[i] = hopper_bwd_score(all, slope, rS[i], distance + i / 4 * 8 + i % 2 - i / 2 % 2 * 8,
                                   rCap[i]);
        }
      }
      if (!sight.all(i0, i1, job.j0, job.j0 + Tile::kN)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Of the thread's queries, each so far from its first, key j is seen by these.
          const int j = job.j0 + warp * 16 + quad + half * 8, first = i0 + pair * 2;
          const int from = j - sight.window_end + 1 - first;
          const int to = j < sight.keys ? j - sight.window_begin + 1 - first : from;
#pragma unroll
          for (int c = 0; c < kM / 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (c * 8 + e < from || c * 8 + e >= to) rS[c * 4 + half * 2 + e] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kM / 8; ++c) {
        const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[stage][c * 8 + pair * 2]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& s = rS[c * 4 + e];
          s = ptx::exp2_approx(fmaf(s, scale_log2, -(e % 2 ? lse.y : lse.x)));
        }
      }
      ++next;
    };
    const auto give_p = [&](int t) {
      ptx::mbarrier_wait(&shared.p_free[t & 1], (t >> 1 & 1) ^ 1);
      float4* const own = reinterpret_cast<float4*>(shared.p[t & 1]) + thread;
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          v[e] = rS[i * 4 + e];
          if constexpr (kChanges) v[e] *= rCap[i * 4 + e];
        }
        own[i * 128] = make_float4(v[0], v[1], v[2], v[3]);
      }
      __syncwarp();
      arrive(&shared.p_there[t & 1]);
      arrive(&shared.query_free[t % kStages]);
    };
    if (count > 0) {
      ptx::mbarrier_wait(&shared.keys_there, 0);
      issue_scores(0);
      ptx::wgmma_wait<0>();
      ptx::registers_arrived(rS);
      make_p(0);
      if constexpr (Tile::kAhead) {
        give_p(0);
        pack_wide(rP, rS, T{});
        for (int t = 1; t < count; ++t) {
          issue_scores(t);
          issue_dv(t - 1);
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rS);
          make_p(t);
          give_p(t);
          complete_dv(t - 1);
          pack_wide(rP, rS, T{});
        }
        issue_dv(count - 1);
        complete_dv(count - 1);
      } else {
        for (int t = 0; t + 1 < count; ++t) {
          pack_wide(rP, rS, T{});
          issue_dv(t);
          give_p(t);
          issue_scores(t + 1);
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rDv);
          arrive(&shared.dout_free[t % kStages]);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rS);
          make_p(t + 1);
        }
        pack_wide(rP, rS, T{});
        issue_dv(count - 1);
        give_p(count - 1);
        complete_dv(count - 1);
      }
    }
    store(rDv, p.dv, p.f.dv, 1.0f);
  } else {
    const ptx::SharedAddress aV = ptx::shared_address(shared.values);
    float rDk[kD / 2], rDp[kM / 2];
    std::uint32_t rDs[kM / 16][4];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) rDk[i] = 0.0f;
    ptx::registers_arrived(rDk);
    const auto issue_dp = [&](int t) {
      const int stage = t % kStages;
      ptx::mbarrier_wait(&shared.rows_there[stage], t / kStages & 1);
      ptx::mbarrier_wait(&shared.dout_there[stage], t / kStages & 1);
      issue_wide_scores<kDv>(rDp, aV, aDout + stage * Shared::kDout, T{});
    };
    const auto make_ds = [&](int t) {
      const int stage = t % kStages;
      arrive(&shared.dout_free[stage]);
      ptx::mbarrier_wait(&shared.p_there[t & 1], t >> 1 & 1);
      const float4* const its = reinterpret_cast<const float4*>(shared.p[t & 1]) + thread;
#pragma unroll
      for (int c = 0; c < kM / 8; ++c) {
        const float2 delta =
            *reinterpret_cast<const float2*>(&shared.delta[stage][c * 8 + pair * 2]);
        const float4 of_p = its[c * 128];
        rDp[c * 4] = of_p.x * (rDp[c * 4] - delta.x);
        rDp[c * 4 + 1] = of_p.y * (rDp[c * 4 + 1] - delta.y);
        rDp[c * 4 + 2] = of_p.z * (rDp[c * 4 + 2] - delta.x);
        rDp[c * 4 + 3] = of_p.w * (rDp[c * 4 + 3] - delta.y);
      }
      __syncwarp();
      arrive(&shared.p_free[t & 1]);
    };
    char* to_ds = nullptr;  // this lane's part of the first block of queries that this thread meets
    if constexpr (kStores) {
      const int head = job.job.b * p.f.heads + next.h - all.first_head;
      to_ds = wide_ds_tile(all, head, 0, job.j0 / Tile::kN) + (warp * 16 + quad) * kPanelRow;
    }
    const auto store_ds = [&] {
      if constexpr (kStores) {
        char* const to = to_ds + next.m * all.ds_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const std::uint32_t words[4] = {rDs[c * 2][half], rDs[c * 2][half + 2],
                                            rDs[c * 2 + 1][half], rDs[c * 2 + 1][half + 2]};
            ptx::st_global(to + half * (8 * kPanelRow) + ((c * 4 + pair) ^ quad) * 16,
                           transposed_4(words, lane));
          }
        }
        const int h = next.h;
        ++next;
        if (next.h != h) to_ds += all.ds_head;
      }
    };
    const auto issue_dk = [&](int t) {
      const int stage = t % kStages;
      ptx::mbarrier_wait(&shared.query_there[stage], t / kStages & 1);
      issue_wide_gradient(rDk, rDs, aQ + stage * Shared::kQuery, T{});
      ptx::wgmma_commit();
    };
    const auto complete_dk = [&](int t) {
      ptx::wgmma_wait<0>();
      ptx::registers_arrived(rDk);
      arrive(&shared.query_free[t % kStages]);
    };
    if (count > 0) {
      ptx::mbarrier_wait(&shared.values_there, 0);
      issue_dp(0);
      ptx::wgmma_wait<0>();
      ptx::registers_arrived(rDp);
      make_ds(0);
      pack_wide(rDs, rDp, T{});
      store_ds();
      for (int t = 1; t < count; ++t) {
        if constexpr (Tile::kAhead) {
          issue_dp(t);
          issue_dk(t - 1);
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rDp);
          make_ds(t);
          complete_dk(t - 1);
        } else {
          issue_dk(t - 1);
          issue_dp(t);
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rDk);
          arrive(&shared.query_free[(t - 1) % kStages]);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rDp);
          make_ds(t);
        }
        pack_wide(rDs, rDp, T{});
        store_ds();
      }
      issue_dk(count - 1);
      complete_dk(count - 1);
    }
    store(rDk, p.dk, p.f.d, p.f.scale);
  }
}

}  // namespace fastkern::cuda::attention_detail
