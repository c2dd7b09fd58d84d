// SPDX-License-Identifier: Apache-2.0
// The fast way of a pointwise function: all tensors have one type S (a condition is boolean, as is
// the result of a comparison) and lie in packs of 16 bytes; or one of two inputs of basic
// arithmetic has 16 bits beside f32, and packs of 8 bytes. What does not goes through
// pointwise_kernel.cuh, with the same formula and the same bits.
//
//   work     a thread has kPacks packs, a block's threads apart, so that a warp's lie side by side.
//            They are counted through one dense dimension (`flat`) or through rows of whole packs;
//            a row may have its own stride, or none, in every operand: a bias, one number for each
//            row
//   index    rows: a division by multiplication for each dimension and pack
//   memory   16 bytes an access; a condition or a boolean result has one byte for each element of
//            the pack. All packs of a thread are under way before the first conversion
//   shift    where an input of a flat call lies at another distance from 16 bytes than the result,
//   a
//            thread reads the 16 bytes in which its pack begins and has the rest from the next lane
//   edges    of a flat call, elements before the first pack and behind the last: one each for the
//            first threads of the first block
//   cost     reads and writes each operand once. Of bf16, per element: the formula, one instruction
//            to unpack an input, half a one to round and pack, a third for index and access; a copy
//            at 4.2 TB/s leaves room for 28 of one input, 42 of two. Results of 16 bits have
//            formulas of their own where those of f32 take more (pointwise_brief.cuh)
#pragma once

#include <algorithm>
#include <optional>

#include "pointwise_kernel.cuh"

namespace fastkern::pointwise_detail {

inline constexpr int kOuterDims = 3;
inline constexpr int kPackThreads = 128;  // a block's: with 256, copies were a hundredth slower

struct PackAccess {
  char* data;
  std::int32_t inner;                // 1: packs along the row; 0: one element for all of it
  std::int32_t strides[kOuterDims];  // elements, of the dimensions around a row
  int shift;                         // bytes that packs of a flat call lie behind 16-byte borders
  bool number;                       // of the call, instead of a tensor
};

template <class T>
struct PackParams {
  PackAccess out, in[kMaxInputs];
  T numbers[kMaxInputs];
  Scalars<T> scalars;
  std::uint32_t groups;             // packs
  std::uint32_t head, edges, tail;  // elements: before the packs, single ones, where the last begin
  int outer;                        // dimensions around a row; 0: flat
  Divider row, dims[kOuterDims];    // packs of a row; sizes
};

/// Whether results are booleans.
template <class F>
inline constexpr bool kTruth = [] {
  if constexpr (requires { F::kTruth; }) {
    return F::kTruth;
  } else {
    return false;
  }
}();
template <class F>
inline constexpr bool kConditional = std::is_same_v<F, functor::where>;
/// Functions that have kernels for 16 bits beside f32.
template <class F>
inline constexpr bool kMixes = std::is_same_v<F, functor::add> || std::is_same_v<F, functor::sub> ||
                               std::is_same_v<F, functor::mul> || std::is_same_v<F, functor::div>;

/// B: the type of the second input, where that is another.
template <class F, class S, class O, class T, class B = S>
struct Packs {
  static constexpr int kIn = F::kInputs, V = 16 / std::max(sizeof(S), sizeof(B));
  static constexpr bool kTurns = kLong<F> && kHasBrief<F, S>;
  // A formula that takes long hides behind the accesses of another pack.
  static constexpr bool kHeavy =
      kLong<F> || (kLaborious<F> && !(kHasBrief<F, S> && kQuickAsBrief<F>));
  static constexpr int kPacks = kIn > 1 || kHeavy ? 2 : 1;
  static constexpr int kBlocks =  // at least
      kTurns     ? 12
      : kLong<F> ? (kIn == 1 ? 10 : 6)
      : kIn == 1 ? 12
                 : 8;
  template <int kInput>
  using In = std::conditional_t<kConditional<F> && kInput == 0, Bool,
                                std::conditional_t<kInput == 1, B, S>>;

  std::uint32_t column[kPacks], index[kOuterDims][kPacks];
  bool inside[kPacks];
  Words<std::uint32_t, 4> words[kIn][kPacks];  // as they are stored

