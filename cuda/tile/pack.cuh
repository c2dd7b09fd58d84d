// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes of a row in registers, and the way in and out of memory.
//
// A thread owns the same columns whatever the alignment: an operand that is not 16-byte aligned is
// read element by element into the same pack. So the order of every sum, and with it every bit of
// the result, does not depend on strides or storage offsets.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fastkern/core.h"
#include "fastkern/rows.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory.cuh"

namespace fastkern::tile {

template <class T>
inline constexpr int kVector = 16 / sizeof(T);  // elements in a pack

/// Words, not elements: an array of 16-bit values would take a 32-bit register each.
template <class T>
struct Pack {
  uint4 bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

/// to[at] = v, rounded to the type of `to`.
__device__ __forceinline__ void store_as(void* to, DType dtype, std::int64_t at, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(to)[at] = v;
  } else if (dtype == DType::f16) {
    static_cast<__half*>(to)[at] = from_float<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(to)[at] = from_float<__nv_bfloat16>(v);
  }
}

/// Columns column to column + 3 of a dense vector of n, those within it; `column` is a multiple of
/// four.
__device__ __forceinline__ void store_as(void* to, DType dtype, std::int64_t column, std::int64_t n,
                                         const float4& v) {
  if (dtype == DType::f32 && n % 4 == 0 && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
    if (column < n) *reinterpret_cast<float4*>(static_cast<float*>(to) + column) = v;
    return;
  }
  const float values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (column + j < n) store_as(to, dtype, column + j, values[j]);
  }
}

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ float2 unpack_pair(std::uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack_pair(std::uint32_t word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float (&out)[kVector<T>]) {
  const std::uint32_t words[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack_pair(words[i], T{});
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

/// Rounds a pack's worth of floats; two 16-bit elements are one conversion instruction.
template <class T>
__device__ __forceinline__ Pack<T> pack_of(const float (&v)[kVector<T>]) {
  if constexpr (sizeof(T) == 4) {
    return {{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
             __float_as_uint(v[3])}};
  } else {
    return {{pack_pair(v[0], v[1], T{}), pack_pair(v[2], v[3], T{}), pack_pair(v[4], v[5], T{}),
             pack_pair(v[6], v[7], T{})}};
  }
}

/// Hides from the compiler that the pack is still what it was, so that floats made of it before are
/// not kept alive for a use after: twice the registers for 16-bit types. Costs no instruction. It
/// stops nvcc's optimiser; ptxas, which sees no asm, may still share them: read its report.
template <class T>
__device__ __forceinline__ void keep_packed(Pack<T>& pack) {
  asm volatile("" : "+r"(pack.bits.x), "+r"(pack.bits.y), "+r"(pack.bits.z), "+r"(pack.bits.w));
}

/// Columns [column, column + kVector) of a row of n; zero beyond its end. `whole`: the row's
/// address and length allow 16-byte accesses only.
template <class T, class Column>
__device__ __forceinline__ Pack<T> load(const T* row, Column column, Column n, bool whole) {
  if (whole) return {column < n ? ptx::ld_global_nc(row + column) : uint4{}};
  float v[kVector<T>];  // widening and rounding back changes no bit of a number
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) v[i] = column + i < n ? to_float(row[column + i]) : 0.0f;
  return pack_of<T>(v);
}

/// The same into shared memory, without waiting for it if the row is `whole`. For the calling
/// thread's own use, after cp_async_wait.
template <class T, class Column>
__device__ __forceinline__ void load_async(uint4* shared, const T* row, Column column, Column n,
                                           bool whole) {
  if (whole) {
    ptx::cp_async_16(shared, row + (column < n ? column : 0), column < n ? 16 : 0);
  } else {
    *shared = load(row, column, n, false).bits;
  }
}

template <class T, class Column>
__device__ __forceinline__ void store(T* row, Column column, Column n, bool whole,
                                      const Pack<T>& pack) {
  if (whole) {
    if (column < n) ptx::st_global(row + column, pack.bits);
    return;
  }
  float v[kVector<T>];
  unpack(pack, v);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (column + i < n) row[column + i] = from_float<T>(v[i]);
  }
}

/// The same value, of which the compiler does not know that it is: what is computed from it stays
/// where it is written, instead of in a register around a loop.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

/// The element type of a kernel that takes each operand in its own type: four columns at a time,
/// 16-bit elements in the first two words of their pack.
struct Mixed {};
template <>
inline constexpr int kVector<Mixed> = 4;

/// The type with as many elements in 16 bytes.
template <class T>
using Own = std::conditional_t<std::is_same_v<T, Mixed>, float, T>;

/// The columns of a thread, `index` of `threads` that share a row: the kPacks packs of a warp lie
/// side by side, those of a thread a warp apart. The offsets of a thread's packs are constants
/// where a warp has one row, and all of its packs lie within the row: `packed`.
template <class T, int kPacks>
struct ThreadColumns {
  static constexpr int kApart = 32 * kVector<T>;
  int first, step;
  bool packed;

  __device__ __forceinline__ ThreadColumns(int threads, int index, int n)
      : first(index / min(threads, 32) * kPacks * min(threads, 32) * kVector<T> +
              index % min(threads, 32) * kVector<T>),
        step(min(threads, 32) * kVector<T>),
        packed(threads >= 32 && first + (kPacks - 1) * kApart < n) {}
  /// The first column of pack i.
  __device__ __forceinline__ int operator()(int i) const { return first + i * step; }
};

/// `columns` is a ThreadColumns whose packs may be accessed at constant offsets.
template <class Columns>
__device__ __forceinline__ bool is_packed(const Columns& columns) {
  if constexpr (requires { columns.packed; }) {
    return columns.packed;
  } else {
    return false;
  }
}

/// Rows of a tensor on the device; a kernel of T takes operands of T, one of Mixed any. Whether
/// rows are accessed in packs is asked once for all packs of a thread: `column_of(i)` is the first
/// column of pack i. Columns beyond n read as zero and are not written.
template <class T>
struct RowView {
  char* data;                               // nullptr: not given
  std::int64_t outer_stride, inner_stride;  // bytes
  std::uint32_t inner;                      // rows under one outer stride; 0: all of them
  DType dtype;
  bool whole;  // every row may be accessed in packs

  template <bool kPlain = false>
  __device__ __forceinline__ char* row(std::int64_t r) const {
    if (kPlain || inner == 0) return data + r * inner_stride;
    const std::uint32_t r32 = static_cast<std::uint32_t>(r), outer = r32 / inner;
    return data + outer * outer_stride + (r32 - outer * inner) * inner_stride;
  }

  /// Rows follow one another at one stride and may be accessed in packs. Functions with kWhole or
  /// kPlain know it at compile time.
  __host__ __device__ __forceinline__ bool plain() const { return whole && inner == 0; }

  template <bool kWhole = false, int kPacks, class ColumnOf>
  __device__ __forceinline__ void load(const char* row, const ColumnOf& column_of, int n,
                                       Pack<T> (&out)[kPacks]) const {
    typed([&]<class S>(S) {
      const S* const from = reinterpret_cast<const S*>(row);
      if ((kWhole || whole) && n > 0 && is_packed(column_of)) {
        const S* const first = from + column_of(0);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) out[i].bits = load_whole(first + i * kApart, true);
      } else if (kWhole || whole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i)
          out[i].bits = load_whole(from + column_of(i), column_of(i) < n);
      } else if constexpr (!kWhole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) out[i].bits = load_each(from, opaque(column_of(i)), n);
      }
    });
  }

  /// The same into shared memory, without waiting for it if the rows are `whole`. For the calling
  /// thread's own use, after cp_async_wait; pack i goes to shared + i * step.
  template <int kPacks, bool kWhole = false, class ColumnOf>
  __device__ __forceinline__ void load_async(uint4* shared, int step, const char* row,
                                             const ColumnOf& column_of, int n) const {
    typed([&]<class S>(S) {
      const S* const from = reinterpret_cast<const S*>(row);
      if ((kWhole || whole) && n > 0 && is_packed(column_of)) {
        const S* const first = from + column_of(0);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) fetch_whole(shared + i * step, first + i * kApart, true);
      } else if (kWhole || whole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          const int column = opaque(column_of(i));
          const bool inside = column < n;
          fetch_whole(shared + i * step, from + (inside ? column : 0), inside);
        }
      } else if constexpr (!kWhole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          shared[i * step] = load_each(from, opaque(column_of(i)), n);
        }
      }
    });
  }

  __device__ __forceinline__ void unpack(const Pack<T>& pack, float (&out)[kVector<T>]) const {
    typed([&]<class S>(S) {
      if constexpr (kBytes<S> == 16) {
        tile::unpack(Pack<S>{pack.bits}, out);
      } else {
        const float2 low = unpack_pair(pack.bits.x, S{}), high = unpack_pair(pack.bits.y, S{});
        out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
      }
    });
  }

  /// Rounds to the type of the elements.
  __device__ __forceinline__ Pack<T> pack(const float (&v)[kVector<T>]) const {
    return typed([&]<class S>(S) -> Pack<T> {
      if constexpr (kBytes<S> == 16) {
        return {pack_of<S>(v).bits};
      } else {
        return {{pack_pair(v[0], v[1], S{}), pack_pair(v[2], v[3], S{}), 0, 0}};
      }
    });
  }

  template <bool kWhole = false, int kPacks, class ColumnOf>
  __device__ __forceinline__ void store(char* row, const ColumnOf& column_of, int n,
                                        const Pack<T> (&values)[kPacks]) const {
    typed([&]<class S>(S) {
      S* const to = reinterpret_cast<S*>(row);
      if ((kWhole || whole) && n > 0 && is_packed(column_of)) {
        S* const first = to + column_of(0);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) store_whole(first + i * kApart, values[i].bits);
      } else if (kWhole || whole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          const int column = opaque(column_of(i));
          if (column < n) store_whole(to + column, values[i].bits);
        }
      } else if constexpr (!kWhole) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          float v[kVector<T>];
          unpack(values[i], v);
          const int column = opaque(column_of(i));
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) {
            if (column + j < n) to[column + j] = from_float<S>(v[j]);
          }
        }
      }
    });
  }

 private:
  static constexpr int kApart = ThreadColumns<T, 1>::kApart;
  template <class S>
  static constexpr int kBytes = sizeof(S) * kVector<T>;

  /// f(S{}) with the type S of the elements.
  template <class F>
  __device__ __forceinline__ decltype(auto) typed(F&& f) const {
    if constexpr (std::is_same_v<T, Mixed>) {
      if (dtype == DType::f32) return f(float{});
      return dtype == DType::f16 ? f(__half{}) : f(__nv_bfloat16{});
    } else {
      return f(T{});
    }
  }

  template <class S>
  static __device__ __forceinline__ uint4 load_whole(const S* from, bool inside) {
    if constexpr (kBytes<S> == 16) {
      return ptx::ld_global_nc_if(from, inside);
    } else {
      const uint2 words = ptx::ld_global_nc_8_if(from, inside);
      return {words.x, words.y, 0, 0};
    }
  }

  template <class S>
  static __device__ __forceinline__ void fetch_whole(uint4* shared, const S* from, bool inside) {
    if constexpr (kBytes<S> == 16) {
      ptx::cp_async_16(shared, from, inside ? 16 : 0);
    } else {
      ptx::cp_async_8(shared, from, inside ? 8 : 0);
    }
  }

  template <class S>
  static __device__ __forceinline__ void store_whole(S* to, uint4 bits) {
    if constexpr (kBytes<S> == 16) {
      ptx::st_global(to, bits);
    } else {
      ptx::st_global_8(to, {bits.x, bits.y});
    }
  }

  template <class S>
  static __device__ __forceinline__ uint4 load_each(const S* from, int column, int n) {
    float v[kVector<T>];  // widening and rounding back changes no bit of a number
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) v[j] = column + j < n ? to_float(from[column + j]) : 0.0f;
    if constexpr (kBytes<S> == 16) {
      return pack_of<S>(v).bits;
    } else {
      return {pack_pair(v[0], v[1], S{}), pack_pair(v[2], v[3], S{}), 0, 0};
    }
  }
};

