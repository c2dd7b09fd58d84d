// SPDX-License-Identifier: Apache-2.0
// A step of an optimizer: the kernel, for any formula of optim_formula.h.
//
//   formula  Formula::update, element by element, in float32; each operand rounded once as it is
//            stored
//   work     a block has a chunk of 16384 elements of one parameter, or half of one, which it finds
//   by
//            its number in the table. Packs of eight elements where all operands, or all but f32
//            states, have 16 bits, else of four; pack (i · kPacks + k) · kThreads + t is thread
//            t's. What is not aligned, and the last elements of a tensor, one by one: the same
//            numbers, element by element
//   memory   nothing is kept; all loads of a thread's packs come before the first use of one, and
//            of most instances one thread has the block's next packs brought into L2 meanwhile
//   sync     one barrier, behind which everyone has the step's numbers, which thread 0 makes in
//            float64. Thread 0 then draws a number, for which nobody waits: at its end, the block
//            that drew the last one knows that all have read the counts of steps, and adds one to
//            each of them
//   cost     each operand is read once, and written once but for the gradient: AdamW in float32
//            moves 28 bytes a parameter
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fastkern/optim_formula.h"
#include "launch.cuh"
#include "optim/optim_table.cuh"
#include "ptx/cluster.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda {

inline constexpr int kOptimThreads = 256;

/// The operand of one tensor: where, and of which type.
struct Operand {
  char* at;
  DType type;

  __device__ __forceinline__ int bytes() const { return type == DType::f32 ? 4 : 2; }
};

/// kVec elements on their way from memory: four of any type, eight of 16 bits, or eight of 32
/// (kFloats).
template <int kVec, bool kFloats = false>
struct RawPack {
  static constexpr int kParts = kFloats ? kVec / 4 : 1;
  uint4 bits[kParts];

  /// Not read unless `wanted`.
  __device__ __forceinline__ void load(const Operand& from, int element, bool wanted) {
    const int size = kFloats ? 4 : kVec == 8 ? 2 : from.bytes();
    const char* const at = from.at + element * static_cast<std::int64_t>(size);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if constexpr (kVec == 8) {
        if (wanted) bits[i] = ptx::ld_global(at + 16 * i);
      } else {
        bits[i] = ptx::ld_global_part(at + 16 * i, wanted ? kVec * size : 0);
      }
    }
  }
  __device__ __forceinline__ void unpack(DType type, float (&out)[kVec]) const {
    const std::uint32_t words[4] = {bits[0].x, bits[0].y, bits[0].z, bits[0].w};
    if constexpr (kFloats) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        out[4 * i] = __uint_as_float(bits[i].x), out[4 * i + 1] = __uint_as_float(bits[i].y);
        out[4 * i + 2] = __uint_as_float(bits[i].z), out[4 * i + 3] = __uint_as_float(bits[i].w);
      }
    } else if (kVec == 4 && type == DType::f32) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) out[j] = __uint_as_float(words[j % 4]);
    } else if (type == DType::f16) {
      halves(words, out, __half{});
    } else {
      halves(words, out, __nv_bfloat16{});
    }
  }
  static __device__ __forceinline__ void store(const Operand& to, int element,
                                               const float (&v)[kVec]) {
    const int size = kFloats ? 4 : kVec == 8 ? 2 : to.bytes();
    char* const at = to.at + element * static_cast<std::int64_t>(size);
    if (kFloats || (kVec == 4 && to.type == DType::f32)) {
#pragma unroll
      for (int j = 0; j < (kFloats ? kVec : 4); j += 4)
        ptx::st_global(at + 4 * j, {__float_as_uint(v[j]), __float_as_uint(v[j + 1]),
                                    __float_as_uint(v[j + 2]), __float_as_uint(v[j + 3])});
    } else if (to.type == DType::f16) {
      store_halves(at, v, __half{});
    } else {
      store_halves(at, v, __nv_bfloat16{});
    }
  }
  static __device__ __forceinline__ void store_words(void* at, const std::uint32_t (&w)[kVec / 2]) {
    if constexpr (kVec == 8) {
      ptx::st_global(at, {w[0], w[1], w[2], w[3]});
    } else {
      ptx::st_global_8(at, {w[0], w[1]});
    }
  }

 private:
  template <class T>
  static __device__ __forceinline__ void halves(const std::uint32_t (&words)[4], float (&out)[kVec],
                                                T) {
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      const float2 pair = tile::unpack_pair(words[j], T{});
      out[2 * j] = pair.x, out[2 * j + 1] = pair.y;
    }
  }
  template <class T>
  static __device__ __forceinline__ void store_halves(void* at, const float (&v)[kVec], T) {
    std::uint32_t words[kVec / 2];
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) words[j] = tile::pack_pair(v[2 * j], v[2 * j + 1], T{});
    store_words(at, words);
  }
};

