// SPDX-License-Identifier: Apache-2.0
// What a thread of the pointwise kernel has: groups of elements that follow one another in the
// result, or single elements; where they are in each operand, their way in, the formula, their way
// out. The card is that of pointwise_kernel.cuh.
#pragma once

#include <cstdint>

#include "fastkern/pointwise_layout.h"
#include "pointwise_brief.cuh"
#include "pointwise_words.cuh"

namespace fastkern::pointwise_detail {

/// Functions that take long: fewer elements a thread, for code that fits the instruction cache.
template <class F>
inline constexpr bool kLong =
    std::is_same_v<F, functor::pow> || std::is_same_v<F, functor::sin> ||
    std::is_same_v<F, functor::cos> || std::is_same_v<F, functor::div_floor>;

template <class F, class T>
struct Shape {
  static constexpr bool kIsLong =
      kLong<F> || (std::is_same_v<T, double> && (F::kTypes & kInt) == 0);
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kGroups = kIsLong ? 1 : F::kInputs == 1 ? 4 : 2;
  static constexpr int kElements = kIsLong || sizeof(T) == 16 ? 1 : 2;
  // Blocks of a multiprocessor, which limits registers.
  static constexpr int kBlocks = F::kInputs == 3 || kIsLong ? 4 : F::kInputs == 1 ? 5 : 6;
  static constexpr bool kStages = !kIsLong && F::kInputs < 3 && sizeof(T) < 16;
  static constexpr PointwiseShape value() {
    return {.vector = kVector,
            .groups = kGroups,
            .elements = kElements,
            .compute_size = static_cast<int>(sizeof(T)),
            .inputs = GroupTypes<T>::kIn,
            .outputs = GroupTypes<T>::kOut,
            .stages = kStages};
  }
};

template <class T>
struct Params {
  PointwiseLayout layout;
  T numbers[kMaxInputs];
  Scalars<T> scalars;
  std::uint32_t group_blocks;
};

/// Element `at` of an operand, from its first one; may be negative.
template <int kSize, class Byte>
__device__ __forceinline__ Byte* place(Byte* data, std::uint32_t at) {
  return data + static_cast<std::int64_t>(static_cast<std::int32_t>(at)) * kSize;
}
__device__ __forceinline__ const char* place(const PointwiseAccess& a, std::uint32_t at) {
  return a.data + (static_cast<std::int64_t>(static_cast<std::int32_t>(at)) << a.log_size);
}

/// K groups of the result and of the inputs.
template <class F, class T, int K>
struct Groups {
  static constexpr int kIn = F::kInputs, N = Shape<F, T>::kVector;
  std::uint32_t out[K], in[kIn][K];  // from the first element
  std::uint32_t index[K];            // of the first element; where they are flat
  bool inside[K];
  Words<T, N> words[kIn][K];

  __device__ __forceinline__ void locate(const PointwiseLayout& p) {
    std::uint32_t rest[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const std::uint32_t block = blockIdx.x * (kPointwiseThreads * K);
      rest[k] = p.paired ? block + k / 2 * (2 * kPointwiseThreads) + 2 * threadIdx.x + k % 2
                         : block + k * kPointwiseThreads + threadIdx.x;
      inside[k] = rest[k] < p.groups;
      index[k] = p.head + rest[k] * N;
      out[k] = p.head;  // where it is not 0, groups have one dimension
#pragma unroll
      for (int i = 0; i < kIn; ++i) in[i][k] = p.head * (p.in[i].group_stride / N);
    }
    std::uint32_t out_stride = p.out.group_stride, in_stride[kIn];
#pragma unroll
    for (int i = 0; i < kIn; ++i) in_stride[i] = p.in[i].group_stride;
    const int last = p.flat ? 0 : p.ndim - 1;
#pragma unroll 1
    for (int d = 0; d < last; ++d) {
      const Divider by = d == 0 ? p.inner_groups : p.dims[d];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const std::uint32_t next = divide(rest[k], by), at = rest[k] - next * by.size;
        out[k] += at * out_stride;
#pragma unroll
        for (int i = 0; i < kIn; ++i) in[i][k] += at * in_stride[i];
        rest[k] = next;
      }
      out_stride = p.out.strides[d + 1];
#pragma unroll
      for (int i = 0; i < kIn; ++i) in_stride[i] = p.in[i].strides[d + 1];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      out[k] += rest[k] * out_stride;
#pragma unroll
      for (int i = 0; i < kIn; ++i) in[i][k] += rest[k] * in_stride[i];
    }
  }

