// SPDX-License-Identifier: Apache-2.0
// A step of an optimizer whose states have 8 bits (optim_code.h), for any formula of
// optim_formula.h.
//
//   formula  states of a block of 256 elements: number of the code · scale; then Formula::update,
//            element by element; scale: the largest magnitude of the new states, codes: of each
//            divided by it
//   work     a block has a chunk of 16384 elements of one parameter, as in optim_step.cuh; warp w
//            has its code blocks w, w + 8, ..., a lane eight elements of each: one pack of eight
//            where values and gradients have 16 bits (`wide`), else two of four, 128 elements
//            apart. What is not aligned, and the last block of a tensor, element by element
//   memory   the pack of the next code block is under way while one is worked on. Numbers of codes
//            and lines of exponents are tables in shared memory, which each block makes; new states
//            of what goes element by element wait there for the largest
//   sync     as in optim_step.cuh; the largest of a warp by one instruction, of magnitudes as
//            integers: no order of sums, no atomics
//   cost     AdamW moves 10 bytes a parameter in bf16 and 1/16 byte of scales; f32 states: 22
#pragma once

#include "fastkern/optim_code.h"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {

inline constexpr int kCodeBlock = static_cast<int>(kOptimCodeBlock);
inline constexpr int kOptimWarps = kOptimThreads / 32;

/// In shared memory: what codes stand for, and the lines that lead to them.
template <bool kSigned>
struct CodeTable {
  using Code = optim::BlockCode<kSigned>;
  float number[256];
  typename Code::Line line[Code::kLines];

  __device__ __forceinline__ void fill() {
    const int i = static_cast<int>(threadIdx.x);
    static_assert(kOptimThreads == 256);
    number[i] = Code::decode(static_cast<std::uint32_t>(i));
    if (i < Code::kLines) line[i] = Code::line(i);
  }
  __device__ __forceinline__ std::uint32_t encode(float x, float inverse) const {
    const std::uint32_t magnitude = Code::magnitude_of(x, inverse);
    return Code::encode(x, magnitude, line[Code::line_of(magnitude)]);
  }
};

template <int kStates>
struct CodeTables {
  CodeTable<true> with_sign;
  CodeTable<false> without;  // of averages of squares, the second state

  __device__ __forceinline__ void fill() {
    with_sign.fill();
    if constexpr (kStates > 1) without.fill();
  }
  template <int k>
  __device__ __forceinline__ const auto& of() const {
    if constexpr (k == 0) {
      return with_sign;
    } else {
      return without;
    }
  }
};

/// f.operator()<k>() for each state.
template <int kStates, class F>
__device__ __forceinline__ void for_states(const F& f) {
  f.template operator()<0>();
  if constexpr (kStates > 1) f.template operator()<1>();
}

/// New states of elements that go one by one.
template <int kStates>
struct WaitingStates {
  float at[kStates][kCodeBlock];
};

/// A code block of a chunk on its way from memory: of a lane, kPacks packs of kVec elements.
template <int kVec, int kStates>
struct RawBlock {
  static constexpr int kPacks = 8 / kVec;
  RawPack<kVec> param[kPacks], extra[kPacks], grad[kPacks];
  uint2 code[kStates];  // eight
  float scale[kStates];

  template <KnownRounding kKnown>
  __device__ __forceinline__ void load(const ChunkOperands<kStates, kKnown>& c,
                                       float* const (&scales)[kStates], int block, bool inside) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = block * kCodeBlock + i * 128 + lane * kVec;
      grad[i].load(c.grad, at, inside);
      param[i].load(c.values.param, at, inside && c.values.reads_param());
      if constexpr (kKnown == KnownRounding::none) {
        extra[i].load({c.values.extra, c.values.extra_type()}, at, inside && c.values.has_extra());
      }
    }
    if (!inside) return;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const char* const at = c.state[k].at + block * kCodeBlock + lane * kVec;
      if constexpr (kVec == 8) {
        code[k] = ptx::ld_global_8(at);
      } else {
        code[k] = {ptx::ld_global_4(at), ptx::ld_global_4(at + 128)};
      }
      scale[k] = scales[k][block];
    }
  }
  /// Element j of pack i.
  __device__ __forceinline__ std::uint32_t code_of(int k, int i, int j) const {
    const int e = i * kVec + j;
    return (e < 4 ? code[k].x : code[k].y) >> (e % 4 * 8) & 0xffu;
  }
};

/// Blocks of a multiprocessor: the most that need no spills.
constexpr int coded_blocks(KnownRounding known) { return known == KnownRounding::nearest ? 3 : 2; }

