// SPDX-License-Identifier: Apache-2.0
// Rotary embeddings on the CPU: fallback for CPU tensors and oracle of the CUDA tests.
//
// A token's angles are read once, in f32, and its heads turned one after the other.
#include "fastkern/rope.h"

#include "rope_heads.h"

namespace fastkern::cpu {
namespace {

using namespace rope_detail;  // NOLINT: all of it is about this

/// The heads of one token; without angles they stay as they are.
template <class T, bool kInterleaved>
FASTKERN_INLINE void turn_heads(const Heads& in, const Heads& out, std::int64_t b, std::int64_t s,
                                std::int64_t half, const float* cos, const float* sin) {
  const std::int64_t n = in.ref.sizes[3];
  for (std::int64_t h = 0; h < in.heads(); ++h) {
    const T* const from = in.head<const T>(b, s, h);
    T* const to = out.head<T>(b, s, h);
    if (cos) turn<kInterleaved>(from, to, cos, sin, half);
    if (from != to) keep(from, to, cos ? 2 * half : 0, n);
  }
}

}  // namespace

void rope(const RopeFwd& args) {
  const Heads q(args.q, args.op, "q"), k(args.k, args.op, "k");
  const Heads q_out(args.q_out, args.op, "q_out"), k_out(args.k_out, args.op, "k_out");
  const std::int64_t batch = args.q.sizes[0], tokens = args.q.sizes[1];
  const Angles angles(args.angles, args.op, batch, tokens);
  const std::int64_t half = angles.half(), width = (q.heads() + k.heads()) * args.q.sizes[3];
  if (width == 0) return;
  dispatch_head(args.q.dtype, args.angles.interleaved, [&]<class T, bool kInterleaved>() {
    parallel_for(batch * tokens, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      Scratch scratch(2, half);
      float *const cos = scratch.row(0), *const sin = scratch.row(1);
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t b = t / tokens, s = t % tokens;
        const float* const given = angles.load(b, s, cos, sin) ? cos : nullptr;
        with_best_isa([&]() __attribute__((always_inline)) {
          turn_heads<T, kInterleaved>(q, q_out, b, s, half, given, sin);
          if (k.given()) turn_heads<T, kInterleaved>(k, k_out, b, s, half, given, sin);
        });
      }
    });
  });
}

}  // namespace fastkern::cpu
