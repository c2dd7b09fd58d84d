// SPDX-License-Identifier: Apache-2.0
// Attention of 8-bit operands, forward, on Hopper (sm_90a): fastkern/attention_fp8.h.
//
//   work     as of 16 bits (attention_hopper_fwd.cuh): a block of threads per multiprocessor goes
//            from tile to tile, 64 queries a warpgroup, kN keys at a time, last ones first
//   values   tensor cores take operands of 8 bits only with the summed dimension side by side: v is
//            transposed before (attention_fp8.cu), keys in the order in which a thread has their
//            scores, so that probabilities become an operand without leaving their thread. Rows
//            beyond a sequence are zeros there
//   range    a row's base is the largest score when it was set, of which the probability is 2^6. It
//            is set anew where one would be above 2^8.8, which is seldom: only then are results
//            multiplied, and lanes asked for what they have
//   sums     the tensor cores' own have some 14 bits. kOverlap: results of kTogether blocks are one
//            such sum, in rO; those are added in f32 in shared memory, a thread's to its own. Else
//            those of a block are, in rT, in kParts parts of columns, and are added to rO
//   overlap  kOverlap: scores of a block are issued before results of the one before, which are
//            there before the last of its exponentials; weights are packed among those. Else one
//            after the other, and rT takes the registers of scores
//   sync     as of 16 bits; results have shared memory of their own
//   cost     4 * S * T * D flops where all is seen, at twice the rate of 16 bits; v is read and
//            written once more
#pragma once

#include <type_traits>

#include "attention/attention_hopper_fp8_fetch.cuh"
#include "launch.cuh"
#include "ptx/barrier.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"