__device__ __forceinline__ float load_one(const Operand& from, int element) {
  switch (from.type) {
    case DType::f32:
      return reinterpret_cast<const float*>(from.at)[element];
    case DType::f16:
      return __half2float(reinterpret_cast<const __half*>(from.at)[element]);
    default:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(from.at)[element]);
  }
}
__device__ __forceinline__ void store_one(const Operand& to, int element, float v) {
  tile::store_as(to.at, to.type, static_cast<std::int64_t>(element), v);
}

/// What an instance knows of the rounding of parameters: to nearest, and no extra; stochastic;
/// nothing.
enum class KnownRounding : std::uint8_t { nearest, stochastic, none };

/// Parameters as their rounding keeps them.
template <KnownRounding kKnown>
struct Values {
  static constexpr bool kPlain = kKnown == KnownRounding::nearest;
  static constexpr bool kNoExtra = kKnown != KnownRounding::none;
  Operand param;
  char* extra;
  OptimRounding rounding;
  std::uint64_t seed, step;
  std::uint32_t index;
  std::int64_t first;  // element of the tensor that is element 0 here; a multiple of eight

  __device__ __forceinline__ Operand extra_as(DType type) const { return {extra, type}; }
  __device__ __forceinline__ DType extra_type() const {
    return rounding == OptimRounding::master ? DType::f32 : param.type;
  }
  __device__ __forceinline__ bool has_extra() const {
    return !kNoExtra && rounding >= OptimRounding::kahan;
  }
  __device__ __forceinline__ bool reads_param() const {
    return kNoExtra || rounding != OptimRounding::master;
  }

