// SPDX-License-Identifier: Apache-2.0
// Attention, forward, on Hopper: the thread that fetches.
#pragma once

#include <algorithm>

#include "attention/attention_hopper.cuh"
#include "ptx/barrier.cuh"
#include "ptx/tma.cuh"

namespace fastkern::cuda::attention_detail {

/// Where a ring of stages stands after `turn` uses.
struct Stage {
  int index;
  std::uint32_t parity;
};
template <int kStages>
__device__ __forceinline__ Stage stage_of(int turn) {
  static_assert(kStages == 1 || kStages == 2 || kStages == 4);
  return {turn & (kStages - 1), static_cast<std::uint32_t>(turn >> kStages / 2 & 1)};
}

/// Room for queries of the job with number t, of one of its warpgroups where those have their own.
template <class Tile>
__device__ __forceinline__ Stage room_of(int t, int group) {
  if constexpr (!Tile::kOwn) return {group, static_cast<std::uint32_t>(t & 1)};
  return stage_of<Tile::kQueries>(t);
}

/// Rows of values beyond a sequence, the last ones of a block, would make zeros NaN if they are of
/// others: they become 0. All that compute.
template <class Tile>
__device__ __forceinline__ void clear_values(char* values, int rows, int thread) {
  constexpr int kN = Tile::kN, kThreads = Tile::kGroups * 128;
  char* const from = values + (kN - rows) * kPanelRow;
  for (int e = thread; e < panels_of(Tile::kDv) * rows * 8; e += kThreads) {
    char* const to = from + e / (rows * 8) * (kN * kPanelRow) + e % (rows * 8) * 16;
    *reinterpret_cast<uint4*>(to) = uint4{};
  }
  ptx::fence_async();
  ptx::bar_sync(kComputing, kThreads);
}

/// Barriers, and whatever else a block of threads begins with; one thread.
template <class Tile>
__device__ __forceinline__ void set_up(const HopperForward& p, HopperShared<Tile>& shared) {
  ptx::prefetch_map(&p.q);
  ptx::prefetch_map(&p.k);
  ptx::prefetch_map(&p.v);
  ptx::prefetch_map(&p.out);
  constexpr int kWarps = 4 * Tile::kGroups;
  for (int s = 0; s < Tile::kRooms; ++s) {
    ptx::mbarrier_init(&shared.query_there[s], 1);
    ptx::mbarrier_init(&shared.query_free[s], kWarps / (Tile::kOwn ? 1 : Tile::kGroups));
  }
  for (int s = 0; s < Tile::kStages; ++s) {
    ptx::mbarrier_init(&shared.keys_there[s], 1);
    ptx::mbarrier_init(&shared.keys_free[s], kWarps);
    ptx::mbarrier_init(&shared.values_there[s], 1);
    ptx::mbarrier_init(&shared.values_free[s], kWarps);
  }
  if constexpr (Tile::kLazy) {
    for (int s = 0; s < 2 * Tile::kGroups; ++s) (&shared.exceeded[0][0])[s] = -1;
  }
  for (int s = 0; s < 2; ++s) {
    ptx::mbarrier_init(&shared.job_there[s], 32);
    ptx::mbarrier_init(&shared.job_free[s], 1);
  }
  for (int s = 0; !Tile::kOwn && s < 4; ++s) ptx::mbarrier_init(&shared.out_free[s / 2][s % 2], 32);
  ptx::mbarrier_init_fence();
}

/// One thread that fetches.
template <class Tile>
struct HopperProducer {
  using Shared = HopperShared<Tile>;
  const HopperForward& p;
  Shared& shared;
  static constexpr int kLate = 4;  // blocks of keys that take longer than planning a tile does
  int turn = 0;                    // blocks of keys asked for; values lag behind

