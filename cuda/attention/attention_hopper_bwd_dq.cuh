// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper (sm_90a), above 128 columns: dq from ds, which the kernel of dk
// and dv left in memory.
//
//   work     a block of threads per 128 queries of one head, 64 a warpgroup, against the keys that
//            they see, 64 at a time; under a causal mask the longest ones first
//   memory   keys and ds, 64 keys x 128 queries, go through a ring; dq stays in registers
//   warps    the first one has everything fetched
//   sync     there: copy engine, warp 0 to who computes; free: the other way
//   cost     2 * S * T * D flops where all is seen
#pragma once

#include "attention/attention_hopper_bwd_wide.cuh"

namespace fastkern::cuda::attention_detail {

template <int kColumns, int kBlocks>
struct HopperDqTile {
  static constexpr int kD = kColumns, kM = 128, kN = 64, kGroups = 2, kStages = kBlocks;
  static constexpr int kThreads = 384, kRegisters = 240, kOtherRegisters = 24;
};

template <class Tile>
struct HopperDqShared {
  static constexpr int kKeys = panels_of(Tile::kD) * kWidePanel;

  alignas(1024) char keys[Tile::kStages][kKeys];
  alignas(1024) char ds[Tile::kStages][Tile::kGroups][kWideDsTile];  // of each warpgroup
  std::uint64_t there[Tile::kStages], free[Tile::kStages];
  HopperJob job;
  HopperSeen seen[Tile::kGroups];
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_bwd_dq_kernel(const __grid_constant__ HopperBwdWide all) {
  using Shared = HopperDqShared<Tile>;
  constexpr int kD = Tile::kD, kN = Tile::kN, kStages = Tile::kStages;
  extern __shared__ __align__(1024) char hopper_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(hopper_memory);
  const Backward& p = all.p;

  const int block_warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int warpgroup = block_warp / 4;
  if (threadIdx.x == 32) {
    ptx::prefetch_map(&all.k);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.there[s], 1);
      ptx::mbarrier_init(&shared.free[s], 4 * Tile::kGroups);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (block_warp == 0) {
    const HopperJob found =
        hopper_job<Tile>(p.f, all.schedule, static_cast<int>(blockIdx.x) + all.first_query_tile);
    if (threadIdx.x == 0) shared.job = found;
    if (threadIdx.x < Tile::kGroups)
      shared.seen[threadIdx.x] = hopper_seen<Tile>(found, threadIdx.x, 0);
  }
  __syncthreads();
  const HopperJob& job = shared.job;
  if (job.i1 <= job.i0) return;
  const int count = job.end - job.begin;

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (threadIdx.x > 0) return;
    const int head = job.b * p.f.heads + job.h - all.first_head;
    for (int t = 0; t < count; ++t) {
      const int stage = t % kStages, n = job.begin + t;
      ptx::mbarrier_wait(&shared.free[stage], (t / kStages & 1) ^ 1);
      int bytes = Shared::kKeys;
      for (const HopperSeen& seen : shared.seen) {
        if (n >= seen.begin && n < seen.end) bytes += kWideDsTile;
      }
      ptx::mbarrier_expect(&shared.there[stage], bytes);
      for (int g = 0; g < Tile::kGroups; ++g) {
        const HopperSeen& seen = shared.seen[g];
        if (n < seen.begin || n >= seen.end) continue;
        ptx::bulk_load(ptx::shared_address(shared.ds[stage][g]),
                       wide_ds_tile(all, head, job.i0 / 64 + g, n), kWideDsTile,
                       &shared.there[stage]);
      }
      for (int panel = 0; panel < panels_of(kD); ++panel) {
        ptx::tma_load(ptx::shared_address(shared.keys[stage]) + panel * kWidePanel, &all.k,
                      panel * 64, n * kN, job.h / p.f.group, job.b, &shared.there[stage],
                      ptx::Keep::long_);
      }
    }
    return;
  }
  ptx::registers_take<Tile::kRegisters>();
  const int group = warpgroup - 1, warp = static_cast<int>(threadIdx.x % 128u) / 32;
  const HopperSeen& seen = shared.seen[group];
  float rDq[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) rDq[i] = 0.0f;
  ptx::registers_arrived(rDq);
  const auto release = [&](int t) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.free[t % kStages]);
  };
  const auto await = [&](int t) {
    ptx::mbarrier_wait(&shared.there[t % kStages], t / kStages & 1);
  };
  const auto skip = [&](int from, int to) {
    for (int t = from - job.begin; t < to - job.begin; ++t) {
      await(t);
      __syncwarp();  // all of its lanes have seen that it was there
      release(t);
    }
  };
  skip(job.begin, seen.begin);
  const int first = seen.begin - job.begin, end = seen.end - job.begin;
  for (int t = first; t < end; ++t) {
    const int stage = t % kStages;
    await(t);
    const ptx::MatrixDescriptor dA =
        ptx::matrix_descriptor(ptx::shared_address(shared.ds[stage][group]));
    const ptx::MatrixDescriptor dB =
        ptx::matrix_descriptor(ptx::shared_address(shared.keys[stage]), kWidePanel);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kN / 16; ++kk) {
      ptx::wgmma<ptx::Major::mn, ptx::Major::mn>(rDq, ptx::matrix_right(dA, kk * (16 * kPanelRow)),
                                                 ptx::matrix_right(dB, kk * (16 * kPanelRow)), true,
                                                 T{});
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (t > first) release(t - 1);
  }
  ptx::wgmma_wait<0>();
  if (first < end) release(end - 1);
  skip(seen.end, job.end);
  ptx::registers_arrived(rDq);
  store_rows(p.dq, p.fours, job.b, job.i0, job.h, group * 64 + warp * 16, job.i1 - job.i0, 0, p.f.d,
             p.f.scale, reinterpret_cast<const float (&)[kD / 8][4]>(rDq), T{});
}

}  // namespace fastkern::cuda::attention_detail
