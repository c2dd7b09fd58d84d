// SPDX-License-Identifier: Apache-2.0
// LAMB (You et al., 2019): Adam's direction, scaled for each parameter by |value| / |direction|.
//
//   work     two launches over the same chunks. The first leaves the states and, for each chunk,
//   the
//            squares of values and directions; the second makes the direction again, of the states
//   sync     the block of the first that draws the last number adds the squares up, a warp a
//   tensor,
//            in float64, lane t those of chunks t, t + 32, ...; the second counts steps as
//            optim_step.cuh does
//   cost     the first reads four operands and writes two, the second reads three and writes one:
//   in
//            float32 40 bytes a parameter, 1.43 of AdamW's. In bf16 it is instructions that count:
//            roots and quotients of a pack are taken the short way where all its numbers allow it
#include "optim/block_sum.cuh"
#include "optim/optim_launch.h"
#include "optim/optim_step.cuh"
#include "optim/ordinary.cuh"

namespace fastkern::cuda {
namespace {

using optim::Lamb;
using LambStart = StepStart<Lamb>;

/// Directions of a pack, of its states; `usual`: the step's numbers are ordinary.
template <int kVec>
__device__ __forceinline__ void directions_of(const Lamb::Numbers& n, bool usual,
                                              const float (&p)[kVec], const float (&s)[2][kVec],
                                              float (&out)[kVec]) {
  ordinary::Seen seen;
#pragma unroll
  for (int j = 0; j < kVec; ++j) seen.add({s[0][j], s[1][j]});
  if (usual && seen.ordinary()) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float below = optim::fma(ordinary::root(s[1][j]), n.unbias2, n.eps);
      out[j] = optim::fma(p[j], n.decay, ordinary::quotient(optim::mul(s[0][j], n.unbias1), below));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] = Lamb::direction(n, p[j], {s[0][j], s[1][j]});
  }
}
__device__ __forceinline__ bool is_usual(const Lamb::Numbers& n) {
  return ordinary::numbers(n.eps, n.unbias2, n.unbias1);
}

/// All threads of a block: the trust ratio of every tensor, from the sums of its chunks.
__device__ __forceinline__ void make_ratios(const StepParams& a) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = warp; i < a.tensors; i += kOptimThreads / 32) {
    double values = 0.0, directions = 0.0;
#pragma unroll 8
    for (int c = a.first_chunk[i] + lane; c < a.first_chunk[i + 1]; c += 32) {
      values += ptx::ld_global_cg(a.workspace + c);
      directions += ptx::ld_global_cg(a.workspace + a.chunks + c);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      values += __shfl_xor_sync(0xffffffffu, values, offset);
      directions += __shfl_xor_sync(0xffffffffu, directions, offset);
    }
    if (lane == 0) a.workspace[2 * a.chunks + i] = optim::trust_ratio(values, directions);
  }
  if (threadIdx.x == 0) *a.counter = 0;
}

template <OptimTypes kTypes, KnownRounding kKnown>
__global__ void __launch_bounds__(kOptimThreads, eight(kTypes) ? 2 : 3)
    lamb_average_kernel(const __grid_constant__ StepParams a) {
  constexpr int kPacks = 2, kVec = eight(kTypes) ? 8 : 4;
  __shared__ LambStart sStart[1];
  __shared__ double sSums[kOptimThreads / 32];
  ptx::grid_wait();
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const int chunk = static_cast<int>(blockIdx.x);
  const ChunkPlace place = place_of(a, chunk);
  const OptimTensor& t = a.tensor[place.tensor];
  ChunkOperands<2, kKnown> c(a, types_of<kTypes>(a), t, place.grad, place.first);
  const int packs = place.grad && c.template aligned<kVec>() ? c.count / kVec : 0;
  RawOperands<kVec, 2, kPacks> raw;
  int pack = static_cast<int>(threadIdx.x);
  raw.load(c, pack, packs);
  if (threadIdx.x == 0) {
    const optim::Start start = start_of(a, t);
    sStart[0] = {Lamb::numbers(start),
                 optim::gradient_factor(start.group, a.grad_factor, a.grad_scale), start.steps,
                 false};
  }
  __syncthreads();
  const Lamb::Numbers numbers = sStart[0].numbers;
  const float factor = sStart[0].factor;
  const bool usual = is_usual(numbers);
  float values = 0.0f, directions = 0.0f;
  const auto add = [&](float p, float direction) {
    values = optim::fma(p, p, values);
    directions = optim::fma(direction, direction, directions);
  };
  while (pack < packs) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      if (at >= packs) break;
      float p[kVec], g[kVec], s[2][kVec];
      c.values.unpack(raw.param[i], raw.extra[i], p);
      raw.grad[i].unpack(c.grad.type, g);
#pragma unroll
      for (int k = 0; k < 2; ++k) raw.state[k][i].unpack(c.state[k].type, s[k]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        float states[2] = {s[0][j], s[1][j]};
        Lamb::average(numbers, optim::mul(g[j], factor), states);
        s[0][j] = states[0], s[1][j] = states[1];
      }
      float direction[kVec];
      directions_of(numbers, usual, p, s, direction);
#pragma unroll
      for (int j = 0; j < kVec; ++j) add(p[j], direction[j]);
#pragma unroll
      for (int k = 0; k < 2; ++k) RawPack<kVec>::store(c.state[k], at * kVec, s[k]);
    }
    pack += kPacks * kOptimThreads;
    raw.load(c, pack, packs);
  }
  const int count = place.grad ? c.count : 0;
