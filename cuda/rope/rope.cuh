// SPDX-License-Identifier: Apache-2.0
// What the kernels of rope.h share: which columns of a head a thread owns, the heads of a tensor in
// packs, the angles of a token.
//
// A thread owns two packs of eight columns of a head, so that it has both columns of every pair:
//
//   lane l < turned      halves       columns 8 l + j and R/2 + 8 l + j
//                        interleaved  columns 8 l + j and 8 turned + 8 l + j       turned =
//                        ceil(R/16)
//   lanes after those    two packs of the columns from R on
//
// The same whatever the alignment: an operand that is not 16-byte aligned is read element by
// element into the same packs.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "fastkern/rope.h"
#include "launch.cuh"
#include "ptx/cluster.cuh"
#include "ptx/memory.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda::rope_detail {

constexpr int kColumns = 8;  // of a pack

/// Division by a number that the host knows, for dividends below 2^31.
struct Divider {
  std::uint32_t divisor = 1, multiplier = 1u << 31;
  int shift = 31;

  __device__ __forceinline__ std::uint32_t operator()(std::uint32_t n,
                                                      std::uint32_t& remainder) const {
    const auto quotient =
        static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) * multiplier >> shift);
    remainder = n - quotient * divisor;
    return quotient;
  }
};

inline Divider divider(std::int64_t divisor) {
  Divider d;
  if (divisor <= 1) return d;
  d.divisor = static_cast<std::uint32_t>(divisor);
  d.shift = 31 + std::bit_width(d.divisor - 1);
  d.multiplier =
      static_cast<std::uint32_t>(((std::uint64_t{1} << d.shift) + d.divisor - 1) / d.divisor);
  return d;
}

// ---- columns ----------------------------------------------------------------------------------

struct Split {
  int n, half;               // D and R/2
  int turned, lanes, apart;  // lanes of the first R columns, and all; between the packs of the rest
  int second;                // first column of the second packs of the first R
};

inline Split split_of(std::int64_t n, const RopeAngles& angles, bool with_rest) {
  Split s{};
  s.n = static_cast<int>(n);
  s.half = static_cast<int>(angles.rotary_dim / 2);
  s.turned = (s.half + kColumns - 1) / kColumns;
  const int rest = with_rest ? s.n - 2 * s.half : 0, of_rest = (rest + 15) / 16;
  s.lanes = s.turned + of_rest;
  s.apart = kColumns * of_rest;
  s.second = angles.interleaved ? kColumns * s.turned : s.half;
  return s;
}

/// Whether columns begin and end where packs do.
inline bool in_packs(const Split& s) {
  return s.half % kColumns == 0 && (s.n - 2 * s.half) % kColumns == 0;
}

/// A thread's columns of a head: two packs, of which those before their end are there.
struct Columns {
  int a = 0, a_end = 0, b = 0, b_end = 0;
  bool turned = false;

  template <bool kInterleaved>
  static __device__ __forceinline__ Columns of(const Split& s, int lane) {
    Columns c;
    c.turned = lane < s.turned;
    if (c.turned) {
      c.a = kColumns * lane;
      c.a_end = kInterleaved ? min(s.second, 2 * s.half) : s.half;
      c.b = s.second + c.a;
      c.b_end = 2 * s.half;
    } else if (lane < s.lanes) {
      c.a = 2 * s.half + kColumns * (lane - s.turned);
      c.a_end = min(2 * s.half + s.apart, s.n);
      c.b = c.a + s.apart;
      c.b_end = s.n;
    }
    return c;
  }
};

// ---- heads ------------------------------------------------------------------------------------

/// Eight columns as they are stored.
template <class T>
struct Eight {
  uint4 bits[sizeof(T) / 2];
};

