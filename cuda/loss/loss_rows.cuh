// SPDX-License-Identifier: Apache-2.0
// What the kernels of the cross entropy share: rows of logits, targets, and what becomes of a pack
// of logits in forward and in backward.
//
// Two forms. kPlain: classes as targets, no softcap, no label smoothing, a positive scale; sums are
// taken of the logits x themselves. Otherwise of z, and every class may have a share of the loss.
// Exponentials are exp2((v - m) * unit), v being x or z: differences first, so that large logits
// lose nothing and the largest numbers do not overflow.
#pragma once

#include <cmath>

#include "dispatch.h"
#include "fastkern/loss.h"
#include "launch.cuh"
#include "ptx/math.cuh"
#include "tile/logsum.cuh"
#include "tile/pack.cuh"

namespace fastkern::cuda::loss_detail {

using tile::kVector;
using tile::Pack;
using tile::RowView;

inline constexpr float kLog2e = 1.44269504f;

/// Classes of rows, and what they weigh.
struct Targets {
  const void* data;  // nullptr: probabilities
  bool narrow;
  std::int64_t ignore_index;
  int classes;
  tile::ColumnView weight;

  /// The class of a row, kNoClass for one that there is not, kIgnored for a row that does not
  /// count; of probabilities kProbabilities.
  __device__ __forceinline__ int operator[](std::int64_t row) const {
    if (!data) return kProbabilities;
    const std::int64_t t = narrow ? static_cast<const std::int32_t*>(data)[row]
                                  : static_cast<const std::int64_t*>(data)[row];
    if (t == ignore_index) return kIgnored;
    return t >= 0 && t < classes ? static_cast<int>(t) : kNoClass;
  }
  /// NaN for a class that there is not.
  __device__ __forceinline__ float weight_of(int target) const {
    if (!weight.data) return 1.0f;
    if (target < 0) return __uint_as_float(0x7fc00000u);
    float w[1];
    weight.load(0, target, classes, 1.0f, w);
    return w[0];
  }

  static constexpr int kProbabilities = -1, kNoClass = -2, kIgnored = -3;
};

/// Rows of probabilities of any type.
struct Probabilities {
  RowView<tile::Mixed> rows;
  bool whole;  // 16 bytes at a time

  __device__ __forceinline__ tile::ColumnView row(std::int64_t r) const {
    return {rows.row(r), rows.dtype, whole};
  }
};

template <class T>
struct Loss {
  RowView<T> logits, grad;
  Targets targets;
  Probabilities probabilities;
  std::int64_t rows;
  int classes;
  bool capped, soft, spread;
  float scale, cap, inverse_cap, unit;
  float hard_share, even_share;
  float square;  // lse_square_scale
  bool reduced, mean;

  float *row_loss, *row_zloss, *lse, *state;  // forward
  const float* totals;                        // what a mean is divided by
  const float *dloss, *dlse, *dzloss;         // backward
  bool dloss_is_one;
  int threads, blocks;  // of a row
};

/// The columns of a row that a thread sees: pack i from column first + i * apart on.
struct Apart {
  int first, apart;
  __device__ __forceinline__ int operator()(int i) const { return first + i * apart; }
};

template <class T, bool kPlain>
inline constexpr int kLossSums = kPlain ? 1 : 3;  // of the target's own v; of shares and products

template <class T, bool kPlain>
using Sums = tile::RowLogSums<kLossSums<T, kPlain>>;

/// x becomes v.
template <class T, bool kPlain, int kCount>
__device__ __forceinline__ void to_values(const Loss<T>& p, float (&v)[kCount]) {
  if constexpr (!kPlain) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float z = v[j] * p.scale;
      v[j] = p.capped ? p.cap * tanhf(z * p.inverse_cap) : z;
    }
  }
}