  template <int kSize>
  __device__ __forceinline__ void load_packs(int i, const char* p, bool paired) {
    if constexpr (kSize * 2 == sizeof(T) && K % 2 == 0) {
      if (paired) {
#pragma unroll
        for (int k = 0; k < K; k += 2) {
          if (!inside[k]) continue;
          Words<std::uint32_t, 4> both;
          load_pack<16>(place<kSize>(p, in[i][k]), both);
          words[i][k].w[0] = both.w[0], words[i][k].w[1] = both.w[1];
          words[i][k + 1].w[0] = both.w[2], words[i][k + 1].w[1] = both.w[3];
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (inside[k]) load_pack<kSize * N>(place<kSize>(p, in[i][k]), words[i][k]);
  }

  /// Where the elements of group k are in an operand that has its own order.
  __device__ __forceinline__ void gather(const PointwiseLayout& p, const PointwiseAccess& a, int k,
                                         std::uint32_t (&at)[N]) const {
    std::uint32_t rest[N];
#pragma unroll
    for (int n = 0; n < N; ++n) rest[n] = index[k] + n, at[n] = 0;
#pragma unroll 1
    for (int d = 0; d < p.ndim; ++d) {
      const Divider by = p.dims[d];
      const std::uint32_t stride = a.strides[d];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const std::uint32_t next = divide(rest[n], by);
        at[n] += (rest[n] - next * by.size) * stride;
        rest[n] = next;
      }
    }
  }

  /// Elements one by one, each in a word (or two) of its own; then together as a pack has them.
  __device__ __forceinline__ void load_each(const PointwiseLayout& p, int i,
                                            const PointwiseAccess& a) {
    constexpr int kWordsOfOne = sizeof(T) / 4;
    const bool repeated = a.access == Access::repeated;
    const std::uint32_t stride = p.flat && p.ndim > 1 ? 1 : a.strides[0];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!inside[k]) continue;
      std::uint32_t at[N];
#pragma unroll
      for (int n = 0; n < N; ++n) at[n] = in[i][k] + n * stride;
      if (a.access == Access::gathered) gather(p, a, k, at);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n > 0 && repeated) continue;
        std::uint32_t* const to = &words[i][k].w[n * kWordsOfOne];
        const char* const from = place(a, at[n]);
        to[0] = load_word(from);
        if constexpr (kWordsOfOne == 2) {
          if (a.log_size == 3) to[1] = ptx::ld_global_4(from + 4);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      std::uint32_t (&w)[kWords<T, N>] = words[i][k].w;
      if (a.log_size == 0) {
        std::uint32_t together = w[0] & 0xffu;
#pragma unroll
        for (int n = 1; n < N; ++n) together |= (w[n * kWordsOfOne] & 0xffu) << (8 * n);
        w[0] = together;
      } else if (a.log_size == 1) {
#pragma unroll
        for (int n = 0; n < N; n += 2)
          w[n / 2] = (w[n * kWordsOfOne] & 0xffffu) | w[(n + 1) * kWordsOfOne] << 16;
      } else if (a.log_size == 2 && kWordsOfOne == 2) {
        w[1] = w[2];
      }
    }
  }

  __device__ __forceinline__ void load(const PointwiseLayout& p, int i) {
    const PointwiseAccess& a = p.in[i];
    if (a.access == Access::number) return;
    if (a.access != Access::packs) return load_each(p, i, a);
    if (a.log_size == 0) return load_packs<1>(i, a.data, p.paired);
    if constexpr (sizeof(T) == 4) {
      if (a.log_size == 1) return load_packs<2>(i, a.data, p.paired);
    }
    if (a.log_size == 2) return load_packs<4>(i, a.data, p.paired);
    if constexpr (sizeof(T) == 8) {
      if (a.log_size == 3) return load_packs<8>(i, a.data, p.paired);
    }
  }

