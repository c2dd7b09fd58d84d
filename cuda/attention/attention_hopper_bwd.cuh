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
//   overlap  of each block of queries a warpgroup issues scores and dp, makes p of scores while
//            dp is computed and ds of both, and issues dv, then, as soon as both warpgroups have
//            written their ds, dq, then dk; dq leaves while dk is computed. Products are issued as
//            they come: those of one warpgroup run in what the other's leave
//   warps    of the first warpgroup: 0 draws tiles and has queries, dout, keys and values fetched,
//            1 and 2 have dq added, of every other block of queries each, 3 fetches lse and delta
//            and finds out what warpgroups have to know of a block of queries
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
//            rows_there       warp 3                  who computes: lse, delta and what else there
//                                                     is to know, and rows that saw nothing are
//                                                     zeros
//            free             who computes            warps 0 and 3: queries, lse, delta
//            dout_free        who computes, after dv  warp 0
//            ds_there         who computes            who computes, before dq. Whoever waits for
//                                                     one has done with dq of the block before, so
//                                                     that ds may be written two blocks on
//            dq_theirs        warp 1 or 2             who computes: dq may be written or, for the
//                                                     last keys, the sums before are there
//            dq_ours          who computes            warp 1 or 2: dq was written, or read. The
//                                                     fence before the copy engine reads it is
//                                                     theirs: one instead of 256, and off the way
//   cost     10 * S * T * D flops where all is seen; 4 bytes of dq added for 1280 flops
#pragma once

#include "attention/attention_hopper_bwd_fetch.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"