/// w_j q_j of a pack, but for a hard target's own.
template <class T, int kCount>
__device__ __forceinline__ void shares_of(const Loss<T>& p, std::int64_t row, int column, int n,
                                          float (&share)[kCount]) {
  float w[kCount];
  p.targets.weight.load(0, column, n, 1.0f, w);
  if (p.soft) {
    p.probabilities.row(row).load(0, column, n, 0.0f, share);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) share[j] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    share[j] = column + j < n ? w[j] * fmaf(share[j], p.hard_share, p.even_share) : 0.0f;
}

/// A row's sums take in the pack from `column` on; kEnd: it may reach beyond the n columns.
template <class T, bool kPlain, bool kEnd>
__device__ __forceinline__ void add_pack(const Loss<T>& p, const Pack<T>& pack, std::int64_t row,
                                         int column, int n, float pivot, Sums<T, kPlain>& sums) {
  constexpr int kV = kVector<T>;
  float v[kV];
  tile::unpack(pack, v);
  to_values<T, kPlain>(p, v);
  if constexpr (kEnd) {
#pragma unroll
    for (int j = 0; j < kV; ++j) v[j] = column + j < n ? v[j] : tile::kMinusInfinity;
  }
  if constexpr (!kPlain) {
    if (p.spread) {
      float share[kV];
      shares_of(p, row, column, n, share);
      float shares = 0.0f, products = 0.0f;  // of the pack first: a row has thousands
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        shares += share[j];
        // Beyond the end 0 times −inf would be NaN; within the row it is, as in torch.
        if (!kEnd || column + j < n) products += share[j] * (v[j] - pivot);
      }
      sums.more[1] += shares, sums.more[2] += products;
    }
  }
  sums.exponentials.add(v, p.unit);
}

/// The sums take in the logit of the row's target, by the one thread that calls this.
template <class T, bool kPlain>
__device__ __forceinline__ void add_target(const Loss<T>& p, T logit, Sums<T, kPlain>& sums) {
  float v[1] = {tile::to_float(logit)};
  to_values<T, kPlain>(p, v);
  sums.more[0] = v[0];
}

/// What products are taken around: the row's first v, if that is a number.
template <class T, bool kPlain>
__device__ __forceinline__ float pivot_of(const Loss<T>& p, const char* row) {
  if constexpr (kPlain) {
    return 0.0f;
  } else {
    if (!p.spread) return 0.0f;
    float v[1] = {tile::to_float(*reinterpret_cast<const T*>(row))};
    to_values<T, kPlain>(p, v);
    return fabsf(v[0]) <= 3.4028235e38f ? v[0] : 0.0f;
  }
}

/// What forward knows of a row in the end, and leaves for backward.
struct RowState {
  float top, sum, shares;
};

/// Writes what one row comes to.
template <class T, bool kPlain>
__device__ __forceinline__ RowState finish_row(const Loss<T>& p, std::int64_t row, int target,
                                               float pivot, const Sums<T, kPlain>& sums,
                                               bool write) {
  constexpr float kNan = __builtin_nanf("");
  RowState s{sums.exponentials.top, sums.exponentials.sum, 0.0f};
  if (fabsf(s.top) == -tile::kMinusInfinity || target == Targets::kNoClass) s.sum = kNan;
  const float per_v = kPlain ? p.scale : 1.0f;  // z of v
  const float log_sum = logf(s.sum);
  const float lse = fmaf(s.top, per_v, log_sum);
  float loss = 0.0f;
  if constexpr (!kPlain) {
    if (p.spread) {
      s.shares = sums.more[1];
      loss = s.shares * (s.top - pivot) - sums.more[2];
    }
  }
  if (kPlain || !p.soft) {
    const float own = p.hard_share * p.targets.weight_of(target);
    loss += own * ((s.top - sums.more[0]) * per_v);
    s.shares += own;
  }
  loss = fmaf(s.shares, log_sum, loss);
  if (write) {
    const float zloss = p.square * lse * lse;
    p.row_loss[row] = p.reduced ? loss : loss + zloss;
    p.row_zloss[row] = zloss;
    p.lse[row] = lse;
    float* const state = p.state + kLossState * row;
    state[0] = s.top, state[1] = s.sum, state[2] = s.shares;
  }
  return s;
}

