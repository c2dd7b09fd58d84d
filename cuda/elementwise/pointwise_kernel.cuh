// SPDX-License-Identifier: Apache-2.0
// The kernel of every pointwise function: one for a formula F and a compute type T, whatever the
// types, strides and addresses of the operands.
//
//   out[i] = F(in[0][i], in[1][i], in[2][i])
//
//   work     a thread has kGroups groups of 16 / sizeof(T) elements that follow one another in the
//            result. The last blocks have single elements: those in front of the first aligned
//            group and behind the last, or all of a result that has no groups (pointwise_layout.h).
//            Groups are those of one dimension, or of rows of whole groups, or `flat`: counted
//            through all dimensions of a dense result, where operands that are not dense with it
//            are gathered.
//   index    one division by multiplication for each dimension and group, not for each element
//   memory   a group of a dense operand is one access of 4, 8 or 16 bytes, by its own type; two
//            `paired` groups of types half as wide as T are one of 16 bytes. An operand repeated
//            along the row is one access a group. All loads of a thread are under way before the
//            first conversion: 32 to 64 bytes an input.
//   types    a switch over the type of memory, for all groups at once; elements stay in the
//            registers that they were loaded into. Groups know the few types that matter, single
//            elements all of them: code that nobody runs would have to be compiled for each F.
//   cost     reads and writes each operand once
#pragma once

#include <array>
#include <cstdint>

#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "fastkern/pointwise_layout.h"
#include "pointwise_groups.cuh"

namespace fastkern::pointwise_detail {

template <class F, class T>
__global__ void __launch_bounds__(kPointwiseThreads, Shape<F, T>::kBlocks)
    pointwise_kernel(const __grid_constant__ Params<T> params) {
  const PointwiseLayout& p = params.layout;
  ptx::grid_wait();
  if constexpr (sizeof(T) < 16) {
    if (blockIdx.x < params.group_blocks) {
      Groups<F, T, Shape<F, T>::kGroups> groups;
      groups.locate(p);
      groups.run(params);
      return;
    }
  }
  Singles<F, T, Shape<F, T>::kElements> singles;
  singles.locate(params);
  singles.run(params);
}

/// The kernel for operands that are dense along dimension 1, not along dimension 0 as the result.
///
///   work     a block has a tile of 64 x 64 elements, a thread 16 of them
///   memory   those operands are read along dimension 1, and wait in shared memory as they are;
///            all else is read and written along dimension 0, one element a thread
///   sync     one barrier, behind the last element in shared memory
template <class F, class T>
__global__ void __launch_bounds__(kPointwiseThreads, 4)
    pointwise_tile_kernel(const __grid_constant__ Params<T> params) {
  extern __shared__ unsigned shared[];
  constexpr int kIn = F::kInputs, kAtOnce = 4;
  constexpr std::uint32_t kStep = kPointwiseThreads / kTile;  // rows that a block has at a time
  const PointwiseLayout& p = params.layout;
  ptx::grid_wait();
  std::uint32_t rest = divide(blockIdx.x, p.tiles[0]);
  const std::uint32_t first0 = (blockIdx.x - rest * p.tiles[0].size) * kTile;
  const std::uint32_t other = divide(rest, p.tiles[1]);
  const std::uint32_t first1 = (rest - other * p.tiles[1].size) * kTile;
  rest = other;
  std::uint32_t out = 0, in[kIn] = {};
#pragma unroll 1
  for (int d = 2; d < p.ndim; ++d) {
    const std::uint32_t next = divide(rest, p.dims[d]), at = rest - next * p.dims[d].size;
    out += at * p.out.strides[d];
#pragma unroll
    for (int i = 0; i < kIn; ++i) in[i] += at * p.in[i].strides[d];
    rest = next;
  }
  const std::uint32_t size0 = p.dims[0].size, size1 = p.dims[1].size;
  const std::uint32_t lane = threadIdx.x % kTile, row = threadIdx.x / kTile;

  std::uint32_t* tile = shared;
#pragma unroll
  for (int i = 0; i < kIn; ++i) {
    const PointwiseAccess& a = p.in[i];
    if (a.access != Access::staged) continue;
    constexpr int kLoads = 8;  // under way at once
#pragma unroll 1
    for (std::uint32_t begin = row; begin < kTile; begin += kLoads * kStep) {
      std::uint32_t words[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const std::uint32_t at0 = first0 + begin + j * kStep, at1 = first1 + lane;
        if (at0 < size0 && at1 < size1)
          words[j] = load_word(place(a, in[i] + at0 * a.strides[0] + at1));
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) tile[lane * kTilePitch + begin + j * kStep] = words[j];
    }
    tile += kTile * kTilePitch;
  }
  __syncthreads();

#pragma unroll 1
  for (std::uint32_t begin = row; begin < kTile; begin += kAtOnce * kStep) {
    Singles<F, T, kAtOnce> singles;
    tile = shared;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const std::uint32_t at0 = first0 + lane, at1 = first1 + begin + k * kStep;
      singles.inside[k] = at0 < size0 && at1 < size1;
      singles.out[k] = out + at0 + at1 * p.out.strides[1];
#pragma unroll
      for (int i = 0; i < kIn; ++i)
        singles.in[i][k] = in[i] + at0 * p.in[i].strides[0] + at1 * p.in[i].strides[1];
    }
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
      if (p.in[i].access != Access::staged) continue;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        singles.words[i][k].w[0] = tile[(begin + k * kStep) * kTilePitch + lane];
      tile += kTile * kTilePitch;
    }
    singles.run(params);
  }
}

template <class T>
T number_as(const Number& v) {
  if constexpr (kIsComplex<T>) {
    using R = decltype(T::re);
    return T(static_cast<R>(v.real), static_cast<R>(v.imag));
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    return v.integer;
  } else {
    return static_cast<T>(v.real);
  }
}

/// Launches F in T for every part of a plan that 32 bits can number.
template <class F, class T>
void launch_pointwise(const char* op, const PointwisePlan& plan,
                      const std::array<Number, kMaxScalars>& scalars, Stream stream) {
  using S = Shape<F, T>;
  if (plan.path == PointwisePath::empty) return;
  split_plan(plan, [&](const PointwisePlan& part) {
    Params<T> params;
    params.layout = pointwise_layout(op, part, S::value());
    const PointwiseLayout& p = params.layout;
    for (int i = 0; i < kMaxInputs; ++i) params.numbers[i] = number_as<T>(part.in[i].number);
    params.scalars = {{number_as<T>(scalars[0]), number_as<T>(scalars[1])}};
    if constexpr (S::kStages) {
      if (p.staged) {
        const cuda::Launch shape{.op = op,
                                 .grid = p.tile_count,
                                 .block = kPointwiseThreads,
                                 .shared = 4u * p.staged * kTile * kTilePitch,
                                 .overlap = true};
        return cuda::launch(pointwise_tile_kernel<F, T>, shape, stream, params);
      }
    }
    const std::int64_t blocks = cuda::ceil_div(p.groups, kPointwiseThreads * S::kGroups);
    params.group_blocks = static_cast<std::uint32_t>(blocks);
    const cuda::Launch shape{
        .op = op,
        .grid = blocks + cuda::ceil_div(p.elements, kPointwiseThreads * S::kElements),
        .block = kPointwiseThreads,
        .overlap = true};
    cuda::launch(pointwise_kernel<F, T>, shape, stream, params);
  });
}

}  // namespace fastkern::pointwise_detail
