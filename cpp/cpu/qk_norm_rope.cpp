// SPDX-License-Identifier: Apache-2.0
// An RMS norm of each head, then rotary embeddings, on the CPU: forward and backward.
//
// Backward turns a head's gradient back into f32, takes the two sums of the norm's gradient in one
// loop over the head, and writes dx and adds to the weight gradient in another. Weight gradients
// are sums over groups of tokens, whose number depends on that of the tokens alone, then over the
// groups.
#include <algorithm>
#include <array>

#include "fastkern/rope.h"
#include "rope_heads.h"

namespace fastkern::cpu {
namespace {

using namespace rope_detail;  // NOLINT: all of it is about this

struct Norm {
  std::int64_t n, half;
  double eps;
};

template <class T, bool kInterleaved>
FASTKERN_INLINE void norm_heads(const Norm& norm, const Heads& in, const Heads& out, std::int64_t b,
                                std::int64_t s, const float* weight, const float* cos,
                                const float* sin, float* scratch) {
  const std::int64_t n = norm.n;
  for (std::int64_t h = 0; h < in.heads(); ++h) {
    const T* const from = in.head<const T>(b, s, h);
    T* const to = out.head<T>(b, s, h);
    const auto [squares] = lane_sums<1>(n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float v = to_float(from[c]);
      return std::array{v * v};
    });
    const float rstd = rstd_of(squares / static_cast<float>(n), norm.eps);
    columns(n, [=](std::int64_t c) __attribute__((always_inline)) {
      scratch[c] = to_float(from[c]) * rstd * weight[c];
    });
    if (cos) turn<kInterleaved>(scratch, to, cos, sin, norm.half);
    keep(scratch, to, cos ? 2 * norm.half : 0, n);
  }
}

/// `dx` and `sums` are where they are wanted, else not given and nullptr.
template <class T, bool kInterleaved>
FASTKERN_INLINE void norm_heads_bwd(const Norm& norm, const Heads& x, const Heads& dy,
                                    const Heads& dx, std::int64_t b, std::int64_t s,
                                    const float* weight, const float* cos, const float* sin,
                                    float* sums, float* g) {
  const std::int64_t n = norm.n;
  for (std::int64_t h = 0; h < x.heads(); ++h) {
    const T* const in = x.head<const T>(b, s, h);
    const T* const grad = dy.head<const T>(b, s, h);
    if (cos) turn<kInterleaved>(grad, g, cos, sin, norm.half);
    keep(grad, g, cos ? 2 * norm.half : 0, n);
    const auto [squares, dot] = lane_sums<2>(n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float v = to_float(in[c]);
      return std::array{v * v, g[c] * weight[c] * v};
    });
    const float rstd = rstd_of(squares / static_cast<float>(n), norm.eps);
    if (sums) {
      columns(n, [=](std::int64_t c) __attribute__((always_inline)) {
        sums[c] += g[c] * (to_float(in[c]) * rstd);
      });
    }
    if (!dx.given()) continue;
    const float mean = dot * rstd / static_cast<float>(n);
    T* const out = dx.head<T>(b, s, h);
    columns(n, [=](std::int64_t c) __attribute__((always_inline)) {
      out[c] = from_float<T>(rstd * (g[c] * weight[c] - to_float(in[c]) * rstd * mean));
    });
  }
}

/// A sum over tokens, of parts over groups of them.
struct WeightGradient {
  WeightGradient(const TensorRef& t, std::int64_t n, std::int64_t groups)
      : out(t), n(n), groups(groups), parts(t.given() ? groups * n : 0) {}

  TensorRef out;
  std::int64_t n, groups;
  Floats parts;

  /// Zeros to add to; nullptr if nobody wants it.
  float* begin(std::int64_t group) const {
    if (!out.given()) return nullptr;
    float* const sums = parts.data() + group * n;
    std::fill_n(sums, n, 0.0f);
    return sums;
  }
  void finish() const {
    if (!out.given()) return;
    dispatch(out.dtype, [&]<class T>() {
      for (std::int64_t c = 0; c < n; ++c) {
        double total = 0.0;
        for (std::int64_t group = 0; group < groups; ++group) total += parts.data()[group * n + c];
        static_cast<T*>(out.data)[c] = from_float<T>(static_cast<float>(total));
      }
    });
  }
};

}  // namespace

