// SPDX-License-Identifier: Apache-2.0
// Attention, forward, on Hopper (sm_90a). attention.h says what is computed; hopper_refuses() for
// which calls.
//
//   work     a block of threads per multiprocessor goes from tile to tile: 64 queries a warpgroup
//   of
//            one head, against the keys they see, last ones first, Tile::kN at a time
//   memory   one thread of the first warpgroup has the copy engine fetch queries, keys and values,
//            stages of the last two; scores, probabilities and results are registers of the
//            others, results leave through shared memory: stored by who has computed them, or by
//            warps of the first warpgroup
//   overlap  products q k of a block are issued before products p v of the one before: its softmax
//            goes with the latter. Warpgroups issue in turn: softmax of one goes with products of
//            the other. Fetching goes on into the next tile, whose queries come to L2 at least
//            while this one is computed. A warpgroup leaves out blocks that its queries do not see
//   kLazy    maxima of a tile's first blocks only, and where exponentials become too large
//   sync     barrier         who arrives              who waits
//            job_there       warp that plans          thread that fetches
//            job_free        thread that fetches      warp that plans, two tiles later
//            query_there     copy engine, producer    all that compute: queries and the job
//            query_free      they, a warp each, after producer (there of a warpgroup)
//                            the last product q k
//            keys_there      copy engine, producer    they
//            keys_free       they, a warp each        producer
//            values_*        the same                 the same
//            kStore + ...    a warpgroup, with half   the warp that stores its results, where
//                            of its results           that is not the warpgroup (!Tile::kOwn)
//            out_free        that warp                warpgroups, in turn, before they put theirs
//            kTurn + g       warpgroup g - 1          warpgroup g, before it issues
//   cost     4 * S * T * D flops where all is seen; keys and values read S / queries times, from L2
#pragma once

#include "attention/attention_hopper_fwd_fetch.cuh"
#include "attention/attention_hopper_scores.cuh"
#include "launch.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fastkern::cuda::attention_detail {

