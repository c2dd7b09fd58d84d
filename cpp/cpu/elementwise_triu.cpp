// SPDX-License-Identifier: Apache-2.0
// The upper triangle of matrices on the CPU.
#include <algorithm>
#include <cstring>

#include "fastkern/elementwise.h"
#include "fastkern/pointwise_plan.h"
#include "parallel.h"

namespace fastkern::cpu {
namespace {

template <std::size_t kSize>
void copy_elements(const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride,
                   std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    std::memcpy(to + i * to_stride, from + i * from_stride, kSize);
}
template <std::size_t kSize>
void clear_elements(char* to, std::int64_t stride, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) std::memset(to + i * stride, 0, kSize);
}

template <std::size_t kSize>
void triu_rows(const Triangle& t, std::int64_t begin, std::int64_t end) {
  const int last = t.out.ndim - 1;
  const std::int64_t rows = t.out.sizes[last - 1], columns = t.out.sizes[last];
  const std::int64_t x_stride = t.x.strides[last] * kSize, out_stride = t.out.strides[last] * kSize;
  for (std::int64_t r = begin; r < end; ++r) {
    std::int64_t from = 0, to = 0;
    for (std::int64_t d = last - 1, rest = r; d >= 0; rest /= t.out.sizes[d], --d) {
      from += rest % t.out.sizes[d] * t.x.strides[d] * static_cast<std::int64_t>(kSize);
      to += rest % t.out.sizes[d] * t.out.strides[d] * static_cast<std::int64_t>(kSize);
    }
    const char* const x = static_cast<const char*>(t.x.data) + from;
    char* const out = static_cast<char*>(t.out.data) + to;
    const std::int64_t zeros = triangle_start(r % rows, columns, t.diagonal), n = columns - zeros;
    if (out_stride == kSize) {
      std::memset(out, 0, zeros * kSize);
    } else {
      clear_elements<kSize>(out, out_stride, zeros);
    }
    if (x == out && x_stride == out_stride) continue;
    if (x_stride == kSize && out_stride == kSize) {
      std::memcpy(out + zeros * kSize, x + zeros * kSize, n * kSize);
    } else {
      copy_elements<kSize>(x + zeros * x_stride, x_stride, out + zeros * out_stride, out_stride, n);
    }
  }
}

}  // namespace

void triu(const Triangle& args) {
  check_triangle(args);
  if (args.out.numel() == 0) return;
  const std::int64_t columns = args.out.sizes[args.out.ndim - 1];
  parallel_for(args.out.numel() / columns, row_grain(columns),
               [&](std::int64_t begin, std::int64_t end) {
                 switch (size_of(args.x.dtype)) {
                   case 1:
                     return triu_rows<1>(args, begin, end);
                   case 2:
                     return triu_rows<2>(args, begin, end);
                   case 4:
                     return triu_rows<4>(args, begin, end);
                   case 8:
                     return triu_rows<8>(args, begin, end);
                   default:
                     return triu_rows<16>(args, begin, end);
                 }
               });
}

}  // namespace fastkern::cpu
