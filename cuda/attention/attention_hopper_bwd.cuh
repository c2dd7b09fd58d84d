// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper (sm_90a): what attention_bwd.cuh computes, for the calls that
// hopper_bwd_refuses() leaves.
//
//   work     a block of threads per multiprocessor goes from tile to tile: 128 keys of one key
//            head, 64 a warpgroup, against the query heads that share them and, kM at a time and
//            the last ones first, the queries that see them
//   memory   keys and values stay in shared memory; queries and dout go through a ring of two
//            stages that the copy engine fills. Scores are transposed, keys x queries, so that p
//            is in registers what the product with dout takes as its left side; ds goes through
//            shared memory, two stages, for dk and dq. dk and dv stay in registers. dq is summed in
//            f32 in global memory, by additions of the copy engine in L2
//   overlap  products are issued one step ahead of what a warpgroup computes: dq of two blocks of
//            queries before, scores, and dk of the block before run while that dq leaves; dp while
//            exponentials are computed; dv while ds is. Nothing is under way where the loop begins
//            anew, which ptxas does not follow
//   warps    of the first warpgroup: 0 draws tiles and has queries, dout, keys and values fetched,
//            1 and 2 have dq added, of every other block of queries each, 3 fetches lse and delta
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
//            rows_there       warp 3                  who computes: lse and delta, which block it
//                                                     is, and rows that saw nothing are zeros
//            free             who computes            warps 0 and 3: queries, dout, lse, delta
//            ds_there         who computes            who computes, before dq
//            ds_free          who computes, after dq  who computes, before ds of two blocks on
//            dq_theirs        warp 1 or 2             who computes: where dq goes; it may be
//                                                     written or, for the last keys, the sums
//                                                     before are there
//            dq_ours          who computes            warp 1 or 2: dq was written, or read
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
        if (threadIdx.x == 0) next.number = n, next.tile = shared.tile;
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

    // Of a block's steps of dv, those that are issued before ds is computed: for more there are no
    // registers.
    constexpr int kEarly = 4;
    float rDk[kD / 2], rDv[kD / 2], rS[kM / 2], rDp[kM / 2], rDq[kDqRegisters];
    std::uint32_t rP[kM / 16][4];

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
    // dk += ds times queries; ds from shared memory: carried in registers from one block to the
    // next there would be none for the scores.
    const auto issue_dk = [&](int stage, ptx::SharedAddress rows, bool add) {
      const ptx::MatrixDescriptor dA =
          ptx::matrix_descriptor(aDs + stage * Shared::kDs + group * (64 * kPanelRow));
      const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(rows, kM * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kM / 16; ++kk) {
        ptx::wgmma<ptx::Major::k, ptx::Major::mn>(
            rDk, ptx::matrix_right(dA, kk / 4 * (kN * kPanelRow) + kk % 4 * 32),
            ptx::matrix_right(dB, kk * (16 * kPanelRow)), kk > 0 || add, T{});
      }
    };
    // dv += p times dout, of steps from `from` to `to`.
    const auto issue_dv = [&](int from, int to, ptx::SharedAddress rows) {
      const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(rows, kM * kPanelRow);
#pragma unroll
      for (int kk = 0; kk < kM / 16; ++kk) {
        if (kk < from || kk >= to) continue;
        ptx::wgmma<ptx::Major::mn>(rDv, rP[kk], ptx::matrix_right(dB, kk * (16 * kPanelRow)), true,
                                   T{});
      }
    };
    // To 16 bits, what a step of a product takes as its left side.
    const auto pack = [&](std::uint32_t (&to)[4], const float (&from)[kM / 2], int kk) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        to[e] = ptx::pack_2(from[kk * 8 + e * 2], from[kk * 8 + e * 2 + 1], T{});
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
    };
    // dq of a block, with number t, has arrived in registers.
    const auto give_dq = [&](const HopperBwdJob& found, int t) {
      const int stage = ring_stage(t);
      float4* const own = reinterpret_cast<float4*>(shared.dq[stage][group]) + threadIdx.x % 128;
      ptx::mbarrier_wait(&shared.dq_theirs[stage], ring_parity(t));
      const int rows = shared.places[stage].rows;
      if (rows == 0) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          own[i * 128] = make_float4(rDq[i * 4], rDq[i * 4 + 1], rDq[i * 4 + 2], rDq[i * 4 + 3]);
        }
        ptx::fence_async();
        __syncwarp();
        arrive(&shared.dq_ours[stage]);
        return;
      }
      const HopperDqPlace at = shared.places[stage];
      if (at.sums) {
#pragma unroll
        for (int i = 0; i < kDqRegisters / 4; ++i) {
          const float4 before = own[i * 128];
          rDq[i * 4] += before.x, rDq[i * 4 + 1] += before.y;
          rDq[i * 4 + 2] += before.z, rDq[i * 4 + 3] += before.w;
        }
      }
      __syncwarp();
      arrive(&shared.dq_ours[stage]);
      store_rows(p.dq, p.fours, found.job.job.b, found.job.job.first_q + at.i0, at.h,
                 (ptx::thread_number() / 32 - 4) % (kM == 64 ? 4 : 8) * 16, rows,
                 kM == 64 ? group * Tile::kDqColumns : 0, p.f.d, p.f.scale,
                 reinterpret_cast<const float (&)[kDqRegisters / 4][4]>(rDq), T{});
    };

    // dk or dv of this warp's keys. Straight from registers a store has a few bytes of each of
    // eight rows, and takes as long as eight.
    const auto store_keys = [&](const View& to, const KeyJob& job, int width, float scale,
                                const float (&v)[kD / 2]) {
      const int row = job.first_k + job.j0, first = (ptx::thread_number() / 32 - 4) * 16;
      if (!p.fours) {
        return store_rows(to, false, job.job.b, row, job.g, first, job.stored, 0, width, scale,
                          reinterpret_cast<const float (&)[kD / 8][4]>(v), T{});
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kD / 8; c += 2) {
        std::uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          words[e] = ptx::pack_2(v[c * 4 + e * 2] * scale, v[c * 4 + e * 2 + 1] * scale, T{});
        const int chunk = (c % 8 + ds_chunk) ^ (ds_row % 8);
        ptx::stmatrix_4(aDs + c / 8 * Shared::kDs + ds_row * kPanelRow + chunk * 16, words);
      }
      __syncwarp();
      constexpr int kFours = kD / 4;
#pragma unroll 4
      for (int e = lane; e < 16 * kFours; e += 32) {
        const int at = first + e / kFours, x = e % kFours;
        const uint2 four = *reinterpret_cast<const uint2*>(
            shared.ds[x / 16] + at * kPanelRow + ((x / 2 % 8) ^ (at % 8)) * 16 + x % 2 * 8);
        if (at < job.stored && x * 4 < width) {
          *reinterpret_cast<uint2*>(to.at(job.job.b, row + at, job.g) + x * 8) = four;
        }
      }
    };

    int turn = 0;  // blocks of queries before
    each_hopper_bwd_job<Tile>(shared, [&](const HopperBwdJob& found) {
      const KeyJob& job = found.job;
      const int own_keys = job.j0 + group * 64;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) rDk[i] = rDv[i] = 0.0f;
#pragma unroll
      for (int kk = 0; kk < kM / 16; ++kk) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rP[kk][e] = 0;
      }
      ptx::registers_arrived(rDk);  // zeros are there before products are issued
      ptx::registers_arrived(rDv);
      const int begin = turn, end = turn + (found.m_end - found.m_begin) * p.f.group;
      if (begin < end) {
        // Rows of keys and values beyond the sequence are of others: make them zeros.
        ptx::mbarrier_wait(&shared.keys_there, found.tile & 1);
        ptx::mbarrier_wait(&shared.values_there, found.tile & 1);
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
      }
      for (; turn < end; ++turn) {
        const int stage = ring_stage(turn), other = stage ^ 1;
        ptx::mbarrier_wait(&shared.rows_there[stage], ring_parity(turn));
        ptx::mbarrier_wait(&shared.query_there[stage], ring_parity(turn));
        // Products of blocks before the first are issued too, as a branch would have ptxas put one
        // after the other: dv of zeros times its own rows, dk and dq that none takes.
        const int last = turn > begin ? other : stage;
        if (turn == begin) ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
        if (turn > begin + 1) ptx::mbarrier_wait(&shared.ds_there[stage], ring_parity(turn - 2));
        ptx::wgmma_fence();
        issue_dq(stage);
        ptx::wgmma_commit();
        issue_transposed(rS, aK, aQ + stage * Shared::kQueries);
        issue_dv(kEarly, kM / 16, aDout + last * Shared::kQueries);
        issue_dk(other, aQ + last * Shared::kQueries, turn > begin + 1);
        ptx::wgmma_commit();
        const HopperBwdBlock& block = shared.blocks[stage];
        const bool whole = block.whole >> group & 1;
        float slope = 0.0f;
        if constexpr (kChanges) {
          slope = all.over_scale *
                  p.f.slopes.at(static_cast<std::int64_t>(job.job.b) * p.f.slopes_batch + block.h,
                                0.0f);
        }
        ptx::wgmma_wait<2>();
        ptx::registers_arrived(rDq);
        if (turn > begin + 1) {
          arrive(&shared.ds_free[stage]);
          give_dq(found, turn - 2);
        }
        ptx::mbarrier_wait(&shared.dout_there[stage], ring_parity(turn));
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDk);
        ptx::registers_arrived(rDv);
        if (turn > begin) arrive(&shared.free[other]);
        issue_transposed(rDp, aV, aDout + stage * Shared::kQueries);
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
          const int distance =
              block.i0 + pair * 2 + job.job.sight.shift - own_keys - warp * 16 - quad;
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
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // Of the thread's queries, each so far from its first, key j is seen by these.
            const int j = own_keys + warp * 16 + quad + half * 8, first = block.i0 + pair * 2;
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
        // Exponentials are computed while dp is: ptxas would move them behind its end, but for a
        // branch between.
        ptx::registers_arrived(rS);
        ptx::mbarrier_wait(&shared.ds_free[stage], ring_parity(turn) ^ 1);
