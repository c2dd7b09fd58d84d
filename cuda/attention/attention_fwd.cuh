// SPDX-License-Identifier: Apache-2.0
// Attention, forward, on tensor cores of a warp (sm_80 and later). attention.h says what is
// computed.
//
//   work     a block has kM queries of one head and goes through the keys they see, kN at a time; a
//            warp has kM / kWarps of the queries and all of the keys. Where values have more than
//            kDv columns, other blocks compute the same scores for those
//   memory   queries in shared memory, keys and values in a ring of two stages there; scores and
//            results in registers
//   sync     one barrier a stage
//   cost     4 * S * T * D flops where all is seen; keys and values read S / kM times, from L2
#pragma once

#include "attention/attention_scores.cuh"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"

namespace fastkern::cuda::attention_detail {

/// Of values, that a block has results of.
inline constexpr int kFwdColumns = 256;

/// Powers of two by which scores may exceed what they are measured against, before results so far
/// are measured anew: where none of a warp's queries has a larger score, which is most of the time,
/// that takes no time (Zadouri et al., FlashAttention-4). Dropout may multiply what is in 16 bits.
template <bool kExtras>
inline constexpr float kLater = kExtras ? 0.0f : 8.0f;

/// Rows of kColumns 16-bit elements in shared memory, 16 bytes after 16 bytes, whose order within a
/// row depends on the row: eight rows of the same column lie in different banks.
template <int kColumns>
struct Swizzled {
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPairs = kChunks % 8 == 0 ? 4 : 2;  // of chunks, whose order changes
  static_assert(kChunks % 4 == 0);
  static __device__ __forceinline__ int turn(int row) {
    return kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;
  }
  static __device__ __forceinline__ int at(int row, int chunk) {
    return (row * kChunks + (chunk ^ turn(row))) * 16;
  }
  /// From the address of (row, chunk), chunk < 2, to that of (row, chunk + 2 * pairs). The tile
  /// begins at a multiple of 128.
  static __device__ __forceinline__ ptx::SharedAddress right(ptx::SharedAddress at, int pairs) {
    return (at ^ (pairs % kPairs * 32)) + pairs / kPairs * (kPairs * 32);
  }
};

/// This thread's number, computed anew: kept, what follows from it takes registers that the
/// products need.
__device__ __forceinline__ int this_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

/// Its place in a warp of kRows queries and in the tiles of 16 rows and 8 columns that warps
/// multiply: row `quad` and the one eight below, columns 2 * pair and 2 * pair + 1.
struct Position {
  int lane, quad, pair, warp_row;
};
template <int kRows>
__device__ __forceinline__ Position position() {
  const int thread = this_thread();
  return {thread % 32, thread % 32 / 4, thread % 4, thread / 32 * kRows};
}

/// kRows rows of kColumns elements from global memory; rows from `rows` on and columns from `width`
/// on become 0.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void fetch(char* shared, const char* global, std::int64_t stride,
                                      int rows, int width, bool vectors) {
  using S = Swizzled<kColumns>;
  constexpr int kAcross = S::kChunks % 8 == 0 ? 8 : 4, kDown = kThreads / kAcross;
  static_assert(kDown % 8 == 0 && (kRows % kDown == 0 || kRows < kDown));
  const int thread = this_thread(), chunk = thread % kAcross, first = thread / kAcross;
  if (vectors) {
    const char* from = global + first * stride + chunk * 16;
    char* to = shared + S::at(first, chunk);
#pragma unroll
    for (int row = 0; row < kRows; row += kDown) {
      if (kRows < kDown && first >= kRows) break;
#pragma unroll
      for (int c = 0; c < S::kChunks; c += kAcross) {
        const bool there = row + first < rows && (chunk + c) * 8 < width;
        ptx::cp_async_16(to + (row * S::kChunks + c) * 16, from + c * 16, there ? 16 : 0);
      }
      from += kDown * stride;
    }
    return;
  }
  for (int row = first; row < kRows; row += kDown) {
    for (int c = chunk; c < S::kChunks; c += kAcross) {
      std::uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (row < rows && c * 8 + e < width) {
          const auto bits =
              *reinterpret_cast<const std::uint16_t*>(global + row * stride + (c * 8 + e) * 2);
          words[e / 2] |= static_cast<std::uint32_t>(bits) << e % 2 * 16;
        }
      }
      *reinterpret_cast<uint4*>(shared + S::at(row, c)) = {words[0], words[1], words[2], words[3]};
    }
  }
}

/// Of shared memory.
constexpr int fwd_bytes(int columns, int value_columns, int queries, int keys) {
  return ((queries + 2 * keys) * columns + 2 * keys * value_columns) * 2;
}