template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& from, float (&out)[kColumns]) {
  constexpr int kV = tile::kVector<T>;
#pragma unroll
  for (int i = 0; i < kColumns / kV; ++i) {
    float v[kV];
    tile::unpack(tile::Pack<T>{from.bits[i]}, v);
#pragma unroll
    for (int j = 0; j < kV; ++j) out[i * kV + j] = v[j];
  }
}

template <class T>
__device__ __forceinline__ Eight<T> pack(const float (&v)[kColumns]) {
  constexpr int kV = tile::kVector<T>;
  Eight<T> to;
#pragma unroll
  for (int i = 0; i < kColumns / kV; ++i) {
    float part[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) part[j] = v[i * kV + j];
    to.bits[i] = tile::pack_of<T>(part).bits;
  }
  return to;
}

/// See tile::keep_packed.
template <class T>
__device__ __forceinline__ void keep_packed(Eight<T>& eight) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
    tile::Pack<T> pack{eight.bits[i]};
    tile::keep_packed(pack);
    eight.bits[i] = pack.bits;
  }
}

/// Columns first to first + 7, those before `end`; zeros for others.
template <class T, bool kWhole>
__device__ __forceinline__ Eight<T> load(const char* head, int first, int end) {
  const T* const from = reinterpret_cast<const T*>(head) + first;
  if constexpr (kWhole) {
    Eight<T> to;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
      to.bits[i] = ptx::ld_global_nc_if(from + i * tile::kVector<T>, first < end);
    return to;
  } else {
    float v[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) v[j] = first + j < end ? tile::to_float(from[j]) : 0.0f;
    return pack<T>(v);
  }
}

template <class T, bool kWhole>
__device__ __forceinline__ void store(char* head, int first, int end, const Eight<T>& from) {
  T* const to = reinterpret_cast<T*>(head) + first;
  if constexpr (kWhole) {
    if (first >= end) return;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
      ptx::st_global(to + i * tile::kVector<T>, from.bits[i]);
  } else {
    float v[kColumns];
    unpack(from, v);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (first + j < end) to[j] = tile::from_float<T>(v[j]);
    }
  }
}

/// The heads of a tensor, (B, S, H, D); strides in bytes.
struct HeadsView {
  char* data = nullptr;
  std::int64_t batch = 0, token = 0, head = 0;
};

inline HeadsView heads_view(const TensorRef& t, const char* op, const char* argument) {
  if (!t.given()) return {};
  FK_CHECK(t.ndim == 4 && (t.sizes[3] <= 1 || t.strides[3] == 1), op, ": ", argument,
           " must be (B, S, H, D) with a dense last dimension, got shape ", t.shape());
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), size * t.strides[0], size * t.strides[1],
          size * t.strides[2]};
}

/// Whether all heads begin on 16 bytes.
inline bool whole(const TensorRef& t) {
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d < 3 && t.given(); ++d)
    aligned = aligned && (t.sizes[d] <= 1 || t.strides[d] * size_of(t.dtype) % 16 == 0);
  return aligned || !t.given();
}

/// Of two tensors the one that is worked on, by value: an index into parameters would make a copy
/// of them in local memory.
__device__ __forceinline__ HeadsView pick(bool second, const HeadsView& a, const HeadsView& b) {
  return {second ? b.data : a.data, second ? b.batch : a.batch, second ? b.token : a.token,
          second ? b.head : a.head};
}

// ---- angles -----------------------------------------------------------------------------------

struct AnglesView {
  const char *cos, *sin;
  std::int64_t cos_batch, cos_row, sin_batch, sin_row;  // bytes
  std::int64_t rows;
  DType dtype;
  bool whole, per_token, narrow;
  float sign;  // of sin
  int step;    // between the numbers of two pairs
  const void* positions;
  std::int64_t position_batch, position_step;  // elements
  const std::int32_t* cu_seqlens;
  int sequences;
};