  /// Input i becomes T, from the words of memory.
  __device__ __forceinline__ void convert(const Params<T>& params, int i) {
    const PointwiseAccess& a = params.layout.in[i];
    if (a.access == Access::number) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int n = 0; n < N; ++n) put(words[i][k], n, params.numbers[i]);
      }
      return;
    }
    with_type<GroupTypes<T>::kIn>(a.dtype, [&]<class S>(S) {
#pragma unroll
      for (int k = 0; k < K; ++k) widen<S>(words[i][k]);
    });
    if (a.access == Access::repeated) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int n = 1; n < N; ++n) put(words[i][k], n, element<T>(words[i][k], 0));
      }
    }
  }

  /// The result takes the place of the first input.
  __device__ __forceinline__ void evaluate(const Params<T>& params) {
    if constexpr (kHasSomeBrief<F> && std::is_same_v<T, float>) {
      if (is_brief<F>(params.layout.out.dtype)) {
#pragma unroll
        for (int k = 0; k < K; ++k) apply_brief<F, N>(words[0][k]);
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const T a = element<T>(words[0][k], n);
        const T b = kIn > 1 ? element<T>(words[kIn > 1 ? 1 : 0][k], n) : a;
        const T c = kIn > 2 ? element<T>(words[kIn > 2 ? 2 : 0][k], n) : a;
        put(words[0][k], n, F::template apply<T>(a, b, c, params.scalars));
      }
    }
  }

  __device__ __forceinline__ void run(const Params<T>& params) {
#pragma unroll
    for (int i = 0; i < kIn; ++i) load(params.layout, i);
#pragma unroll
    for (int i = 0; i < kIn; ++i) convert(params, i);
    evaluate(params);
    store(params.layout);
  }

  __device__ __forceinline__ void store(const PointwiseLayout& p) {
    char* const to = p.out.data;
    with_type<GroupTypes<T>::kOut>(p.out.dtype, [&]<class S>(S) {
#pragma unroll
      for (int k = 0; k < K; ++k) narrow<S>(words[0][k]);
      if constexpr (sizeof(S) * 2 == sizeof(T) && K % 2 == 0) {
        if (p.paired) {
#pragma unroll
          for (int k = 0; k < K; k += 2) {
            const Words<std::uint32_t, 4> both{
                {words[0][k].w[0], words[0][k].w[1], words[0][k + 1].w[0], words[0][k + 1].w[1]}};
            if (inside[k]) store_pack<16>(place<sizeof(S)>(to, out[k]), both);
          }
          return;
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (inside[k]) store_pack<N * sizeof(S)>(place<sizeof(S)>(to, out[k]), words[0][k]);
    });
  }
};

/// K single elements, of any type.
template <class F, class T, int K>
struct Singles {
  static constexpr int kIn = F::kInputs;
  using Raw = Words<std::uint32_t, kIsComplex<T> ? 4 : 2>;
  std::uint32_t out[K], in[kIn][K];  // from the first element
  bool inside[K];
  Raw words[kIn][K];

  __device__ __forceinline__ void locate(const Params<T>& params) {
    const PointwiseLayout& p = params.layout;
    const std::uint32_t block = (blockIdx.x - params.group_blocks) * (kPointwiseThreads * K);
    std::uint32_t rest[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const std::uint32_t e = block + k * kPointwiseThreads + threadIdx.x;
      rest[k] = e < p.head ? e : e - p.head + p.tail;
      inside[k] = e < p.elements;
      out[k] = 0;
#pragma unroll
      for (int i = 0; i < kIn; ++i) in[i][k] = 0;
    }
#pragma unroll 1
    for (int d = 0; d < p.ndim; ++d) {
      const Divider by = p.dims[d];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const std::uint32_t next = divide(rest[k], by), at = rest[k] - next * by.size;
        out[k] += at * p.out.strides[d];
#pragma unroll
        for (int i = 0; i < kIn; ++i) in[i][k] += at * p.in[i].strides[d];
        rest[k] = next;
      }
    }
  }

  __device__ __forceinline__ void load(const PointwiseLayout& p, int i) {
    const PointwiseAccess& a = p.in[i];
    if (a.access == Access::number || a.access == Access::staged) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!inside[k]) continue;
      const char* const at = place(a, in[i][k]);
      words[i][k].w[0] = load_word(at);
      if (a.log_size >= 3) words[i][k].w[1] = ptx::ld_global_4(at + 4);
      if constexpr (kIsComplex<T>) {
        if (a.log_size == 4) {
          words[i][k].w[2] = ptx::ld_global_4(at + 8);
          words[i][k].w[3] = ptx::ld_global_4(at + 12);
        }
      }
    }
  }

  __device__ __forceinline__ void convert(const Params<T>& params, int i, T (&to)[K]) {
    const PointwiseAccess& a = params.layout.in[i];
    if (a.access == Access::number) {
#pragma unroll
      for (int k = 0; k < K; ++k) to[k] = params.numbers[i];
      return;
    }
    with_type<kReadable<T>>(a.dtype, [&]<class S>(S) {
#pragma unroll
      for (int k = 0; k < K; ++k) to[k] = to_compute<T>(element<S>(words[i][k], 0));
    });
  }

  __device__ __forceinline__ void run(const Params<T>& params) {
#pragma unroll
    for (int i = 0; i < kIn; ++i) load(params.layout, i);
    T values[3][K] = {};
#pragma unroll
    for (int i = 0; i < kIn; ++i) convert(params, i, values[i]);
    evaluate(params, values);
    store(params.layout, values[0]);
  }

  __device__ __forceinline__ void evaluate(const Params<T>& params, T (&values)[3][K]) {
    if constexpr (kHasSomeBrief<F> && std::is_same_v<T, float>) {
      if (is_brief<F>(params.layout.out.dtype)) return apply_brief<F>(values[0]);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[0][k] = F::template apply<T>(values[0][k], values[1][k], values[2][k], params.scalars);
    }
  }

  __device__ __forceinline__ void store(const PointwiseLayout& p, const T (&values)[K]) {
    with_type<kWritable<T>>(p.out.dtype, [&]<class S>(S) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (inside[k])
          *reinterpret_cast<S*>(place<sizeof(S)>(p.out.data, out[k])) = to_stored<S>(values[k]);
      }
    });
  }
};

}  // namespace fastkern::pointwise_detail