namespace fastkern::cuda::attention_detail {

/// The score with soft cap and ALiBi, in units of what the products q k are. What is its gradient
/// is multiplied with the slope of the cap there.
__device__ __forceinline__ float hopper_bwd_score(const HopperBackward& all, float slope, float s,
                                                  int distance, float& gradient) {
  if (all.to_cap > 0.0f) {
    const float power = ptx::exp2_approx(s * all.to_cap);
    const float part = fmaf(-2.0f, ptx::rcp_approx(1.0f + power), 1.0f);  // tanh to some 2^-22
    gradient *= fmaf(-part, part, 1.0f);
    s = part * all.from_cap;
  }
  return fmaf(-slope, fabsf(static_cast<float>(distance)), s);
}

/// kChanges: there is a soft cap or ALiBi.
template <class T, class Tile, bool kChanges>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_bwd_kernel(const __grid_constant__ HopperBackward all) {
  using Shared = HopperBwdShared<Tile>;
  constexpr int kD = Tile::kD, kM = Tile::kM, kN = Tile::kN;
  constexpr int kDqRegisters = Tile::kDq / 128;
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
      ptx::mbarrier_init(&shared.rows_there[s], 32);
      ptx::mbarrier_init(&shared.free[s], kWarps);
      ptx::mbarrier_init(&shared.dout_free[s], kWarps);
      ptx::mbarrier_init(&shared.ds_there[s], kWarps);
      ptx::mbarrier_init(&shared.dq_theirs[s], 1);
      ptx::mbarrier_init(&shared.dq_ours[s], kWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::grid_wait();
  ptx::grid_launch_next();

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (block_warp == 0) {
      if (threadIdx.x == 0) shared.turn = shared.tile = 0;
      for (int n = 0;; ++n) {
        HopperBwdJob& next = shared.jobs[ring_stage(n)];
        ptx::mbarrier_wait(&shared.job_free[ring_stage(n)], ring_parity(n) ^ 1);
        __syncwarp();  // all of its lanes have seen that it is free
        if (threadIdx.x == 0) next.number = n;
        find_hopper_bwd_job<Tile>(p, next);
        if (threadIdx.x == 0) ptx::mbarrier_arrive(&shared.job_there[ring_stage(next.number)]);
        __syncwarp();
        if (next.job.job.b < 0) break;
        if (threadIdx.x == 0) {
          fetch_hopper_bwd<Tile>(all, shared, next);
          const int count = (next.m_end - next.m_begin) * p.f.group;
          shared.turn += count, shared.tile += count > 0;
        }
        __syncwarp();
        n = next.number;
      }
    } else if (block_warp == 3) {
      int turn = 0;
      each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
        fetch_hopper_bwd_rows<Tile>(p, shared, found, turn);
      });
    } else {
      int turn = 0;
      each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
        if (threadIdx.x % 32 == 0) add_hopper_dq<Tile>(p, shared, found, block_warp - 1, turn);
      });
    }
  } else {
    ptx::registers_take<Tile::kRegisters>();
    const int group = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x % 128u), lane = thread % 32, warp = thread / 32;
    const int quad = lane / 4, pair = lane % 4;
    const auto arrive = [&](std::uint64_t* barrier) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
    };
    const float scale_log2 = p.f.scale_log2;

    const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
    const ptx::SharedAddress aV = ptx::shared_address(shared.values);
    const ptx::SharedAddress aQ = ptx::shared_address(shared.query);
    const ptx::SharedAddress aDout = ptx::shared_address(shared.dout);
    const ptx::SharedAddress aDs = ptx::shared_address(shared.ds);
    // Where this lane's rows of ds begin, and which of the first two chunks of 16 bytes is its own.
    const int ds_row = group * 64 + warp * 16 + lane % 16, ds_chunk = lane / 16;

    float rDk[kD / 2], rDv[kD / 2], rS[kM / 2], rDp[kM / 2];
    // dq: at 128 columns in the registers of the scores, which have become p by then.
    float rOwnDq[kD == 64 ? kDqRegisters : 1];
    float (&rDq)[kDqRegisters] = *reinterpret_cast<float (*)[kDqRegisters]>(kD == 64 ? rOwnDq : rS);
    std::uint32_t rP[kM / 16][4], rDs[kM / 16][4];

    // A descriptor that the compiler cannot look into: it would make each step's of its parts anew,
    // four instructions instead of one.
    const auto fixed = [](ptx::SharedAddress at, int panel = 16) {
      ptx::MatrixDescriptor d = ptx::matrix_descriptor(at, panel);
      asm volatile("" : "+l"(d));
      return d;
    };
    // d (64 keys x queries) = own keys or values times rows.
    const auto issue_transposed = [&](float (&d)[kM / 2], ptx::SharedAddress of_keys,
                                      ptx::SharedAddress rows) {
      const ptx::MatrixDescriptor dA = fixed(of_keys + group * (64 * kPanelRow));
      const ptx::MatrixDescriptor dB = fixed(rows);
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
      const ptx::MatrixDescriptor dB = fixed(rows, kM * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kM / 16; ++kk) {
        ptx::wgmma<ptx::Major::mn>(d, a[kk], ptx::matrix_right(dB, kk * (16 * kPanelRow)), true,
                                   T{});
      }
    };
    // dq (64 queries x columns) = ds transposed times keys.
    const auto issue_dq = [&](int stage) {
      const ptx::MatrixDescriptor dA =
          fixed(aDs + stage * Shared::kDs + (kM == 64 ? 0 : group * (kN * kPanelRow)));
      const ptx::MatrixDescriptor dB =
          fixed(aK + (kM == 64 ? group * (kN * kPanelRow) : 0), kN * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kN / 16; ++kk) {
        ptx::wgmma<ptx::Major::mn, ptx::Major::mn>(
            rDq, ptx::matrix_right(dA, kk * (16 * kPanelRow)),
            ptx::matrix_right(dB, kk * (16 * kPanelRow)), kk > 0, T{});
      }
      ptx::wgmma_commit();
    };
    // dq of a block has arrived in registers.
    const auto give_dq = [&](const KeyJob& job, int t) {
      const int stage = ring_stage(t);
      float4* const own = reinterpret_cast<float4*>(shared.dq[stage][group]) + threadIdx.x % 128;
      ptx::mbarrier_wait(&shared.dq_theirs[stage], ring_parity(t));
      const HopperDqIs is = shared.dq_is[stage];
      if (is == HopperDqIs::part) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          own[i * 128] = make_float4(rDq[i * 4], rDq[i * 4 + 1], rDq[i * 4 + 2], rDq[i * 4 + 3]);
        }
        __syncwarp();
        arrive(&shared.dq_ours[stage]);
        return;
      }
      if (is == HopperDqIs::rest) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          const float4 before = own[i * 128];
          rDq[i * 4] += before.x, rDq[i * 4 + 1] += before.y;
          rDq[i * 4 + 2] += before.z, rDq[i * 4 + 3] += before.w;
        }
      }
      __syncwarp();
      arrive(&shared.dq_ours[stage]);
      const HopperBwdBlock& block = shared.blocks[stage];
      const int i0 = block.m * kM, i1 = min(i0 + kM, job.queries);
      store_rows(p.dq, p.fours, job.job.b, job.job.first_q + i0, block.h,
                 warp * 16 + (kM == 64 ? 0 : group * 64), i1 - i0,
                 kM == 64 ? group * Tile::kDqColumns : 0, p.f.d, p.f.scale,
                 reinterpret_cast<const float (&)[kDqRegisters / 4][4]>(rDq), T{});
    };

    int turn = 0, tile = 0;  // blocks of queries before, and tiles that met some
    each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
      const KeyJob& job = found.job;
      const int own_keys = job.j0 + group * 64;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) rDk[i] = rDv[i] = 0.0f;
      ptx::registers_arrived(rDk);  // zeros are there before products are issued
      ptx::registers_arrived(rDv);
      const int begin = turn;
      const int end = turn + __shfl_sync(~0u, (found.m_end - found.m_begin) * p.f.group, 0);
      if (begin < end) {
        // Rows of keys and values beyond the sequence are of others: make them zeros.
        ptx::mbarrier_wait(&shared.keys_there, tile & 1);
        ptx::mbarrier_wait(&shared.values_there, tile & 1);
        if (const int rows = job.j0 + kN - job.j1;
            rows > 0 && (p.f.lengths.start_q || p.f.lengths.used_k)) {
          for (int e = static_cast<int>(threadIdx.x) - 128; e < panels_of(kD) * rows * 8;
               e += 256) {
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
      const auto await_queries = [&](int t) {
        ptx::mbarrier_wait(&shared.rows_there[ring_stage(t)], ring_parity(t));
        ptx::mbarrier_wait(&shared.query_there[ring_stage(t)], ring_parity(t));
      };
      if (begin < end) {
        await_queries(begin);
        do {
          turn = __shfl_sync(~0u, turn, 0);  // for the compiler to see that all of the warp agree
          const int stage = ring_stage(turn);
          issue_transposed(rS, aK, aQ + stage * Shared::kQueries);
          ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
          issue_transposed(rDp, aV, aDout + stage * Shared::kQueries);
          const bool whole = shared.blocks[stage].whole[group];
          float slope = 0.0f;
          int i0 = 0;
          if constexpr (kChanges) {
            i0 = shared.blocks[stage].m * kM;
            slope = all.over_scale *
                    p.f.slopes.at(static_cast<std::int64_t>(job.job.b) * p.f.slopes_batch +
                                      shared.blocks[stage].h,
                                  0.0f);
          }
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rS);
          const auto minus_delta = [&] {
#pragma unroll
            for (int c = 0; c < kM / 8; ++c) {
              const float2 delta =
                  *reinterpret_cast<const float2*>(&shared.delta[stage][c * 8 + pair * 2]);
#pragma unroll
              for (int e = 0; e < 4; ++e) rDp[c * 4 + e] -= e % 2 ? delta.y : delta.x;
            }
          };
          if constexpr (kChanges) {
            ptx::wgmma_wait<0>();
            ptx::registers_arrived(rDp);
            minus_delta();
            const int distance = i0 + pair * 2 + job.job.sight.shift - own_keys - warp * 16 - quad;
#pragma unroll
            for (int c = 0; c < kM / 8; ++c) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float& s = rS[c * 4 + e];
                s = hopper_bwd_score(all, slope, s, distance + c * 8 + e % 2 - e / 2 * 8,
                                     rDp[c * 4 + e]);
              }
            }
          }
          if (!whole) {
            const AttentionSight<int> sight = job.job.sight;
            i0 = shared.blocks[stage].m * kM;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              // Of the thread's queries, each so far from its first, key j is seen by these.
              const int j = own_keys + warp * 16 + quad + half * 8, first = i0 + pair * 2;
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
            const float2 lse =
                *reinterpret_cast<const float2*>(&shared.lse[stage][c * 8 + pair * 2]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& s = rS[c * 4 + e];
              s = ptx::exp2_approx(fmaf(s, scale_log2, -(e % 2 ? lse.y : lse.x)));
            }
          }
          // Exponentials are computed while dp is: ptxas would move them behind its end, but for a
          // branch between.
          ptx::registers_arrived(rS);
          ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rDp);
          if (turn + 1 == end) arrive(&shared.values_free);
          if constexpr (!kChanges && kD == 64) {
            // All of them read first: faster here, and slower at 128 columns.
            float2 rDelta[kM / 8];
#pragma unroll
            for (int c = 0; c < kM / 8; ++c)
              rDelta[c] = *reinterpret_cast<const float2*>(&shared.delta[stage][c * 8 + pair * 2]);
#pragma unroll
            for (int c = 0; c < kM / 8; ++c) {
#pragma unroll
              for (int e = 0; e < 4; ++e) rDp[c * 4 + e] -= e % 2 ? rDelta[c].y : rDelta[c].x;
            }
          } else if constexpr (!kChanges) {
            minus_delta();
          }
#pragma unroll
          for (int kk = 0; kk < kM / 16; ++kk) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int from = kk * 8 + e * 2;
              rDs[kk][e] = ptx::pack_2(rDp[from] * rS[from], rDp[from + 1] * rS[from + 1], T{});
              rP[kk][e] = ptx::pack_2(rS[from], rS[from + 1], T{});
            }
          }
          const ptx::SharedAddress to_ds = aDs + stage * Shared::kDs + ds_row * kPanelRow;