inline AnglesView angles_view(const RopeAngles& a, std::int64_t tokens, const char* op) {
  AnglesView v{};
  const int last = a.cos.ndim - 1;
  FK_CHECK((a.cos.ndim == 2 || a.cos.ndim == 3) && a.sin.ndim == a.cos.ndim, op,
           ": cos must have two or three dimensions, got shape ", a.cos.shape());
  v.per_token = a.cos.ndim == 3;
  const std::int64_t size = size_of(a.cos.dtype);
  v.cos = static_cast<const char*>(a.cos.data), v.sin = static_cast<const char*>(a.sin.data);
  v.cos_row = size * a.cos.strides[last - 1], v.sin_row = size * a.sin.strides[last - 1];
  if (v.per_token && a.cos.sizes[0] > 1)
    v.cos_batch = size * a.cos.strides[0], v.sin_batch = size * a.sin.strides[0];
  v.rows = v.per_token ? tokens : a.cos.sizes[0];
  v.dtype = a.cos.dtype;
  v.narrow = a.narrow;
  v.sign = a.inverse ? -1.0f : 1.0f;
  v.step = a.interleaved && a.cos.sizes[last] != a.rotary_dim / 2 ? 2 : 1;
  v.whole =
      v.step == 1 &&
      (reinterpret_cast<std::uintptr_t>(a.cos.data) | reinterpret_cast<std::uintptr_t>(a.sin.data) |
       static_cast<std::uintptr_t>(v.cos_row | v.sin_row | v.cos_batch | v.sin_batch)) %
              16 ==
          0;
  v.positions = a.positions;
  v.position_batch = a.positions_batch_stride, v.position_step = a.positions_stride;
  v.cu_seqlens = a.cu_seqlens;
  v.sequences = static_cast<int>(a.sequences);
  return v;
}

constexpr std::int64_t kNoSequence = -1;  // for a row of the table: the token stays as it is
constexpr std::int64_t kNoRow = -2;       // there is none

/// The table's row for a token.
__device__ __forceinline__ std::int64_t row_of(const AnglesView& v, std::uint32_t b,
                                               std::uint32_t s) {
  std::int64_t row = s;
  if (v.positions) {
    const std::int64_t at = b * v.position_batch + s * v.position_step;
    row = v.narrow ? static_cast<const std::int32_t*>(v.positions)[at]
                   : static_cast<const std::int64_t*>(v.positions)[at];
  } else if (v.cu_seqlens) {
    int first = 0, count = v.sequences + 1;  // the first bound above s
    while (count > 0) {
      const int half = count / 2;
      const bool above = v.cu_seqlens[first + half] > static_cast<std::int64_t>(s);
      first = above ? first : first + half + 1;
      count = above ? half : count - half - 1;
    }
    if (first == 0 || first > v.sequences) return kNoSequence;
    row = static_cast<std::int64_t>(s) - v.cu_seqlens[first - 1];
  }
  return row >= 0 && row < v.rows ? row : kNoRow;
}