  template <int kVec>
  __device__ __forceinline__ void unpack(const RawPack<kVec>& p, const RawPack<kVec>& x,
                                         float (&out)[kVec]) const {
    if (kNoExtra || rounding <= OptimRounding::stochastic) {
      p.unpack(param.type, out);
    } else if (rounding == OptimRounding::master) {
      if constexpr (kVec == 4) x.unpack(DType::f32, out);
    } else if (rounding == OptimRounding::kahan) {
      float lost[kVec];
      p.unpack(param.type, out);
      x.unpack(param.type, lost);
#pragma unroll
      for (int j = 0; j < kVec; ++j) out[j] = __fadd_rn(out[j], lost[j]);
    } else {
      const std::uint32_t high[4] = {p.bits[0].x, p.bits[0].y, p.bits[0].z, p.bits[0].w};
      const std::uint32_t low[4] = {x.bits[0].x, x.bits[0].y, x.bits[0].z, x.bits[0].w};
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        out[j] = optim::with_remainder(
            static_cast<std::uint16_t>(high[j / 2] >> (j % 2 * 16)),
            static_cast<std::int16_t>(static_cast<std::uint16_t>(low[j / 2] >> (j % 2 * 16))));
      }
    }
  }

  template <int kVec>
  __device__ __forceinline__ void store(int element, const float (&v)[kVec]) const {
    if (kPlain || rounding == OptimRounding::nearest) {
      RawPack<kVec>::store(param, element, v);
    } else if (rounding == OptimRounding::kahan) {
      float lost[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) lost[j] = optim::lost_by_rounding(v[j], rounded(v[j]));
      RawPack<kVec>::store(param, element, v);
      RawPack<kVec>::store(extra_as(param.type), element, lost);
    } else if (rounding == OptimRounding::master && param.type != DType::bf16) {
      if constexpr (kVec == 4) RawPack<kVec>::store(extra_as(DType::f32), element, v);
      RawPack<kVec>::store(param, element, v);
    } else if (rounding == OptimRounding::stochastic) {
      store_stochastic(element, v);
    } else {
      std::uint32_t bits[kVec / 2] = {}, low[kVec / 2] = {};
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const std::uint16_t high = optim::nearest_away_bf16(v[j]);
        bits[j / 2] |= static_cast<std::uint32_t>(high) << (j % 2 * 16);
        low[j / 2] |=
            static_cast<std::uint32_t>(static_cast<std::uint16_t>(optim::remainder_of(v[j])))
            << (j % 2 * 16);
      }
      RawPack<kVec>::store_words(param.at + element * 2ll, bits);
      if (rounding == OptimRounding::remainder) {
        RawPack<kVec>::store_words(extra + element * 2ll, low);
      } else if (kVec == 4 && rounding == OptimRounding::master) {
        if constexpr (kVec == 4) RawPack<kVec>::store(extra_as(DType::f32), element, v);
      }
    }
  }

  __device__ __forceinline__ float load_value(int element) const {
    if (kNoExtra || rounding <= OptimRounding::stochastic) return load_one(param, element);
    if (rounding == OptimRounding::master) return load_one(extra_as(DType::f32), element);
    if (rounding == OptimRounding::kahan) {
      return __fadd_rn(load_one(param, element), load_one(extra_as(param.type), element));
    }
    return optim::with_remainder(reinterpret_cast<const std::uint16_t*>(param.at)[element],
                                 reinterpret_cast<const std::int16_t*>(extra)[element]);
  }
  __device__ __forceinline__ void store_value(int element, float v) const {
    std::uint16_t* const bits = reinterpret_cast<std::uint16_t*>(param.at) + element;
    if (kPlain || rounding == OptimRounding::nearest) {
      store_one(param, element, v);
    } else if (rounding == OptimRounding::stochastic) {
      const std::int64_t at = first + element;
      const PhiloxWords words = optim::rounding_words(seed, step, index, at / 8);
      *bits = optim::stochastic_bf16(v, optim::half_word(words, static_cast<int>(at % 8)));
    } else if (rounding == OptimRounding::kahan) {
      store_one(param, element, v);
      store_one(extra_as(param.type), element, optim::lost_by_rounding(v, rounded(v)));
    } else {
      if (rounding == OptimRounding::master) {
        store_one(extra_as(DType::f32), element, v);
      } else {
        reinterpret_cast<std::int16_t*>(extra)[element] = optim::remainder_of(v);
      }
      if (param.type == DType::bf16) {
        *bits = optim::nearest_away_bf16(v);
      } else {
        store_one(param, element, v);
      }
    }
  }

 private:
  /// One question for all, whether they are finite.
  template <int kVec>
  __device__ __forceinline__ void store_stochastic(int element, const float (&v)[kVec]) const {
    const std::int64_t at = first + element;
    const PhiloxWords words = optim::rounding_words(seed, step, index, at / 8);
    const bool upper = kVec == 4 && at % 8 != 0;  // half of a group of eight
    const auto word = [&](int i) { return upper ? words.word[(i + 2) % 4] : words.word[i]; };
    std::uint32_t bits[kVec / 2], largest = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) largest = max(largest, __float_as_uint(v[j]) & 0x7fffffffu);
    if (largest < 0x7f800000u) {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        bits[i] = __byte_perm(__float_as_uint(v[2 * i]) + (word(i) & 0xffffu),
                              __float_as_uint(v[2 * i + 1]) + (word(i) >> 16), 0x7632);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        const std::uint32_t high = optim::stochastic_bf16(v[2 * i + 1], word(i) >> 16);
        bits[i] = optim::stochastic_bf16(v[2 * i], word(i) & 0xffffu) | high << 16;
      }
    }
    RawPack<kVec>::store_words(param.at + element * 2ll, bits);
  }
  __device__ __forceinline__ float rounded(float v) const {
    return param.type == DType::f16 ? __half2float(__float2half_rn(v))
                                    : __bfloat162float(__float2bfloat16_rn(v));
  }
};

/// What an instance knows of its operands' types: nothing; all have 16 bits; all are bf16; all but
/// the states, which are f32.
enum class OptimTypes : std::uint8_t { any, halves, bf16, bf16_float_states };

