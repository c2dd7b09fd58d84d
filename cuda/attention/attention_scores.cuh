// SPDX-License-Identifier: Apache-2.0
// What attention kernels are called with, where their blocks lie, and what stands between the
// products q . k and the softmax: softcap, bias, ALiBi, masks, dropout.
#pragma once

#include "fastkern/attention.h"
#include "fastkern/attention_mask.h"
#include "fastkern/philox.h"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"

namespace fastkern::cuda::attention_detail {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// What blocks take of shared memory on devices that run the code of an architecture, in KB. With
/// extras 163 are not made use of: that would be as many kernels again.
struct SharedMemory {
  int least, most;
};
constexpr SharedMemory shared_memory(int arch, bool extras) {
  if (arch >= 900 && arch < 1200) return {227, 227};
  // Code for 80 runs on 86 and 89, too.
  return {99, (arch == 800 || arch == 870) && !extras ? 163 : 99};
}

/// Dynamic shared memory of a kernel and, if there is one, of the kernel that devices with enough
/// for it take instead. Code for devices that take another would only take time to compile.
template <int kBytes, int kInstead, bool kExtras>
constexpr bool taken_somewhere() {
#ifdef __CUDA_ARCH__
  constexpr SharedMemory kHere = shared_memory(__CUDA_ARCH__, kExtras);
  return kBytes + 1024 <= kHere.most * 1024 &&
         (kInstead == 0 || kInstead + 1024 > kHere.least * 1024);
#else
  return true;
#endif
}

struct View {
  char* data;
  std::int64_t batch, row, head;  // strides in bytes

  __device__ __forceinline__ char* at(int b, int r, int h) const {
    return data + (b * batch + r * row + h * head);
  }
};

__device__ __forceinline__ float load_float(const char* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f16:
      return __half2float(reinterpret_cast<const __half*>(data)[i]);
    case DType::bf16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return reinterpret_cast<const float*>(data)[i];
  }
}

struct Vector {
  const char* data;  // nullptr: not given
  DType dtype;

  __device__ __forceinline__ float at(std::int64_t i, float otherwise) const {
    return data ? load_float(data, dtype, i) : otherwise;
  }
};

struct Bias {
  const char* data;                      // nullptr: not given
  DType dtype;                           // i8: a mask
  std::int64_t batch, head, query, key;  // strides in elements
};

struct Blocks {
  const std::int8_t* data;
  std::int64_t head, query, key;
  int size;
};

struct DropoutRows {
  const std::int64_t *seed, *offset;
  std::uint32_t threshold;  // 0: none
  float scale;
};

struct Forward {
  View q, k, v, out;
  float* lse;
  int batch, heads, group;   // query heads, and how many of them share keys
  int queries, keys, d, dv;  // of packed tensors: all of them
  int blocks;                // of queries: of an entry or, packed, at most in all
  float scale, scale_log2, softcap;
  bool vectors;  // all operands lie in 16 bytes
  AttentionLengths lengths;
  AttentionMask mask;  // `blocks` apart
  Vector sinks, slopes;
  int slopes_batch;
  Bias bias;
  Blocks block_mask;
  DropoutRows dropout;
  int* given;  // on Hopper: how many tiles were given out as they were asked for; none: all are in
               // a fixed order
};

/// What a block of threads does: queries i0 to i1 of one head of one entry.
struct Job {
  int b, h, i0, i1;  // b < 0: nothing to do
  int stored;        // queries of the tensor from i0 on: those beyond the sequence get zeros
  int first_q;
  AttentionSight<int> sight;
  std::int64_t lse_at;
  const char *k, *v;  // of the sequence

  template <int kN>
  __device__ __forceinline__ int begin() const {
    return sight.begin(i0) / kN;
  }
  template <int kN>
  __device__ __forceinline__ int end() const {
    return i1 > i0 ? (sight.end(i1) + kN - 1) / kN : 0;
  }
};

struct Place {
  int b, h, i0;
};

/// Block `index` of the `count` of head h of entry b; b < 0: there is none.
struct Unit {
  int b, h, index, count;
};

/// For a whole warp: the block with number `id`, of `heads` heads. Packed: entry b has count(b)
/// blocks, all entries together at most `blocks`; else each has `blocks`.
template <class Count>
__device__ __forceinline__ Unit unit_of(const AttentionLengths& lengths, int id, int blocks,
                                        int heads, int batch, const Count& count) {
  const int unit = id % blocks, rest = id / blocks;
  if (!lengths.start_q) return {rest / heads, rest % heads, unit, blocks};
  // Blocks are counted through the entries, 32 at a time.
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int b = 0; b < batch; b += 32) {
    const int own = b + lane < batch ? count(b + lane) : 0;
    int up_to = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, up_to, step);
      if (lane >= step) up_to += other;
    }
    const unsigned beyond = __ballot_sync(~0u, unit < before + up_to);
    if (beyond) {
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      const int of_found = __shfl_sync(~0u, own, found);
      const int first = before + __shfl_sync(~0u, up_to, found) - of_found;
      return {b + found, rest, unit - first, of_found};
    }
    before += __shfl_sync(~0u, up_to, 31);
  }
  return {-1, 0, 0, 0};
}

/// For a whole warp.
template <int kM>
__device__ __forceinline__ Place place_of(const Forward& p, int id) {
  const Unit unit = unit_of(p.lengths, id, p.blocks, p.heads, p.batch, [&](int b) {
    return (attention_sequence(p.lengths, b, p.queries, p.keys).queries + kM - 1) / kM;
  });
  // The last queries of a sequence first: under a causal mask they take longest.
  return {unit.b, unit.h, (unit.count - 1 - unit.index) * kM};
}