/// kCount numbers of a row of a table from number `first` on, those below `half`.
template <int kCount>
__device__ __forceinline__ void load_numbers(const AnglesView& v, const char* row, int first,
                                             int half, float (&out)[kCount]) {
  if (v.dtype == DType::f32) {
    const float* const from = reinterpret_cast<const float*>(row) + first * v.step;
    if (v.whole && first + kCount <= half) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 bits = ptx::ld_global_nc(from + i);
        out[i] = __uint_as_float(bits.x), out[i + 1] = __uint_as_float(bits.y);
        out[i + 2] = __uint_as_float(bits.z), out[i + 3] = __uint_as_float(bits.w);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = first + i < half ? from[i * v.step] : 0.0f;
    return;
  }
  const std::uint16_t* const from = reinterpret_cast<const std::uint16_t*>(row) + first * v.step;
  std::uint32_t words[kCount / 2];
  if (v.whole && first + kCount <= half) {
    if constexpr (kCount == 8) {
      const uint4 bits = ptx::ld_global_nc(from);
      words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    } else {
      const uint2 bits = ptx::ld_global_nc_8_if(from, true);
      words[0] = bits.x, words[1] = bits.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const std::uint32_t low = first + i < half ? from[i * v.step] : 0u;
      const std::uint32_t high = first + i + 1 < half ? from[(i + 1) * v.step] : 0u;
      words[i / 2] = low | high << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const float2 pair = v.dtype == DType::f16 ? tile::unpack_pair(words[i / 2], __half{})
                                              : tile::unpack_pair(words[i / 2], __nv_bfloat16{});
    out[i] = pair.x, out[i + 1] = pair.y;
  }
}

/// cos and sin of a thread's eight pairs: of interleaved ones four in each pack.
template <bool kInterleaved>
struct Turn {
  float cos[kColumns], sin[kColumns];

  __device__ __forceinline__ void ask(const AnglesView& v, std::uint32_t b, std::int64_t row,
                                      const Columns& c, int half) {
    if (row == kNoRow) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) cos[i] = sin[i] = __uint_as_float(0x7fc00000u);
      return;
    }
    if (row == kNoSequence || !c.turned) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) cos[i] = 1.0f, sin[i] = 0.0f;
      return;
    }
    fill(v, v.cos + b * v.cos_batch + row * v.cos_row, c, half, cos);
    fill(v, v.sin + b * v.sin_batch + row * v.sin_row, c, half, sin);
  }
  /// Behind ask(), before apply(): waits for the numbers.
  __device__ __forceinline__ void settle(const AnglesView& v) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sin[i] *= v.sign;
  }
  __device__ __forceinline__ void load(const AnglesView& v, std::uint32_t b, std::int64_t row,
                                       const Columns& c, int half) {
    ask(v, b, row, c, half);
    settle(v);
  }

  /// Both packs turned. The products' order is written out: the instances of a kernel must agree.
  __device__ __forceinline__ void apply(float (&a)[kColumns], float (&b)[kColumns]) const {
    if constexpr (kInterleaved) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) {
        pair(a[2 * i], a[2 * i + 1], cos[i], sin[i]);
        pair(b[2 * i], b[2 * i + 1], cos[4 + i], sin[4 + i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) pair(a[i], b[i], cos[i], sin[i]);
    }
  }

 private:
  static __device__ __forceinline__ void pair(float& a, float& b, float c, float s) {
    const float turned = fmaf(a, c, -__fmul_rn(b, s));
    b = fmaf(b, c, __fmul_rn(a, s));
    a = turned;
  }
  static __device__ __forceinline__ void fill(const AnglesView& v, const char* row,
                                              const Columns& c, int half, float (&out)[kColumns]) {
    if constexpr (kInterleaved) {
      float first[4], second[4];
      load_numbers(v, row, c.a / 2, half, first);
      load_numbers(v, row, c.b / 2, half, second);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = first[i], out[4 + i] = second[i];
    } else {
      load_numbers(v, row, c.a, half, out);
    }
  }
};

/// f<T, kInterleaved, kWhole>() for a call.
template <class F>
void dispatch_heads(DType dtype, bool interleaved, bool whole, const F& f) {
  dispatch(dtype, [&]<class T>() {
    if (interleaved) {
      whole ? f.template operator()<T, true, true>() : f.template operator()<T, true, false>();
    } else {
      whole ? f.template operator()<T, false, true>() : f.template operator()<T, false, false>();
    }
  });
}

/// How many heads a thread has of one token in forward: eight packs of 16 bytes under way.
template <class T>
inline constexpr int kHeads = sizeof(T) == 2 ? 4 : 2;

/// Units, tokens or rows as 31-bit numbers, or an Error.
inline std::uint32_t counted(std::int64_t count, const char* op) {
  FK_CHECK(count >> 31 == 0, op, ": q and k have more elements than one launch can number, ", count,
           " units of work; split the call");
  return static_cast<std::uint32_t>(count);
}

}  // namespace fastkern::cuda::rope_detail
