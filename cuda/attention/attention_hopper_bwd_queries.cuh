// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper (sm_90a), above 128 columns: dq.
//
//   work     a block of threads per 128 queries of one head, 64 a warpgroup, against the keys that
//            they see, 64 at a time; under a causal mask the longest ones first
//   memory   queries and dout stay in shared memory, keys and values go through rings; dq stays in
//            registers, and so does ds, the left side of the product with keys
//   overlap  a warpgroup computes p and ds during products of the other
//   warps    the first one has everything fetched
//   sync     barrier          who arrives             who waits
//            query_there,     copy engine, warp 0     the warpgroup whose they are
//            dout_there
//            keys_there, ...  copy engine, warp 0     who computes
//            keys_free, ...   who computes            warp 0
//   cost     6 * S * T * D flops where all is seen
#pragma once

#include "attention/attention_hopper_bwd_wide.cuh"

namespace fastkern::cuda::attention_detail {

template <int kColumns, int kValueColumns, int kKeyBlocks, int kValueBlocks, bool kIssueAhead>
struct HopperQueriesTile {
  static constexpr bool kAhead = kIssueAhead;  // in turn, then
  static constexpr int kD = kColumns, kDv = kValueColumns, kM = 128, kN = 64, kGroups = 2;
  static constexpr int kKeyStages = kKeyBlocks, kValueStages = kValueBlocks;
  static constexpr int kThreads = 384, kRegisters = 240, kOtherRegisters = 24;
};

template <class Tile>
struct HopperQueriesShared {
  static constexpr int kKeys = panels_of(Tile::kD) * kWidePanel;
  static constexpr int kValues = panels_of(Tile::kDv) * kWidePanel;

  alignas(1024) char query[2][kKeys];  // of each warpgroup
  alignas(1024) char dout[2][kValues];
  alignas(1024) char keys[Tile::kKeyStages][kKeys];
  alignas(1024) char values[Tile::kValueStages][kValues];
  std::uint64_t query_there[2], dout_there[2];
  std::uint64_t keys_there[Tile::kKeyStages], keys_free[Tile::kKeyStages];
  std::uint64_t values_there[Tile::kValueStages], values_free[Tile::kValueStages];
  HopperJob job;
  HopperSeen seen[2];  // by each warpgroup
};

template <class Tile>
__device__ __forceinline__ void fetch_hopper_queries(const HopperBwdWide& all,
                                                     HopperQueriesShared<Tile>& shared) {
  const HopperJob& job = shared.job;
  const Forward& f = all.p.f;
  const int entry = f.lengths.start_q ? 0 : job.b, g = job.h / f.group;
  const int row = job.first_q + job.i0;
  const auto fetch_keys = [&](int t) {
    const int stage = t % Tile::kKeyStages;
    ptx::mbarrier_wait(&shared.keys_free[stage], (t / Tile::kKeyStages & 1) ^ 1);
    fetch_wide<Tile::kD>(shared.keys[stage], &all.k, job.first_k + (job.begin + t) * Tile::kN, g,
                         entry, &shared.keys_there[stage], ptx::Keep::long_);
  };
  const auto fetch_values = [&](int t) {
    const int stage = t % Tile::kValueStages;
    ptx::mbarrier_wait(&shared.values_free[stage], (t / Tile::kValueStages & 1) ^ 1);
    fetch_wide<Tile::kDv>(shared.values[stage], &all.v, job.first_k + (job.begin + t) * Tile::kN, g,
                          entry, &shared.values_there[stage], ptx::Keep::long_);
  };
  const int count = job.end - job.begin;
  for (int t = 0; t < count; ++t) {
    if (t == 0) {
      fetch_wide<Tile::kD>(shared.query[0], &all.q, row, job.h, entry, &shared.query_there[0],
                           ptx::Keep::shortly);
    }
    fetch_keys(t);
    if (t == 0) {
      fetch_wide<Tile::kDv>(shared.dout[0], &all.dout, row, job.h, entry, &shared.dout_there[0],
                            ptx::Keep::shortly);
    }
    fetch_values(t);
    if (t == 0) {
      fetch_wide<Tile::kD>(shared.query[1], &all.q, row + 64, job.h, entry, &shared.query_there[1],
                           ptx::Keep::shortly);
      fetch_wide<Tile::kDv>(shared.dout[1], &all.dout, row + 64, job.h, entry,
                            &shared.dout_there[1], ptx::Keep::shortly);
    }
  }
}

/// kChanges: there is a soft cap or ALiBi.
template <class T, class Tile, bool kChanges>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_bwd_queries_kernel(const __grid_constant__ HopperBwdWide all) {
  using Shared = HopperQueriesShared<Tile>;
  constexpr int kD = Tile::kD, kDv = Tile::kDv, kN = Tile::kN;
  constexpr int kKeyStages = Tile::kKeyStages, kValueStages = Tile::kValueStages;
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
    for (int g = 0; g < 2; ++g) {
      ptx::mbarrier_init(&shared.query_there[g], 1);
      ptx::mbarrier_init(&shared.dout_there[g], 1);
    }
    for (int s = 0; s < kKeyStages; ++s) {
      ptx::mbarrier_init(&shared.keys_there[s], 1);
      ptx::mbarrier_init(&shared.keys_free[s], 8);
    }
    for (int s = 0; s < kValueStages; ++s) {
      ptx::mbarrier_init(&shared.values_there[s], 1);
      ptx::mbarrier_init(&shared.values_free[s], 8);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (block_warp == 0) {
    const HopperJob found = hopper_job<Tile>(p.f, all.schedule, static_cast<int>(blockIdx.x));
    if (threadIdx.x == 0) shared.job = found;
    if (threadIdx.x < 2) shared.seen[threadIdx.x] = hopper_seen<Tile>(found, threadIdx.x, 0);
  }
  __syncthreads();
  const HopperJob& job = shared.job;
  if (job.b < 0 || job.i1 <= job.i0) return;

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (threadIdx.x == 0) fetch_hopper_queries<Tile>(all, shared);
    return;
  }
  ptx::registers_take<Tile::kRegisters>();
  const int group = warpgroup - 1;
  const int thread = static_cast<int>(threadIdx.x % 128u), lane = thread % 32, warp = thread / 32;
  const int quad = lane / 4, pair = lane % 4;
  const auto arrive = [&](std::uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  };
  const ptx::SharedAddress aQ = ptx::shared_address(shared.query[group]);
  const ptx::SharedAddress aDout = ptx::shared_address(shared.dout[group]);
  const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
  const ptx::SharedAddress aV = ptx::shared_address(shared.values);
  const float scale_log2 = p.f.scale_log2;
  const int own = job.i0 + group * 64 + warp * 16 + quad;
  // There, as registers are few.
  const HopperSeen& seen = shared.seen[group];
  const AttentionSight<int>& sight = job.sight;
  float slope = 0.0f;
  if constexpr (kChanges) {
    slope = all.over_scale *
            p.f.slopes.at(static_cast<std::int64_t>(job.b) * p.f.slopes_batch + job.h, 0.0f);
  }
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 row = own + half * 8 < job.i1 ? p.rows[job.lse_at + own + half * 8 - job.i0]
                                               : make_float2(INFINITY, 0.0f);
    lse[half] = row.x, delta[half] = row.y;
  }

