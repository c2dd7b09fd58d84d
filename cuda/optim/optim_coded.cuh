// SPDX-License-Identifier: Apache-2.0
// A step of an optimizer whose states have 8 bits (optim_code.h), for any formula of
// optim_formula.h.
//
//   formula  states of a block of 256 elements: number of the code · scale; then Formula::update,
//            element by element; scale: the largest magnitude of the new states, codes: of each
//            divided by it
//   work     a block has up to four chunks of 16384 elements, those of one parameter together: warp
//   w
//            has their code blocks w, w + 8, ..., a lane eight elements of each: one pack of eight
//            where values and gradients have 16 bits, else two of four, 128 elements apart. Element
//            by element goes what is not aligned, the last block of a tensor, and a block with
//            numbers so large or small that the short ways of ordinary.cuh and code_tables.cuh do
//            not hold: the warp asks once, when it has the new states
//   memory   the pack of the next code block is under way while one is worked on, and those behind
//            it come into L2, not those of Adam in bf16. Tables of numbers
//            and of lines, 66 KB of shared memory, are made by each block while its first packs are
//            under way. Lane i has the scales of the warp's i-th block, old and new
//   sync     as in optim_step.cuh; the largest of a warp by one instruction, of magnitudes as
//            integers: no order of sums, no atomics
//   cost     AdamW moves 10 bytes a parameter in bf16 and 1/16 byte of scales; f32 states: 22. At
//            these 10 bytes the instructions count, 57 a parameter
#pragma once

#include "optim/code_tables.cuh"
#include "optim/optim_step.cuh"
#include "optim/ordinary.cuh"

namespace fastkern::cuda {

/// A formula where numbers are ordinary. limit: what the largest magnitude of state k must be
/// below, as bits; kLeast: and every other magnitude but 0 at least.
template <class Formula>
struct OrdinaryStep {
  static constexpr std::uint32_t kLeast = 0;
  static constexpr std::uint32_t limit(int) { return (127u + 126) << 23; }  // of a normal inverse
  using Numbers = typename Formula::Numbers;
  static __device__ __forceinline__ bool holds(const Numbers&) { return true; }
  static __device__ __forceinline__ float average(const Numbers& n, float p, float g,
                                                  float (&s)[1]) {
    return Formula::update(n, p, g, s);
  }
  static __device__ __forceinline__ float follow(const Numbers&, float p, const float (&)[1]) {
    return p;
  }
};
/// What is divided is 0 or from 2^-96 to 2^60, by eps at least, 2^-66, and 2^22 at most.
template <>
struct OrdinaryStep<optim::Adam<false>> {
  using Formula = optim::Adam<false>;
  static constexpr std::uint32_t kLeast = (127u - 96) << 23;
  static constexpr std::uint32_t limit(int k) { return (k == 0 ? 127u + 60 : 127u + 29) << 23; }
  using Numbers = Formula::Numbers;
  static __device__ __forceinline__ bool holds(const Numbers& n) {
    return ordinary::numbers(n.eps, n.unbias2, 1.0f);
  }
  static __device__ __forceinline__ float average(const Numbers& n, float p, float g,
                                                  float (&s)[2]) {
    return Formula::average(n, p, g, s);
  }
  static __device__ __forceinline__ float follow(const Numbers& n, float p, const float (&s)[2]) {
    const float below = optim::fma(ordinary::root(s[1]), n.unbias2, n.eps);
    return Formula::follow(n, p, ordinary::quotient(s[0], below));
  }
};

/// A code block on its way from memory: of a lane, kPacks packs of kVec elements.
template <int kVec, int kStates>
struct RawBlock {
  static constexpr int kPacks = 8 / kVec;
  RawPack<kVec> param[kPacks], extra[kPacks], grad[kPacks];
  uint2 code[kStates];  // eight