/// kChanges: there is a soft cap or ALiBi.
template <class T, class Tile, bool kChanges>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_fwd_kernel(const __grid_constant__ HopperForward p) {
  using Shared = HopperShared<Tile>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kDv = Tile::kDv, kGroups = Tile::kGroups;
  // Sums are added up while the last products are computed.
  constexpr bool kOwn = Tile::kOwn, kEarly = Tile::kNarrow || (!kOwn && !kChanges);
  static_assert(kOwn || kGroups == 2);
  static_assert(!Tile::kLazy || (kOwn && !kChanges));  // with a barrier between tiles
  constexpr int kScores = kN / 2, kResults = kDv / 2;  // of a thread
  extern __shared__ __align__(1024) char hopper_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(hopper_memory);

  // The number of the warpgroup, for the compiler to see that all of a warp agree.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.q);
    ptx::prefetch_map(&p.k);
    ptx::prefetch_map(&p.v);
    ptx::prefetch_map(&p.out);
    constexpr int kWarps = 4 * kGroups;
    for (int s = 0; s < Tile::kRooms; ++s) {
      ptx::mbarrier_init(&shared.query_there[s], 1);
      ptx::mbarrier_init(&shared.query_free[s], kWarps / (kOwn ? 1 : kGroups));
    }
    for (int s = 0; s < Tile::kStages; ++s) {
      ptx::mbarrier_init(&shared.keys_there[s], 1);
      ptx::mbarrier_init(&shared.keys_free[s], kWarps);
      ptx::mbarrier_init(&shared.values_there[s], 1);
      ptx::mbarrier_init(&shared.values_free[s], kWarps);
    }
    if constexpr (Tile::kLazy) {
      for (int s = 0; s < 2 * kGroups; ++s) (&shared.exceeded[0][0])[s] = -1;
    }
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(&shared.job_there[s], 32);
      ptx::mbarrier_init(&shared.job_free[s], 1);
    }
    for (int s = 0; !kOwn && s < 4; ++s) ptx::mbarrier_init(&shared.out_free[s / 2][s % 2], 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::grid_wait();
  ptx::grid_launch_next();

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
    if (threadIdx.x == 0) {
      HopperProducer<Tile> producer{p, shared};
      for (int t = 0; producer.run(t); ++t) {
      }
    } else if (warp == 1) {
      hopper_plan<Tile>(p, shared);
    } else if (!kOwn && warp >= 2) {
      hopper_store<Tile>(p, shared, warp - 2);
    }
  } else {
    ptx::registers_take<Tile::kRegisters>();
    const int group = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, pair = lane % 4;
    const auto arrive = [&](std::uint64_t* barrier) {
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };
    const ptx::SharedAddress aQuery =
        ptx::shared_address(shared.query) + (kOwn ? group * (64 * kPanelRow) : 0);
    const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
    const ptx::SharedAddress aV = ptx::shared_address(shared.values);
    const float unit = p.f.scale_log2;  // from products to powers of two

    float rS[kScores], rO[kResults];
    std::uint32_t rP[kN / 16][4];
    const auto issue_scores = [&](ptx::SharedAddress aQ, int stage) {
      const ptx::MatrixDescriptor dQ = ptx::matrix_descriptor(aQ);
      const ptx::MatrixDescriptor dK = ptx::matrix_descriptor(aK + stage * Shared::kKeys);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < Tile::kD / 16; ++kk) {
        ptx::wgmma<ptx::Major::k, ptx::Major::k>(
            rS, ptx::matrix_right(dQ, kk / 4 * (Tile::kRoomRows * kPanelRow) + kk % 4 * 32),
            ptx::matrix_right(dK, kk / 4 * (kN * kPanelRow) + kk % 4 * 32), kk > 0, T{});
      }
      ptx::wgmma_commit();
    };
    const auto issue_results = [&](int stage) {
      const ptx::MatrixDescriptor dV =
          ptx::matrix_descriptor(aV + stage * Shared::kValues, kN * kPanelRow);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kN / 16; ++kk) {
        ptx::wgmma<ptx::Major::mn>(rO, rP[kk], ptx::matrix_right(dV, kk * (16 * kPanelRow)), true,
                                   T{});
      }
      ptx::wgmma_commit();
    };
    const auto pack_probabilities = [&] {
#pragma unroll
      for (int kk = 0; kk < kN / 16; ++kk) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* const s = rS + kk * 8 + e * 2;
          rP[kk][e] = ptx::pack_2(s[0], s[1], T{});
        }
      }
    };

    if (Tile::kTurns && group == 0) ptx::bar_arrive(kTurn, 256);
    int turn = 0;  // blocks of keys seen
    for (int t = 0;; ++t) {
      // What stages follow from stays in registers that all of a warp share; where ptxas takes turn
      // and t for different in each, products wait for their descriptors. (With changes of scores
      // it has no register for that at 256 columns.)
      if constexpr (!kChanges) turn = __shfl_sync(~0u, turn, 0), t = __shfl_sync(~0u, t, 0);
      const Stage tile = room_of<Tile>(t, group);
      ptx::mbarrier_wait(&shared.query_there[tile.index], tile.parity);
      const HopperJob& job = shared.jobs[t % Shared::kJobs];
      if (job.b < 0) {
        if (!kOwn) ptx::bar_arrive(hopper_store_barrier(group, 0, t), 160);
        break;
      }
      const ptx::SharedAddress aQ = aQuery + tile.index * Shared::kQuery;
      const int pack = p.schedule.pack;
      // The thread's two rows are eight apart, of queries from job.i0 and heads from job.h on.
      const auto row_of = [&](int half) {
        const int at = anew(thread);
        return group * 64 + at / 32 * 16 + at % 32 / 4 + half * 8;
      };
      const auto query_of = [&](int half) { return row_of(half) >> pack; };
      const auto head_of = [&](int half) { return row_of(half) & ((1 << pack) - 1); };
      // What scores are measured against, in units of what the products are, or as a power of two.
      // A sink is a key of its own, counted by one thread.
      constexpr float kNone = Tile::kNarrow ? -0x1p126f : -INFINITY;
      float top[2] = {kNone, kNone}, sum[2] = {}, alpha[2];
      // Products below it have not grown by too much; of narrow tiles.
      float limit[2] = {-INFINITY, -INFINITY};
      const auto find_limit = [&](int half) {
        limit[half] =
            upper_below((top[half] + kMostGrowth * (1 - 0x1p-18f)) * ptx::rcp_approx(unit));
      };
      if (p.f.sinks.data) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sink = p.f.sinks.at(job.h + head_of(half), -INFINITY);
          if constexpr (Tile::kNarrow) {
            top[half] = fmaxf(sink * kLog2e, kNone);
          } else {
            top[half] = sink == -INFINITY ? sink : sink / p.f.scale;
          }
          sum[half] = sink == -INFINITY || pair > 0 ? 0.0f : 1.0f;
          if constexpr (Tile::kNarrow) find_limit(half);
        }
      }
      bool grown = false;