/// Whether packs have eight elements, not four.
constexpr bool eight(OptimTypes types) { return types >= OptimTypes::halves; }

/// Of the parameter, the gradient and the states.
struct OperandTypes {
  DType param, grad, state;
};
template <OptimTypes kTypes>
__device__ __forceinline__ OperandTypes types_of(const StepParams& a) {
  if constexpr (kTypes == OptimTypes::bf16) return {DType::bf16, DType::bf16, DType::bf16};
  if constexpr (kTypes == OptimTypes::bf16_float_states)
    return {DType::bf16, DType::bf16, DType::f32};
  return {a.param, a.grad, a.state};
}

/// What the operands of some elements are, from element `first` of a tensor on, at most `most`.
template <int kStates, KnownRounding kKnown>
struct ChunkOperands {
  Values<kKnown> values;
  Operand grad;
  Operand state[kStates];  // at == nullptr: not given
  int count;               // elements

  __device__ __forceinline__ ChunkOperands(const StepParams& a, const OperandTypes& types,
                                           const OptimTensor& t, const void* gradient,
                                           std::int64_t first, std::int64_t most = kOptimChunk)
      : count(static_cast<int>(max(std::int64_t{0}, min(most, t.numel - first)))) {
    const auto part = [&](const void* base, DType type) {
      return static_cast<char*>(const_cast<void*>(base)) + first * (type == DType::f32 ? 4 : 2);
    };
    values.param = {part(t.param, types.param), types.param};
    values.rounding = kKnown == KnownRounding::nearest      ? OptimRounding::nearest
                      : kKnown == KnownRounding::stochastic ? OptimRounding::stochastic
                                                            : a.rounding;
    values.seed = a.seed, values.step = 0, values.index = t.index, values.first = first;
    values.extra = values.has_extra() ? part(t.extra, values.extra_type()) : nullptr;
    grad = {part(gradient, types.grad), types.grad};
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      state[k] = {t.state[k] ? part(t.state[k], types.state) : nullptr, types.state};
    }
  }

  /// So many elements on; states are the caller's.
  __device__ __forceinline__ void move(int elements) {
    const auto on = [&](char*& at, DType type) {
      at += elements * (type == DType::f32 ? 4ll : 2ll);
    };
    on(values.param.at, values.param.type);
    on(grad.at, grad.type);
    if (values.has_extra()) on(values.extra, values.extra_type());
    values.first += elements;
  }

  /// One thread for the block: so many elements from `element` on into L2, of all operands but the
  /// states. Both are multiples of eight, and packs of eight elements are aligned.
  __device__ __forceinline__ void ask(int element, int elements) const {
    ask(grad, element, elements);
    if (values.reads_param()) ask(values.param, element, elements);
    if (values.has_extra()) ask({values.extra, values.extra_type()}, element, elements);
  }
  static __device__ __forceinline__ void ask(const Operand& from, int element, int elements) {
    ask(from.at, from.bytes(), element, elements);
  }
  static __device__ __forceinline__ void ask(const char* at, int bytes, int element, int elements) {
    ptx::bulk_prefetch(at + element * static_cast<std::int64_t>(bytes), elements * bytes);
  }

  /// Whether packs of kVec elements lie at multiples of their size, up to 16 bytes.
  template <int kVec>
  __device__ __forceinline__ bool aligned() const {
    const auto off = [](const void* at, int bytes) {
      return static_cast<int>(reinterpret_cast<std::uintptr_t>(at)) & (min(kVec * bytes, 16) - 1);
    };
    int any = off(values.param.at, values.param.bytes()) | off(grad.at, grad.bytes());
    if (values.has_extra()) any |= off(values.extra, values.extra_type() == DType::f32 ? 4 : 2);
#pragma unroll
    for (int k = 0; k < kStates; ++k) any |= off(state[k].at, state[k].bytes());
    return any == 0;
  }
};

template <int kVec, int kStates, int kPacks, bool kFloatStates = false>
struct RawOperands {
  RawPack<kVec> param[kPacks], extra[kPacks], grad[kPacks];
  RawPack<kVec, kFloatStates> state[kStates][kPacks];

