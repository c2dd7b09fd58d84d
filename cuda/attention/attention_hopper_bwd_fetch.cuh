// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper: tiles, what lies where in shared memory, jobs, and what the warps
// of the first warpgroup do. attention_hopper_bwd.cuh says who waits for whom.
#pragma once

#include "attention/attention_bwd_blocks.cuh"
#include "attention/attention_hopper.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"

namespace fastkern::cuda::attention_detail {

/// kD columns, kM queries at a time.
template <int kColumns, int kQueries>
struct HopperBwdTile {
  static constexpr int kD = kColumns, kM = kQueries, kN = 128, kThreads = 384;
  // Of the 168 of each that a launch of so many threads gets, and no more: else it waits for ever.
  static constexpr int kRegisters = 240, kOtherRegisters = 24;
  static_assert(256 * kRegisters + 128 * kOtherRegisters <= 168 * kThreads);
  // dq: a warpgroup has 64 rows of it, or half of the columns.
  static constexpr int kDqColumns = kM == 64 ? kD / 2 : kD, kDq = 64 * kDqColumns;
  static_assert(kM % 64 == 0 && kD % 64 == 0 && kDqColumns % 64 == 0 && 2 * kDq == kM * kD);
};

struct HopperBackward {
  CUtensorMap q, k, v, dout;
  Backward p;
  // From products to twice what the soft cap takes the tanh of, in powers of two, and from the tanh
  // to products, to_cap 0: none; and from scores to products.
  float to_cap, from_cap, over_scale;
};

/// Blocks m_begin to m_end of queries, of each of the query heads, meet the keys of the job.
struct HopperBwdJob {
  KeyJob job;
  int m_begin, m_end;
  int number;  // of the job in this block of threads: here, as registers are few
};

/// What warpgroups know of a block of queries: its number and head, and whether each sees all of it
/// from all of its keys.
struct HopperBwdBlock {
  int m, h;
  bool whole[2];
};

/// dq of a block of queries and keys: of others to come, or the last of them, that add to it.
enum class HopperDqIs : int { part, rest, all };

template <class Tile>
struct HopperBwdShared {
  static constexpr int kKeys = panels_of(Tile::kD) * Tile::kN * kPanelRow;
  static constexpr int kQueries = panels_of(Tile::kD) * Tile::kM * kPanelRow;
  static constexpr int kDs = panels_of(Tile::kM) * Tile::kN * kPanelRow;

  alignas(1024) char keys[kKeys];
  alignas(1024) char values[kKeys];
  alignas(1024) char query[2][kQueries];
  alignas(1024) char dout[2][kQueries];
  alignas(1024) char ds[2][kDs];  // keys x queries
  // Two stages; of each warpgroup, four of each thread at a time.
  alignas(1024) float dq[2][2][Tile::kDq];
  float lse[2][Tile::kM], delta[2][Tile::kM];
  std::uint64_t job_there[2], job_free[2];
  std::uint64_t keys_there, values_there, keys_free, values_free;
  std::uint64_t query_there[2], dout_there[2], rows_there[2], free[2], dout_free[2];
  std::uint64_t ds_there[2];
  std::uint64_t dq_theirs[2], dq_ours[2];
  HopperBwdJob jobs[2];
  HopperBwdBlock blocks[2];
  HopperDqIs dq_is[2];
  int turn, tile;  // of the thread that fetches: blocks of queries before, tiles that met some
};

/// Barriers besides those: of the warpgroup whose turn it is to issue (one each), of all that
/// compute.
enum HopperBwdBarrier : int { kIssues = 1, kBoth = 3 };

/// What a block of keys and a block of queries are to each other.
struct HopperMeeting {
  int h, m;
  int first, last;     // blocks of keys that add to dq of these queries
  std::int64_t block;  // of queries, among all
};

/// The blocks of queries of a job in their order.
template <class Tile>
struct HopperMeetings {
  const Backward& p;
  const HopperBwdJob& all;
  int h, m;