namespace fastkern::cuda::attention_detail {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_fp8_kernel(const __grid_constant__ HopperFp8Forward p) {
  using Shared = HopperFp8Shared<Tile>;
  using Stage = HopperFp8Stage<Tile>;
  using T = __nv_bfloat16;
  constexpr int kM = Tile::kM, kN = Tile::kN, kDv = Tile::kDv, kGroups = Tile::kGroups;
  constexpr int kParts = Tile::kParts;
  constexpr int kScores = kN / 2, kResults = kDv / 2;  // of a thread
  constexpr int kPart = kResults / kParts;             // of them at a time
  constexpr int kPartBytes = kDv / kParts * kPanelRow;
  // Powers of two that the largest probability has when it becomes the largest, and how far later
  // ones may be above it: together 448, the largest number of 8 bits.
  constexpr float kShift = 6.0f, kSlack = 2.8f;
  constexpr float kNothing = 1e30f;  // what is added to powers before there is a largest one
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
    ptx::mbarrier_init(&shared.query_there, 1);
    ptx::mbarrier_init(&shared.query_free, kWarps);
    for (int s = 0; s < Tile::kStages; ++s) {
      ptx::mbarrier_init(&shared.keys_there[s], 1);
      ptx::mbarrier_init(&shared.keys_free[s], kWarps);
      ptx::mbarrier_init(&shared.values_there[s], 1);
      ptx::mbarrier_init(&shared.values_free[s], kWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::grid_wait();
  ptx::grid_launch_next();

  if (warpgroup == 0) {
    ptx::registers_give_back<Tile::kOtherRegisters>();
    if (threadIdx.x < 32) {
      HopperFp8Producer<Tile> producer{p, shared};
      int t = 0;
      for (int round = 0;; ++round) {
        const int id = hopper_fixed_tile(p.schedule, round);
        if (round * static_cast<int>(gridDim.x) >= p.schedule.tiles) break;
        if (id >= p.schedule.tiles) continue;
        const HopperJob job = hopper_job<Tile>(p.f, p.schedule, id);
        if (job.b < 0) continue;
        if (threadIdx.x == 0) producer.run(job, t);
        __syncwarp();
        ++t;
      }
      if (threadIdx.x == 0) producer.finish(t);
    }
  } else {
    ptx::registers_take<Tile::kRegisters>();
    const int group = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = thread / 32;
    const int quad = lane / 4, pair = lane % 4;
    const auto arrive = [&](std::uint64_t* barrier) {
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    };
    const ptx::SharedAddress aQ = ptx::shared_address(shared.query) + group * (64 * kPanelRow);
    const ptx::SharedAddress aK = ptx::shared_address(shared.keys);
    const ptx::SharedAddress aV = ptx::shared_address(shared.values);

    constexpr int kTs = kParts == 4 ? 2 : 1;
    float rS[kScores], rT[kTs][kPart], rO[kResults];
    std::uint32_t rP[kN / 32][4];
    const auto issue_scores = [&](int stage) {
      const ptx::MatrixDescriptor dQ = ptx::matrix_descriptor(aQ);
      const ptx::MatrixDescriptor dK = ptx::matrix_descriptor(aK + stage * Shared::kKeys);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < Tile::kD / 32; ++kk) {
        ptx::wgmma(rS, ptx::matrix_right(dQ, kk / 4 * (kM * kPanelRow) + kk % 4 * 32),
                   ptx::matrix_right(dK, kk / 4 * (kN * kPanelRow) + kk % 4 * 32), kk > 0,
                   ptx::E4m3{});
      }
      ptx::wgmma_commit();
    };
    const auto issue_results = [&](auto& to, int stage, int part, bool add) {
      const ptx::MatrixDescriptor dV =
          ptx::matrix_descriptor(aV + stage * Shared::kValues + part * kPartBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kN / 32; ++kk) {
        ptx::wgmma(to, rP[kk], ptx::matrix_right(dV, kk * 32), kk > 0 || add, ptx::E4m3{});
      }
      ptx::wgmma_commit();
    };
    const auto issue_part = [&](int stage, int part) {
      issue_results(rT[part % kTs], stage, part, false);
    };
    const auto add_part = [&](int part) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) rO[part * kPart + i] += rT[part % kTs][i];
    };
    // Results of a block, the first part of which was issued: added, and the others after it.
    const auto add_parts = [&](int stage) {
      if constexpr (kTs == 2) issue_part(stage, 1);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (kTs == 2 && part + 1 < kParts) {
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        ptx::registers_arrived(rT[part % kTs]);
        add_part(part);
        if (part + kTs < kParts) issue_part(stage, part + kTs);
      }
    };
    // Columns 8 c + 2 pair and the next of four c: four bytes of k and the four that are 16 on.
    const auto pack_probabilities = [&] {
#pragma unroll
      for (int kk = 0; kk < kN / 32; ++kk) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* const s = rS + kk * 16 + e / 2 * 8 + e % 2 * 2;
          rP[kk][e] = ptx::pack_4(s[0], s[1], s[4], s[5], ptx::E4m3{});
        }
      }
    };

    Stage at;  // of the next block
    for (int t = 0;; ++t) {
      ptx::mbarrier_wait(&shared.query_there, t & 1);
      const HopperJob& job = shared.jobs[t & 1];
      if (job.b < 0) break;
      const int row = group * 64 + warp * 16 + quad;  // and eight below
      const int kv_head = job.h / p.f.group;
      // From products to powers of two. Of a scale that is 0 all scores are 0, those that are not
      // seen -inf.
      const float signed_unit =
          p.f.scale_log2 * (p.q_scale.at(job.b, kv_head) * p.k_scale.at(job.b, kv_head));
      const bool negative = signed_unit < 0.0f;
      const float unit = fabsf(signed_unit) < 1e-30f ? 1e-30f : fabsf(signed_unit);
      const float sink = p.f.sinks.at(job.h, -INFINITY);
      // In units of what the products are; a sink is a key of its own, counted by one thread.
      float shift[2], sum[2], alpha[2];
      shift[0] = shift[1] = fminf(fmaf(-sink, kLog2e, kShift), kNothing);
      sum[0] = sum[1] = sink == -INFINITY || pair > 0 ? 0.0f : ptx::exp2_approx(kShift);
#pragma unroll
      for (int i = 0; i < kResults; ++i) rO[i] = 0.0f;

      // Scores of block n are about to become probabilities; masked: some are not seen, or their
      // sign is to be turned. Whether results so far are to be multiplied with alpha, which is
      // seldom.
      const auto bound = [&](int n, bool masked) {
        if (masked && negative) {
#pragma unroll
          for (int i = 0; i < kScores; ++i) rS[i] = -rS[i];
        }
        const int j0 = n * kN + pair * 2;
        if (masked) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = job.i0 + row + half * 8;
            const int from = job.sight.low(i) - j0, to = job.sight.high(i) - j0;
#pragma unroll
            for (int c = 0; c < kN / 8; ++c) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (c * 8 + e < from || c * 8 + e >= to) rS[c * 4 + half * 2 + e] = -INFINITY;
              }
            }
          }
        }
        const auto too_large = [&](float m, int half) {
          return fmaf(m, unit, shift[half]) > kShift + kSlack;
        };
        // Numbers that are not negative are in the order of their bits.
        int most[2][2] = {};
