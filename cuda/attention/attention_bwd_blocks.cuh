// SPDX-License-Identifier: Apache-2.0
// Attention, backward: what its kernels are called with, the kernel before them (delta of each
// row), where their blocks lie, and how results leave registers.
#pragma once

#include "attention/attention_fwd.cuh"
#include "ptx/memory.cuh"

namespace fastkern::cuda::attention_detail {

struct Backward {
  Forward f;
  View dout, dq, dk, dv;
  const float* dlse;
  int key_blocks, kv_heads;
  int together;  // heads, of all entries, whose blocks are among each other
  float2* rows;  // for each query of each head, where lse has it: lse in powers of two, inf if the
                 // query saw nothing, and delta = sum of dout * out - dlse
  float* dq_sums;  // for each block of queries of each head, in the order of the threads
  int* turns;      // for each of them: how many blocks of keys have added; and one for the numbers
                   // of the blocks of threads
  int blocks;      // of queries, an entry or, packed, at most in all
  std::int64_t turn_count;
  bool fours;  // rows of dq, dk and dv lie in 8 bytes, four elements each
  // On Hopper above 128 columns, instead of dq_sums: gradients of scores, in so many bytes.
  char* ds;
  std::int64_t ds_bytes;
};

inline constexpr int kFirstThreads = 256;

/// How many threads a row of dout takes, wherever it lies: the order of its sum depends on it.
template <class T>
__host__ __device__ int first_width(const Forward& f) {
  constexpr int kPack = 16 / sizeof(T);
  int width = 1;
  while (width < 32 && width * kPack < f.dv) width *= 2;
  return width;
}

/// rows; turns = 0; dq = 0 where no block of keys may write it. A block has queries of one head.
template <class T>
__global__ void __launch_bounds__(kFirstThreads)
    attention_bwd_first_kernel(const __grid_constant__ Backward p) {
  const Forward& f = p.f;
  constexpr int kPack = 16 / sizeof(T);
  const int width = first_width<T>(f), lane = static_cast<int>(threadIdx.x) % width;
  const int rows = kFirstThreads / width, blocks = (f.queries + rows - 1) / rows;
  const int head = static_cast<int>(blockIdx.x) / blocks;
  const int row =
      static_cast<int>(blockIdx.x) % blocks * rows + static_cast<int>(threadIdx.x) / width;
  const int b = head / f.heads, h = head % f.heads;  // packed tensors are one entry
  const std::int64_t at = static_cast<std::int64_t>(head) * f.queries + row;
  ptx::grid_wait();
  ptx::grid_launch_next();
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kFirstThreads + threadIdx.x;
       e < p.turn_count; e += static_cast<std::int64_t>(gridDim.x) * kFirstThreads)
    p.turns[e] = 0;
  const bool there = row < f.queries;
  float sum = 0.0f;
  if (there) {
    const T* const out = reinterpret_cast<const T*>(f.out.at(b, row, h));
    const T* const dout = reinterpret_cast<const T*>(p.dout.at(b, row, h));
    const auto add = [&](T x, T y) {
      sum = fmaf(static_cast<float>(x), static_cast<float>(y), sum);
    };
    for (int c = lane * kPack; c < f.dv; c += width * kPack) {
      if (f.vectors) {
        const uint4 x = ptx::ld_global_nc(out + c), y = ptx::ld_global_nc(dout + c);
        const T* const xs = reinterpret_cast<const T*>(&x);
        const T* const ys = reinterpret_cast<const T*>(&y);
#pragma unroll
        for (int e = 0; e < kPack; ++e) add(xs[e], ys[e]);
      } else {
        for (int e = c; e < min(c + kPack, f.dv); ++e) add(out[e], dout[e]);
      }
    }
  }
  for (int step = width / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!there) return;
  const bool nothing = f.lse[at] == -INFINITY;  // seen: what comes in does not matter
  if (lane == 0) {
    p.rows[at] = nothing ? make_float2(INFINITY, 0.0f)
                         : make_float2(f.lse[at] * kLog2e, p.dlse ? sum - p.dlse[at] : sum);
  }
  if (p.dq.data && (f.sinks.data || nothing)) {
    T* const dq = reinterpret_cast<T*>(p.dq.at(b, row, h));
    for (int c = lane; c < f.d; c += width) dq[c] = T(0.0f);
  }
}

/// Keys of entry b, the used ones and those that get zeros.
__device__ __forceinline__ int stored_keys(const Forward& f, int b) {
  AttentionLengths all = f.lengths;
  all.used_k = nullptr;
  return attention_sequence(all, b, f.queries, f.keys).keys;
}

/// For a whole warp: the number of a block of keys. Numbers are drawn, so that a block has begun
/// after all those it waits for.
__device__ __forceinline__ int draw_key_block(const Backward& p) {
  int id = 0;
  if (threadIdx.x == 0) id = ptx::draw_number(p.turns + p.turn_count - 1);
  return __shfl_sync(~0u, id, 0);
}

