// SPDX-License-Identifier: Apache-2.0
// Attention, forward, on Hopper: the thread that fetches.
#pragma once

#include <algorithm>

#include "attention/attention_hopper.cuh"
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

/// One thread that fetches.
template <class Tile>
struct HopperProducer {
  using Shared = HopperShared<Tile>;
  const HopperForward& p;
  Shared& shared;
  int turn = 0;  // blocks of keys asked for; values lag behind

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

  /// Queries of the job with number t, and the job.
  __device__ __forceinline__ void queries(const HopperJob& job, int entry, int t) {
    const Stage stage = stage_of<Tile::kQueries>(t);
    ptx::mbarrier_wait(&shared.query_free[stage.index], stage.parity ^ 1);
    shared.jobs[t % Shared::kJobs] = job;
    for (int group = 0; group < Tile::kGroups; ++group) {
      shared.seen[t % Shared::kJobs][group] = hopper_seen<Tile>(job, group, p.schedule.pack);
    }
    if (job.begin == job.end) {
      ptx::mbarrier_arrive(&shared.query_there[stage.index]);
      return;
    }
    ptx::mbarrier_expect(&shared.query_there[stage.index], Shared::kQuery);
    const int row = job.first_q + job.i0;
    const bool pack = p.schedule.pack > 0;
    fetch(shared.query[stage.index], panels_of(Tile::kD), Tile::kM, &p.q, pack ? job.h : row,
          pack ? row : job.h, entry, &shared.query_there[stage.index], ptx::Keep::shortly);
  }
  /// What tile `id` begins with comes to L2, where nobody has to wait for it later.
  __device__ __forceinline__ void ask_for(int id) {
    if (id >= p.schedule.tiles || p.f.lengths.start_q) return;
    const HopperJob next = hopper_job<Tile>(p.f, p.schedule, id);
    if (Tile::kQueries == 1) {
      const bool pack = p.schedule.pack > 0;
      for (int panel = 0; panel < panels_of(Tile::kD); ++panel) {
        ptx::tma_prefetch(&p.q, panel * 64, pack ? next.h : next.i0, pack ? next.i0 : next.h,
                          next.b);
      }
    }
    const int head = next.h / p.f.group;
    for (int n = next.end - 1; n >= max(next.begin, next.end - p.schedule.ahead); --n) {
      for (int panel = 0; panel < panels_of(Tile::kD); ++panel) {
        ptx::tma_prefetch(&p.k, panel * 64, n * Tile::kN, head, next.b);
      }
      for (int panel = 0; panel < panels_of(Tile::kDv); ++panel) {
        ptx::tma_prefetch(&p.v, panel * 64, n * Tile::kN, head, next.b);
      }
    }
  }

  /// Everything of the job with number t; `next`: the tile after it.
  __device__ __forceinline__ void run(const HopperJob& job, int t, int next) {
    const int entry = p.f.lengths.start_q ? 0 : job.b, head = job.h / p.f.group;
    int row = job.first_k + (job.end - 1) * Tile::kN;
    const bool any = job.begin < job.end;
    // Room for queries of two tiles: they do not wait for the warpgroups, keys may.
    if (Tile::kQueries > 1) queries(job, entry, t);
    if (any) keys(row, head, entry);
    if (Tile::kQueries == 1) queries(job, entry, t);
    ask_for(next);
    if (!any) return;
    for (int n = job.end - 1; n > job.begin; --n) {
      const int before = turn++;
      keys(row - Tile::kN, head, entry);
      values(before, row, head, entry);
      row -= Tile::kN;
    }
    values(turn++, row, head, entry);
  }
  __device__ __forceinline__ void finish(int t) {
    const Stage stage = stage_of<Tile::kQueries>(t);
    ptx::mbarrier_wait(&shared.query_free[stage.index], stage.parity ^ 1);
    shared.jobs[t % Shared::kJobs].b = -1;
    ptx::mbarrier_arrive(&shared.query_there[stage.index]);
  }
};

}  // namespace fastkern::cuda::attention_detail