#pragma unroll
        for (int c = 0; c < kN / 8; c += 2) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            int& m = most[i / 2][i % 2];
            m = ptx::max_3(m, __float_as_int(rS[c * 4 + i]), __float_as_int(rS[c * 4 + 4 + i]));
          }
        }
        float power[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          power[half] = fmaf(__int_as_float(max(most[half][0], most[half][1])), unit, shift[half]);
        }
        const bool rescale = __any_sync(~0u, fmaxf(power[0], power[1]) > kShift + kSlack);
        if (rescale) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float m = rS[half * 2];
#pragma unroll
            for (int i = 0; i < kScores / 2; ++i) m = fmaxf(m, rS[i / 2 * 4 + half * 2 + i % 2]);
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            alpha[half] = 1.0f;
            if (too_large(m, half)) {
              const float before = shift[half];
              shift[half] = fmaf(-m, unit, kShift);
              alpha[half] = ptx::exp2_approx(shift[half] - before);
              sum[half] *= alpha[half];
            }
          }
        }
        return rescale;
      };
      const auto exponentials = [&](int from, int to) {
#pragma unroll
        for (int i = from; i < to; i += 2) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            rS[i + e] = ptx::exp2_approx(fmaf(rS[i + e], unit, shift[i / 2 % 2]));
          }
          sum[i / 2 % 2] += rS[i] + rS[i + 1];
        }
      };
      // Sums so far, in f32, of a thread: four of each 16 bytes. What they were relative to.
      bool any_aside = false;
      float aside[2] = {};
      float4* const sSums = reinterpret_cast<float4*>(shared.out[group]) + thread;
      const auto add_aside = [&] {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          factor[half] = ptx::exp2_approx(shift[half] - aside[half]);
        }