/// For a whole warp: the block of keys with number `id`. Key blocks of a sequence come in order.
template <int kN>
__device__ __forceinline__ Place key_place_of(const Backward& p, int id) {
  // Of the heads that go together all have their first block of keys before any has its second one:
  // so a block has little to wait for, and what it reads and adds to is still in L2.
  const int heads = p.kv_heads * (p.f.lengths.start_q ? 1 : p.f.batch);
  const int before_these = id / (p.together * p.key_blocks) * p.together;
  const int these = min(p.together, heads - before_these);
  id -= before_these * p.key_blocks;
  const int block = id / these, head = before_these + id % these;
  const Unit unit = unit_of(p.f.lengths, head * p.key_blocks + block, p.key_blocks, p.kv_heads,
                            p.f.batch, [&](int b) { return (stored_keys(p.f, b) + kN - 1) / kN; });
  return {unit.b, unit.h, unit.index * kN};
}

/// Keys j0 to j1 of key head g; `sight`, b and h (a query head, in turn) as the forward has them.
struct KeyJob {
  Job job;
  int g, j0, j1, stored;  // stored: keys of the tensor from j0 on
  int first_k, queries;
};

template <int kN>
__device__ __forceinline__ KeyJob key_job_of(const Backward& p, int id) {
  const Place place = key_place_of<kN>(p, id);
  KeyJob k{};
  k.job.b = place.b;
  if (place.b < 0) return k;
  const AttentionSequence<int> at = attention_sequence(p.f.lengths, place.b, p.f.queries, p.f.keys);
  k.g = place.h, k.j0 = place.i0, k.j1 = max(place.i0, min(place.i0 + kN, at.keys));
  k.stored = min(kN, stored_keys(p.f, place.b) - place.i0);
  k.first_k = at.first_k, k.queries = at.queries;
  k.job.first_q = at.first_q;
  k.job.sight = attention_sight(p.f.mask, at, place.b);
  return k;
}

/// Whether the block mask leaves anything of queries i0 to i1 and keys j0 to j1.
__device__ __forceinline__ bool listed_block(const Forward& p, int h, int i0, int i1, int j0,
                                             int j1) {
  const Blocks& m = p.block_mask;
  if (!m.data) return true;
  for (int i = i0 / m.size; i <= (i1 - 1) / m.size; ++i) {
    for (int j = j0 / m.size; j <= (j1 - 1) / m.size; ++j) {
      if (m.data[h * m.head + i * m.query + j * m.key]) return true;
    }
  }
  return false;
}

/// A part of kTiles tiles of 8 columns of rows of kD elements.
template <int kD, int kTiles>
struct Columns {
  using S = Swizzled<kD>;
  // Whether going right to the part and then within it is going right by the sum.
  static constexpr bool kAdds = S::kPairs % (kTiles / 2) == 0 || kTiles / 2 % S::kPairs == 0;
  int first;  // pair of tiles

  __device__ __forceinline__ explicit Columns(int part) : first(part * (kTiles / 2)) {}
  /// From the address of the first columns of a row to what at() takes.
  __device__ __forceinline__ ptx::SharedAddress begin(ptx::SharedAddress row) const {
    return kAdds ? S::right(row, first) : row;
  }
  __device__ __forceinline__ ptx::SharedAddress at(ptx::SharedAddress begin, int tile) const {
    return S::right(begin, (kAdds ? 0 : first) + tile / 2);
  }
};

/// scale * v, for a warp: 16 rows from `first` on of those from `row` on, of which there are
/// `rows`, and columns from `column` on, of which there are `width`. `fours`: these lie in 8 bytes.
template <class T, int kColumnTiles>
__device__ __forceinline__ void store_rows(const View& to, bool fours, int b, int row, int h,
                                           int first, int rows, int column, int width, float scale,
                                           const float (&v)[kColumnTiles][4], T) {
  static_assert(kColumnTiles % 2 == 0);
  const int lane = threadIdx.x % 32, pair = lane % 4;
  const bool odd = pair & 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first + lane / 4 + half * 8;
    T* const at = reinterpret_cast<T*>(to.at(b, row + i, h)) + column;
    if (fours) {
      // Of two tiles even lanes store the first, odd ones the second: whole sectors.
      const int x = odd * 8 + (pair & 2) * 2;
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        std::uint32_t words[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float (&of)[4] = v[c + k];
          words[k] = ptx::pack_2(of[half * 2] * scale, of[half * 2 + 1] * scale, T{});
        }
        const std::uint32_t other = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
        const uint2 both = odd ? uint2{other, words[1]} : uint2{words[0], other};
        if (i < rows && column + c * 8 + x < width)
          *reinterpret_cast<uint2*>(at + c * 8 + x) = both;
      }
      continue;
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int x = c * 8 + pair * 2 + e;
        if (i < rows && column + x < width) at[x] = T(v[c][half * 2 + e] * scale);
      }
    }
  }
}

}  // namespace fastkern::cuda::attention_detail