  /// From `ahead` code blocks behind the operands' place on; codes are `codes` elements behind it.
  template <KnownRounding kKnown>
  __device__ __forceinline__ void load(const ChunkOperands<kStates, kKnown>& c, int ahead,
                                       unsigned codes, bool inside) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = ahead * kCodeBlock + i * 128;
      grad[i].load(c.grad, at, inside);
      param[i].load(c.values.param, at, inside && c.values.reads_param());
      if constexpr (kKnown == KnownRounding::none) {
        extra[i].load({c.values.extra, c.values.extra_type()}, at, inside && c.values.has_extra());
      }
    }
    if (!inside) return;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const char* const at = c.state[k].at + codes + ahead * kCodeBlock;
      if constexpr (kVec == 8) {
        code[k] = ptx::ld_global_8(at);
      } else {
        code[k] = {ptx::ld_global_4(at), ptx::ld_global_4(at + 128)};
      }
    }
  }
};

inline constexpr int kCodedRun =
    4;  // chunks of a block, at most: a lane has the scales of one block

template <class Formula>
struct CodedStart : StepStart<Formula> {
  std::uint32_t limit[Formula::kStates];  // 0: no number is ordinary
  float* scale[Formula::kStates];         // of the chunk's first code block
};

/// Blocks of a multiprocessor: the most that need no spills; before sm_90, whose tables fit.
constexpr int coded_blocks(KnownRounding known) {
  return ptx::kHasClusters && known != KnownRounding::none ? 3 : 2;
}

/// Whether operands of a block's next rounds are brought into L2. Three blocks of Adam are slower
/// with it.
constexpr bool coded_asks(int states, KnownRounding known) {
  return states == 1 || known == KnownRounding::none;
}

