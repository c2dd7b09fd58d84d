// SPDX-License-Identifier: Apache-2.0
// Attention of 8-bit operands on CUDA: which calls there is a kernel for, and values transposed.
//
//   to[d, P(j)] = v[j, d]   for each entry and key head, in blocks of 128 keys
//
// P puts the keys of 32 in the order in which a thread of a warpgroup has their scores: of chunks
// of eight, two keys of each of two chunks beside each other.
//
//   work     a block of 256 threads transposes 128 keys, 128 columns at a time
//   memory   rows of v in shared memory, whose words of four keys and four columns are transposed
//   in
//            registers; rows of 128 bytes are stored
//   cost     reads and writes v once
#include <algorithm>

#include "attention/attention_fp8.h"
#include "attention/attention_launch.h"
#include "fastkern/attention_fp8.h"

#ifndef FASTKERN_HAS_SM90
#define FASTKERN_HAS_SM90 0
#endif

namespace fastkern::cuda {
namespace attention_detail {
namespace {

constexpr int kColumns = 128;

struct Fp8Values {
  View v;
  char* to;
  AttentionLengths lengths;
  int batch, heads, keys, dv, width, block_keys;
};

/// Rows of 33 words; what a warp reads at once lies in 32 banks.
__device__ __forceinline__ int word_of_row(int row) {
  return row * (kColumns / 4 + 1) + (row / 32 & 1) + row / 64 * 8;
}

__global__ void __launch_bounds__(256) attention_fp8_values_kernel(const Fp8Values p) {
  __shared__ unsigned words[kFp8Keys * (kColumns / 4 + 1) + 9];
  ptx::grid_wait();
  ptx::grid_launch_next();
  const int thread = static_cast<int>(threadIdx.x);
  const Unit unit = unit_of(
      p.lengths, static_cast<int>(blockIdx.x), p.width / kFp8Keys, p.heads, p.batch, [&](int b) {
        const int keys = attention_sequence(p.lengths, b, p.keys, p.keys).keys;
        return static_cast<int>(fp8_rows(keys, p.block_keys) / kFp8Keys);
      });
  if (unit.b < 0) return;
  const AttentionSequence<int> at = attention_sequence(p.lengths, unit.b, p.keys, p.keys);
  const bool packed = p.lengths.start_k;
  const int entry = packed ? 0 : unit.b, first = unit.index * kFp8Keys;
  const int column_of_block = (packed ? fp8_first_key(at.first_k, unit.b) : 0) + first;
  const std::int64_t head = static_cast<std::int64_t>(entry) * p.heads + unit.h;
  char* const to = p.to + head * p.dv * p.width + column_of_block;
  for (int c0 = 0; c0 < p.dv; c0 += kColumns) {
    // All that a thread takes is under way at once.
    constexpr int kLoads = kFp8Keys * (kColumns / 16) / 256;
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int e = thread + i * 256, row = first + e / (kColumns / 16);
      const int column = c0 + e % (kColumns / 16) * 16;
      loaded[i] = {};
      if (row < at.keys && column < p.dv) {
        loaded[i] = ptx::ld_global(p.v.at(entry, at.first_k + row, unit.h) + column);
      }
    }
    if (c0 > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int e = thread + i * 256;
      unsigned* const place = words + word_of_row(e / (kColumns / 16)) + e % (kColumns / 16) * 4;
      place[0] = loaded[i].x, place[1] = loaded[i].y;
      place[2] = loaded[i].z, place[3] = loaded[i].w;
    }
    __syncthreads();
    for (int e = thread; e < kFp8Keys / 4 * (kColumns / 4); e += 256) {
      const int four = e % (kFp8Keys / 4), column = e / (kFp8Keys / 4);
      if (c0 + column * 4 >= p.dv) continue;
      // Keys that thread pair of a quad has of two chunks beside each other.
      const int pair = four % 4, key = four / 4 * 16 + pair * 2;
      const auto word = [&](int row) { return words[word_of_row(row) + column]; };
      const std::uint32_t a = word(key), b = word(key + 1), c = word(key + 8), d = word(key + 9);
      const std::uint32_t low_ab = __byte_perm(a, b, 0x5140), low_cd = __byte_perm(c, d, 0x5140);
      const std::uint32_t high_ab = __byte_perm(a, b, 0x7362), high_cd = __byte_perm(c, d, 0x7362);
      char* const out = to + static_cast<std::int64_t>(c0 + column * 4) * p.width + four * 4;
      const std::int64_t next = p.width;
      ptx::st_global_4(out, __byte_perm(low_ab, low_cd, 0x5410));
      ptx::st_global_4(out + next, __byte_perm(low_ab, low_cd, 0x7632));
      ptx::st_global_4(out + 2 * next, __byte_perm(high_ab, high_cd, 0x5410));
      ptx::st_global_4(out + 3 * next, __byte_perm(high_ab, high_cd, 0x7632));
    }
  }
}

Fp8Scale scale_of(const TensorRef& t) {
  if (!t.given()) return {};
  return {static_cast<const float*>(t.data), t.strides[0], t.strides[1]};
}

int block_keys_of(const AttentionFwd& a) {
  return fp8_keys(static_cast<int>(std::max(a.q.sizes[a.q.ndim - 1], a.v.sizes[a.v.ndim - 1])));
}

/// Keys of a row of transposed values: of an entry or, packed, of all.
std::int64_t width_of(const AttentionFwd& a) {
  const std::int64_t keys = a.k.sizes[a.k.ndim - 3];
  const bool packed = a.q.ndim == 3;
  return packed ? (keys / kFp8Keys + 2 * a.lengths.batch) * kFp8Keys
                : fp8_rows(keys, block_keys_of(a));
}

}  // namespace
}  // namespace attention_detail

