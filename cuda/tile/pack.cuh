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

/// Rows of a tensor on the device. `whole`: every row may be accessed in packs.
template <class T>
struct RowView {
  T* data;
  std::int64_t outer_stride, inner_stride;
  std::uint32_t inner;  // rows under one outer stride; 0: all of them
  bool whole;

  __device__ __forceinline__ T* row(std::int64_t r) const {
    if (inner == 0) return data + r * inner_stride;
    const std::uint32_t r32 = static_cast<std::uint32_t>(r), outer = r32 / inner;
    return data + outer * outer_stride + (r32 - outer * inner) * inner_stride;
  }
};

template <class T>
RowView<T> row_view(const TensorRef& t, const Rows& rows, const char* op) {
  const bool one_level = rows.inner >= rows.count;
  FK_CHECK(
      one_level || rows.count >> 32 == 0, op, ": ", rows.count,
      " rows with two strides are more than 2^32; split the call or make the tensor contiguous");
  const auto aligned = [](std::int64_t stride) {
    return stride * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
  };
  return {.data = static_cast<T*>(t.data),
          .outer_stride = rows.outer_stride,
          .inner_stride = rows.inner_stride,
          .inner = one_level ? 0 : static_cast<std::uint32_t>(rows.inner),
          .whole = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && aligned(rows.length) &&
                   aligned(rows.inner_stride) && aligned(rows.outer_stride)};
}

/// A per-column vector (weight, bias) of any float type; ones when there is none.
struct ColumnView {
  const void* data;
  DType dtype;
  bool whole;

  /// kCount columns from `column` on, as f32; 0 beyond the end.
  template <int kCount, class Column>
  __device__ __forceinline__ void load(Column column, Column n, float (&out)[kCount]) const {
    if (!data) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = 1.0f;
      return;
    }
    switch (dtype) {
      case DType::f32:
        return load_as<float>(column, n, out);
      case DType::f16:
        return load_as<__half>(column, n, out);
      case DType::bf16:
        return load_as<__nv_bfloat16>(column, n, out);
    }
  }

 private:
  template <class W, int kCount, class Column>
  __device__ __forceinline__ void load_as(Column column, Column n, float (&out)[kCount]) const {
    const W* values = static_cast<const W*>(data) + column;
    if (whole && column + kCount <= n) {
      constexpr int kBytes = kCount * sizeof(W);
      if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += kVector<W>) {
          float part[kVector<W>];
          unpack(Pack<W>{ptx::ld_global_nc(values + i)}, part);
#pragma unroll
          for (int j = 0; j < kVector<W>; ++j) out[i + j] = part[j];
        }
      } else {
        struct alignas(kBytes) Part {
          W v[kCount];
        } part = *reinterpret_cast<const Part*>(values);
#pragma unroll
        for (int i = 0; i < kCount; ++i) out[i] = to_float(part.v[i]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = column + i < n ? to_float(values[i]) : 0.0f;
  }
};

inline ColumnView column_view(const TensorRef& t) {
  return {t.given() ? t.data : nullptr, t.dtype,
          reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0};
}

}  // namespace fastkern::tile