template <int kM>
__device__ __forceinline__ Job job_of(const Forward& p, int id) {
  const Place place = place_of<kM>(p, id);
  Job job{place.b, place.h, place.i0, place.i0, 0, 0, {}, 0, nullptr, nullptr};
  if (place.b < 0) return job;
  const AttentionSequence<int> at = attention_sequence(p.lengths, place.b, p.queries, p.keys);
  const bool packed = p.lengths.start_q;
  job.i1 = max(min(job.i0 + kM, at.queries), job.i0);
  job.stored = packed ? job.i1 - job.i0 : min(kM, p.queries - job.i0);
  job.first_q = at.first_q;
  job.sight = attention_sight(p.mask, at, place.b);
  const std::int64_t row =
      packed ? place.h : static_cast<std::int64_t>(place.b) * p.heads + place.h;
  job.lse_at = row * p.queries + at.first_q + job.i0;
  job.k = p.k.at(place.b, at.first_k, place.h / p.group);
  job.v = p.v.at(place.b, at.first_k, place.h / p.group);
  return job;
}

/// Whether the block mask leaves anything of the queries and of keys from j0 on.
__device__ __forceinline__ bool listed(const Forward& p, const Job& job, int j0) {
  const Blocks& m = p.block_mask;
  if (!m.data) return true;
  for (int i = job.i0; i < job.i1; i += m.size) {
    if (m.data[job.h * m.head + i / m.size * m.query + j0 / m.size * m.key]) return true;
  }
  return false;
}

/// From the product of query i and key j to the score in powers of two; -inf: not seen. `capped`:
/// what the softcap makes of it, over the cap.
__device__ __forceinline__ float score_of(const Forward& p, const Job& job, int h, float slope,
                                          int i, int j, float product, float* capped = nullptr) {
  const AttentionSight<int>& sight = job.sight;
  if (!((j >= sight.low(i) && j < sight.high(i)) || j < sight.prefix)) return -INFINITY;
  if (const Blocks& m = p.block_mask; m.data) {
    if (!m.data[h * m.head + i / m.size * m.query + j / m.size * m.key]) return -INFINITY;
  }
  float v = product * p.scale;
  if (p.softcap > 0.0f) {
    v = tanhf(v / p.softcap);
    if (capped) *capped = v;
    v *= p.softcap;
  }
  if (const Bias& bias = p.bias; bias.data) {
    const std::int64_t at = job.b * bias.batch + h * bias.head + i * bias.query + j * bias.key;
    if (bias.dtype == DType::i8) {
      if (!reinterpret_cast<const std::int8_t*>(bias.data)[at]) return -INFINITY;
    } else {
      v += load_float(bias.data, bias.dtype, at);
    }
  }
  return (v - slope * fabsf(static_cast<float>(i + sight.shift - j))) * kLog2e;
}

/// Of elements half * 2 and half * 2 + 1 of tiles of 8 keys, which are of query i and keys j, j +
/// 1, j + 8, j + 9, ...
template <int kTiles>
__device__ __forceinline__ void finish_scores(const Forward& p, const Job& job, int i, int j,
                                              int half, float (&s)[kTiles][4]) {
  const float slope = p.slopes.at(static_cast<std::int64_t>(job.b) * p.slopes_batch + job.h, 0.0f);
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& v = s[c][half * 2 + e];
      v = score_of(p, job, job.h, slope, i, j + c * 8 + e, v);
    }
  }
}

/// What dropout multiplies the probability of query i and key j with.
__device__ __forceinline__ float dropout_factor(const Forward& p, int b, int h, int i, int j) {
  const std::uint64_t first = p.dropout.offset ? static_cast<std::uint64_t>(*p.dropout.offset) : 0;
  const auto head = static_cast<std::uint64_t>(static_cast<std::int64_t>(b) * p.heads + h);
  const PhiloxWords words =
      philox(static_cast<std::uint64_t>(*p.dropout.seed), first + (head << 32),
             (static_cast<std::uint64_t>(i) << 30) + j / 4);
  const std::uint32_t low = j & 1 ? words.word[1] : words.word[0];
  const std::uint32_t high = j & 1 ? words.word[3] : words.word[2];
  return (j & 2 ? high : low) >= p.dropout.threshold ? p.dropout.scale : 0.0f;
}

/// Dropout of query i and keys j and j + 1, j even.
__device__ __forceinline__ void drop(const Forward& p, const Job& job, int i, int j, int half,
                                     float (&v)[4]) {
  const std::uint64_t first = p.dropout.offset ? static_cast<std::uint64_t>(*p.dropout.offset) : 0;
  const auto head = static_cast<std::uint64_t>(static_cast<std::int64_t>(job.b) * p.heads + job.h);
  const PhiloxWords words =
      philox(static_cast<std::uint64_t>(*p.dropout.seed), first + (head << 32),
             (static_cast<std::uint64_t>(i) << 30) + j / 4);
  const bool upper = j & 2;
  const std::uint32_t w0 = upper ? words.word[2] : words.word[0];
  const std::uint32_t w1 = upper ? words.word[3] : words.word[1];
  v[half * 2] = w0 >= p.dropout.threshold ? v[half * 2] * p.dropout.scale : 0.0f;
  v[half * 2 + 1] = w1 >= p.dropout.threshold ? v[half * 2 + 1] * p.dropout.scale : 0.0f;
}

}  // namespace fastkern::cuda::attention_detail