std::size_t attention_fp8_workspace(const AttentionFp8Fwd& args) {
  const AttentionFwd& a = args.fwd;
  const std::int64_t entries = a.q.ndim == 3 ? 1 : a.q.sizes[0];
  const std::int64_t rows = entries * a.v.sizes[a.v.ndim - 2] * a.v.sizes[a.v.ndim - 1];
  return static_cast<std::size_t>(rows * attention_detail::width_of(a));
}

void attention_fp8(const AttentionFp8Fwd& args, Stream stream) {
  using namespace attention_detail;
  const AttentionFwd& a = args.fwd;
  const int found = capability(stream.device, a.op);
  FK_CHECK(found == 90, a.op, ": needs a CUDA device of compute capability 9.0, got ", found / 10,
           ".", found % 10);
  FK_CHECK(FASTKERN_HAS_SM90, a.op, ": this build has no code for sm_90a");
  FK_CHECK(a.q.dtype == DType::f8e4m3 && a.k.dtype == DType::f8e4m3 && a.v.dtype == DType::f8e4m3,
           a.op, ": q, k and v must be f8e4m3");
  Fp8Call call{.f = forward_params(a),
               .values = {},
               .width = static_cast<int>(width_of(a)),
               .q_scale = scale_of(args.q_scale),
               .k_scale = scale_of(args.k_scale),
               .v_scale = scale_of(args.v_scale)};
  Forward& f = call.f;
  for (const auto& [columns, name] : {std::pair{f.d, "q"}, std::pair{f.dv, "v"}}) {
    FK_CHECK(columns % 16 == 0 && columns <= 256, a.op, ": ", name,
             " must have a last dimension that is a multiple of 16 and at most 256 on CUDA, got ",
             columns);
  }
  FK_CHECK(f.scale > 0.0f, a.op, ": scale must be above 0 on CUDA, got ", f.scale);
  if (f.heads == 0 || f.queries == 0) return;
  const bool packed = f.lengths.start_q, entries = !packed && f.batch > 1;
  const int kv_heads = f.heads / f.group;
  FK_CHECK(f.vectors && in_boxes(f.q, f.queries > 1, f.heads > 1, entries) &&
               in_boxes(f.k, f.keys > 1, kv_heads > 1, entries) &&
               in_boxes(f.v, f.keys > 1, kv_heads > 1, entries),
           a.op, ": q, k and v must lie in 16 bytes and not be expanded");
  const std::int64_t units = std::int64_t{f.heads} * (packed ? 1 : f.batch);
  FK_CHECK((f.queries / 128 + 1 + (packed ? f.batch : 0)) * units < std::int64_t{1} << 30 &&
               width_of(a) < std::int64_t{1} << 31,
           a.op, ": ", f.queries, " queries and ", f.keys, " keys of ", units,
           " heads do not fit a launch; split the call");
  FK_CHECK(args.workspace_size >= attention_fp8_workspace(args), a.op, ": workspace must have ",
           attention_fp8_workspace(args), " bytes, got ", args.workspace_size);
  char* const values = static_cast<char*>(args.workspace);
  const std::int64_t head = std::int64_t{f.dv} * call.width;
  call.values = {values, head * kv_heads, call.width, head};
  if (f.batch > 0 && f.keys > 0) {
    launch(attention_fp8_values_kernel,
           {.op = a.op,
            .grid = std::int64_t{call.width / kFp8Keys} * kv_heads * (packed ? 1 : f.batch),
            .block = 256,
            .overlap = true},
           stream,
           Fp8Values{f.v, values, f.lengths, f.batch, kv_heads, f.keys, f.dv, call.width,
                     block_keys_of(a)});
  }
#if FASTKERN_HAS_SM90
  if (f.batch > 0) launch_hopper_fp8_any(call, stream, a.op);
#endif
  if (packed) launch_rest(f, DType::bf16, stream, a.op);
}

}  // namespace fastkern::cuda