#pragma unroll
      for (int i = 0; i < kResults; ++i) rO[i] = 0.0f;

      // In registers: read from memory for each block, they are waited for behind its scores.
      const HopperSeen seen = shared.seen[t % Shared::kJobs][group];
      const int job_begin = job.begin, job_end = job.end;
      const unsigned whole = max(seen.whole_end - seen.whole_begin, 0);

      const auto mask = [&]<int kCount>(int n, Keys<kCount>) {
        const auto first_key = [&] { return n * kN + anew(thread) % 4 * 2; };
        int j0 = 0;
        if constexpr (!Tile::kNarrow || kChanges) j0 = first_key();
        if constexpr (kChanges) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const ScoreChange change(p.f, job.b, job.h + head_of(half));
            change.apply<kCount / 2>(rS, half, job.i0 + query_of(half) + job.sight.shift - j0);
          }
        }
        const bool masked = Tile::kNarrow ? static_cast<unsigned>(n - seen.whole_begin) >= whole
                                          : n >= seen.whole_end || n < seen.whole_begin;
        if (masked) {
          if constexpr (Tile::kNarrow && !kChanges) j0 = first_key();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = job.i0 + query_of(half);
            const int from = job.sight.low(i) - j0, to = job.sight.high(i) - j0;
#pragma unroll
            for (int c = 0; c < kCount / 8; ++c) {
              const std::uint32_t bits =
                  pairs_below(to - c / 16 * 128) & ~pairs_below(from - c / 16 * 128);
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (!(bits >> (c % 16 * 2 + e) & 1)) rS[c * 4 + half * 2 + e] = -INFINITY;
              }
            }
          }
        }
      };
      // What scores of the first kCount keys are measured against; alpha: what results so far are
      // multiplied with, if any of the warp's queries has `grown`. keep(half, m): a maximum of m is
      // no reason to measure a query's scores anew.
      float base[2], more[4];
      [[maybe_unused]] bool fresh[2] = {true, true},
                            settled = false;  // queries that saw nothing yet
      const auto maxima_of = [&]<int kCount>(float(&most)[2], Keys<kCount>) {
        // Four chains side by side: an instruction takes as long as four are issued.
        float chains[4] = {rS[0], rS[1], rS[2], rS[3]};
#pragma unroll
        for (int i = 4; i < kCount / 2; ++i) chains[i % 4] = fmaxf(chains[i % 4], rS[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          most[half] = fmaxf(chains[half * 2], chains[half * 2 + 1]);
        }
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], lanes));
          }
        }
      };
      const auto measure = [&]<int kCount>(Keys<kCount> count, const auto& keep) {
        float most[2];
        grown = false;
        maxima_of(most, count);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& m = most[half];
          if constexpr (Tile::kLazy) fresh[half] = fresh[half] && m == -INFINITY;
          if (keep(half, m)) {
            m = top[half];  // stays
          } else {
            grown = true;
          }
        }
        grown = __any_sync(~0u, grown);
        if (grown) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float base = most[half] == -INFINITY ? 0.0f : most[half] * unit;
            alpha[half] =
                top[half] == most[half] ? 1.0f : ptx::exp2_approx(fmaf(top[half], unit, -base));
            top[half] = most[half];
            sum[half] *= alpha[half];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          base[half] = top[half] == -INFINITY ? 0.0f : top[half] * unit;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) more[i] = 0.0f;
      };
      // Narrow tiles: few blocks have a maximum that counts. Whether a thread's scores may have one
      // takes half of the instructions, and nothing of the other threads.
      const auto measure_narrow = [&]<int kCount, bool kFirst>(Keys<kCount> count, First<kFirst>) {
        bool above = true;
        if constexpr (!kFirst) {
          float most[2] = {rS[0], rS[2]};
#pragma unroll
          for (int i = 0; i < kCount / 2; i += 2) {
            most[i / 2 % 2] = ptx::max_3_upper(most[i / 2 % 2], rS[i], rS[i + 1]);
          }
          above = !(most[0] < limit[0]) || !(most[1] < limit[1]);
        }
        grown = false;
        if (kFirst || __any_sync(~0u, above)) {
          float most[2];
          maxima_of(most, count);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            most[half] *= unit;
            if (most[half] - top[half] <= kMostGrowth) {
              most[half] = top[half];  // stays
            } else {
              grown = true;
            }
          }
          grown = __any_sync(~0u, grown);
          if (grown) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              alpha[half] = ptx::exp2_approx(top[half] - most[half]);
              top[half] = most[half];
              sum[half] *= alpha[half];
              find_limit(half);
            }
            if constexpr (!kFirst) {
              ptx::wgmma_wait<0>();
              ptx::registers_arrived(rO);
#pragma unroll
              for (int i = 0; i < kResults; ++i) rO[i] *= alpha[i / 2 % 2];
            }
          }
        }
        base[0] = top[0], base[1] = top[1];
      };
      // Scores of the first kCount keys become probabilities.
      const auto exponentials = [&]<int kCount>(Keys<kCount>) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
          rS[i] = ptx::exp2_approx(fmaf(rS[i], unit, -base[i / 2 % 2]));
          more[i % 4] = Tile::kNarrow && i < 4 ? rS[i] : more[i % 4] + rS[i];
        }
      };
      const auto add_up = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] += more[half * 2] + more[half * 2 + 1];
      };
      const auto softmax = [&]<int kCount, bool kFirst>(int n, Keys<kCount> count,
                                                        First<kFirst> first) {
        mask(n, count);
        if constexpr (Tile::kNarrow) {
          measure_narrow(count, first);
        } else {
          measure(count, [&](int half, float m) { return (m - top[half]) * unit <= kMostGrowth; });
        }
        exponentials(count);
        add_up();
      };

      // kLazy: a query's scores are measured in the first block that it sees anything of, ...
      const auto measure_or_not = [&](int n) {
        mask(n, Keys<kN>{});
        grown = false;
        if (!settled) {
          const bool was_fresh[2] = {fresh[0], fresh[1]};
          measure(Keys<kN>{}, [&](int half, float m) {
            return !was_fresh[half] || (m - top[half]) * unit <= kMostGrowth;
          });
          settled = !__any_sync(~0u, fresh[0] || fresh[1]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) more[i] = 0.0f;
        }
      };
      // ... and in one where a thread's exponentials come to more than the limit, below which they
      // are numbers of 16 bits, or to none: rare, and then the products are computed again. What a
      // query is measured against follows from its own scores alone.
      const auto measure_again = [&](int n, int stage) {
        constexpr float kLimit = 32768.0f;
        const bool over[2] = {!(more[0] + more[1] <= kLimit), !(more[2] + more[3] <= kLimit)};
        // Products are a warpgroup's: its warps agree. By turns, as a warp may be a block ahead.
        int& flag = shared.exceeded[turn & 1][group];
        if (__any_sync(~0u, over[0] || over[1]) && lane == 0) flag = turn;
        ptx::bar_sync(kGroup + group, 128);
        if (flag == turn) {
          issue_scores(aQ, stage);
          bool row_over[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            row_over[half] = __ballot_sync(~0u, over[half]) >> (lane & 28) & 15;
          }
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rS);
          mask(n, Keys<kN>{});
          measure(Keys<kN>{}, [&](int half, float) { return !row_over[half]; });
          exponentials(Keys<kN>{});
          pack_probabilities();
        }
      };

      // The copy engine has read the results before.
      const auto wait_for_room = [&] {
        if (!kOwn) return;
        if (thread == 0) ptx::bulk_wait_read<0>();
        ptx::bar_sync(kGroup + group, 128);
      };
      const auto give_back_queries = [&] { arrive(&shared.query_free[tile.index]); };
      // Rows of values beyond the sequence, which are of others, would make zeros NaN. They are in
      // the tile's first block.
      const auto clear_rest = [&](const Stage& stage) {
        const int rows = job_end * kN - job.sight.keys;
        if (rows <= 0 || !(p.f.lengths.start_q || p.f.lengths.used_k)) return;
        ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
        const int all = panels_of(kDv) * rows * 8;
        char* const from = shared.values[stage.index] + (kN - rows) * kPanelRow;
        for (int e = group * 128 + thread; e < all; e += kGroups * 128) {
          char* const to = from + e / (rows * 8) * (kN * kPanelRow) + e % (rows * 8) * 16;
          *reinterpret_cast<uint4*>(to) = uint4{};
        }
        ptx::fence_async();
        ptx::bar_sync(kComputing, kGroups * 128);
      };
      // A block that none of the warpgroup's queries sees. Stages are given back once all lanes
      // have seen that they were there.
      const auto leave_out = [&](int n) {
        const Stage stage = stage_of<Tile::kStages>(turn++);
        ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
        __syncwarp();
        arrive(&shared.keys_free[stage.index]);
        if (n == job_end - 1) {
          clear_rest(stage);
        } else if (Tile::kTurns) {
          ptx::bar_sync(kTurn + group, 256);
          ptx::bar_arrive(kTurn + (group + 1) % kGroups, 256);
        }
        ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
        __syncwarp();
        arrive(&shared.values_free[stage.index]);
      };

      float total[2], inverse[2], lse[2];
      bool nothing[2];  // seen, or to be computed
      const auto lse_of = [&](int half) {
        return nothing[half] ? -INFINITY
                             : fmaf(top[half], Tile::kNarrow ? kLn2 : p.f.scale, logf(total[half]));
      };
      const auto divide = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = sum[half];
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(~0u, total[half], lanes);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          nothing[half] = total[half] == 0.0f || job.i0 + query_of(half) >= job.i1;
          // Sums are 1 at least, or 0: nothing here that division is slow for.
          const float about = ptx::rcp_approx(total[half]);
          inverse[half] = fmaf(fmaf(-total[half], about, 1.0f), about, about);
          if constexpr (Tile::kNarrow) lse[half] = lse_of(half);
        }
      };

      int n = job_end - 1;
      for (; n >= seen.end; --n) leave_out(n);
      if (n >= seen.begin) {
        {
          const Stage stage = stage_of<Tile::kStages>(turn);
          const bool in_turn = Tile::kTurns && n < job_end - 1;
          ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
          if (in_turn) ptx::bar_sync(kTurn + group, 256);
          issue_scores(aQ, stage.index);
          if (in_turn) ptx::bar_arrive(kTurn + (group + 1) % kGroups, 256);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rS);
          arrive(&shared.keys_free[stage.index]);
          if (!Tile::kNarrow && n == seen.begin) give_back_queries();
          if (n == job_end - 1) clear_rest(stage);
          if (seen.half) {
            softmax(n, Keys<kN / 2>{}, First<true>{});
#pragma unroll
            for (int i = kScores / 2; i < kScores; ++i) rS[i] = 0.0f;
          } else {
            softmax(n, Keys<kN>{}, First<true>{});
          }
          pack_probabilities();
        }
        if constexpr (Tile::kLazy) settled = !__any_sync(~0u, fresh[0] || fresh[1]);
        for (--n; n >= seen.begin; --n) {
          // Found anew where it matters: carried from the block before, it would not stay in
          // registers that a warp shares.
          const Stage before = stage_of<Tile::kStages>(Tile::kNarrow ? anew(turn) : turn);
          const Stage stage = stage_of<Tile::kStages>(++turn);
          ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
          if (Tile::kTurns) ptx::bar_sync(kTurn + group, 256);
          issue_scores(aQ, stage.index);
          ptx::mbarrier_wait(&shared.values_there[before.index], before.parity);
          issue_results(before.index);
          if (Tile::kTurns) ptx::bar_arrive(kTurn + (group + 1) % kGroups, 256);
          ptx::wgmma_wait<1>();
          ptx::registers_arrived(rS);
          if constexpr (!Tile::kLazy) {
            arrive(&shared.keys_free[stage.index]);
            if (!Tile::kNarrow && n == seen.begin) give_back_queries();
            softmax(n, Keys<kN>{}, First<false>{});
            ptx::wgmma_wait<0>();
            ptx::registers_arrived(rO);
            arrive(&shared.values_free[before.index]);
            pack_probabilities();
          } else {
            measure_or_not(n);
            exponentials(Keys<kN>{});
            ptx::wgmma_wait<0>();
            ptx::registers_arrived(rO);
            arrive(&shared.values_free[before.index]);
            pack_probabilities();
            measure_again(n, stage.index);
            add_up();
            arrive(&shared.keys_free[stage.index]);
            if (n == seen.begin) give_back_queries();
          }
          if (!Tile::kNarrow && grown) {
#pragma unroll
            for (int i = 0; i < kResults; ++i) rO[i] *= alpha[i / 2 % 2];
          }
        }
        const Stage stage = stage_of<Tile::kStages>(Tile::kNarrow ? anew(turn) : turn);
        ++turn;
        if constexpr (Tile::kNarrow) give_back_queries();  // there is room for another tile's
        ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
        issue_results(stage.index);
        if (kEarly) divide();
        wait_for_room();
        ptx::wgmma_wait<0>();
        ptx::registers_arrived(rO);
        arrive(&shared.values_free[stage.index]);
      } else {
        __syncwarp();
        give_back_queries();
        if (kEarly) divide();
        wait_for_room();
      }
      for (; n >= job_begin; --n) leave_out(n);

      if (!kEarly) divide();
      if (nothing[0] || nothing[1]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (nothing[half]) inverse[half] = 0.0f;
#pragma unroll
          for (int c = 0; c < kDv / 8; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& o = rO[c * 4 + half * 2 + e];
              o = nothing[half] ? 0.0f : o;
            }
          }
        }
      }
      const int rows = min((job.stored << pack) - group * 64, 64);
      const bool packed = p.f.lengths.start_q;
      const int warp = thread / 32;
      const auto place = [&](int r) {  // of the r-th row of the warpgroup
        return p.f.out.at(packed ? 0 : job.b, job.first_q + job.i0 + ((group * 64 + r) >> pack),
                          job.h + (r & ((1 << pack) - 1)));
      };
      // Of column tile c and the row eight `half`s below, two results.
      const auto results = [&](int c, int half) {
        const float* const o = rO + c * 4 + half * 2;
        return ptx::pack_2(o[0] * inverse[half], o[1] * inverse[half], T{});
      };
      constexpr int kPanel = Tile::kRoomRows * kPanelRow;
      const int first = kOwn ? group * (64 * kPanelRow) : 0;
      const ptx::SharedAddress aO = ptx::shared_address(shared.out) + first;
      // Tiles of eight columns from kFrom to kTo to shared memory.
      const auto put = [&]<int kFrom, int kTo>() {
        const int to_row = anew(warp * 16 + lane % 16);
#pragma unroll
        for (int c = kFrom; c < kTo; c += 2) {
          const std::uint32_t words[4] = {results(c, 0), results(c, 1), results(c + 1, 0),
                                          results(c + 1, 1)};
          const int chunk = (c % 8 + lane / 16) ^ (to_row % 8);
          ptx::stmatrix_4(aO + c / 8 * kPanel + to_row * kPanelRow + chunk * 16, words);
        }
      };
      // And on from there where the rows after these are another sequence's: a warp stores what
      // it has computed.
      const auto store_rows = [&]<int kFrom, int kTo>() {
        __syncwarp();
        const char* const from = shared.out + first;
        for (int e = anew(lane); e < 16 * (kTo - kFrom); e += 32) {
          const int r = anew(warp) * 16 + e / (kTo - kFrom), chunk = kFrom + e % (kTo - kFrom);
          if (r >= rows || chunk * 8 >= p.f.dv) continue;
          const char* const at =
              from + chunk / 8 * kPanel + r * kPanelRow + ((chunk % 8) ^ (r % 8)) * 16;
          *reinterpret_cast<uint4*>(place(r) + chunk * 16) = *reinterpret_cast<const uint4*>(at);
        }
      };
      if constexpr (!kOwn) {
        // In two parts: the other warpgroup waits for the first half of a store only.
        const auto part = [&]<int kPart>() {
          constexpr int kHalf = (panels_of(kDv) + 1) / 2 * 8;
          constexpr int kFrom = kPart * kHalf, kTo = kPart ? kDv / 8 : kHalf;
          ptx::mbarrier_wait(&shared.out_free[kPart][1 - group], (t + 1 + group) & 1);
          if (kPart == 0 && pair == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              shared.sums[row_of(half) - group * 64] = {nothing[half] ? 0.0f : total[half],
                                                        top[half]};
            }
          }
          if (rows > 0) put.template operator()<kFrom, kTo>();
          if (packed && rows < 64) store_rows.template operator()<kFrom, kTo>();
          ptx::fence_async();
          ptx::bar_arrive(hopper_store_barrier(group, kPart, t), 160);
        };
        part.template operator()<0>();
        part.template operator()<1>();
      } else if (rows > 0) {
        put.template operator()<0, kDv / 8>();
        if (packed && rows < 64) {
          store_rows.template operator()<0, kDv / 8>();
        } else {
          ptx::fence_async();
          ptx::bar_sync(kGroup + group, 128);
          if (thread == 0) {
            for (int panel = 0; panel < panels_of(kDv); ++panel) {
              const int at = job.first_q + job.i0 + (group * 64 >> pack);
              ptx::tma_store(&p.out, panel * 64, pack > 0 ? job.h : at, pack > 0 ? at : job.h,
                             packed ? 0 : job.b, aO + panel * (kM * kPanelRow));
            }
            ptx::bulk_commit();
          }
        }
      }
      if (kOwn && pair == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = query_of(half);
          if (at >= job.stored) continue;
          p.f.lse[job.lse_at + static_cast<std::int64_t>(head_of(half)) * p.f.queries + at] =
              Tile::kNarrow ? lse[half] : lse_of(half);
        }
      }
    }
    if (kOwn && thread == 0) ptx::bulk_wait<0>();
  }
}

}  // namespace fastkern::cuda::attention_detail