  template <KnownRounding kKnown>
  __device__ __forceinline__ void load(const ChunkOperands<kStates, kKnown>& c, int pack,
                                       int packs) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      const bool inside = at < packs;
      grad[i].load(c.grad, at * kVec, inside && c.grad.at != nullptr);
      param[i].load(c.values.param, at * kVec, inside && c.values.reads_param());
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        state[k][i].load(c.state[k], at * kVec, inside && c.state[k].at != nullptr);
      }
      if constexpr (kKnown == KnownRounding::none) {
        extra[i].load({c.values.extra, c.values.extra_type()}, at * kVec,
                      inside && c.values.has_extra());
      }
    }
  }
};

/// What the step of a tensor needs, in shared memory. `last`: end_turn()'s.
template <class Formula>
struct StepStart {
  typename Formula::Numbers numbers;
  float factor;
  std::uint64_t step;
  bool last;
};
/// Thread 0: makes it, and gives the number that was drawn if this is the `last` of the block.
template <class Formula>
__device__ __forceinline__ int begin_step(const StepParams& a, const OptimTensor& t,
                                          StepStart<Formula>& s, bool last = true) {
  const optim::Start start = start_of(a, t);
  s = {Formula::numbers(start), optim::gradient_factor(start.group, a.grad_factor, a.grad_scale),
       start.steps, false};
  return last ? draw_turn(a, start) : 0;
}

/// Blocks that share a chunk: one where packs have eight elements, else two. A block's part of an
/// operand is then 32 KB: 16384 elements of 16 bits, or 8192 of float32.
constexpr int chunk_parts(OptimTypes types) { return eight(types) ? 1 : 2; }

/// Blocks of a multiprocessor: the most that need no spills.
constexpr int optim_blocks(int states, OptimTypes types, KnownRounding known) {
  if (known == KnownRounding::stochastic) return ptx::kHasClusters ? 3 : 2;
  if (types == OptimTypes::bf16_float_states)
    return known == KnownRounding::nearest && states < 2 ? 3 : 2;
  const bool wide = eight(types);
  if (ptx::kHasClusters && types == OptimTypes::bf16 && known == KnownRounding::nearest)
    return states == 2 ? 4 : 3;
  if (known == KnownRounding::none) return wide || states != 2 ? 2 : 3;
  return wide || states != 2 ? 3 : 4;
}

/// Packs of a thread under way in registers.
constexpr int optim_packs(OptimTypes types, KnownRounding known) {
  const bool few = ptx::kHasClusters && known != KnownRounding::none;
  return few || types == OptimTypes::bf16_float_states ? 1 : 2;
}
/// Whether a block has its next packs brought into L2. With four blocks of bf16 it would be slower.
constexpr bool optim_asks(int states, OptimTypes types, KnownRounding known) {
  return states != 2 || types != OptimTypes::bf16 || known != KnownRounding::nearest;
}