#pragma unroll
          for (int kk = 0; kk < kM / 16; ++kk) {
            const int chunk = (kk % 4 * 2 + ds_chunk) ^ (ds_row % 8);
            ptx::stmatrix_4(to_ds + kk / 4 * (kN * kPanelRow) + chunk * 16, rDs[kk]);
          }
          ptx::wgmma_fence();
          issue_gradient(rDv, rP, aDout + stage * Shared::kQueries);
          ptx::wgmma_commit();
          ptx::fence_async();
          __syncwarp();
          arrive(&shared.ds_there[stage]);
          ptx::mbarrier_wait(&shared.ds_there[stage], ring_parity(turn));
          ptx::wgmma_fence();
          issue_dq(stage);
          ptx::wgmma_wait<1>();
          arrive(&shared.dout_free[stage]);
          issue_gradient(rDk, rDs, aQ + stage * Shared::kQueries);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rDq);
          give_dq(job, turn);
          // Those of the next block while products are under way: after these its own are issued at
          // once.
          if (turn + 1 < end) await_queries(turn + 1);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rDv);
          ptx::registers_arrived(rDk);
          arrive(&shared.free[stage]);
        } while (++turn < end);
        arrive(&shared.keys_free);
      }
      const int row = job.first_k + job.j0, first = (static_cast<int>(threadIdx.x) / 32 - 4) * 16;
      store_rows(p.dv, p.fours, job.job.b, row, job.g, first, job.stored, 0, p.f.dv, 1.0f,
                 reinterpret_cast<const float (&)[kD / 8][4]>(rDv), T{});
      store_rows(p.dk, p.fours, job.job.b, row, job.g, first, job.stored, 0, p.f.d, p.f.scale,
                 reinterpret_cast<const float (&)[kD / 8][4]>(rDk), T{});
    });
  }
}

}  // namespace fastkern::cuda::attention_detail
