// SPDX-License-Identifier: Apache-2.0
// Cross entropy on the CPU, backward: each row of logits read once, its gradient written once.
#include "fastkern/loss.h"
#include "loss_rows.h"

namespace fastkern::cpu {
namespace {

template <class Out>
void store_block(Out* out, std::int64_t n, const float* v) {
  for_columns(
      n, [=](std::int64_t c) __attribute__((always_inline)) { out[c] = from_float<Out>(v[c]); });
}

}  // namespace

void LossRows::gradient(std::int64_t r, float top, float sum, float a, float b, const float* p,
                        const RowTensor& out, float* g, float* slopes) const {
  dispatch(out.dtype(), [&]<class T>() {
    T* const to = out.row<T>(r);
    if (ignored(r)) {
      return for_columns(classes, [=](std::int64_t c) __attribute__((always_inline)) {
        to[c] = from_float<T>(0.0f);
      });
    }
    const float factor = a / sum;
    const std::int64_t own = soft() ? -1 : class_of(r);
    for (std::int64_t begin = 0; begin < classes; begin += kLossBlock) {
      const std::int64_t count = std::min(kLossBlock, classes - begin);
      const float* const in = z(r, begin, count, g);
      if (spread()) {
        const float* const w = weights() + begin;
        const float hard = hard_share, even = even_share;
        if (p) {
          const float* const q = p + begin;
          for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
            g[c] = factor * exp_to_zero(in[c] - top) - b * (w[c] * (q[c] * hard + even));
          });
        } else {
          for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
            g[c] = factor * exp_to_zero(in[c] - top) - b * (w[c] * even);
          });
        }
      } else {
        for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
          g[c] = factor * exp_to_zero(in[c] - top);
        });
      }
      if (own >= begin && own < begin + count) g[own - begin] -= b * (weight_of(own) * hard_share);
      if (cap != 0.0f) {
        slopes_of(r, begin, count, slopes);
        for_columns(count,
                    [=](std::int64_t c) __attribute__((always_inline)) { g[c] *= slopes[c]; });
      } else if (scale != 1.0f) {
        for_columns(count,
                    [g, s = scale](std::int64_t c) __attribute__((always_inline)) { g[c] *= s; });
      }
      store_block(to + begin, count, g);
    }
  });
}

void LossRows::slopes_of(std::int64_t r, std::int64_t begin, std::int64_t count,
                         float* slopes) const {
  dispatch(logits.dtype(), [&]<class T>() {
    const T* const in = logits.row<const T>(r) + begin;
    // 1 - tanh^2 as it stands loses its digits where the cap is reached.
    for_columns(count, [in, slopes, s = scale,
                        twice = 2.0f / cap](std::int64_t c) __attribute__((always_inline)) {
      const float u = to_float(in[c]) * s * twice, e = exp_to_zero(u < 0 ? u : -u);
      slopes[c] = s * (4.0f * e / ((1.0f + e) * (1.0f + e)));
    });
  });
}

void cross_entropy_bwd(const CrossEntropyBwd& args) {
  const LossRows f(args);
  const RowTensor out(args.dlogits, args.op, "dlogits", RowTensor::required);
  const bool each = args.reduction == Reduction::none, mean = args.reduction == Reduction::mean;
  const float* const totals = args.state + kLossState * f.rows;
  const float per_loss = mean ? 1.0f / totals[0] : 1.0f, per_zloss = mean ? 1.0f / totals[1] : 1.0f;
  const auto at = [](const float* from, std::int64_t i) { return from ? from[i] : 0.0f; };
  parallel_for(f.rows, row_grain(f.classes), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(3, f.classes);
    for (std::int64_t r = begin; r < end; ++r) {
      if (f.ignored(r)) {
        f.gradient(r, 0.0f, 1.0f, 0.0f, 0.0f, nullptr, out, scratch.row(0), scratch.row(2));
        continue;
      }
      const float* const p = f.shares(r, scratch.row(1));
      const float* const state = args.state + kLossState * r;
      const float top = state[0], sum = state[1], shares = state[2];
      const float dloss = at(args.dloss, each ? r : 0), dzloss = at(args.dzloss, each ? r : 0);
      const LossCoefficients k =
          loss_coefficients(args, shares, top + std::log(sum), dloss * per_loss,
                            (dloss + dzloss) * per_zloss, at(args.dlse, r));
      f.gradient(r, top, sum, k.softmax, k.target, p, out, scratch.row(0), scratch.row(2));
    }
  });
}

void scale_unless_one(const TensorRef& x, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  dispatch(x.dtype, [&]<class T>() {
    T* const to = static_cast<T*>(x.data);
    parallel_for(x.numel(), 1 << 16, [=](std::int64_t begin, std::int64_t end) {
      T* const part = to + begin;
      for_columns(end - begin, [=](std::int64_t c) __attribute__((always_inline)) {
        part[c] = from_float<T>(to_float(part[c]) * by);
      });
    });
  });
}

}  // namespace fastkern::cpu