template <class Formula, OptimTypes kTypes, KnownRounding kKnown>
__global__ void __launch_bounds__(kOptimThreads, coded_blocks(kKnown))
    optim_coded_kernel(const __grid_constant__ StepParams a) {
  constexpr int kVec = eight(kTypes) ? 8 : 4, kStates = Formula::kStates, kPacks = 8 / kVec;
  using Ordinary = OrdinaryStep<Formula>;
  using Start = CodedStart<Formula>;
  extern __shared__ __align__(256) char code_memory[];
  __shared__ Start sStart[1];
  CodeTables& tables = *reinterpret_cast<CodeTables*>(code_memory);
  ptx::grid_wait();
  if (a.found_inf && *a.found_inf != 0.0f) return;
  // All operands are moved on from code block to code block, to the lane's first elements.
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int begin = warp * kCodeBlock + lane * kVec;
  constexpr int kRound = kOptimWarps * kCodeBlock;  // elements of the block's warps at a time
  const auto own = [&] {
    return warp + lane * kOptimWarps;
  };  // the code block whose scales are here
  constexpr int kAhead = 2;  // rounds of which operands come into L2
  static_assert(kCodedRun * kOptimChunk / kRound <= 32);
  const std::uint32_t copy = CodeTables::copy_of(lane);
  int turn = 0;

  // Chunks of one tensor at a time, mostly all of them.
  const int first_chunk = static_cast<int>(blockIdx.x) * a.run;
  const int end = min(first_chunk + a.run, a.chunks);
#pragma unroll 1
  for (int chunk = first_chunk; chunk < end;) {
    const ChunkPlace place = place_of(a, chunk);
    const OptimTensor& t = a.tensor[place.tensor];
    const int next = min(a.first_chunk[place.tensor + 1], end);
    ChunkOperands<kStates, kKnown> c(a, types_of<kTypes>(a), t, place.grad, place.first,
                                     (next - chunk) * kOptimChunk);
    const int count = place.grad ? c.count : 0;
    const int packed = c.template aligned<kVec>() ? count / kCodeBlock * kCodeBlock : 0;
    const int asked = kVec == 8 || c.template aligned<8>() ? packed : 0;

    std::uint32_t scales[kStates] = {};
    c.move(begin);
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      c.state[k].at = static_cast<char*>(t.state[k]) + place.first + begin;  // codes, of one byte
      if (own() * kCodeBlock < count)
        scales[k] = ptx::ld_global_4(t.scale[k] + place.first / kCodeBlock + own());
    }
    RawBlock<kVec, kStates> raw;
    raw.load(c, 0, 0, warp * kCodeBlock < packed);
    if (chunk == first_chunk) {
      tables.fill<kStates>();
    } else {
      __syncthreads();  // all have done with the numbers of the tensor before
    }
    if (threadIdx.x == 0) {
      Start& s = sStart[0];
      turn = begin_step<Formula>(a, t, s, next == end);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        s.limit[k] = Ordinary::holds(s.numbers) ? Ordinary::limit(k) : 0u;
        s.scale[k] = t.scale[k] + place.first / kCodeBlock;
      }
    }
    __syncthreads();
    const typename Formula::Numbers& numbers = sStart[0].numbers;  // registers are short
    const float& factor = sStart[0].factor;
    c.values.step = sStart[0].step;

    const auto offset_of = [](int i) { return static_cast<unsigned>(i * kRound); };
    // A negative average of squares is beyond the limit.
    const auto bits_of = [](int k, float state) {
      return __float_as_uint(state) & (k == 0 ? 0x7fffffffu : ~0u);
    };
    // Lane i's scales, and new ones in their place.
    const auto scale_of = [&](int k, int i) {
      return __uint_as_float(__shfl_sync(0xffffffffu, scales[k], i));
    };
    const auto replace = [&](int k, int i, std::uint32_t scale) {
      if (lane == i) scales[k] = scale;
    };

    // The warp's i-th block in packs, or nothing but loads for the next one and `false`.
    const auto packs = [&](int number, bool more) {
      float scale[kStates];
#pragma unroll
      for (int k = 0; k < kStates; ++k) scale[k] = scale_of(k, number);
      float p[kPacks][kVec], s[kStates][kPacks][kVec];
      std::uint32_t largest[kStates] = {}, least = ~0u;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float g[kVec];
        c.values.unpack(raw.param[i], raw.extra[i], p[i]);
        raw.grad[i].unpack(c.grad.type, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const int e = i * kVec + j;
          float states[kStates];
          for_states<kStates>([&]<int k>() {
            const std::uint32_t codes = e < 4 ? raw.code[k].x : raw.code[k].y;
            states[k] = optim::mul(tables.template decode<k>(codes, e % 4, copy), scale[k]);
          });
          p[i][j] = Ordinary::average(numbers, p[i][j], optim::mul(g[j], factor), states);
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            s[k][i][j] = states[k];
            if (Ordinary::kLeast) least = min(least, bits_of(k, states[k]) - 1u);  // 0 is no matter
            if (j % 2 != 0)
              largest[k] = max(max(largest[k], bits_of(k, s[k][i][j - 1])), bits_of(k, s[k][i][j]));
          }
        }
      }
      std::uint32_t all[kStates];
      bool odd = Ordinary::kLeast && least < Ordinary::kLeast - 1u;
      for_states<kStates>([&]<int k>() {
        all[k] = __reduce_max_sync(0xffffffffu, largest[k]);
        if (all[k] >= sStart[0].limit[k]) odd = true;
        if (!Ordinary::kLeast && all[k] - 1u < 0x007fffffu) odd = true;  // denormal
      });
      odd = __any_sync(0xffffffffu, odd);
      raw.load(c, kOptimWarps, offset_of(number), more);  // not before: into the same registers
      if (odd) return false;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          float states[kStates];
#pragma unroll
          for (int k = 0; k < kStates; ++k) states[k] = s[k][i][j];
          p[i][j] = Ordinary::follow(numbers, p[i][j], states);
        }
        c.values.store(i * 128, p[i]);
      }
      for_states<kStates>([&]<int k>() {
        const float inverse = ordinary::reciprocal(__uint_as_float(max(all[k], 0x00800000u)));
        const auto four = [&](int e) {
          const float x[4] = {s[k][e / kVec][e % kVec], s[k][e / kVec][e % kVec + 1],
                              s[k][e / kVec][e % kVec + 2], s[k][e / kVec][e % kVec + 3]};
          return tables.template encode<k>(x, inverse);
        };
        const uint2 codes = {four(0), four(4)};
        char* const at = c.state[k].at + offset_of(number);
        if constexpr (kVec == 8) {
          ptx::st_global_8(at, codes);
        } else {
          ptx::st_global_4(at, codes.x);
          ptx::st_global_4(at + 128, codes.y);
        }
        replace(k, number, all[k]);
      });
      return true;
    };

    // Its `count` elements one by one, twice: the largest is known when all have been looked at.
    const auto elements = [&](int number, int count) {
      const int from = -lane * kVec;  // the first of the code block
      std::uint8_t* codes[kStates];
      float scale[kStates];
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        scale[k] = scale_of(k, number);
        codes[k] = reinterpret_cast<std::uint8_t*>(c.state[k].at + offset_of(number)) + from;
      }
      const auto updated = [&](int e, float (&states)[kStates]) {
        for_states<kStates>([&]<int k>() {
          states[k] = optim::mul(tables.template decode<k>(codes[k][e], 0, copy), scale[k]);
        });
        const float g = optim::mul(load_one(c.grad, from + e), factor);
        return Formula::update(numbers, c.values.load_value(from + e), g, states);
      };
      std::uint32_t largest[kStates] = {};
