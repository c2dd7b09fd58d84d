// SPDX-License-Identifier: Apache-2.0
// What the kernels of rope.h share: the angles of a token, the heads of a tensor, turning a head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fastkern/rope.h"
#include "rowwise.h"

namespace fastkern::cpu::rope_detail {

/// A tensor of heads, (B, S, H, D).
struct Heads {
  Heads(const TensorRef& t, const char* op, const char* argument) : ref(t) {
    if (!t.given()) return;
    FK_CHECK(t.ndim == 4 && (t.sizes[3] <= 1 || t.strides[3] == 1), op, ": ", argument,
             " must be (B, S, H, D) with a dense last dimension, got shape ", t.shape());
  }

  TensorRef ref;

  bool given() const { return ref.given(); }
  std::int64_t heads() const { return ref.given() ? ref.sizes[2] : 0; }
  template <class T>
  FASTKERN_INLINE T* head(std::int64_t b, std::int64_t s, std::int64_t h) const {
    return static_cast<T*>(ref.data) + b * ref.strides[0] + s * ref.strides[1] + h * ref.strides[2];
  }
};

/// The angles of the tokens of a (B, S, ...).
class Angles {
 public:
  /// Looks at all positions: an Error if the table has no row for one.
  Angles(const RopeAngles& a, const char* op, std::int64_t batch, std::int64_t tokens)
      : a_(a),
        half_(a.rotary_dim / 2),
        per_token_(a.cos.ndim == 3),
        rows_(per_token_ ? tokens : a.cos.sizes[0]),
        step_(a.cos.sizes[a.cos.ndim - 1] == half_ || !a.interleaved ? 1 : 2) {
    const std::int64_t batches = a.positions && a.positions_batch_stride == 0 ? 1 : batch;
    const char* const culprit = a.positions ? "positions" : a.cu_seqlens ? "cu_seqlens" : "cos";
    for (std::int64_t b = 0; b < batches; ++b) {
      if (!a.positions && !a.cu_seqlens) {
        FK_CHECK(tokens <= rows_, op, ": cos must have a row for each of ", tokens,
                 " positions, got ", rows_);
        break;
      }
      for (std::int64_t s = 0; s < tokens; ++s) {
        const std::int64_t at = position(b, s);
        FK_CHECK((at >= 0 && at < rows_) || (at == kNone && !a.positions), op, ": ", culprit,
                 " must give positions between 0 and ", rows_ - 1, ", for which cos has rows; got ",
                 at, " for token ", s);
      }
    }
  }

  std::int64_t half() const { return half_; }

  /// cos and sin of the R/2 pairs of a token in f32; false if the token stays as it is.
  bool load(std::int64_t b, std::int64_t s, float* cos, float* sin) const {
    const std::int64_t row = per_token_ ? s : position(b, s);
    if (row == kNone) return false;
    load(a_.cos, b, row, 1.0f, cos);
    load(a_.sin, b, row, a_.inverse ? -1.0f : 1.0f, sin);
    return true;
  }

 private:
  static constexpr std::int64_t kNone = -1;  // the position of a token of no sequence

  std::int64_t position(std::int64_t b, std::int64_t s) const {
    if (a_.positions) {
      const std::int64_t at = b * a_.positions_batch_stride + s * a_.positions_stride;
      return a_.narrow ? static_cast<const std::int32_t*>(a_.positions)[at]
                       : static_cast<const std::int64_t*>(a_.positions)[at];
    }
    if (!a_.cu_seqlens) return s;
    const std::int32_t* const end = a_.cu_seqlens + a_.sequences + 1;
    const std::int32_t* const next = std::upper_bound(a_.cu_seqlens, end, s);
    return next == a_.cu_seqlens || next == end ? kNone : s - next[-1];
  }

  void load(const TensorRef& table, std::int64_t b, std::int64_t row, float sign,
            float* out) const {
    dispatch(table.dtype, [&]<class T>() {
      const std::int64_t start =
          per_token_ ? (table.sizes[0] > 1 ? b * table.strides[0] : 0) + row * table.strides[1]
                     : row * table.strides[0];
      const T* const in = static_cast<const T*>(table.data) + start;
      const std::int64_t step = step_;
      for_columns(half_, [=](std::int64_t i) __attribute__((always_inline)) {
        out[i] = sign * to_float(in[i * step]);
      });
    });
  }

  RopeAngles a_;
  std::int64_t half_;
  bool per_token_;
  std::int64_t rows_;
  std::int64_t step_;
};

/// Pair i of a head; of 16-bit elements that lie side by side, as one word.
template <bool kInterleaved, class T>
FASTKERN_INLINE void load_pair(const T* in, std::int64_t i, std::int64_t half, float& a, float& b) {
  if constexpr (kInterleaved && sizeof(T) == 2) {
    std::uint32_t word;
    std::memcpy(&word, in + 2 * i, 4);
    a = to_float(T{static_cast<std::uint16_t>(word)});
    b = to_float(T{static_cast<std::uint16_t>(word >> 16)});
  } else {
    a = to_float(in[kInterleaved ? 2 * i : i]);
    b = to_float(in[kInterleaved ? 2 * i + 1 : half + i]);
  }
}
template <bool kInterleaved, class T>
FASTKERN_INLINE void store_pair(T* out, std::int64_t i, std::int64_t half, float a, float b) {
  if constexpr (kInterleaved && sizeof(T) == 2) {
    const std::uint32_t word = static_cast<std::uint32_t>(from_float<T>(a).bits) |
                               static_cast<std::uint32_t>(from_float<T>(b).bits) << 16;
    std::memcpy(out + 2 * i, &word, 4);
  } else {
    out[kInterleaved ? 2 * i : i] = from_float<T>(a);
    out[kInterleaved ? 2 * i + 1 : half + i] = from_float<T>(b);
  }
}

/// The pairs of a head turned; `out` may be `in`.
template <bool kInterleaved, class In, class Out>
FASTKERN_INLINE void turn(const In* in, Out* out, const float* cos, const float* sin,
                          std::int64_t half) {
  columns(half, [=](std::int64_t i) __attribute__((always_inline)) {
    float a, b;
    load_pair<kInterleaved>(in, i, half, a, b);
    const float c = cos[i], s = sin[i];
    store_pair<kInterleaved>(out, i, half, a * c - b * s, b * c + a * s);
  });
}

/// Columns from `first` on as they are.
template <class In, class Out>
FASTKERN_INLINE void keep(const In* in, Out* out, std::int64_t first, std::int64_t n) {
  columns(n - first, [=](std::int64_t i) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<In, Out>) {
      out[first + i] = in[first + i];
    } else {
      out[first + i] = from_float<Out>(to_float(in[first + i]));
    }
  });
}

template <class F>
void dispatch_head(DType dtype, bool interleaved, const F& f) {
  dispatch(dtype, [&]<class T>() {
    interleaved ? f.template operator()<T, true>() : f.template operator()<T, false>();
  });
}

}  // namespace fastkern::cpu::rope_detail