  __device__ __forceinline__ HopperMeetings(const Backward& p, const HopperBwdJob& all)
      : p(p), all(all), h(all.job.g * p.f.group), m(all.m_end - 1) {}
  __device__ __forceinline__ int count() const { return (all.m_end - all.m_begin) * p.f.group; }
  __device__ __forceinline__ HopperMeeting operator*() const {
    constexpr int kM = Tile::kM, kN = Tile::kN;
    const KeyJob& job = all.job;
    const int i0 = m * kM, i1 = min(i0 + kM, job.queries);
    return {h, m, job.job.sight.begin(i0) / kN, (job.job.sight.end(i1) + kN - 1) / kN - 1,
            p.f.lengths.start_q
                ? static_cast<std::int64_t>(h) * p.blocks + job.job.first_q / kM + job.job.b + m
                : (static_cast<std::int64_t>(job.job.b) * p.f.heads + h) * p.blocks + m};
  }
  __device__ __forceinline__ void operator++() {
    if (--m < all.m_begin) ++h, m = all.m_end - 1;
  }
};

/// Stage of a ring of two after `turn` uses.
__device__ __forceinline__ int ring_stage(int turn) { return turn & 1; }
__device__ __forceinline__ std::uint32_t ring_parity(int turn) { return turn >> 1 & 1; }

/// Which queries meet the keys of a job.
template <class Tile>
__device__ __forceinline__ void find_hopper_bwd_queries(HopperBwdJob& next) {
  constexpr int kM = Tile::kM;
  const KeyJob& job = next.job;
  const AttentionSight<int>& sight = job.job.sight;
  int begin = 0, end = 0;
  if (job.j1 > job.j0) {
    begin = sight.first_query(job.j0) / kM;
    end = (sight.last_query(job.j1, job.queries) + kM - 1) / kM;
    // Behind the last query there may be none that sees these keys.
    while (begin < end && sight.end(min(begin * kM + kM, job.queries)) <= job.j0) ++begin;
  }
  next.m_begin = begin, next.m_end = max(end, begin);
}

/// What comes next, b < 0 when nothing does; for a whole warp.
template <class Tile>
__device__ __forceinline__ void find_hopper_bwd_job(const Backward& p, HopperBwdJob& next) {
  constexpr int kN = Tile::kN;
  const int tiles = p.key_blocks * p.kv_heads * (p.f.lengths.start_q ? 1 : p.f.batch);
  for (;;) {
    const int id = draw_key_block(p);
    if (id >= tiles) {
      if (threadIdx.x == 0) next.job.job.b = -1;
      return;
    }
    const KeyJob found = key_job_of<kN>(p, id);
    if (found.job.b < 0) continue;
    if (threadIdx.x == 0) next.job = found;
    break;
  }
  if (threadIdx.x == 0) find_hopper_bwd_queries<Tile>(next);
}

/// Everything that is fetched by boxes; one thread.
template <class Tile>
__device__ __forceinline__ void fetch_hopper_bwd(const HopperBackward& all,
                                                 HopperBwdShared<Tile>& shared,
                                                 const HopperBwdJob& found) {
  using Shared = HopperBwdShared<Tile>;
  const Backward& p = all.p;
  const KeyJob& job = found.job;
  const int entry = p.f.lengths.start_q ? 0 : job.job.b;
  const auto fetch = [&](char* to, const CUtensorMap* map, int rows, int row, int head,
                         std::uint64_t* barrier, ptx::Keep keep) {
    for (int panel = 0; panel < panels_of(Tile::kD); ++panel) {
      ptx::tma_load(ptx::shared_address(to) + panel * rows * kPanelRow, map, panel * 64, row, head,
                    entry, barrier, keep);
    }
  };
  const auto fetch_keys = [&](char* to, const CUtensorMap* map, std::uint64_t* there,
                              std::uint64_t* free) {
    ptx::mbarrier_wait(free, (shared.tile & 1) ^ 1);
    ptx::mbarrier_expect(there, Shared::kKeys);
    fetch(to, map, Tile::kN, job.first_k + job.j0, job.g, there, ptx::Keep::shortly);
  };
  HopperMeetings<Tile> next(p, found);
  const int count = next.count();
  for (int t = 0; t < count; ++t, ++next) {
    const int turn = shared.turn + t, stage = ring_stage(turn),
              row = job.job.first_q + next.m * Tile::kM;
    ptx::mbarrier_wait(&shared.dout_free[stage], ring_parity(turn) ^ 1);
    ptx::mbarrier_expect(&shared.dout_there[stage], Shared::kQueries);
    fetch(shared.dout[stage], &all.dout, Tile::kM, row, next.h, &shared.dout_there[stage],
          ptx::Keep::long_);
    ptx::mbarrier_wait(&shared.free[stage], ring_parity(turn) ^ 1);
    ptx::mbarrier_expect(&shared.query_there[stage], Shared::kQueries);
    fetch(shared.query[stage], &all.q, Tile::kM, row, next.h, &shared.query_there[stage],
          ptx::Keep::long_);
    if (t == 0) fetch_keys(shared.values, &all.v, &shared.values_there, &shared.values_free);
    // Keys are free last: dq of the tile before takes them.
    if (t == 0) fetch_keys(shared.keys, &all.k, &shared.keys_there, &shared.keys_free);
  }
}

/// One after the other, all that this block of threads is given; for a whole warp.
template <class Tile, class F>
__device__ __forceinline__ void each_hopper_bwd_job(HopperBwdShared<Tile>& shared, F&& f) {
  for (int n = 0;; ++n) {
    ptx::mbarrier_wait(&shared.job_there[ring_stage(n)], ring_parity(n));
    const HopperBwdJob& next = shared.jobs[ring_stage(n)];
    if (next.job.job.b < 0) break;
    f(next);
    n = next.number;
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.job_free[ring_stage(n)]);
  }
}