/// The rows a thread visits: `first`, then every `step` rows on. kPlain: the rows are plain().
template <class T, bool kPlain = false>
struct RowWalk {
  const RowView<T>& view;
  std::int64_t step;
  char* at;

  __device__ __forceinline__ RowWalk(const RowView<T>& rows, std::int64_t first, std::int64_t step_)
      : view(rows),
        step(!kPlain && rows.inner ? step_ : step_ * rows.inner_stride),
        at(rows.template row<kPlain>(first)) {}
  /// On to `row`, the next one.
  __device__ __forceinline__ void next(std::int64_t row) {
    if (kPlain || view.inner == 0) {
      at += step;
    } else {
      at = view.row(row);
    }
  }
};

/// The rows of `t` for a kernel of T; nothing if `t` is not given.
template <class T>
RowView<T> row_view(const TensorRef& t, const char* op, const char* argument) {
  if (!t.given()) return {};
  const Rows rows = rows_of(t, op, argument);
  const bool one_level = rows.inner >= rows.count;
  FK_CHECK(
      one_level || rows.count >> 32 == 0, op, ": ", rows.count,
      " rows with two strides are more than 2^32; split the call or make the tensor contiguous");
  const std::int64_t size = size_of(t.dtype), bytes = size * kVector<T>;
  const auto aligned = [&](std::int64_t elements) { return elements * size % bytes == 0; };
  return {.data = static_cast<char*>(t.data),
          .outer_stride = rows.outer_stride * size,
          .inner_stride = rows.inner_stride * size,
          .inner = one_level ? 0 : static_cast<std::uint32_t>(rows.inner),
          .dtype = t.dtype,
          .whole = reinterpret_cast<std::uintptr_t>(t.data) % bytes == 0 && aligned(rows.length) &&
                   aligned(rows.inner_stride) && aligned(rows.outer_stride)};
}

