// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper (sm_90a): what attention_bwd.cuh computes, for the calls that
// hopper_bwd_refuses() leaves.
//
//   work     a block of threads per multiprocessor goes from tile to tile: 128 keys of one key
//            head, 64 a warpgroup, against the query heads that share them and, kM at a time and
//            the last ones first, the queries that see them
//   memory   keys and values stay in shared memory; queries and dout go through a ring of two
//            stages that the copy engine fills. Scores are transposed, keys x queries, so that p
//            and ds are in registers what the products with dout and q take as their left side; ds
//            goes through shared memory, two stages, for dq. dk and dv stay in registers. dq is
//            summed in f32 in global memory, by additions of the copy engine in L2
//   overlap  dq of a block of queries is computed with dk and dv of the next, when both warpgroups
//            have long written their ds; scores and dp of a block are issued behind dk and dv of
//            the one before. The warpgroups issue in turn: p and ds of one are computed during
//            products of the other
//   warps    of the first warpgroup: 0 draws tiles and has queries, dout, keys and values fetched,
//   1 and 2 have dq
//            of a warpgroup each added, 3 fetches lse and delta
//   order    blocks add to dq by their keys, as in attention_bwd.cuh: the first stores, the others
//            wait for their turn, and the last one, whose sums before are fetched to shared
//            memory, writes dq itself. A block waits for blocks alone that began before it
//   sync     barrier          who arrives             who waits
//            job_there        warp 0                  all: the next tile
//            job_free         all                     warp 0
//            keys_there, ...  copy engine, warp 0     who computes
//            keys_free, ...   who computes            warp 0
//            query_there,     copy engine, warp 0     who computes, warp 3
//            dout_there
//            rows_there       warp 3                  who computes: lse and delta, and rows that
//                                                     saw nothing are zeros
//            free             who computes            warps 0 and 3: queries, dout, lse, delta
//            ds_there         who computes            who computes, before dq
//            ds_free          who computes, after dq  who computes, before ds of two blocks on
//            dq_theirs        warp 1 or 2             a warpgroup: its dq may be written or, for
//                                                     the last, the sums before are there
//            dq_ours          a warpgroup             warp 1 or 2: dq was written, or read
//   cost     10 * S * T * D flops where all is seen; 4 bytes of dq added for 1280 flops
#pragma once