template <class Formula, OptimTypes kTypes, KnownRounding kKnown>
__global__ void __launch_bounds__(kOptimThreads, optim_blocks(Formula::kStates, kTypes, kKnown))
    optim_step_kernel(const __grid_constant__ StepParams a) {
  constexpr bool kFloatStates = kTypes == OptimTypes::bf16_float_states;
  constexpr int kVec = eight(kTypes) ? 8 : 4, kPacks = optim_packs(kTypes, kKnown);
  constexpr int kStates = Formula::kStates, kParts = chunk_parts(kTypes);
  using Start = StepStart<Formula>;
  using Numbers = typename Formula::Numbers;
  __shared__ Start sStart[1];
  ptx::grid_wait();
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const int chunk = static_cast<int>(blockIdx.x) / kParts;
  const int part = static_cast<int>(blockIdx.x) % kParts;
  const ChunkPlace place = place_of(a, chunk);
  const OptimTensor& t = a.tensor[place.tensor];
  constexpr std::int64_t kCount = kOptimChunk / kParts;
  ChunkOperands<kStates, kKnown> c(a, types_of<kTypes>(a), t, place.grad,
                                   place.first + part * kCount, kCount);
  const int packs = place.grad && c.template aligned<kVec>() ? c.count / kVec : 0;

  const int asked = c.template aligned<8>() ? packs : 0;
  const auto ask = [&](int from) {
    constexpr int kRound = kPacks * kOptimThreads;
    if (!optim_asks(kStates, kTypes, kKnown) || threadIdx.x != 0 || from + kRound > asked) return;
    c.ask(from * kVec, kRound * kVec);
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (c.state[k].at) c.ask(c.state[k], from * kVec, kRound * kVec);
  };

  RawOperands<kVec, kStates, kPacks, kFloatStates> raw;
  int pack = static_cast<int>(threadIdx.x);
  raw.load(c, pack, packs);
  ask(pack + kPacks * kOptimThreads);
  int turn = 0;
  if (threadIdx.x == 0) turn = begin_step(a, t, sStart[0]);
  __syncthreads();
  // Of instances that are short of registers, numbers stay where they are.
  constexpr bool kStay = kKnown == KnownRounding::none || kTypes == OptimTypes::bf16;
  const std::conditional_t<kStay, const Numbers&, const Numbers> numbers = sStart[0].numbers;
  const float factor = sStart[0].factor;
  c.values.step = sStart[0].step;

  while (pack < packs) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      if (at >= packs) break;
      float p[kVec], g[kVec], s[kStates][kVec];
      c.values.unpack(raw.param[i], raw.extra[i], p);
      raw.grad[i].unpack(c.grad.type, g);
#pragma unroll
      for (int k = 0; k < kStates; ++k) raw.state[k][i].unpack(c.state[k].type, s[k]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        float states[kStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) states[k] = c.state[k].at ? s[k][j] : 0.0f;
        p[j] = Formula::update(numbers, p[j], optim::mul(g[j], factor), states);
#pragma unroll
        for (int k = 0; k < kStates; ++k) s[k][j] = states[k];
      }
      c.values.store(at * kVec, p);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (c.state[k].at) RawPack<kVec, kFloatStates>::store(c.state[k], at * kVec, s[k]);
      }
    }
    pack += kPacks * kOptimThreads;
    raw.load(c, pack, packs);
    ask(pack + kPacks * kOptimThreads);
  }
  const int count = place.grad ? c.count : 0;
#pragma unroll 1
  for (int e = packs * kVec + static_cast<int>(threadIdx.x); e < count; e += kOptimThreads) {
    float states[kStates];
#pragma unroll
    for (int k = 0; k < kStates; ++k) states[k] = c.state[k].at ? load_one(c.state[k], e) : 0.0f;
    const float g = optim::mul(load_one(c.grad, e), factor);
    c.values.store_value(e, Formula::update(numbers, c.values.load_value(e), g, states));
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (c.state[k].at) store_one(c.state[k], e, states[k]);
    }
  }
  end_turn(a, turn, sStart[0].last);
}

/// Host: kEvery, an instance each for what is used most; else one.
template <class Formula, bool kEvery>
void launch_step(const OptimStep& args, const StepParams& a, Stream stream) {
  const auto as = [&]<OptimTypes kTypes, KnownRounding kKnown>() {
    const Launch shape{.op = args.op,
                       .grid = std::int64_t{a.chunks} * chunk_parts(kTypes),
                       .block = kOptimThreads,
                       .overlap = true};
    launch(optim_step_kernel<Formula, kTypes, kKnown>, shape, stream, a);
  };
  if constexpr (kEvery) {
    using enum OptimTypes;
    using enum KnownRounding;
    const auto known = [&]<OptimTypes kTypes>() {
      if (a.rounding == OptimRounding::nearest) return as.template operator()<kTypes, nearest>();
      if (a.rounding == OptimRounding::stochastic)
        return as.template operator()<kTypes, stochastic>();
      as.template operator()<kTypes, none>();
    };
    const auto all = [&](DType param, DType state) {
      return a.param == param && a.grad == param && a.state == state;
    };
    const bool plain = a.rounding == OptimRounding::nearest;
    const bool wide = a.rounding != OptimRounding::master;
    if (wide && all(DType::bf16, DType::bf16)) return known.template operator()<bf16>();
    if (wide && all(DType::bf16, DType::f32)) return known.template operator()<bf16_float_states>();
    if (wide && a.param != DType::f32 && a.grad != DType::f32 && a.state != DType::f32)
      return as.template operator()<halves, none>();
    if (plain) return as.template operator()<any, nearest>();
  }
  as.template operator()<OptimTypes::any, KnownRounding::none>();
}

}  // namespace fastkern::cuda
