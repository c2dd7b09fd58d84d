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

/// kRows rows of kColumns elements from global memory; rows from `rows` on and columns from `width`
/// on become 0.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void fetch(char* shared, const char* global, std::int64_t stride,
                                      int rows, int width, bool vectors) {
  using S = Swizzled<kColumns>;
  constexpr int kAcross = S::kChunks % 8 == 0 ? 8 : 4, kDown = kThreads / kAcross;
  static_assert(kDown % 8 == 0 && (kRows % kDown == 0 || kRows < kDown));
  // Computed each time: kept, what follows from it takes registers that the products need.
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const int chunk = thread % kAcross, first = thread / kAcross;
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4;
  // Blocks beside each other have parts of the same results.
  const int parts = kD > kFwdColumns ? (p.dv + kDv - 1) / kDv : 1;
  const int column = kD > kFwdColumns ? static_cast<int>(blockIdx.x) % parts * kDv : 0;

  ptx::grid_wait();
  ptx::grid_launch_next();
  // In shared memory: in registers it would be kept from what the products need.
  __shared__ Job shared_job[1];
  Job& job = shared_job[0];
  if (warp == 0) {
    const Job found = job_of<kM>(p, static_cast<int>(blockIdx.x) / parts);
    if (lane == 0) job = found;
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
    sum[t][0] = sum[t][1] = sink == -INFINITY || pair > 0 ? 0.0f : 1.0f;
  }
  const int warp_row = warp * (kTiles * 16);
  const ptx::SharedAddress aQ = ptx::shared_address(sQ) + S::at(warp_row + (lane & 15), lane >> 4);
  const ptx::SharedAddress key_address =
      ptx::shared_address(sK) + S::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const ptx::SharedAddress value_address = ptx::shared_address(sV) + V::at(lane & 15, lane >> 4);

  for (int stage = 0; n < end; stage ^= 1) {
    const int j0 = n * kN;
    ptx::cp_async_wait<0>();
    __syncthreads();
    n = next(n + 1);
    if (n < end) fetch_keys(n, stage ^ 1);
    const ptx::SharedAddress aK = key_address + stage * (kN * kD * 2);
    const ptx::SharedAddress aV = value_address + stage * (kN * kDv * 2);

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
    } else if (!job.sight.all(job.i0, job.i1, j0, j0 + kN)) {
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

#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[t][half];
#pragma unroll
        for (int c = 0; c < kKeyTiles; ++c) {
          most = fmaxf(most, fmaxf(rS[t][c][half * 2], rS[t][c][half * 2 + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float base = most == -INFINITY ? 0.0f : most * unit;
        const float alpha = ptx::exp2_approx(fmaf(top[t][half], unit, -base));
        top[t][half] = most;
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
        sum[t][half] = fmaf(sum[t][half], alpha, more);
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          rO[t][c][half * 2] *= alpha;
          rO[t][c][half * 2 + 1] *= alpha;
        }
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