#include "attention/attention_bwd_blocks.cuh"
#include "attention/attention_hopper.cuh"
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fastkern::cuda::attention_detail {

/// kD columns, kM queries at a time. kTurns: the warpgroups issue their products in turn.
template <int kColumns, int kQueries, bool kInTurn>
struct HopperBwdTile {
  static constexpr int kD = kColumns, kM = kQueries, kN = 128, kThreads = 384;
  static constexpr bool kTurns = kInTurn;
  static constexpr int kRegisters = 240, kOtherRegisters = 24;
  // dq: a warpgroup has 64 rows of it, or half of the columns.
  static constexpr int kDqColumns = kM == 64 ? kD / 2 : kD, kDq = 64 * kDqColumns;
  static_assert(kM % 64 == 0 && kD % 64 == 0 && kDqColumns % 64 == 0 && 2 * kDq == kM * kD);
};

struct HopperBackward {
  CUtensorMap q, k, v, dout;
  Backward p;
};

/// Blocks m_begin to m_end of queries, of each of the query heads, meet the keys of the job.
struct HopperBwdJob {
  KeyJob job;
  int m_begin, m_end;
};

template <class Tile>
struct HopperBwdShared {
  static constexpr int kKeys = panels_of(Tile::kD) * Tile::kN * kPanelRow;
  static constexpr int kQueries = panels_of(Tile::kD) * Tile::kM * kPanelRow;
  static constexpr int kDs = panels_of(Tile::kM) * Tile::kN * kPanelRow;

  alignas(1024) char keys[kKeys];
  alignas(1024) char values[kKeys];
  alignas(1024) char query[2][kQueries];
  alignas(1024) char dout[2][kQueries];
  alignas(1024) char ds[2][kDs];         // keys x queries
  alignas(1024) float dq[2][Tile::kDq];  // of a warpgroup: four of each thread at a time
  float lse[2][Tile::kM], delta[2][Tile::kM];
  std::uint64_t job_there[2], job_free[2];
  std::uint64_t keys_there, values_there, keys_free, values_free;
  std::uint64_t query_there[2], dout_there[2], rows_there[2], free[2];
  std::uint64_t ds_there[2], ds_free[2];
  std::uint64_t dq_theirs[2], dq_ours[2];
  HopperBwdJob jobs[2];
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

/// What comes next, b < 0 when nothing does; for a whole warp.
template <class Tile>
__device__ __forceinline__ void find_hopper_bwd_job(const Backward& p, HopperBwdJob& next) {
  constexpr int kM = Tile::kM, kN = Tile::kN;
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
  if (threadIdx.x > 0) return;
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

/// Everything that is fetched by boxes; one thread. Turns: blocks of queries before, and tiles that
/// met some.
template <class Tile>
__device__ __forceinline__ void fetch_hopper_bwd(const HopperBackward& all,
                                                 HopperBwdShared<Tile>& shared,
                                                 const HopperBwdJob& found, int turn, int tile) {
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
    ptx::mbarrier_wait(free, (tile & 1) ^ 1);
    ptx::mbarrier_expect(there, Shared::kKeys);
    fetch(to, map, Tile::kN, job.first_k + job.j0, job.g, there, ptx::Keep::shortly);
  };
  HopperMeetings<Tile> next(p, found);
  const int count = next.count();
  for (int t = 0; t < count; ++t, ++next) {
    const int stage = ring_stage(turn + t), row = job.job.first_q + next.m * Tile::kM;
    ptx::mbarrier_wait(&shared.free[stage], ring_parity(turn + t) ^ 1);
    ptx::mbarrier_expect(&shared.query_there[stage], Shared::kQueries);
    fetch(shared.query[stage], &all.q, Tile::kM, row, next.h, &shared.query_there[stage],
          ptx::Keep::long_);
    if (t == 0) fetch_keys(shared.values, &all.v, &shared.values_there, &shared.values_free);
    ptx::mbarrier_expect(&shared.dout_there[stage], Shared::kQueries);
    fetch(shared.dout[stage], &all.dout, Tile::kM, row, next.h, &shared.dout_there[stage],
          ptx::Keep::long_);
    // Keys are free last: dq of the tile before takes them.
    if (t == 0) fetch_keys(shared.keys, &all.k, &shared.keys_there, &shared.keys_free);
  }
}

/// One after the other, all that this block of threads is given: f(job, its number), for a whole
/// warp.
template <class Tile, class F>
__device__ __forceinline__ void each_hopper_bwd_job(HopperBwdShared<Tile>& shared, F&& f) {
  for (int n = 0;; ++n) {
    ptx::mbarrier_wait(&shared.job_there[ring_stage(n)], ring_parity(n));
    const HopperBwdJob& next = shared.jobs[ring_stage(n)];
    if (next.job.job.b < 0) break;
    f(next);
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
    ptx::mbarrier_wait(&shared.free[stage], ring_parity(turn) ^ 1);
    bool dead = false;
#pragma unroll
    for (int i = lane; i < kM; i += 32) {
      const float2 row = i < rows ? from[i] : make_float2(INFINITY, 0.0f);
      shared.lse[stage][i] = row.x, shared.delta[stage][i] = row.y;
      dead |= row.x == INFINITY;
    }
    // Of a query that saw nothing, or is not there, 0 times what there is may be NaN: make it 0.
    if (__any_sync(~0u, dead)) {
      ptx::mbarrier_wait(&shared.query_there[stage], ring_parity(turn));
      ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
      for (int e = lane; e < panels_of(Tile::kD) * kM * kRowChunks; e += 32) {
        if (shared.lse[stage][e / kRowChunks % kM] != INFINITY) continue;
        *reinterpret_cast<uint4*>(shared.query[stage] + e * 16) = uint4{};
        *reinterpret_cast<uint4*>(shared.dout[stage] + e * 16) = uint4{};
      }
      ptx::fence_async();
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.rows_there[stage]);
  }
}

/// dq of a warpgroup to where it is summed, in its turn; one thread.
template <class Tile>
struct HopperDqAdder {
  static constexpr int kBytes = Tile::kDq * 4;
  const Backward& p;
  HopperBwdShared<Tile>& shared;
  int group, turn = 0;
  int* added = nullptr;  // whose turn is to be passed on

  __device__ __forceinline__ void finish() {
    if (!added) return;
    ptx::bulk_wait<0>();
    ptx::fence_async_global();
    ptx::pass_on(added);
    added = nullptr;
  }
  __device__ __forceinline__ void run(const HopperBwdJob& found) {
    const ptx::SharedAddress own = ptx::shared_address(shared.dq[group]);
    const int n = found.job.j0 / Tile::kN;
    HopperMeetings<Tile> next(p, found);
    for (const int end = turn + next.count(); turn < end; ++turn, ++next) {
      const HopperMeeting at = *next;
      int* const turns = p.turns + (2 * at.block + group);
      float* const sums = p.dq_sums + (2 * at.block + group) * Tile::kDq;
      const auto wait = [&] {
        while (ptx::ld_global_relaxed(turns) < n - at.first) {
        }
        ptx::fence_acquire();
        ptx::fence_async_global();
      };
      const bool fetches = n == at.last && n > at.first;
      if (!fetches) ptx::mbarrier_arrive(&shared.dq_theirs[group]);
      finish();
      if (fetches) {
        wait();
        ptx::mbarrier_expect(&shared.dq_theirs[group], kBytes);
        ptx::bulk_load(own, sums, kBytes, &shared.dq_theirs[group]);
      }
      ptx::mbarrier_wait(&shared.dq_ours[group], turn & 1);
      if (n == at.last) continue;
      if (n == at.first) {
        ptx::bulk_store(sums, own, kBytes);
      } else {
        wait();
        ptx::bulk_add(sums, own, kBytes);
      }
      ptx::bulk_commit();
      added = turns;
      ptx::bulk_wait_read<0>();
    }
    finish();
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_bwd_kernel(const __grid_constant__ HopperBackward all) {
  using Shared = HopperBwdShared<Tile>;
  constexpr int kD = Tile::kD, kM = Tile::kM, kN = Tile::kN;
  constexpr int kDqRegisters = Tile::kDqColumns / 2;
  extern __shared__ __align__(1024) char hopper_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(hopper_memory);
  const Backward& p = all.p;

  // The number of the warp, for the compiler to see that all of it agree.
  const int block_warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int warpgroup = block_warp / 4;
  if (threadIdx.x == 32) {
    ptx::prefetch_map(&all.q);
    ptx::prefetch_map(&all.k);
    ptx::prefetch_map(&all.v);
    ptx::prefetch_map(&all.dout);
    constexpr int kWarps = 8;  // that compute
    ptx::mbarrier_init(&shared.keys_there, 1);
    ptx::mbarrier_init(&shared.values_there, 1);
    ptx::mbarrier_init(&shared.keys_free, kWarps);
    ptx::mbarrier_init(&shared.values_free, kWarps);
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&shared.job_there[s], 1);
      ptx::mbarrier_init(&shared.job_free[s], kWarps + 3);
      ptx::mbarrier_init(&shared.query_there[s], 1);
      ptx::mbarrier_init(&shared.dout_there[s], 1);
      ptx::mbarrier_init(&shared.rows_there[s], 1);
      ptx::mbarrier_init(&shared.free[s], kWarps);
      ptx::mbarrier_init(&shared.ds_there[s], kWarps);
      ptx::mbarrier_init(&shared.ds_free[s], kWarps);
      ptx::mbarrier_init(&shared.dq_theirs[s], 1);
      ptx::mbarrier_init(&shared.dq_ours[s], kWarps / 2);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::grid_wait();
  ptx::grid_launch_next();

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (block_warp == 0) {
      int turn = 0, tile = 0;
      for (int n = 0;; ++n) {
        HopperBwdJob& next = shared.jobs[ring_stage(n)];
        ptx::mbarrier_wait(&shared.job_free[ring_stage(n)], ring_parity(n) ^ 1);
        __syncwarp();  // all of its lanes have seen that it is free
        find_hopper_bwd_job<Tile>(p, next);
        if (threadIdx.x == 0) ptx::mbarrier_arrive(&shared.job_there[ring_stage(n)]);
        __syncwarp();
        if (next.job.job.b < 0) break;
        if (threadIdx.x == 0) fetch_hopper_bwd<Tile>(all, shared, next, turn, tile);
        __syncwarp();
        const int count = (next.m_end - next.m_begin) * p.f.group;
        turn += count, tile += count > 0;
      }
    } else if (block_warp == 3) {
      int turn = 0;
      each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
        fetch_hopper_bwd_rows<Tile>(p, shared, found, turn);
      });
    } else {
      HopperDqAdder<Tile> adder{p, shared, block_warp - 1};
      each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
        if (threadIdx.x % 32 == 0) adder.run(found);
      });
    }
  } else {
    ptx::registers_take<Tile::kRegisters>();
    const int group = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = thread / 32;
    const int quad = lane / 4, pair = lane % 4;
    const auto arrive = [&](std::uint64_t* barrier) {
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };
    const float scale_log2 = p.f.scale_log2;

    const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
    const ptx::SharedAddress aV = ptx::shared_address(shared.values);
    const ptx::SharedAddress aQ = ptx::shared_address(shared.query);
    const ptx::SharedAddress aDout = ptx::shared_address(shared.dout);
    const ptx::SharedAddress aDs = ptx::shared_address(shared.ds);
    // Where this lane's rows of ds begin, and which of the first two chunks of 16 bytes is its own.
    const int ds_row = group * 64 + warp * 16 + lane % 16, ds_chunk = lane / 16;

    float rDk[kD / 2], rDv[kD / 2], rS[kM / 2], rDp[kM / 2], rDq[kDqRegisters];
    std::uint32_t rP[kM / 16][4], rDs[kM / 16][4];

    // d (64 keys x queries) = own keys or values times rows.
    const auto issue_transposed = [&](float (&d)[kM / 2], ptx::SharedAddress of_keys,
                                      ptx::SharedAddress rows) {
      const ptx::MatrixDescriptor dA = ptx::matrix_descriptor(of_keys + group * (64 * kPanelRow));
      const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(rows);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kD / 16; ++kk) {
        ptx::wgmma<ptx::Major::k, ptx::Major::k>(
            d, ptx::matrix_right(dA, kk / 4 * (kN * kPanelRow) + kk % 4 * 32),
            ptx::matrix_right(dB, kk / 4 * (kM * kPanelRow) + kk % 4 * 32), kk > 0, T{});
      }
      ptx::wgmma_commit();
    };
    // d (64 keys x columns) += p or ds times rows.
    const auto issue_gradient = [&](float (&d)[kD / 2], const std::uint32_t (&a)[kM / 16][4],
                                    ptx::SharedAddress rows) {
      const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(rows, kM * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kM / 16; ++kk) {
        ptx::wgmma<ptx::Major::mn>(d, a[kk], ptx::matrix_right(dB, kk * (16 * kPanelRow)), true,
                                   T{});
      }
    };
    // dq (64 queries x columns) = ds transposed times keys.
    const auto issue_dq = [&](int stage) {
      const ptx::MatrixDescriptor dA = ptx::matrix_descriptor(
          aDs + stage * Shared::kDs + (kM == 64 ? 0 : group * (kN * kPanelRow)));
      const ptx::MatrixDescriptor dB =
          ptx::matrix_descriptor(aK + (kM == 64 ? group * (kN * kPanelRow) : 0), kN * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kN / 16; ++kk) {
        ptx::wgmma<ptx::Major::mn, ptx::Major::mn>(
            rDq, ptx::matrix_right(dA, kk * (16 * kPanelRow)),
            ptx::matrix_right(dB, kk * (16 * kPanelRow)), kk > 0, T{});
      }
      ptx::wgmma_commit();
    };
    const auto my_turn = [&] {
      if (Tile::kTurns) ptx::bar_sync(kIssues + group, 256);
    };
    const auto others_turn = [&] {
      if (Tile::kTurns) ptx::bar_arrive(kIssues + 1 - group, 256);
    };
    const auto issue_scores = [&](int t) {
      const int stage = ring_stage(t);
      ptx::mbarrier_wait(&shared.rows_there[stage], ring_parity(t));
      ptx::mbarrier_wait(&shared.query_there[stage], ring_parity(t));
      my_turn();
      issue_transposed(rS, aK, aQ + stage * Shared::kQueries);
      ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(t));
      issue_transposed(rDp, aV, aDout + stage * Shared::kQueries);
      others_turn();
    };
    // dq of a block, with number t, has arrived in registers.
    const auto give_dq = [&](const HopperMeetings<Tile>& of, int t) {
      const HopperMeeting at = *of;
      const KeyJob& job = of.all.job;
      const int n = job.j0 / kN;
      float4* const own = reinterpret_cast<float4*>(shared.dq[group]) + thread;
      ptx::mbarrier_wait(&shared.dq_theirs[group], t & 1);
      if (n < at.last) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          own[i * 128] = make_float4(rDq[i * 4], rDq[i * 4 + 1], rDq[i * 4 + 2], rDq[i * 4 + 3]);
        }
        ptx::fence_async();
        __syncwarp();
        arrive(&shared.dq_ours[group]);
        return;
      }
      if (n > at.first) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          const float4 before = own[i * 128];
          rDq[i * 4] += before.x, rDq[i * 4 + 1] += before.y;
          rDq[i * 4 + 2] += before.z, rDq[i * 4 + 3] += before.w;
        }
      }
      __syncwarp();
      arrive(&shared.dq_ours[group]);
      const int i0 = at.m * kM, i1 = min(i0 + kM, job.queries);
      store_rows(p.dq, p.fours, job.job.b, job.job.first_q + i0, at.h,
                 warp * 16 + (kM == 64 ? 0 : group * 64), i1 - i0,
                 kM == 64 ? group * Tile::kDqColumns : 0, p.f.d, p.f.scale,
                 reinterpret_cast<const float (&)[kDqRegisters / 4][4]>(rDq), T{});
    };

    if (Tile::kTurns && group == 0) ptx::bar_arrive(kIssues, 256);
    int turn = 0, tile = 0;  // blocks of queries before, and tiles that met some
    each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
      const KeyJob& job = found.job;
      const int own_keys = job.j0 + group * 64;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) rDk[i] = rDv[i] = 0.0f;
      HopperMeetings<Tile> next(p, found), before = next;
      const int begin = turn, end = turn + next.count();
      if (begin < end) {
        // Rows of keys and values beyond the sequence are of others: make them zeros.
        ptx::mbarrier_wait(&shared.keys_there, tile & 1);
        ptx::mbarrier_wait(&shared.values_there, tile & 1);
        if (const int rows = job.j0 + kN - job.j1;
            rows > 0 && (p.f.lengths.start_q || p.f.lengths.used_k)) {
          for (int e = group * 128 + thread; e < panels_of(kD) * rows * 8; e += 256) {
            const int at =
                e / (rows * 8) * (kN * kPanelRow) + (kN - rows) * kPanelRow + e % (rows * 8) * 16;
            *reinterpret_cast<uint4*>(shared.keys + at) = uint4{};
            *reinterpret_cast<uint4*>(shared.values + at) = uint4{};
          }
          ptx::fence_async();
          ptx::bar_sync(kBoth, 256);
        }
        ++tile;
      }
      for (; turn < end; ++turn) {
        const int stage = ring_stage(turn), other = stage ^ 1;
        const int i0 = next.m * kM, i1 = min(i0 + kM, job.queries);
        issue_scores(turn);
        ptx::wgmma_wait<1>();
        ptx::registers_arrived(rS);
        if (const AttentionSight<int> sight = job.job.sight;
            !sight.all(i0, i1, own_keys, own_keys + 64)) {
          const int j = own_keys + warp * 16 + quad;
#pragma unroll
          for (int c = 0; c < kM / 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int i = i0 + c * 8 + pair * 2 + e;
              const int from = sight.low(i) - j, to = sight.high(i) - j;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                if (half * 8 < from || half * 8 >= to) rS[c * 4 + half * 2 + e] = -INFINITY;
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
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDp);
        if (turn + 1 == end) arrive(&shared.values_free);
#pragma unroll
        for (int c = 0; c < kM / 8; ++c) {
          const float2 delta =
              *reinterpret_cast<const float2*>(&shared.delta[stage][c * 8 + pair * 2]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& dp = rDp[c * 4 + e];
            dp = rS[c * 4 + e] * (dp - (e % 2 ? delta.y : delta.x));
          }
        }
#pragma unroll
        for (int kk = 0; kk < kM / 16; ++kk) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int from = kk * 8 + e * 2;
            rP[kk][e] = ptx::pack_2(rS[from], rS[from + 1], T{});
            rDs[kk][e] = ptx::pack_2(rDp[from], rDp[from + 1], T{});
          }
        }
        ptx::mbarrier_wait(&shared.ds_free[stage], ring_parity(turn) ^ 1);
        const ptx::SharedAddress to_ds = aDs + stage * Shared::kDs + ds_row * kPanelRow;