void qk_norm_rope(const QkNormRopeFwd& args) {
  const Heads q(args.q, args.op, "q"), k(args.k, args.op, "k");
  const Heads q_out(args.q_out, args.op, "q_out"), k_out(args.k_out, args.op, "k_out");
  const std::int64_t batch = args.q.sizes[0], tokens = args.q.sizes[1], n = args.q.sizes[3];
  const Angles angles(args.angles, args.op, batch, tokens);
  const Norm norm{n, angles.half(), args.eps};
  const std::int64_t width = (q.heads() + k.heads()) * n;
  if (width == 0) return;
  const float offset = static_cast<float>(args.weight_offset);
  const Parameters q_weight(args.q_weight, n, offset, 1.0f);
  const Parameters k_weight(args.k_weight, n, offset, 1.0f);
  dispatch_head(args.q.dtype, args.angles.interleaved, [&]<class T, bool kInterleaved>() {
    parallel_for(batch * tokens, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      Scratch scratch(3, n);
      float *const cos = scratch.row(0), *const sin = scratch.row(1);
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t b = t / tokens, s = t % tokens;
        const float* const given = angles.load(b, s, cos, sin) ? cos : nullptr;
        const auto run = [&](const Heads& in, const Heads& out, const Parameters& weight) {
          with_best_isa([&]() __attribute__((always_inline)) {
            norm_heads<T, kInterleaved>(norm, in, out, b, s, weight.row(0), given, sin,
                                        scratch.row(2));
          });
        };
        run(q, q_out, q_weight);
        if (k.given()) run(k, k_out, k_weight);
      }
    });
  });
}

void qk_norm_rope_bwd(const QkNormRopeBwd& args) {
  const Heads q(args.q, args.op, "q"), k(args.k, args.op, "k");
  const Heads q_dy(args.dq_out, args.op, "dq_out"), k_dy(args.dk_out, args.op, "dk_out");
  const Heads dq(args.dq, args.op, "dq"), dk(args.dk, args.op, "dk");
  const std::int64_t batch = args.q.sizes[0], tokens = args.q.sizes[1], n = args.q.sizes[3];
  RopeAngles back = args.angles;
  back.inverse = !back.inverse;
  const Angles angles(back, args.op, batch, tokens);
  const Norm norm{n, angles.half(), args.eps};
  const float offset = static_cast<float>(args.weight_offset);
  const Parameters q_weight(args.q_weight, n, offset, 1.0f);
  const Parameters k_weight(args.k_weight, n, offset, 1.0f);
  constexpr std::int64_t kMostGroups = 512;
  const std::int64_t all = batch * tokens, groups = std::min(all, kMostGroups);
  const WeightGradient q_sums(args.dq_weight, n, groups), k_sums(args.dk_weight, n, groups);
  dispatch_head(args.q.dtype, args.angles.interleaved, [&]<class T, bool kInterleaved>() {
    parallel_for(groups, 1, [&](std::int64_t begin, std::int64_t end) {
      Scratch scratch(3, n);
      float *const cos = scratch.row(0), *const sin = scratch.row(1);
      for (std::int64_t group = begin; group < end; ++group) {
        float *const of_q = q_sums.begin(group), *const of_k = k_sums.begin(group);
        for (std::int64_t t = all * group / groups; t < all * (group + 1) / groups; ++t) {
          const std::int64_t b = t / tokens, s = t % tokens;
          const float* const given = angles.load(b, s, cos, sin) ? cos : nullptr;
          const auto run = [&](const Heads& x, const Heads& dy, const Heads& dx,
                               const Parameters& weight, float* sums) {
            if (!x.given() || (!dx.given() && !sums)) return;
            with_best_isa([&]() __attribute__((always_inline)) {
              norm_heads_bwd<T, kInterleaved>(norm, x, dy, dx, b, s, weight.row(0), given, sin,
                                              sums, scratch.row(2));
            });
          };
          run(q, q_dy, dq, q_weight, of_q);
          run(k, k_dy, dk, k_weight, of_k);
        }
      }
    });
  });
  q_sums.finish();
  k_sums.finish();
}

}  // namespace fastkern::cpu