  __device__ __forceinline__ void locate(const PackParams<T>& p) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const std::uint32_t group =
          blockIdx.x * (kPackThreads * kPacks) + k * kPackThreads + threadIdx.x;
      inside[k] = group < p.groups;
      column[k] = group;
#pragma unroll
      for (int d = 0; d < kOuterDims; ++d) index[d][k] = 0;
      if (p.outer == 0) continue;
      std::uint32_t rest = divide(group, p.row);
      column[k] = group - rest * p.row.size;
      // The last dimension is divided by as well: with a branch around that, nvcc had the indices
      // of some functions in local memory.
#pragma unroll
      for (int d = 0; d < kOuterDims; ++d) {
        if (d >= p.outer) break;
        const std::uint32_t next = divide(rest, p.dims[d]);
        index[d][k] = rest - next * p.dims[d].size;
        rest = next;
      }
    }
  }

  __device__ __forceinline__ std::uint32_t at(const PackParams<T>& p, const PackAccess& a,
                                              int k) const {
    std::uint32_t element = column[k] * (a.inner * V);
    if (p.outer > 0) {
#pragma unroll
      for (int d = 0; d < kOuterDims; ++d) {
        if (d < p.outer) element += index[d][k] * a.strides[d];
      }
    }
    return element;
  }

  template <int kInput>
  __device__ __forceinline__ void load(const PackParams<T>& p) {
    using I = In<kInput>;
    const PackAccess& a = p.in[kInput];
    if (a.number) return;
    if (a.inner != 0) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (inside[k])
          load_pack<V * sizeof(I)>(place<sizeof(I)>(a.data, at(p, a, k)), words[kInput][k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!inside[k]) continue;
        const char* const from = place<sizeof(I)>(a.data, at(p, a, k));
        load_pack<sizeof(I)>(from, words[kInput][k]);
      }
    }
  }

  /// Pack k of an input that is shifted: its bytes out of those read by this lane and by the next.
  template <int kInput>
  __device__ __forceinline__ void join(const PackParams<T>& p, int k) {
    using I = In<kInput>;
    const PackAccess& a = p.in[kInput];
    Words<std::uint32_t, 8> both;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      both.w[w] = words[kInput][k].w[w];
      both.w[4 + w] =
          __shfl_sync(0xffffffffu, both.w[w], static_cast<int>(threadIdx.x % 32 + 1) % 32);
    }
    // The next pack is another warp's, or there is none.
    if (inside[k] && (threadIdx.x % 32 == 31 || column[k] + 1 >= p.groups)) {
      Words<std::uint32_t, 4> last;
      load_pack<16>(place<sizeof(I)>(a.data, at(p, a, k) + V), last);
#pragma unroll
      for (int w = 0; w < 4; ++w) both.w[4 + w] = last.w[w];
    }
    const int bits = 8 * (a.shift % 4);
    const auto joined = [&]<int kFirst>() {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[kInput][k].w[w] = __funnelshift_r(
            both.w[kFirst + w], both.w[kFirst + w + 1 < 8 ? kFirst + w + 1 : 7], bits);
      }
    };
    if (a.shift < 4) {
      joined.template operator()<0>();
    } else if (a.shift < 8) {
      joined.template operator()<1>();
    } else if (a.shift < 12) {
      joined.template operator()<2>();
    } else {
      joined.template operator()<3>();
    }
  }

  template <int kInput>
  __device__ __forceinline__ void join_shifted(const PackParams<T>& p, int k) {
    if constexpr (V * sizeof(In<kInput>) == 16) {
      if (p.in[kInput].shift != 0) join<kInput>(p, k);
    }
  }

  /// Pack k of an input as T: one pack at a time, so that the others stay as small as they came.
  template <int kInput>
  __device__ __forceinline__ Words<T, V> values(const PackParams<T>& p, int k) const {
    using I = In<kInput>;
    const PackAccess& a = p.in[kInput];
    Words<T, V> to;
    if (!a.number && a.inner != 0) {
#pragma unroll
      for (int n = 0; n < V; ++n) put(to, n, element_as<T, I>(words[kInput][k], n));
    } else {
      const T v = a.number ? p.numbers[kInput] : to_compute<T>(element<I>(words[kInput][k], 0));
#pragma unroll
      for (int n = 0; n < V; ++n) put(to, n, v);
    }
    return to;
  }

  __device__ __forceinline__ void run(const PackParams<T>& p) {
    locate(p);
    load<0>(p);
    if constexpr (kIn > 1) load<1>(p);
    if constexpr (kIn > 2) load<2>(p);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      join_shifted<0>(p, k);
      if constexpr (kIn > 1) join_shifted<1>(p, k);
      if constexpr (kIn > 2) join_shifted<2>(p, k);
      Words<T, V> a = values<0>(p, k), b = a, c = a;
      if constexpr (kIn > 1) b = values<1>(p, k);
      if constexpr (kIn > 2) c = values<2>(p, k);
      if constexpr (kHasBrief<F, S>) {
        apply_brief<F, V>(a);
      } else {
#pragma unroll
        for (int n = 0; n < V; ++n)
          put(a, n,
              F::template apply<T>(element<T>(a, n), element<T>(b, n), element<T>(c, n),
                                   p.scalars));
      }
      narrow<O>(a);
      if (inside[k]) store_pack<V * sizeof(O)>(place<sizeof(O)>(p.out.data, at(p, p.out, k)), a);
    }
  }

  template <int kInput>
  static __device__ __forceinline__ T single(const PackParams<T>& p, std::int64_t element) {
    using I = In<kInput>;
    const PackAccess& a = p.in[kInput];
    if (a.number) return p.numbers[kInput];
    // Packs begin `shift` bytes behind `data`, elements `head` before them.
    const std::int64_t from = a.inner != 0 ? element - p.head : 0;
    return to_compute<T>(reinterpret_cast<const I*>(a.data + a.shift)[from]);
  }

  static __device__ __forceinline__ void run_edges(const PackParams<T>& p) {
    if (blockIdx.x > 0 || threadIdx.x >= p.edges) return;
    const std::int64_t e = threadIdx.x < p.head ? threadIdx.x : threadIdx.x - p.head + p.tail;
    const T a = single<0>(p, e);
    T b = a, c = a;
    if constexpr (kIn > 1) b = single<1>(p, e);
    if constexpr (kIn > 2) c = single<2>(p, e);
    T result[1] = {a};
    if constexpr (kHasBrief<F, O>) {
      apply_brief<F>(result);
    } else {
      result[0] = F::template apply<T>(a, b, c, p.scalars);
    }
    reinterpret_cast<O*>(p.out.data)[e - p.head] = to_stored<O>(result[0]);
  }
};