#pragma unroll
        for (int kk = 0; kk < kM / 16; ++kk) {
          const int chunk = (kk % 4 * 2 + ds_chunk) ^ (ds_row % 8);
          ptx::stmatrix_4(to_ds + kk / 4 * (kN * kPanelRow) + chunk * 16, rDs[kk]);
        }
        ptx::fence_async();
        __syncwarp();
        arrive(&shared.ds_there[stage]);

        const auto issue_gradients = [&] {
          issue_gradient(rDv, rP, aDout + stage * Shared::kQueries);
          issue_gradient(rDk, rDs, aQ + stage * Shared::kQueries);
          ptx::wgmma_commit();
          others_turn();
        };
        if (turn > begin) {
          ptx::mbarrier_wait(&shared.ds_there[other], ring_parity(turn - 1));
          my_turn();
          ptx::wgmma_fence();
          issue_dq(other);
          issue_gradients();
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rDq);
          arrive(&shared.ds_free[other]);
          give_dq(before, turn - 1);
        } else {
          my_turn();
          ptx::wgmma_fence();
          issue_gradients();
        }
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDv);
        ptx::registers_arrived(rDk);
        arrive(&shared.free[stage]);
        before.h = next.h, before.m = next.m;
        ++next;
      }
      if (begin < end) {
        const int stage = ring_stage(end - 1);
        ptx::mbarrier_wait(&shared.ds_there[stage], ring_parity(end - 1));
        ptx::wgmma_fence();
        issue_dq(stage);
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDq);
        arrive(&shared.ds_free[stage]);
        arrive(&shared.keys_free);
        give_dq(before, end - 1);
      }
      const int row = job.first_k + job.j0, first = group * 64 + warp * 16;
      store_rows(p.dv, p.fours, job.job.b, row, job.g, first, job.stored, 0, p.f.dv, 1.0f,
                 reinterpret_cast<const float (&)[kD / 8][4]>(rDv), T{});
      store_rows(p.dk, p.fours, job.job.b, row, job.g, first, job.stored, 0, p.f.d, p.f.scale,
                 reinterpret_cast<const float (&)[kD / 8][4]>(rDk), T{});
    });
  }
}

}  // namespace fastkern::cuda::attention_detail