  static __device__ __forceinline__ void fetch(char* to, int panels, int rows,
                                               const CUtensorMap* map, int row, int head, int entry,
                                               std::uint64_t* barrier, ptx::Keep keep) {
    for (int panel = 0; panel < panels; ++panel) {
      ptx::tma_load(ptx::shared_address(to) + panel * rows * kPanelRow, map, panel * 64, row, head,
                    entry, barrier, keep);
    }
  }
  __device__ __forceinline__ void keys(int row, int head, int entry) {
    const Stage stage = stage_of<Tile::kStages>(turn);
    ptx::mbarrier_wait(&shared.keys_free[stage.index], stage.parity ^ 1);
    ptx::mbarrier_expect(&shared.keys_there[stage.index], Shared::kKeys);
    fetch(shared.keys[stage.index], panels_of(Tile::kD), Tile::kN, &p.k, row, head, entry,
          &shared.keys_there[stage.index], ptx::Keep::long_);
  }
  __device__ __forceinline__ void values(int of_turn, int row, int head, int entry) {
    const Stage stage = stage_of<Tile::kStages>(of_turn);
    ptx::mbarrier_wait(&shared.values_free[stage.index], stage.parity ^ 1);
    ptx::mbarrier_expect(&shared.values_there[stage.index], Shared::kValues);
    fetch(shared.values[stage.index], panels_of(Tile::kDv), Tile::kN, &p.v, row, head, entry,
          &shared.values_there[stage.index], ptx::Keep::long_);
  }

  /// Lets another job be planned into the place of the one with number t.
  __device__ __forceinline__ void plan_after(int t) {
    if (t >= 0) ptx::mbarrier_arrive(&shared.job_free[t & 1]);
  }

  /// Queries of the job with number t, or of one of its warpgroups.
  __device__ __forceinline__ void queries(const HopperJob& job, int entry, int t, int group = 0) {
    const Stage stage = room_of<Tile>(t, group);
    ptx::mbarrier_wait(&shared.query_free[stage.index], stage.parity ^ 1);
    const bool all = Tile::kOwn || group == Tile::kGroups - 1;
    if (all && !p.f.given) plan_after(t);
    if (job.b < 0 || job.begin == job.end) {
      ptx::mbarrier_arrive(&shared.query_there[stage.index]);
      return;
    }
    ptx::mbarrier_expect(&shared.query_there[stage.index], Shared::kQuery);
    const int row = job.first_q + job.i0 + (group * 64 >> p.schedule.pack);
    const bool pack = p.schedule.pack > 0;
    fetch(shared.query[stage.index], panels_of(Tile::kD), Tile::kRoomRows, &p.q, pack ? job.h : row,
          pack ? row : job.h, entry, &shared.query_there[stage.index], ptx::Keep::shortly);
  }