#pragma unroll
        for (int kk = 0; kk < kEarly; ++kk) pack(rP[kk], rS, kk);
        ptx::wgmma_fence();
        issue_dv(0, kEarly, aDout + stage * Shared::kQueries);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::registers_arrived(rDp);
        if (turn + 1 == end) arrive(&shared.values_free);
        if constexpr (!kChanges) minus_delta();
#pragma unroll
        for (int i = 0; i < kM / 2; ++i) rDp[i] *= rS[i];
        const ptx::SharedAddress to_ds = aDs + stage * Shared::kDs + ds_row * kPanelRow;
#pragma unroll
        for (int kk = 0; kk < kM / 16; ++kk) {
          if (kk >= kEarly) pack(rP[kk], rS, kk);
          std::uint32_t ds[4];
          pack(ds, rDp, kk);
          const int chunk = (kk % 4 * 2 + ds_chunk) ^ (ds_row % 8);
          ptx::stmatrix_4(to_ds + kk / 4 * (kN * kPanelRow) + chunk * 16, ds);
        }
        ptx::fence_async();
        __syncwarp();
        arrive(&shared.ds_there[stage]);
        ptx::bar_sync(kWarpgroup + group, 128);  // dk takes what this warpgroup wrote
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDv);
      }
      if (begin < end) {
        const int stage = ring_stage(end - 1), other = stage ^ 1;
        if (end - begin > 1) ptx::mbarrier_wait(&shared.ds_there[other], ring_parity(end - 2));
        ptx::wgmma_fence();
        issue_dq(other);
        ptx::wgmma_commit();
        issue_dv(kEarly, kM / 16, aDout + stage * Shared::kQueries);
        issue_dk(stage, aQ + stage * Shared::kQueries, end - begin > 1);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::registers_arrived(rDq);
        if (end - begin > 1) {
          arrive(&shared.ds_free[other]);
          give_dq(found, end - 2);
        }
        ptx::mbarrier_wait(&shared.ds_there[stage], ring_parity(end - 1));
        ptx::wgmma_fence();
        issue_dq(stage);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rDq);
        ptx::registers_arrived(rDv);
        ptx::registers_arrived(rDk);
        arrive(&shared.free[stage]);
        arrive(&shared.ds_free[stage]);
        arrive(&shared.keys_free);
        give_dq(found, end - 1);
      }
      // ds is read by the other warpgroup, too: once it has been, results leave through its rows.
      ptx::mbarrier_wait(&shared.ds_free[ring_stage(end - 2)], ring_parity(end - 2));
      ptx::mbarrier_wait(&shared.ds_free[ring_stage(end - 1)], ring_parity(end - 1));
      store_keys(p.dv, job, p.f.dv, 1.0f, rDv);
      store_keys(p.dk, job, p.f.d, p.f.scale, rDk);
    });
  }
}

}  // namespace fastkern::cuda::attention_detail