template <class F, class S, class O, class T, class B>
__global__ void __launch_bounds__(kPackThreads, Packs<F, S, O, T, B>::kBlocks)
    pointwise_packs_kernel(const __grid_constant__ PackParams<T> p) {
  ptx::grid_wait();
  Packs<F, S, O, T, B> packs;
  packs.run(p);
  packs.run_edges(p);
}

/// Describes a plan in packs of `vector` elements; whether that is possible. `p` has all but
/// numbers and scalars then.
template <class T>
bool in_packs(const PointwisePlan& plan, int vector, PackParams<T>& p) {
  const PointwiseView* views[kMaxInputs + 1] = {&plan.out};
  PackAccess* accesses[kMaxInputs + 1] = {&p.out};
  for (int i = 0; i < plan.inputs; ++i) views[i + 1] = &plan.in[i], accesses[i + 1] = &p.in[i];
  const int count = plan.inputs + 1;
  const auto aligned = [&](const PointwiseView& v, std::int64_t head) {
    const std::int64_t size = size_of(v.dtype);
    return (reinterpret_cast<std::uintptr_t>(v.data) + head * size) % (vector * size) == 0;
  };
  p.outer = plan.ndim - 1;
  if (p.outer > kOuterDims) return false;
  std::int64_t head = p.outer == 0 ? -1 : 0;
  for (std::int64_t h = 0; head < 0 && h < vector && h <= plan.numel; ++h) {
    if (aligned(plan.out, h)) head = h;
  }
  if (head < 0 || (p.outer > 0 && plan.sizes[0] % vector != 0)) return false;
  for (int i = 0; i < count; ++i) {
    const PointwiseView& v = *views[i];
    PackAccess& a = *accesses[i];
    a.number = !v.data;
    a.data = v.data;
    a.inner = a.shift = 0;
    if (a.number) continue;
    const std::int64_t size = size_of(v.dtype);
    if (v.strides[0] != 0) {
      if (v.strides[0] != size) return false;
      a.inner = 1;
      a.data += head * size;
      a.shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(a.data) % (vector * size));
      if (a.shift != 0 && (p.outer > 0 || vector * size != 16)) return false;
      a.data -= a.shift;
    }
    for (int d = 0; d < p.outer; ++d) {
      if (v.strides[d + 1] % size != 0 || (a.inner != 0 && v.strides[d + 1] % (vector * size) != 0))
        return false;
      a.strides[d] = static_cast<std::int32_t>(v.strides[d + 1] / size);
    }
    // Elements at their natural places, as single ones are read.
    if (reinterpret_cast<std::uintptr_t>(v.data) % size != 0) return false;
  }
  if (p.out.inner == 0) return false;
  p.head = static_cast<std::uint32_t>(head);
  p.groups = static_cast<std::uint32_t>((plan.numel - head) / vector);
  p.tail = static_cast<std::uint32_t>(head + std::int64_t{p.groups} * vector);
  p.edges = static_cast<std::uint32_t>(plan.numel - std::int64_t{p.groups} * vector);
  p.row = divider(std::max<std::int64_t>(plan.sizes[0] / vector, 1));
  for (int d = 0; d < p.outer; ++d) p.dims[d] = divider(plan.sizes[d + 1]);
  return p.groups > 0;
}