#pragma unroll 1
      for (int e = lane; e < count; e += 32) {
        float states[kStates];
        updated(e, states);
#pragma unroll
        for (int k = 0; k < kStates; ++k)
          largest[k] = max(largest[k], __float_as_uint(states[k]) & 0x7fffffffu);
      }
      float inverse[kStates];
      for_states<kStates>([&]<int k>() {
        largest[k] = __reduce_max_sync(0xffffffffu, largest[k]);
        inverse[k] = optim::inverse_of(largest[k]);
        replace(k, number, largest[k]);
      });
#pragma unroll 1
      for (int e = lane; e < count; e += 32) {
        float states[kStates];
        c.values.store_value(from + e, updated(e, states));
        for_states<kStates>([&]<int k>() {
          codes[k][e] =
              static_cast<std::uint8_t>(CodeTables::Code<k>::encode(states[k], inverse[k]));
        });
      }
    };

#pragma unroll 1
    for (int e = warp * kCodeBlock; e < count; e += kRound) {
      if (coded_asks(kStates, kKnown) && threadIdx.x == 0 && e + (kAhead + 1) * kRound <= asked) {
        c.ask(kAhead * kRound, kRound);
#pragma unroll
        for (int k = 0; k < kStates; ++k) c.ask(c.state[k].at, 1, e + kAhead * kRound, kRound);
      }
      if (e >= packed || !packs(e / kRound, e + kRound < packed))
        elements(e / kRound, min(kCodeBlock, count - e));
      c.move(kRound);
    }
    if (own() * kCodeBlock < count) {
#pragma unroll
      for (int k = 0; k < kStates; ++k) ptx::st_global_4(sStart[0].scale[k] + own(), scales[k]);
    }
    chunk = next;
  }
  end_turn(a, turn, sStart[0].last);
}

/// Host.
template <class Formula>
void launch_coded(const OptimStep& args, StepParams a, Stream stream) {
  // Tables and looking up cost a block as much as a third of a chunk: fewer blocks, but so many
  // that they end together.
  constexpr std::int64_t kRounds = 8;
  const std::int64_t resident =
      3 * device_attribute(cudaDevAttrMultiProcessorCount, stream.device, args.op);
  while (a.run < kCodedRun && a.chunks >= 2 * a.run * kRounds * resident) a.run *= 2;
  const Launch shape{.op = args.op,
                     .grid = ceil_div(a.chunks, a.run),
                     .block = kOptimThreads,
                     .shared = sizeof(CodeTables),
                     .overlap = true};
  using enum OptimTypes;
  using enum KnownRounding;
  const bool bfloats = a.param == DType::bf16 && a.grad == DType::bf16;
  const bool wide =
      a.param != DType::f32 && a.grad != DType::f32 && a.rounding != OptimRounding::master;
  if (bfloats && a.rounding == OptimRounding::nearest)
    return launch(optim_coded_kernel<Formula, bf16, nearest>, shape, stream, a);
  if (bfloats && a.rounding == OptimRounding::stochastic)
    return launch(optim_coded_kernel<Formula, bf16, stochastic>, shape, stream, a);
  if (wide) return launch(optim_coded_kernel<Formula, halves, none>, shape, stream, a);
  launch(optim_coded_kernel<Formula, any, none>, shape, stream, a);
}

}  // namespace fastkern::cuda