  /// Everything of the job with number t; whether there was one.
  __device__ __forceinline__ bool run(int t) {
    const Stage planned = stage_of<2>(t);
    ptx::mbarrier_wait(&shared.job_there[planned.index], planned.parity);
    const HopperJob& job = shared.jobs[t % Shared::kJobs];
    const int entry = p.f.lengths.start_q ? 0 : job.b, head = job.h / p.f.group;
    const int begin = job.begin, end = job.end;
    int row = job.first_k + (end - 1) * Tile::kN;
    const bool is_one = job.b >= 0, any = is_one && begin < end;
    // Room for queries of two tiles: they do not wait for the warpgroups, keys may.
    if (Tile::kQueries > 1) queries(job, entry, t);
    if (any) keys(row, head, entry);
    if (!Tile::kOwn) {
      for (int group = 0; group < Tile::kGroups; ++group) queries(job, entry, t, group);
    } else if (Tile::kQueries == 1) {
      queries(job, entry, t);
    }
    // Who gives tiles out as they are asked for does so late: what is taken early is not there for
    // others who are done before.
    const int late = end - begin > kLate + 1 ? begin + kLate : -1;
    if (p.f.given && late < 0) plan_after(t - 1);
    if (!any) return is_one;
    for (int n = end - 1; n > begin; --n) {
      if (p.f.given && n == late) plan_after(t - 1);
      const int before = turn++;
      keys(row - Tile::kN, head, entry);
      values(before, row, head, entry);
      row -= Tile::kN;
    }
    values(turn++, row, head, entry);
    return true;
  }
};

/// Queries come to L2 where there is no room for them yet, and nobody has to wait for them later.
template <class Tile>
__device__ __forceinline__ void bring_near(const HopperForward& p, const HopperJob& next) {
  if (p.f.lengths.start_q) return;
  const bool pack = p.schedule.pack > 0;
  for (int r = 0; r < Tile::kM; r += Tile::kRoomRows) {
    const int row = next.i0 + (r >> p.schedule.pack);
    for (int panel = 0; panel < panels_of(Tile::kD); ++panel) {
      ptx::tma_prefetch(&p.q, panel * 64, pack ? next.h : row, pack ? row : next.h, next.b);
    }
  }
}

/// What the thread that fetches does not have to find out itself: a warp plans the tiles, one or
/// two ahead.
template <class Tile>
__device__ __forceinline__ void hopper_plan(const HopperForward& p, HopperShared<Tile>& shared) {
  using Shared = HopperShared<Tile>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool more = true;
  for (int round = 0, t = 0; more; ++round) {
    const Stage stage = stage_of<2>(t);
    // Queries of the job two before have been asked for: nobody looks at those before it.
    const auto wait_for_room = [&] {
      ptx::mbarrier_wait(&shared.job_free[stage.index], stage.parity ^ 1);
    };
    if (p.f.given) wait_for_room();  // a tile is taken when it can be begun soon
    const int id = hopper_tile(p.schedule, p.f.given, round);
    more = (p.f.given ? id : round * static_cast<int>(gridDim.x)) < p.schedule.tiles;
    HopperJob job{};
    job.b = -1;
    if (more) {
      if (id >= p.schedule.tiles) continue;
      job = hopper_job<Tile>(p.f, p.schedule, id);
      if (job.b < 0) continue;
    }
    wait_for_room();
    if (lane == 0) shared.jobs[t % Shared::kJobs] = job;
    if (lane < Tile::kGroups) {
      shared.seen[t % Shared::kJobs][lane] = hopper_seen<Tile>(job, lane, p.schedule.pack);
    }
    ptx::mbarrier_arrive(&shared.job_there[stage.index]);  // every lane: each may have written
    if (Tile::kQueries == 1 && more && lane == 0) bring_near<Tile>(p, job);
    ++t;
  }
}

/// A warp that stores what a warpgroup has computed, tile after tile, in two parts of its columns.
template <class Tile>
__device__ __forceinline__ void hopper_store(const HopperForward& p, HopperShared<Tile>& shared,
                                             int group) {
  constexpr int kPanels = panels_of(Tile::kDv), kFirst = (kPanels + 1) / 2;
  const bool packed = p.f.lengths.start_q;
  const int lane = static_cast<int>(threadIdx.x) % 32, pack = p.schedule.pack;
  for (int t = 0;; ++t) {
    ptx::bar_sync(hopper_store_barrier(group, 0, t), 160);
    const HopperJob& job = shared.jobs[t % HopperShared<Tile>::kJobs];
    if (job.b < 0) break;
    const int rows = (job.stored << pack) - group * 64;
    // Those of a packed sequence's end are stored by who has computed them.
    const bool stores = lane == 0 && rows > 0 && !(packed && rows < 64);
    const auto store = [&](int from, int to) {
      const int at = job.first_q + job.i0 + (group * 64 >> pack);
      for (int panel = from; stores && panel < to; ++panel) {
        ptx::tma_store(&p.out, panel * 64, pack > 0 ? job.h : at, pack > 0 ? at : job.h,
                       packed ? 0 : job.b,
                       ptx::shared_address(shared.out) + panel * (64 * kPanelRow));
      }
      ptx::bulk_commit();
    };
    store(0, kFirst);
#pragma unroll
    for (int r = lane; r < 64; r += 32) {
      const int at = (group * 64 + r) >> pack, head = (group * 64 + r) & ((1 << pack) - 1);
      const float2 sum = shared.sums[r];
      if (at >= job.stored) continue;
      p.f.lse[job.lse_at + static_cast<std::int64_t>(head) * p.f.queries + at] =
          sum.x == 0.0f ? -INFINITY : fmaf(sum.y, p.f.scale, logf(sum.x));
    }
    ptx::bar_sync(hopper_store_barrier(group, 1, t), 160);
    store(kFirst, kPanels);
    ptx::bulk_wait_read<1>();
    ptx::mbarrier_arrive(&shared.out_free[0][group]);  // every lane: each may have read
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(&shared.out_free[1][group]);
  }
  ptx::bulk_wait<0>();
}

}  // namespace fastkern::cuda::attention_detail
