// SPDX-License-Identifier: Apache-2.0
// The upper triangle of matrices.
//
//   out[..., i, j] = x[..., i, j] if j >= i + diagonal, else 0
//
//   work     a thread has four packs of 16 bytes, a block's width apart; single elements instead
//            where rows are not dense and aligned
//   index    row and column of a pack by multiplications
//   memory   a pack that is all zeros is not read
//   cost     reads the triangle, writes the matrix
#include <algorithm>
#include <cstdint>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise_layout.h"
#include "launch.cuh"
#include "pointwise_words.cuh"
#include "ptx/cluster.cuh"

namespace fastkern::cuda {
namespace {

using namespace pointwise_detail;  // NOLINT: all of it is about this

constexpr int kThreads = 256, kPacks = 4;

struct Params {
  const char* x;
  char* out;
  std::int64_t x_strides[kMaxDims], out_strides[kMaxDims];  // bytes, innermost first
  Divider dims[kMaxDims];                                   // the innermost one in packs
  int ndim;
  std::uint32_t packs;
  std::int32_t diagonal;
};

/// Elements of kSize bytes, N of them in a pack.
template <int kSize, int N>
__global__ void __launch_bounds__(kThreads) triu_kernel(const __grid_constant__ Params p) {
  constexpr int kBytes = kSize * N;
  ptx::grid_wait();
  Words < std::uint32_t, kBytes<4 ? 1 : kBytes / 4> words[kPacks];
  char* to[kPacks];
  std::int32_t zeros[kPacks];  // elements at the begin of the pack
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    std::uint32_t rest = (blockIdx.x * kPacks + k) * kThreads + threadIdx.x;
    to[k] = nullptr;
    if (rest >= p.packs) continue;
    std::int64_t from = 0, at = 0;
    std::int32_t row = 0, column = 0;
#pragma unroll 1
    for (int d = 0; d < p.ndim; ++d) {
      const std::uint32_t next = divide(rest, p.dims[d]), i = rest - next * p.dims[d].size;
      from += i * p.x_strides[d];
      at += i * p.out_strides[d];
      if (d == 0) column = static_cast<std::int32_t>(i) * N;
      if (d == 1) row = static_cast<std::int32_t>(i);
      rest = next;
    }
    to[k] = p.out + at;
    zeros[k] = row + p.diagonal - column;
#pragma unroll
    for (std::uint32_t& w : words[k].w) w = 0;
    if (zeros[k] < N) load_pack<kBytes>(p.x + from, words[k]);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!to[k]) continue;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n >= zeros[k]) continue;
      if constexpr (kSize < 4) {
        const std::uint32_t ones = (1u << (8 * kSize)) - 1;
        words[k].w[n * kSize / 4] &= ~(ones << (8 * (n * kSize % 4)));
      } else {
#pragma unroll
        for (int j = 0; j < kSize / 4; ++j) words[k].w[n * kSize / 4 + j] = 0;
      }
    }
    store_pack<kBytes>(to[k], words[k]);
  }
}

template <int kSize, int N>
void launch_triu(const Triangle& args, Stream stream) {
  const TensorRef &x = args.x, &out = args.out;
  Params p{};
  p.x = static_cast<const char*>(x.data), p.out = static_cast<char*>(out.data);
  p.ndim = out.ndim;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = out.ndim - 1 - d;
    p.x_strides[d] = x.strides[from] * kSize * (d == 0 ? N : 1);
    p.out_strides[d] = out.strides[from] * kSize * (d == 0 ? N : 1);
    p.dims[d] = divider(out.sizes[from] / (d == 0 ? N : 1));
  }
  p.packs = static_cast<std::uint32_t>(out.numel() / N);
  // Of diagonals beyond the matrix one is like the other.
  p.diagonal = static_cast<std::int32_t>(
      std::clamp(args.diagonal, -out.sizes[out.ndim - 2], out.sizes[out.ndim - 1]));
  launch(triu_kernel<kSize, N>,
         {.op = args.op,
          .grid = ceil_div(p.packs, kThreads * kPacks),
          .block = kThreads,
          .overlap = true},
         stream, p);
}

/// All packs of `n` elements of `t` are dense and aligned.
bool in_packs(const TensorRef& t, int n) {
  const auto bytes = static_cast<std::uintptr_t>(n * size_of(t.dtype));
  bool good = t.strides[t.ndim - 1] == 1 && t.sizes[t.ndim - 1] % n == 0 &&
              reinterpret_cast<std::uintptr_t>(t.data) % bytes == 0;
  for (int d = 0; d + 1 < t.ndim; ++d) good &= t.sizes[d] == 1 || t.strides[d] % n == 0;
  return good;
}

template <int kSize>
void launch_sized(const Triangle& args, Stream stream) {
  constexpr int kPack = 16 / kSize;
  if (in_packs(args.x, kPack) && in_packs(args.out, kPack)) {
    launch_triu<kSize, kPack>(args, stream);
  } else {
    launch_triu<kSize, 1>(args, stream);
  }
}

/// Halves what 32 bits do not number.
void launch_parts(const Triangle& args, Stream stream) {
  const TensorRef& out = args.out;
  if (out.numel() > std::int64_t{1} << 30) {
    int d = 0;
    while (out.sizes[d] == 1) ++d;
    const std::int64_t size = out.sizes[d];
    std::int64_t half = size / 2;
    if (d == out.ndim - 1) half = half / 16 * 16;
    Triangle parts[] = {args, args};
    parts[0].x.sizes[d] = parts[0].out.sizes[d] = half;
    parts[1].x.sizes[d] = parts[1].out.sizes[d] = size - half;
    for (TensorRef* t : {&parts[1].x, &parts[1].out})
      t->data = static_cast<char*>(t->data) + half * t->strides[d] * size_of(t->dtype);
    if (d == out.ndim - 2) parts[1].diagonal += half;
    if (d == out.ndim - 1) parts[1].diagonal -= half;
    for (const Triangle& part : parts) launch_parts(part, stream);
    return;
  }
  switch (size_of(out.dtype)) {
    case 1:
      return launch_sized<1>(args, stream);
    case 2:
      return launch_sized<2>(args, stream);
    case 4:
      return launch_sized<4>(args, stream);
    case 8:
      return launch_sized<8>(args, stream);
    default:
      return launch_sized<16>(args, stream);
  }
}

}  // namespace

void triu(const Triangle& args, Stream stream) {
  check_triangle(args);
  if (args.out.numel() == 0) return;
  Triangle near = args;  // sums with it do not overflow
  near.diagonal = std::clamp(args.diagonal, -args.out.sizes[args.out.ndim - 2],
                             args.out.sizes[args.out.ndim - 1]);
  launch_parts(near, stream);
}

}  // namespace fastkern::cuda
