// SPDX-License-Identifier: Apache-2.0
// Results larger than the caches, written past them: a plain store reads the line first, which is a
// third of the traffic of a kernel that reads one tensor and writes another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "rowwise.h"

namespace fastkern::cpu {

/// Whether rows of `t`, a result, are written past the caches: it is larger than they, so whoever
/// reads it next finds nothing of it there, its rows are long enough for a copy of each, and its
/// elements are wide: of 16-bit ones the loops take longer than memory does.
inline bool streamed(const TensorRef& t) {
  constexpr std::int64_t kBytes = 64 << 20, kColumns = 1024;
  return t.dtype == DType::f32 && t.sizes[t.ndim - 1] >= kColumns &&
         t.numel() * size_of(t.dtype) >= kBytes;
}

/// memcpy past the caches. stream_end() comes after the last one of a thread.
inline void stream_copy(void* to, const void* from, std::int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const std::int64_t head =
      std::min<std::int64_t>(bytes, -reinterpret_cast<std::uintptr_t>(out) & 15);
  std::memcpy(out, in, head);
  std::int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    __m128i part;
    std::memcpy(&part, in + i, sizeof(part));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), part);
  }
  std::memcpy(out + i, in + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

/// What was streamed is there for other threads when this one says that it is done.
inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// out[c] = value(c) for every column, past the caches if `stream`.
template <class Out, class Value>
FASTKERN_INLINE void write_columns(Out* out, std::int64_t n, bool stream, const Value& value) {
  if (!stream) {
    return columns(n, [=](std::int64_t c) __attribute__((always_inline)) { out[c] = value(c); });
  }
  constexpr std::int64_t kStretch = 2048;  // in the nearest cache
  alignas(64) Out part[kStretch];
  Out* const to = part;
  for (std::int64_t begin = 0; begin < n; begin += kStretch) {
    const std::int64_t count = std::min(n - begin, kStretch);
    columns(count,
            [=](std::int64_t c) __attribute__((always_inline)) { to[c] = value(begin + c); });
    stream_copy(out + begin, part, count * sizeof(Out));
  }
}

}  // namespace fastkern::cpu