/// kD, kDv: columns of queries and keys, and of values. kInstead: taken_somewhere(). kExtras:
/// whatever makes scores other than scale * q . k, and masks that are tensors.
template <class T, int kD, int kDv, int kM, int kN, int kWarps, int kBlocks, int kInstead,
          bool kExtras>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    attention_fwd_kernel(const __grid_constant__ Forward p) {
  if constexpr (!taken_somewhere<fwd_bytes(kD, kDv, kM, kN), kInstead, kExtras>()) return;
  constexpr int kThreads = kWarps * 32, kTiles = kM / kWarps / 16;  // of 16 queries, a warp
  constexpr int kKeyTiles = kN / 8, kColumnTiles = kDv / 8;
  using S = Swizzled<kD>;
  using V = Swizzled<kDv>;
  extern __shared__ __align__(128) uint4 memory[];
  char* const sQ = reinterpret_cast<char*>(memory);
  char* const sK = sQ + kM * kD * 2;
  char* const sV = sK + 2 * kN * kD * 2;
  // Blocks beside each other have parts of the same results.
  const int parts = kD > kFwdColumns ? (p.dv + kDv - 1) / kDv : 1;
  const int column = kD > kFwdColumns ? static_cast<int>(blockIdx.x) % parts * kDv : 0;

  ptx::grid_wait();
  ptx::grid_launch_next();
  // In shared memory: in registers it would be kept from what the products need.
  __shared__ Job shared_job[1];
  Job& job = shared_job[0];
  if (threadIdx.x < 32) {
    const Job found = job_of<kM>(p, static_cast<int>(blockIdx.x) / parts);
    if (threadIdx.x == 0) job = found;
  }
  __syncthreads();
  if (job.b < 0) return;
  int n = job.begin<kN>();
  const int end = job.end<kN>();
  const auto fetch_keys = [&](int n, int stage) {
    const int j0 = n * kN, rows = job.sight.keys - j0;
    fetch<kN, kD, kThreads>(sK + stage * (kN * kD * 2), job.k + j0 * p.k.row, p.k.row, rows, p.d,
                            p.vectors);
    fetch<kN, kDv, kThreads>(sV + stage * (kN * kDv * 2), job.v + j0 * p.v.row + column * 2,
                             p.v.row, rows, p.dv - column, p.vectors);
    ptx::cp_async_commit();
  };
  // The first block from n on that has to be computed.
  const auto next = [&](int n) {
    if constexpr (kExtras) {
      while (n < end &&
             (job.sight.none(job.i0, job.i1, n * kN, n * kN + kN) || !listed(p, job, n * kN))) {
        ++n;
      }
    }
    return n;
  };
  n = next(n);
  if (n < end) {
    fetch<kM, kD, kThreads>(sQ, p.q.at(job.b, job.first_q + job.i0, job.h), p.q.row,
                            job.i1 - job.i0, p.d, p.vectors);
    fetch_keys(n, 0);
  }

  const float sink = p.sinks.at(job.h, -INFINITY);
  const float unit = kExtras ? 1.0f : p.scale_log2;  // from scores to powers of two
  float rO[kTiles][kColumnTiles][4];
  float top[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rO[t][c][e] = 0.0f;
    }
    // In units of what the products are; a sink is a key of its own, counted by one thread.
    top[t][0] = top[t][1] = sink == -INFINITY ? sink : sink / (kExtras ? kLn2 : p.scale);
    sum[t][0] = sum[t][1] = sink == -INFINITY || threadIdx.x % 4 > 0 ? 0.0f : 1.0f;
  }
  for (int stage = 0; n < end; stage ^= 1) {
    const int j0 = n * kN;
    ptx::cp_async_wait<0>();
    __syncthreads();
    n = next(n + 1);
    if (n < end) fetch_keys(n, stage ^ 1);
    const auto [lane, quad, pair, warp_row] = position<kTiles * 16>();
    // A warp whose queries see none of these keys leaves its share of the products out.
    const bool masked = !job.sight.all(job.i0, job.i1, j0, j0 + kN);
    if (masked) {
      const int i = job.i0 + warp_row, last = min(i + kTiles * 16, job.i1);
      if (i >= last || job.sight.none(i, last, j0, j0 + kN)) continue;
    }
    const ptx::SharedAddress aQ =
        ptx::shared_address(sQ) + S::at(warp_row + (lane & 15), lane >> 4);
    const ptx::SharedAddress aK = ptx::shared_address(sK) + stage * (kN * kD * 2) +
                                  S::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    const ptx::SharedAddress aV =
        ptx::shared_address(sV) + stage * (kN * kDv * 2) + V::at(lane & 15, lane >> 4);

    float rS[kTiles][kKeyTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int c = 0; c < kKeyTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[t][c][e] = 0.0f;
      }
    }
#pragma unroll
    for (int kk = 0; kk < kD / 16; ++kk) {
      std::uint32_t rQ[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ptx::ldmatrix_4(rQ[t], S::right(aQ + t * (16 * kD * 2), kk));
      }
#pragma unroll
      for (int c = 0; c < kKeyTiles; c += 2) {
        std::uint32_t rK[4];
        ptx::ldmatrix_4(rK, S::right(aK, kk) + c * (8 * kD * 2));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          ptx::mma_16x8x16(rS[t][c], rQ[t], rK[0], rK[1], T{});
          ptx::mma_16x8x16(rS[t][c + 1], rQ[t], rK[2], rK[3], T{});
        }
      }
    }

    if constexpr (kExtras) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = job.i0 + warp_row + t * 16 + quad + half * 8;
          finish_scores(p, job, min(i, job.i1 - 1), j0 + pair * 2, half, rS[t]);
        }
      }
    } else if (masked) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = job.i0 + warp_row + t * 16 + quad + half * 8;
          const int from = job.sight.low(i) - j0 - pair * 2;
          const int to = job.sight.high(i) - j0 - pair * 2;