  float rDq[kD / 2], rS[kN / 2], rDp[kN / 2];
  std::uint32_t rDs[kN / 16][4];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) rDq[i] = 0.0f;
  ptx::registers_arrived(rDq);
  if (job.end > job.begin) {
    ptx::mbarrier_wait(&shared.query_there[group], 0);
    ptx::mbarrier_wait(&shared.dout_there[group], 0);
  }
  // Without turns it is for ptxas, which has no registers to spare but between barriers.
  const auto my_turn = [&] {
    ptx::bar_sync(Tile::kAhead ? kIssues + group : kBoth + group, Tile::kAhead ? 256 : 128);
  };
  const auto others_turn = [&] {
    if (Tile::kAhead) ptx::bar_arrive(kIssues + 1 - group, 256);
  };
  if (Tile::kAhead && group == 0) ptx::bar_arrive(kIssues, 256);
  const auto skip = [&](int from, int to) {
    for (int t = from - job.begin; t < to - job.begin; ++t) {
      const int stage = t % kKeyStages, of_values = t % kValueStages;
      ptx::mbarrier_wait(&shared.keys_there[stage], t / kKeyStages & 1);
      ptx::mbarrier_wait(&shared.values_there[of_values], t / kValueStages & 1);
      my_turn();
      others_turn();
      arrive(&shared.values_free[of_values]);
      arrive(&shared.keys_free[stage]);
    }
  };
  const auto issue_scores = [&](int n) {
    const int t = n - job.begin, stage = t % kKeyStages, of_values = t % kValueStages;
    ptx::mbarrier_wait(&shared.keys_there[stage], t / kKeyStages & 1);
    if (const int rows = sight.keys - n * kN;
        rows < kN && (p.f.lengths.start_q || p.f.lengths.used_k)) {
      // Rows of keys and values beyond the sequence are of others: make them zeros. Either
      // warpgroup does, as neither waits for the other.
      ptx::mbarrier_wait(&shared.values_there[of_values], t / kValueStages & 1);
      clear_wide_rows<kD>(shared.keys[stage], rows, thread, 128);
      clear_wide_rows<kDv>(shared.values[of_values], rows, thread, 128);
      ptx::fence_async();
      ptx::bar_sync(kBoth + group, 128);
    }
    my_turn();
    issue_wide_scores<kD>(rS, aQ, aK + stage * Shared::kKeys, T{});
  };
  const auto issue_dp = [&](int n) {
    const int t = n - job.begin, of_values = t % kValueStages;
    ptx::mbarrier_wait(&shared.values_there[of_values], t / kValueStages & 1);
    issue_wide_scores<kDv>(rDp, aDout, aV + of_values * Shared::kValues, T{});
    others_turn();
  };
  const auto issue_dq = [&](int n) {
    issue_wide_gradient(rDq, rDs, aK + (n - job.begin) % kKeyStages * Shared::kKeys, T{});
    ptx::wgmma_commit();
  };
  const auto minus_delta = [&] {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) rDp[i] -= delta[i / 2 % 2];
  };
  const auto make_p = [&](int n) {
    if constexpr (kChanges) {
      ptx::wgmma_wait<0>();
      ptx::registers_arrived(rDp);
      minus_delta();
      const int distance = own + sight.shift - n * kN - pair * 2;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        rS[i] = hopper_bwd_score(all, slope, rS[i], distance + i / 2 % 2 * 8 - i / 4 * 8 - i % 2,
                                 rDp[i]);
      }
    }
    if (n < seen.whole_begin || n >= seen.whole_end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Of the thread's keys, each so far from its first, these are seen.
        const int i = own + half * 8, first_key = n * kN + pair * 2;
        const int from = sight.low(i) - first_key, to = sight.high(i) - first_key;
#pragma unroll
        for (int c = 0; c < kN / 8; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (c * 8 + e < from || c * 8 + e >= to) rS[c * 4 + half * 2 + e] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      rS[i] = ptx::exp2_approx(fmaf(rS[i], scale_log2, -lse[i / 2 % 2]));
    }
    // Exponentials are computed while dp is: ptxas would move them behind its end, but for a branch
    // between.
    ptx::registers_arrived(rS);
    const int t = n - job.begin;
    ptx::mbarrier_wait(&shared.keys_there[t % kKeyStages], t / kKeyStages & 1);
  };
  const auto make_ds = [&](int n) {
    ptx::wgmma_wait<0>();
    ptx::registers_arrived(rDp);
    arrive(&shared.values_free[(n - job.begin) % kValueStages]);
    if constexpr (!kChanges) minus_delta();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) rDp[i] *= rS[i];
    pack_wide(rDs, rDp, T{});
  };
  const auto complete_dq = [&](int n) {
    ptx::registers_arrived(rDq);
    arrive(&shared.keys_free[(n - job.begin) % kKeyStages]);
  };
  skip(job.begin, seen.begin);
  if (seen.begin < seen.end) {
    issue_scores(seen.begin);
    issue_dp(seen.begin);
    ptx::wgmma_wait<1>();
    ptx::registers_arrived(rS);
    make_p(seen.begin);
    make_ds(seen.begin);
    for (int n = seen.begin + 1; n < seen.end; ++n) {
      if constexpr (Tile::kAhead) {
        issue_scores(n);
        issue_dq(n - 1);
        issue_dp(n);
        ptx::wgmma_wait<2>();
        ptx::registers_arrived(rS);
        make_p(n);
        ptx::wgmma_wait<1>();
        complete_dq(n - 1);
      } else {
        issue_dq(n - 1);
        ptx::wgmma_wait<0>();
        complete_dq(n - 1);
        issue_scores(n);
        issue_dp(n);
        ptx::wgmma_wait<1>();
        ptx::registers_arrived(rS);
        make_p(n);
      }
      make_ds(n);
    }
    issue_dq(seen.end - 1);
    ptx::wgmma_wait<0>();
    complete_dq(seen.end - 1);
  }
  skip(seen.end, job.end);
  // A query that saw nothing may be anything.
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    if (lse[i / 2 % 2] == INFINITY) rDq[i] = 0.0f;
  }
  store_rows(p.dq, p.fours, job.b, job.first_q + job.i0, job.h, group * 64 + warp * 16,
             job.i1 - job.i0, 0, p.f.d, p.f.scale,
             reinterpret_cast<const float (&)[kD / 8][4]>(rDq), T{});
}

}  // namespace fastkern::cuda::attention_detail