/// The same for a row that does not count.
template <class T>
__device__ __forceinline__ void finish_ignored(const Loss<T>& p, std::int64_t row) {
  p.row_loss[row] = p.row_zloss[row] = p.lse[row] = 0.0f;
  float* const state = p.state + kLossState * row;
  state[0] = 0.0f, state[1] = 1.0f, state[2] = 0.0f;
}

/// What the gradient of a row is made of:
///   (factor * exp2((v - top) * unit) - target * share_j - [j == target's class] own) * dz/dx
/// where the slope of a plain row is in the coefficients already. A target's own column is written
/// once more behind the others, by the thread that has written it: loops need not look for it.
struct RowGradient {
  float top, factor, target, own;
};

template <class T, bool kPlain>
__device__ __forceinline__ RowGradient row_gradient(const Loss<T>& p, std::int64_t row, int target,
                                                    const RowState& s) {
  const auto at = [](const float* from, std::int64_t i) { return from ? from[i] : 0.0f; };
  const std::int64_t i = p.reduced ? 0 : row;
  float dloss = p.dloss_is_one ? 1.0f : at(p.dloss, i), dzloss = dloss + at(p.dzloss, i);
  if (p.mean) dloss = __fdiv_rn(dloss, p.totals[0]), dzloss = __fdiv_rn(dzloss, p.totals[1]);
  float softmax = fmaf(dloss, s.shares, at(p.dlse, row));
  if (p.square != 0.0f) {
    const float lse = fmaf(s.top, kPlain ? p.scale : 1.0f, logf(s.sum));
    softmax = fmaf(dzloss, 2.0f * p.square * lse, softmax);
  }
  RowGradient g{s.top, __fdiv_rn(softmax, s.sum), dloss, 0.0f};
  if (kPlain || !p.soft) g.own = dloss * (p.hard_share * p.targets.weight_of(target));
  if constexpr (kPlain) g.factor *= p.scale, g.own *= p.scale;
  return g;
}