/// Per-column vectors (weight, bias) of any float type, one for each head.
struct ColumnView {
  const char* data;  // nullptr: not given
  DType dtype;
  bool whole;  // 16 bytes at a time

  /// Its columns from element `start` on.
  __device__ __forceinline__ ColumnView from(std::int64_t start) const {
    return {data ? data + start * (dtype == DType::f32 ? 4 : 2) : nullptr, dtype, whole};
  }

  /// kCount columns from `column` on of the vector that starts at element `start`, as f32;
  /// `missing` where none is given, 0 beyond the end.
  template <int kCount>
  __device__ __forceinline__ void load(std::int64_t start, std::int64_t column, std::int64_t n,
                                       float missing, float (&out)[kCount]) const {
    if (!data) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = missing;
      return;
    }
    if (dtype == DType::f32) return load_as<float>(start, column, n, out);
    if (dtype == DType::f16) return load_as<__half>(start, column, n, out);
    load_as<__nv_bfloat16>(start, column, n, out);
  }

 private:
  template <class W, int kCount>
  __device__ __forceinline__ void load_as(std::int64_t start, std::int64_t column, std::int64_t n,
                                          float (&out)[kCount]) const {
    const W* values = reinterpret_cast<const W*>(data) + start + column;
    if constexpr (kCount * sizeof(W) % 16 == 0) {
      if (whole && column + kCount <= n) {
#pragma unroll
        for (int i = 0; i < kCount; i += kVector<W>) {
          float part[kVector<W>];
          tile::unpack(Pack<W>{ptx::ld_global_nc(values + i)}, part);
#pragma unroll
          for (int j = 0; j < kVector<W>; ++j) out[i + j] = part[j];
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = column + i < n ? to_float(values[i]) : 0.0f;
  }
};

/// Vectors of length n, dense.
inline ColumnView column_view(const TensorRef& t, std::int64_t n) {
  if (!t.given()) return {};
  return {static_cast<const char*>(t.data), t.dtype,
          reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && n * size_of(t.dtype) % 16 == 0};
}

/// The columns of one pack of T in a vector of W, as words: what a thread keeps until it needs
/// them.
template <class T, class W>
struct ColumnPack {
  static constexpr int kParts = kVector<T> / kVector<W>;
  static_assert(kParts >= 1);
  Pack<W> part[kParts];

  /// kInside: the pack lies within the vector.
  template <bool kInside = false>
  __device__ __forceinline__ void load(const ColumnView& view, std::int64_t start, int column,
                                       int n) {
    const W* const from = reinterpret_cast<const W*>(view.data) + start;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int at = column + i * kVector<W>;
      part[i].bits =
          kInside ? ptx::ld_global_nc(from + at) : ptx::ld_global_nc_if(from + at, at < n);
    }
  }
  __device__ __forceinline__ void unpack(float (&out)[kVector<T>]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float v[kVector<W>];
      tile::unpack(part[i], v);
#pragma unroll
      for (int j = 0; j < kVector<W>; ++j) out[i * kVector<W> + j] = v[j];
    }
  }
};

}  // namespace fastkern::tile