#pragma unroll 1
  for (int e = packs * kVec + static_cast<int>(threadIdx.x); e < count; e += kOptimThreads) {
    float states[2] = {load_one(c.state[0], e), load_one(c.state[1], e)};
    const float p = c.values.load_value(e);
    Lamb::average(numbers, optim::mul(load_one(c.grad, e), factor), states);
    add(p, Lamb::direction(numbers, p, states));
    store_one(c.state[0], e, states[0]);
    store_one(c.state[1], e, states[1]);
  }

  const auto sum = [](double x, double y) { return x + y; };
  const double all_values = block_fold<kOptimThreads>(static_cast<double>(values), sSums, sum);
  const double all_directions =
      block_fold<kOptimThreads>(static_cast<double>(directions), sSums, sum);
  if (threadIdx.x == 0) {
    a.workspace[chunk] = static_cast<float>(all_values);
    a.workspace[a.chunks + chunk] = static_cast<float>(all_directions);
    __threadfence();
    sStart[0].last = ptx::draw_number_ordered(a.counter) == a.chunks - 1;
  }
  __syncthreads();
  if (!sStart[0].last) return;
  ptx::fence_acquire();
  make_ratios(a);
}

template <OptimTypes kTypes, KnownRounding kKnown>
__global__ void __launch_bounds__(kOptimThreads, eight(kTypes) ? 3 : 2)
    lamb_apply_kernel(const __grid_constant__ StepParams a) {
  constexpr int kPacks = 2, kVec = eight(kTypes) ? 8 : 4;
  __shared__ LambStart sStart[1];
  ptx::grid_wait();
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const ChunkPlace place = place_of(a, static_cast<int>(blockIdx.x));
  const OptimTensor& t = a.tensor[place.tensor];
  ChunkOperands<2, kKnown> c(a, types_of<kTypes>(a), t, nullptr, place.first);
  c.grad.at = nullptr;
  const int packs = place.grad && c.template aligned<kVec>() ? c.count / kVec : 0;
  RawOperands<kVec, 2, kPacks> raw;
  int pack = static_cast<int>(threadIdx.x);
  raw.load(c, pack, packs);
  int turn = 0;
  if (threadIdx.x == 0) {
    const optim::Start start = start_of(a, t);
    sStart[0] = {Lamb::numbers(start), a.workspace[2 * a.chunks + place.tensor], start.steps,
                 false};
    turn = draw_turn(a, start);
  }
  __syncthreads();
  const Lamb::Numbers numbers = sStart[0].numbers;
  const bool usual = is_usual(numbers);
  const float step_size = optim::mul(numbers.lr, sStart[0].factor);
  c.values.step = sStart[0].step;
  while (pack < packs) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      if (at >= packs) break;
      float p[kVec], s[2][kVec];
      c.values.unpack(raw.param[i], raw.extra[i], p);
#pragma unroll
      for (int k = 0; k < 2; ++k) raw.state[k][i].unpack(c.state[k].type, s[k]);
      float direction[kVec];
      directions_of(numbers, usual, p, s, direction);
#pragma unroll
      for (int j = 0; j < kVec; ++j) p[j] = optim::fma(-step_size, direction[j], p[j]);
      c.values.store(at * kVec, p);
    }
    pack += kPacks * kOptimThreads;
    raw.load(c, pack, packs);
  }
  const int count = place.grad ? c.count : 0;
#pragma unroll 1
  for (int e = packs * kVec + static_cast<int>(threadIdx.x); e < count; e += kOptimThreads) {
    const float states[2] = {load_one(c.state[0], e), load_one(c.state[1], e)};
    const float p = c.values.load_value(e);
    c.values.store_value(e, optim::fma(-step_size, Lamb::direction(numbers, p, states), p));
  }
  end_turn(a, turn, sStart[0].last);
}

}  // namespace

void launch_lamb(const OptimStep& args, const StepParams& a, Stream stream) {
  FK_CHECK(args.workspace, args.op, ": workspace must be given");
  const Launch shape{.op = args.op, .grid = a.chunks, .block = kOptimThreads, .overlap = true};
  const auto as = [&]<OptimTypes kTypes, KnownRounding kKnown>() {
    launch(lamb_average_kernel<kTypes, kKnown>, shape, stream, a);
    launch(lamb_apply_kernel<kTypes, kKnown>, shape, stream, a);
  };
  const bool bf16 = a.param == DType::bf16 && a.grad == DType::bf16 && a.state == DType::bf16;
  if (bf16 && a.rounding == OptimRounding::nearest)
    return as.template operator()<OptimTypes::bf16, KnownRounding::nearest>();
  as.template operator()<OptimTypes::any, KnownRounding::none>();
}

}  // namespace fastkern::cuda