/// lse and delta; a warp.
template <class Tile>
__device__ __forceinline__ void fetch_hopper_bwd_rows(const Backward& p,
                                                      HopperBwdShared<Tile>& shared,
                                                      const HopperBwdJob& found, int& turn) {
  constexpr int kM = Tile::kM, kRowChunks = 8;
  const KeyJob& job = found.job;
  const int lane = threadIdx.x % 32;
  HopperMeetings<Tile> next(p, found);
  for (const int end = turn + next.count(); turn < end; ++turn, ++next) {
    const int stage = ring_stage(turn);
    const std::int64_t head =
        p.f.lengths.start_q ? next.h : static_cast<std::int64_t>(job.job.b) * p.f.heads + next.h;
    const float2* const from = p.rows + (head * p.f.queries + job.job.first_q + next.m * kM);
    const int rows = job.queries - next.m * kM;
    float2 row[kM / 32];  // on their way while others still read the ones before
    bool dead = false;
#pragma unroll
    for (int k = 0; k < kM / 32; ++k) {
      const int i = lane + k * 32;
      row[k] = i < rows ? from[i] : make_float2(INFINITY, 0.0f);
      dead |= row[k].x == INFINITY;
    }
    ptx::mbarrier_wait(&shared.free[stage], ring_parity(turn) ^ 1);
#pragma unroll
    for (int k = 0; k < kM / 32; ++k) {
      shared.lse[stage][lane + k * 32] = row[k].x, shared.delta[stage][lane + k * 32] = row[k].y;
    }
    // Of a query that saw nothing, or is not there, 0 times what there is may be NaN: make it 0.
    if (__any_sync(~0u, dead)) {
      __syncwarp();  // what other lanes wrote
      ptx::mbarrier_wait(&shared.query_there[stage], ring_parity(turn));
      ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
      for (int e = lane; e < panels_of(Tile::kD) * kM * kRowChunks; e += 32) {
        if (shared.lse[stage][e / kRowChunks % kM] != INFINITY) continue;
        *reinterpret_cast<uint4*>(shared.query[stage] + e * 16) = uint4{};
        *reinterpret_cast<uint4*>(shared.dout[stage] + e * 16) = uint4{};
      }
      ptx::fence_async();
    }
    if (lane == 0) {
      HopperBwdBlock& block = shared.blocks[stage];
      block.m = next.m, block.h = next.h;
      const int i0 = next.m * kM, i1 = min(i0 + kM, job.queries);
      for (int g = 0; g < 2; ++g)
        block.whole[g] = job.job.sight.all(i0, i1, job.j0 + g * 64, job.j0 + g * 64 + 64);
    }
    ptx::mbarrier_arrive(&shared.rows_there[stage]);  // every lane: each has written
  }
}

/// dq to where it is summed, in its turn, of every other block of queries: those of this stage. One
/// thread, so that while what it added arrives, the next block is the other stage's.
template <class Tile>
__device__ __forceinline__ void add_hopper_dq(const Backward& p, HopperBwdShared<Tile>& shared,
                                              const HopperBwdJob& found, int stage, int& turn) {
  constexpr int kBytes = 2 * Tile::kDq * 4;
  const ptx::SharedAddress own = ptx::shared_address(shared.dq[stage]);
  const int n = found.job.j0 / Tile::kN;
  HopperMeetings<Tile> next(p, found);
  for (const int end = turn + next.count(); turn < end; ++turn, ++next) {
    if (ring_stage(turn) != stage) continue;
    const HopperMeeting at = *next;
    int* const turns = p.turns + at.block;
    float* const sums = p.dq_sums + at.block * (2 * Tile::kDq);
    const bool fetches = n == at.last && n > at.first;
    shared.dq_is[stage] = n < at.last    ? HopperDqIs::part
                          : n > at.first ? HopperDqIs::rest
                                         : HopperDqIs::all;
    if (!fetches) ptx::mbarrier_arrive(&shared.dq_theirs[stage]);
    if (n > at.first) {
      while (ptx::ld_global_relaxed(turns) < n - at.first) {
      }
      ptx::fence_acquire();
      ptx::fence_async_global();
    }
    if (fetches) {
      ptx::mbarrier_expect(&shared.dq_theirs[stage], kBytes);
      ptx::bulk_load(own, sums, kBytes, &shared.dq_theirs[stage]);
    }
    ptx::mbarrier_wait(&shared.dq_ours[stage], ring_parity(turn));
    if (n == at.last) continue;
    ptx::fence_async();  // of what others wrote, once for all of them
    if (n == at.first) {
      ptx::bulk_store(sums, own, kBytes);
    } else {
      ptx::bulk_add(sums, own, kBytes);
    }
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::fence_async_global();
    ptx::pass_on(turns);
  }
}

}  // namespace fastkern::cuda::attention_detail