#pragma unroll
        for (int c = 0; c < kResults / 4; ++c) {
          const float4 s = sSums[c * 128];
          float* const o = rO + c * 4;
          o[0] = fmaf(s.x, factor[0], o[0]), o[1] = fmaf(s.y, factor[0], o[1]);
          o[2] = fmaf(s.z, factor[1], o[2]), o[3] = fmaf(s.w, factor[1], o[3]);
        }
      };
      const auto put_aside = [&] {
        if (any_aside) {
          add_aside();
        } else {
          // Results of the tile before have left from there.
          if (thread == 0) ptx::bulk_wait_read<0>();
          ptx::bar_sync(kGroup + group, 128);
          any_aside = true;
        }
#pragma unroll
        for (int c = 0; c < kResults / 4; ++c) {
          const float* const o = rO + c * 4;
          sSums[c * 128] = {o[0], o[1], o[2], o[3]};
        }
        aside[0] = shift[0], aside[1] = shift[1];
      };
      const auto rescale_results = [&] {
#pragma unroll
        for (int i = 0; i < kResults; ++i) rO[i] *= alpha[i / 2 % 2];
      };

      // Blocks of the tile that no query of the warpgroup sees any of.
      const auto let_pass = [&](int blocks) {
        for (; blocks > 0; --blocks) {
          const Stage stage = at;
          ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
          ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
          __syncwarp();
          arrive(&shared.keys_free[stage.index]);
          arrive(&shared.values_free[stage.index]);
          at = at.next();
        }
      };
      const int i0 = job.i0 + group * 64, i1 = min(i0 + 64, job.i1);
      const bool any = i0 < i1;
      const int begin = any ? min(job.sight.begin(i0) / kN, job.end) : job.end;
      const int end = any ? max(min((job.sight.end(i1) + kN - 1) / kN, job.end), begin) : begin;
      let_pass(job.end - end);
      if (begin < end) {
        // Blocks that all queries of the warpgroup see whole: whole_begin to whole_end.
        const int whole_end = max(min(job.sight.high(i0) / kN, end), begin);
        const int whole_begin = min((job.sight.low(i1 - 1) + kN - 1) / kN, whole_end);
        const auto is_masked = [&](int block) {
          return negative || block >= whole_end || block < whole_begin;
        };
        int n = end - 1;
        if constexpr (Tile::kOverlap) {
          const auto wait_for_keys = [&](const Stage& stage) {
            ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
          };
          const auto wait_for_values = [&](const Stage& stage) {
            ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
          };
          // Among exponentials, that they go on meanwhile: without a branch around it. Where there
          // is no next block, what is waited for is there.
          const auto wait_for_next_keys = [&] {
            const Stage next = at.next();
            const bool more = n > begin;
            ptx::mbarrier_wait(more ? &shared.keys_there[next.index] : &shared.query_there,
                               more ? next.parity : t & 1);
          };
          wait_for_keys(at);
          issue_scores(at.index);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rS);
          arrive(&shared.keys_free[at.index]);
          bound(n, is_masked(n));
          exponentials(0, kScores);
          wait_for_next_keys();
          pack_probabilities();
          int together = 0;  // blocks in the sum of tensor cores
          const auto block = [&](auto masked) {
            const Stage before = at;
            at = at.next();
            issue_scores(at.index);
            wait_for_values(before);
            issue_results(rO, before.index, 0, together++ > 0);
            ptx::wgmma_wait<1>();
            ptx::registers_arrived(rS);
            arrive(&shared.keys_free[at.index]);
            const bool rescale = bound(n, masked.value);
            exponentials(0, Tile::kFirst);
            wait_for_next_keys();
            ptx::computed(fminf(sum[0], sum[1]));
            ptx::wgmma_wait<0>();
            ptx::registers_arrived(rO);
            if (rescale) rescale_results();
            arrive(&shared.values_free[before.index]);
            exponentials(Tile::kFirst, kScores);
            pack_probabilities();
            --n;
          };
          --n;
          while (n >= begin) {
            if (Tile::kTogether > 0 && together == Tile::kTogether) {
              put_aside();
              together = 0;
            }
            if (is_masked(n)) {
              block(std::true_type{});
            } else {
              // Nothing but a block in the loop: no jumps over what is seldom, and less to
              // remember.
              int to = max(begin, whole_begin);
              if (Tile::kTogether > 0) to = max(to, n - (Tile::kTogether - together) + 1);
              do {
                block(std::false_type{});
              } while (n >= to);
            }
          }
          if (Tile::kTogether > 0 && together == Tile::kTogether) {
            put_aside();
            together = 0;
          }
          wait_for_values(at);
          issue_results(rO, at.index, 0, together > 0);
          arrive(&shared.query_free);
          ptx::wgmma_wait<0>();
          ptx::registers_arrived(rO);
          arrive(&shared.values_free[at.index]);
          at = at.next();
          if (Tile::kTogether > 0 && any_aside) add_aside();
        } else {
          for (; n >= begin; --n) {
            const Stage stage = at;
            at = at.next();
            ptx::mbarrier_wait(&shared.keys_there[stage.index], stage.parity);
            issue_scores(stage.index);
            ptx::wgmma_wait<0>();
            ptx::registers_arrived(rS);
            arrive(&shared.keys_free[stage.index]);
            if (n == begin) arrive(&shared.query_free);
            if (bound(n, is_masked(n))) rescale_results();
            exponentials(0, kScores);
            pack_probabilities();
            ptx::mbarrier_wait(&shared.values_there[stage.index], stage.parity);
            issue_part(stage.index, 0);
            add_parts(stage.index);
            arrive(&shared.values_free[stage.index]);
          }
        }
      } else {
        __syncwarp();  // all of its lanes have seen that the job is there
        arrive(&shared.query_free);
      }
      let_pass(begin - job.begin);

      // Results leave through shared memory, once the copy engine has read those before.
      const ptx::SharedAddress aO = ptx::shared_address(shared.out[group]);
      if (thread == 0) ptx::bulk_wait_read<0>();
      ptx::bar_sync(kGroup + group, 128);
      const float value = p.v_scale.at(job.b, kv_head);
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const int at = row + half * 8;
        // Seen, or to be computed. Where anything is seen the largest probability is 2^kShift.
        const bool nothing = total < 1.0f || job.i0 + at >= job.i1;
        factor[half] = nothing ? 0.0f : value / total;
        if (nothing) {
#pragma unroll
          for (int c = 0; c < kDv / 8; ++c) rO[c * 4 + half * 2] = rO[c * 4 + half * 2 + 1] = 0.0f;
        }
        if (pair == 0 && at < job.stored) {
          p.f.lse[job.lse_at + at] = nothing ? -INFINITY : fmaf(-shift[half], kLn2, logf(total));
        }
      }
      const int rows = min(job.stored - group * 64, 64);
      const bool packed = p.f.lengths.start_q;
      const int first = job.first_q + job.i0 + group * 64;
      if (rows > 0) {
        const int to_row = warp * 16 + lane % 16;
#pragma unroll
        for (int c = 0; c < kDv / 8; c += 2) {
          std::uint32_t words[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float* const o = rO + c * 4 + e * 2;
            words[e] = ptx::pack_2(o[0] * factor[e % 2], o[1] * factor[e % 2], T{});
          }
          const int chunk = (c % 8 + lane / 16) ^ (to_row % 8);
          ptx::stmatrix_4(aO + c / 8 * (64 * kPanelRow) + to_row * kPanelRow + chunk * 16, words);
        }
        if (packed && rows < 64) {
          // The rows after these are another sequence's. A warp stores what it has computed.
          __syncwarp();
          const char* const from = shared.out[group];
          for (int e = lane; e < 16 * (kDv / 8); e += 32) {
            const int r = warp * 16 + e / (kDv / 8), chunk = e % (kDv / 8);
            if (r >= rows || chunk * 8 >= p.f.dv) continue;
            const char* const at =
                from + chunk / 8 * (64 * kPanelRow) + r * kPanelRow + ((chunk % 8) ^ (r % 8)) * 16;
            *reinterpret_cast<uint4*>(p.f.out.at(0, first + r, job.h) + chunk * 16) =
                *reinterpret_cast<const uint4*>(at);
          }
        } else {
          ptx::fence_async();
          ptx::bar_sync(kGroup + group, 128);
          if (thread == 0) {
            for (int panel = 0; panel < panels_of(kDv); ++panel) {
              ptx::tma_store(&p.out, panel * 64, first, job.h, packed ? 0 : job.b,
                             aO + panel * (64 * kPanelRow));
            }
            ptx::bulk_commit();
          }
        }
      }
    }
    if (thread == 0) ptx::bulk_wait<0>();
  }
}

}  // namespace fastkern::cuda::attention_detail