template <class Formula, bool kWide, KnownRounding kKnown>
__global__ void __launch_bounds__(kOptimThreads, coded_blocks(kKnown))
    optim_coded_kernel(const __grid_constant__ StepParams a) {
  constexpr int kVec = kWide ? 8 : 4, kStates = Formula::kStates, kPacks = 8 / kVec;
  using Start = StepStart<Formula>;
  using Tables = CodeTables<kStates>;
  using Waiting = WaitingStates<kStates>;
  __shared__ Start sStart[1];
  __shared__ Tables sTables[1];
  __shared__ Waiting sWaiting[kOptimWarps];
  ptx::grid_wait();
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const int chunk = static_cast<int>(blockIdx.x);
  const int tensor = find_tensor(a.first_chunk, a.tensors, chunk);
  const OptimTensor& t = a.tensor[tensor];
  const void* const gradient = a.grad_of(tensor);
  const std::int64_t first = (chunk - a.first_chunk[tensor]) * kOptimChunk;
  ChunkOperands<kStates, kKnown> c(a, types_of<OptimTypes::any>(a), t, gradient, first);
  float* scales[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    c.state[k].at = static_cast<char*>(t.state[k]) + first;  // codes, of one byte
    scales[k] = t.scale[k] + first / kCodeBlock;
  }
  // Code blocks that go in packs; the others go element by element.
  const int packed = gradient && c.template aligned<kVec>() ? c.count / kCodeBlock : 0;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  RawBlock<kVec, kStates> raw;
  int block = warp;
  raw.load(c, scales, block, block < packed);
  sTables[0].fill();
  int turn = 0;
  if (threadIdx.x == 0) {
    const optim::Start start = start_of(a, t);
    sStart[0] = {Formula::numbers(start),
                 optim::gradient_factor(start.group, a.grad_factor, a.grad_scale), start.steps,
                 false};
    turn = draw_turn(a, start);
  }
  __syncthreads();
  const typename Formula::Numbers& numbers = sStart[0].numbers;  // registers are short
  const float& factor = sStart[0].factor;
  c.values.step = sStart[0].step;
  const Tables& tables = sTables[0];

  for (; block < packed; block += kOptimWarps) {
    float s[kStates][kPacks][kVec];
    std::uint32_t largest[kStates] = {};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float p[kVec], g[kVec];
      c.values.unpack(raw.param[i], raw.extra[i], p);
      raw.grad[i].unpack(c.grad.type, g);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        float states[kStates];
        for_states<kStates>([&]<int k>() {
          states[k] =
              optim::mul(tables.template of<k>().number[raw.code_of(k, i, j)], raw.scale[k]);
        });
        p[j] = Formula::update(numbers, p[j], optim::mul(g[j], factor), states);
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          s[k][i][j] = states[k];
          largest[k] = max(largest[k], __float_as_uint(states[k]) & 0x7fffffffu);
        }
      }
      c.values.store(block * kCodeBlock + i * 128 + lane * kVec, p);
    }
    const int done = block;
    raw.load(c, scales, block + kOptimWarps, block + kOptimWarps < packed);
    for_states<kStates>([&]<int k>() {
      const std::uint32_t all = __reduce_max_sync(0xffffffffu, largest[k]);
      const float inverse = optim::inverse_of(all);
      std::uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const int e = i * kVec + j;
          words[e / 4] |= tables.template of<k>().encode(s[k][i][j], inverse) << (e % 4 * 8);
        }
      }
      char* const at = c.state[k].at + done * kCodeBlock + lane * kVec;
      if constexpr (kVec == 8) {
        ptx::st_global_8(at, {words[0], words[1]});
      } else {
        ptx::st_global_4(at, words[0]);
        ptx::st_global_4(at + 128, words[1]);
      }
      if (lane == 0) scales[k][done] = __uint_as_float(all);
    });
  }

  const int blocks = gradient ? (c.count + kCodeBlock - 1) / kCodeBlock : 0;
  Waiting& waiting = sWaiting[warp];
#pragma unroll 1
  for (; block < blocks; block += kOptimWarps) {
    const int end = min((block + 1) * kCodeBlock, c.count);
    std::uint32_t largest[kStates] = {};
#pragma unroll 1
    for (int e = block * kCodeBlock + lane; e < end; e += 32) {
      float states[kStates];
      for_states<kStates>([&]<int k>() {
        const auto code = reinterpret_cast<const std::uint8_t*>(c.state[k].at)[e];
        states[k] = optim::mul(tables.template of<k>().number[code], scales[k][block]);
      });
      const float g = optim::mul(load_one(c.grad, e), factor);
      c.values.store_value(e, Formula::update(numbers, c.values.load_value(e), g, states));
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        waiting.at[k][e % kCodeBlock] = states[k];  // read by this thread alone
        largest[k] = max(largest[k], __float_as_uint(states[k]) & 0x7fffffffu);
      }
    }
    for_states<kStates>([&]<int k>() {
      const std::uint32_t all = __reduce_max_sync(0xffffffffu, largest[k]);
      const float inverse = optim::inverse_of(all);
#pragma unroll 1
      for (int e = block * kCodeBlock + lane; e < end; e += 32) {
        reinterpret_cast<std::uint8_t*>(c.state[k].at)[e] = static_cast<std::uint8_t>(
            tables.template of<k>().encode(waiting.at[k][e % kCodeBlock], inverse));
      }
      if (lane == 0) scales[k][block] = __uint_as_float(all);
    });
  }
  end_turn(a, turn, sStart[0].last);
}

/// Host.
template <class Formula>
void launch_coded(const OptimStep& args, const StepParams& a, Stream stream) {
  const Launch shape{.op = args.op, .grid = a.chunks, .block = kOptimThreads, .overlap = true};
  const bool wide =
      a.param != DType::f32 && a.grad != DType::f32 && a.rounding != OptimRounding::master;
  const bool plain = a.rounding == OptimRounding::nearest;
  using enum KnownRounding;
  if (wide && plain) return launch(optim_coded_kernel<Formula, true, nearest>, shape, stream, a);
  if (wide) return launch(optim_coded_kernel<Formula, true, none>, shape, stream, a);
  launch(optim_coded_kernel<Formula, false, none>, shape, stream, a);
}

}  // namespace fastkern::cuda
