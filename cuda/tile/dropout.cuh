// SPDX-License-Identifier: Apache-2.0
// Dropout of packs: what is dropped follows from seed, offset and the element's index alone.
#pragma once

#include "fastkern/philox.h"

namespace fastkern::tile {

struct DropoutView {
  const std::int64_t *seed, *offset;  // nullptr: no dropout
  std::uint32_t threshold;
  float scale;

  /// Drops and scales kCount elements (a multiple of 4) from index `first` on.
  template <int kCount>
  __device__ __forceinline__ void apply(std::int64_t first, float (&v)[kCount]) const {
    apply(*seed, *offset, first, v);
  }
  /// The same where seed and offset have been read before.
  template <int kCount>
  __device__ __forceinline__ void apply(std::uint64_t s, std::uint64_t o, std::int64_t first,
                                        float (&v)[kCount]) const {
    const std::uint64_t e = first;
    if (e % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const PhiloxWords random = philox(s, o, e / 4 + i / 4);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          v[i + j] = random.word[j] >= threshold ? __fmul_rn(v[i + j], scale) : 0.0f;
      }
    } else {  // rows of another length: the groups of four lie across packs
      const int shift = static_cast<int>(e % 4);
      PhiloxWords random = philox(s, o, e / 4);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int word = (shift + i) % 4;
        if (i > 0 && word == 0) random = philox(s, o, (e + i) / 4);
        const std::uint32_t bits = word == 0   ? random.word[0]
                                   : word == 1 ? random.word[1]
                                   : word == 2 ? random.word[2]
                                               : random.word[3];
        v[i] = bits >= threshold ? __fmul_rn(v[i], scale) : 0.0f;
      }
    }
  }
};

}  // namespace fastkern::tile