/// Launches F for operands of type S, the second of type B; whether it has.
template <class F, class S, class O, class T, class B = S>
bool launch_packs(const char* op, const PointwisePlan& plan,
                  const std::array<Number, kMaxScalars>& scalars, Stream stream) {
  using P = Packs<F, S, O, T, B>;
  PackParams<T> p{};
  if (!in_packs(plan, P::V, p)) return false;
  for (int i = 0; i < plan.inputs; ++i) p.numbers[i] = number_as<T>(plan.in[i].number);
  p.scalars = {{number_as<T>(scalars[0]), number_as<T>(scalars[1])}};
  const cuda::Launch shape{.op = op,
                           .grid = cuda::ceil_div(p.groups, kPackThreads * P::kPacks),
                           .block = kPackThreads,
                           .overlap = true};
  cuda::launch(pointwise_packs_kernel<F, S, O, T, B>, shape, stream, p);
  return true;
}

/// The type of all tensors, but for the condition of F and a boolean result; none: they differ.
template <class F>
std::optional<DType> common_type(const PointwisePlan& plan) {
  std::optional<DType> type;
  for (int i = 0; i < plan.inputs; ++i) {
    const PointwiseView& v = plan.in[i];
    if (!v.data) continue;
    if (kConditional<F> && i == 0) {
      if (v.dtype != DType::boolean) return std::nullopt;
    } else if (type && *type != v.dtype) {
      return std::nullopt;
    } else {
      type = v.dtype;
    }
  }
  return type;
}

/// One input of 16 bits, the other and the result of f32, as packs; whether that was possible.
template <class F>
bool try_mixed_packs(const char* op, const PointwisePlan& plan,
                     const std::array<Number, kMaxScalars>& scalars, Stream stream) {
  if (!plan.in[0].data || !plan.in[1].data || plan.out.dtype != DType::f32) return false;
  const auto typed = [&]<class S, class B>(S, B) {
    return launch_packs<F, S, float, float, B>(op, plan, scalars, stream);
  };
  const auto beside = [&](DType narrow, const auto& launch) {
    if (narrow == DType::f16) return launch(__half{});
    return narrow == DType::bf16 && launch(__nv_bfloat16{});
  };
  if (plan.in[1].dtype == DType::f32)
    return beside(plan.in[0].dtype, [&](auto narrow) { return typed(narrow, float{}); });
  if (plan.in[0].dtype == DType::f32)
    return beside(plan.in[1].dtype, [&](auto narrow) { return typed(float{}, narrow); });
  return false;
}

/// clamp between two numbers, as a function of one input.
struct ClampToNumbers {
  static constexpr int kInputs = 1;
  template <class T>
  static __device__ __forceinline__ T apply(T a, T, T, const Scalars<T>& s) {
    return math::min(math::max(a, s(0)), s(1));
  }
};

/// A part of a plan as packs, if that is possible; whether it was.
template <class F, class T>
bool try_packs(const char* op, const PointwisePlan& plan,
               const std::array<Number, kMaxScalars>& scalars, Stream stream) {
  if constexpr (std::is_same_v<F, functor::clamp>) {
    if (!plan.in[1].data && !plan.in[2].data) {
      PointwisePlan one = plan;
      one.inputs = 1;
      return try_packs<ClampToNumbers, T>(op, one, {plan.in[1].number, plan.in[2].number}, stream);
    }
  }
  const std::optional<DType> type = common_type<F>(plan);
  if constexpr (kMixes<F> && std::is_same_v<T, float>) {
    if (!type) return try_mixed_packs<F>(op, plan, scalars, stream);
  }
  if (!type) return false;
  if (plan.out.dtype != (kTruth<F> ? DType::boolean : *type)) return false;
  const auto typed = [&]<class S>(S) {
    using O = std::conditional_t<kTruth<F>, Bool, S>;
    return launch_packs<F, S, O, T>(op, plan, scalars, stream);
  };
  if constexpr (std::is_same_v<T, float>) {
    switch (*type) {
      case DType::f32:
        return typed(float{});
      case DType::f16:
        return typed(__half{});
      case DType::bf16:
        return typed(__nv_bfloat16{});
      default:
        return false;
    }
  } else {
    switch (*type) {
      case DType::i32:
        return typed(std::int32_t{});
      case DType::i64:
        return typed(std::int64_t{});
      default:
        return false;
    }
  }
}

/// Launches F in T for every part of a plan that 32 bits can number: in packs, if it can be.
template <class F, class T>
void launch_function(const char* op, const PointwisePlan& plan,
                     const std::array<Number, kMaxScalars>& scalars, Stream stream) {
  if (plan.path == PointwisePath::empty) return;
  split_plan(plan, [&](const PointwisePlan& part) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, std::int64_t>) {
      if (try_packs<F, T>(op, part, scalars, stream)) return;
    }
    launch_pointwise<F, T>(op, part, scalars, stream);
  });
}

}  // namespace fastkern::pointwise_detail