/// x becomes the gradient, at kCount columns from `column` on; `own`: of those, for a target's.
/// `again(v)`: v becomes x once more, of which slopes are made: kept, it would take registers.
template <class T, bool kPlain, int kCount, class Again>
__device__ __forceinline__ void to_gradient(const Loss<T>& p, float (&v)[kCount], std::int64_t row,
                                            int column, int n, const RowGradient& g, float own,
                                            const Again& again) {
  to_values<T, kPlain>(p, v);
#pragma unroll
  for (int j = 0; j < kCount; ++j) v[j] = g.factor * ptx::exp2_approx((v[j] - g.top) * p.unit);
  if constexpr (!kPlain) {
    if (p.spread) {
      float share[kCount];
      shares_of(p, row, column, n, share);
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = fmaf(-g.target, share[j], v[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) v[j] -= own;
  if constexpr (!kPlain) {
    float x[kCount];
    again(x);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float slope = p.scale;
      if (p.capped) {
        // 1 − tanh² as it stands loses its digits where the cap is reached.
        const float u = x[j] * p.scale * p.inverse_cap;
        const float e = ptx::exp2_approx(fabsf(u) * (-2.0f * kLog2e)), d = 1.0f + e;
        slope *= __fdividef(4.0f * e, d * d);
      }
      v[j] *= slope;
    }
  }
}

template <class T, bool kPlain>
__device__ __forceinline__ Pack<T> gradient_of(const Loss<T>& p, Pack<T> pack, std::int64_t row,
                                               int column, int n, const RowGradient& g) {
  float v[kVector<T>];
  tile::unpack(pack, v);
  to_gradient<T, kPlain>(p, v, row, column, n, g, 0.0f, [&pack](float (&x)[kVector<T>]) {
    tile::keep_packed(pack);
    tile::unpack(pack, x);
  });
  return tile::pack_of<T>(v);
}

/// Writes the gradient of the target's own logit, behind the pack that has it.
template <class T, bool kPlain>
__device__ __forceinline__ void store_target(const Loss<T>& p, T logit, std::int64_t row,
                                             int target, const RowGradient& g, char* gG) {
  float v[1] = {tile::to_float(logit)};
  to_gradient<T, kPlain>(p, v, row, target, p.classes, g, g.own,
                         [logit](float (&x)[1]) { x[0] = tile::to_float(logit); });
  reinterpret_cast<T*>(gG)[target] = tile::from_float<T>(v[0]);
}

/// The parameters of a call's kernels; defined by the host code of each.
inline bool is_plain(const CrossEntropy& a) {
  const float unit = static_cast<float>(a.logit_scale) * kLog2e;
  return !a.probabilities.given() && a.softcap == 0.0 && a.label_smoothing == 0.0 &&
         unit >= 1.1754944e-38f && unit <= 3.4028235e38f;
}

template <class T>
Loss<T> loss_params(const CrossEntropy& a) {
  Loss<T> p{};
  p.logits = tile::row_view<T>(a.logits, a.op, "logits");
  const Rows rows = rows_of(a.logits, a.op, "logits");
  FK_CHECK(rows.length > 0 && rows.length < (std::int64_t{1} << 31) - (1 << 16), a.op,
           ": logits must have between 1 and 2^31 - 65537 classes, got ", rows.length);
  p.rows = rows.count, p.classes = static_cast<int>(rows.length);
  p.targets = {a.target.data, a.target.narrow, a.ignore_index, p.classes,
               tile::column_view(a.weight, rows.length)};
  p.soft = a.probabilities.given();
  p.spread = p.soft || a.label_smoothing > 0.0;
  if (p.soft) {
    const Rows of = rows_of(a.probabilities, a.op, "target");
    const std::int64_t size = size_of(a.probabilities.dtype);
    const auto aligned = [&](std::int64_t elements) { return elements * size % 16 == 0; };
    p.probabilities.rows = tile::row_view<tile::Mixed>(a.probabilities, a.op, "target");
    p.probabilities.whole = reinterpret_cast<std::uintptr_t>(a.probabilities.data) % 16 == 0 &&
                            aligned(of.inner_stride) && aligned(of.outer_stride);
  }
  p.capped = a.softcap != 0.0;
  p.scale = static_cast<float>(a.logit_scale), p.cap = static_cast<float>(a.softcap);
  p.inverse_cap = p.capped ? 1.0f / p.cap : 0.0f;
  p.unit = is_plain(a) ? p.scale * kLog2e : kLog2e;
  p.hard_share = static_cast<float>(1.0 - a.label_smoothing);
  p.even_share = static_cast<float>(a.label_smoothing / static_cast<double>(rows.length));
  p.square = static_cast<float>(a.lse_square_scale);
  p.reduced = a.reduction != Reduction::none, p.mean = a.reduction == Reduction::mean;
  return p;
}

template <class T>
Loss<T> forward_params(const CrossEntropyFwd& a) {
  Loss<T> p = loss_params<T>(a);
  p.row_loss = a.row_loss, p.row_zloss = a.row_zloss, p.lse = a.lse, p.state = a.state;
  p.grad = tile::row_view<T>(a.grad, a.op, "grad");
  p.dloss = a.dloss, p.dloss_is_one = a.dloss == nullptr;
  p.totals = a.totals ? a.totals : a.state + kLossState * p.rows;
  return p;
}

void launch_fwd(const CrossEntropyFwd& args, Stream stream);
void launch_grad(const CrossEntropyFwd& args, const Plan& plan, Stream stream);

}  // namespace fastkern::cuda::loss_detail