#pragma unroll
          for (int c = 0; c < kKeyTiles; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (c * 8 + e < from || c * 8 + e >= to) rS[t][c][half * 2 + e] = -INFINITY;
            }
          }
        }
      }
    }

    float most[kTiles][2];
    bool grows = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& m = most[t][half];
        m = -INFINITY;
#pragma unroll
        for (int c = 0; c < kKeyTiles; ++c) {
          m = fmaxf(m, fmaxf(rS[t][c][half * 2], rS[t][c][half * 2 + 1]));
        }
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        if ((m - top[t][half]) * unit <= kLater<kExtras>) {
          m = top[t][half];  // stays
        } else {
          grows = true;
        }
      }
    }
    if (__any_sync(~0u, grows)) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float base = most[t][half] == -INFINITY ? 0.0f : most[t][half] * unit;
          const float alpha = top[t][half] == most[t][half]
                                  ? 1.0f
                                  : ptx::exp2_approx(fmaf(top[t][half], unit, -base));
          top[t][half] = most[t][half];
          sum[t][half] *= alpha;
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c) {
            rO[t][c][half * 2] *= alpha;
            rO[t][c][half * 2 + 1] *= alpha;
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = top[t][half] == -INFINITY ? 0.0f : top[t][half] * unit;
        float more = 0.0f;
#pragma unroll
        for (int c = 0; c < kKeyTiles; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = rS[t][c][half * 2 + e];
            s = ptx::exp2_approx(fmaf(s, unit, -base));
            more += s;
          }
        }
        sum[t][half] += more;
      }
    }

#pragma unroll
    for (int kk = 0; kk < kN / 16; ++kk) {
      if constexpr (kExtras) {
        if (p.dropout.threshold > 0) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int i = job.i0 + warp_row + t * 16 + quad + half * 8;
              drop(p, job, i, j0 + kk * 16 + pair * 2, half, rS[t][2 * kk]);
              drop(p, job, i, j0 + kk * 16 + 8 + pair * 2, half, rS[t][2 * kk + 1]);
            }
          }
        }
      }
      std::uint32_t rP[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* const s = rS[t][2 * kk + e / 2];
          rP[t][e] = ptx::pack_2(s[e % 2 * 2], s[e % 2 * 2 + 1], T{});
        }
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        std::uint32_t rV[4];
        ptx::ldmatrix_4_transposed(rV, V::right(aV, c / 2) + kk * (16 * kDv * 2));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          ptx::mma_16x8x16(rO[t][c], rP[t], rV[0], rV[1], T{});
          ptx::mma_16x8x16(rO[t][c + 1], rP[t], rV[2], rV[3], T{});
        }
      }
    }
  }

  // Results go where the queries of the same warp were.
  const auto [lane, quad, pair, warp_row] = position<kTiles * 16>();
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[t][half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = warp_row + t * 16 + quad + half * 8;
      const bool nothing = total == 0.0f || job.i0 + row >= job.i1;  // seen, or to be computed
      const float inverse = 1.0f / total;
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        *reinterpret_cast<std::uint32_t*>(sQ + S::at(row, c) + pair * 4) =
            nothing
                ? 0u
                : ptx::pack_2(rO[t][c][half * 2] * inverse, rO[t][c][half * 2 + 1] * inverse, T{});
      }
      if (pair == 0 && row < job.stored && column == 0) {
        p.lse[job.lse_at + row] =
            nothing ? -INFINITY : fmaf(top[t][half], kExtras ? kLn2 : p.scale, logf(total));
      }
    }
  }
  __syncwarp();
  char* const gO = p.out.at(job.b, job.first_q + job.i0, job.h) + column * 2;
  for (int e = lane; e < kTiles * 16 * V::kChunks; e += 32) {
    const int row = warp_row + e / V::kChunks, chunk = e % V::kChunks;
    if (row >= job.stored || chunk * 8 >= p.dv - column) continue;
    const uint4 words = *reinterpret_cast<const uint4*>(sQ + S::at(row, chunk));
    char* const to = gO + row * p.out.row + chunk * 16;
    if (p.vectors) {
      *reinterpret_cast<uint4*>(to) = words;
    } else {
      const std::uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (chunk * 8 + k < p.dv - column) {
          reinterpret_cast<std::uint16_t*>(to)[k] =
              static_cast<std::uint16_t>(w[k / 2] >> k % 2 * 16);
        }
      }
    }
  }
}

}  // namespace fastkern::cuda::attention_detail
