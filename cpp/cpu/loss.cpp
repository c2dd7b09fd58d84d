// SPDX-License-Identifier: Apache-2.0
// Cross entropy on the CPU, forward: one pass over the logits, in blocks of columns, with a running
// maximum m and s = sum exp(z - m). Losses are made of differences from m, not of lse, which has
// fewer digits left where logits are large.
#include "fastkern/loss.h"

#include "loss_rows.h"
#include "softmax_rows.h"

namespace fastkern::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Blocks are added up in double: there are up to a hundred of them.
struct RowSums {
  float top = -kInfinity;  // m
  double sum = 0.0;        // s
  double shares = 0.0;     // sum_j w_j q_j of a spread loss
  double products = 0.0;   // sum_j w_j q_j (z_j - pivot)
  float pivot = 0.0f;
};

/// Adds a block of z to the running maximum and sum.
void add_block(const float* z, std::int64_t n, RowSums& row) {
  const float before = row.top;
  float top = before, sum = 0.0f;
  with_best_isa([&]() __attribute__((always_inline)) {
    const float largest = row_max(z, n);
    top = largest > before ? largest : before;
    const float base = top == -kInfinity ? 0.0f : top;  // nothing but -inf so far
    const auto [more] = lane_sums<1>(n, [=](std::int64_t c) __attribute__((always_inline)) {
      return std::array{exp_to_zero(z[c] - base)};
    });
    sum = more;
  });
  if (top != before)
    row.sum = before == -kInfinity ? 0.0 : row.sum * std::exp(double{before} - top);
  row.sum += sum, row.top = top;
}

template <bool kSoft>
void add_shares(const LossRows& f, const float* z, const float* p, const float* w, std::int64_t n,
                RowSums& row) {
  const float hard = f.hard_share, even = f.even_share, pivot = row.pivot;
  float shares = 0.0f, products = 0.0f;
  with_best_isa([&]() __attribute__((always_inline)) {
    const auto sums = lane_sums<2>(n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float share = w[c] * (kSoft ? p[c] * hard + even : even);
      return std::array{share, share * (z[c] - pivot)};
    });
    shares = sums[0], products = sums[1];
  });
  row.shares += shares, row.products += products;
}

RowSums sums_of(const LossRows& f, std::int64_t r, const float* p, float* scratch) {
  RowSums row;
  if (f.spread()) {
    const float first = f.z_at(r, 0);
    row.pivot = std::isfinite(first) ? first : 0.0f;
  }
  for (std::int64_t begin = 0; begin < f.classes; begin += kLossBlock) {
    const std::int64_t count = std::min(kLossBlock, f.classes - begin);
    const float* const z = f.z(r, begin, count, scratch);
    add_block(z, count, row);
    if (!f.spread()) continue;
    const float* const w = f.weights() + begin;
    if (p) {
      add_shares<true>(f, z, p + begin, w, count, row);
    } else {
      add_shares<false>(f, z, nullptr, w, count, row);
    }
  }
  if (std::isinf(row.top)) row.sum = kNan;
  return row;
}

/// What a row of a batch comes to.
struct RowResult {
  RowSums sums;
  float loss = 0.0f, lse = 0.0f, shares = 0.0f;
};

RowResult result_of(const LossRows& f, std::int64_t r, const float* p, float* scratch) {
  RowResult result{.sums = sums_of(f, r, p, scratch)};
  const RowSums& row = result.sums;
  const double log_sum = std::log(row.sum);
  double loss = 0.0, shares = row.shares;
  if (f.spread()) loss = row.shares * (double{row.top} - row.pivot) - row.products;
  if (!f.soft()) {
    const std::int64_t t = f.class_of(r);
    const double own = double{f.hard_share} * f.weight_of(t);
    loss += own * (double{row.top} - f.z_at(r, t));
    shares += own;
  }
  result.lse = static_cast<float>(row.top + log_sum);
  result.loss = static_cast<float>(loss + shares * log_sum);
  result.shares = static_cast<float>(shares);
  return result;
}

}  // namespace

void cross_entropy(const CrossEntropyFwd& args) {
  const LossRows f(args);
  const RowTensor grad(args.grad, args.op, "grad");
  const bool reduced = args.reduction != Reduction::none;
  float* const own_totals = args.state + kLossState * f.rows;
  const float* const totals = args.totals ? args.totals : own_totals;
  LossSums sums{.op = args.op,
                .target = args.target,
                .weight = args.weight,
                .rows = f.rows,
                .classes = f.classes,
                .ignore_index = args.ignore_index,
                .reduction = args.reduction,
                .totals = own_totals};
  if (!args.totals) loss_sums(sums);
  const float square = static_cast<float>(args.lse_square_scale);
  const bool mean = args.reduction == Reduction::mean;
  const float dloss = mean ? 1.0f / totals[0] : 1.0f, dzloss = mean ? 1.0f / totals[1] : 1.0f;
  parallel_for(f.rows, row_grain(f.classes), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(3, f.classes);
    for (std::int64_t r = begin; r < end; ++r) {
      RowResult row;
      row.sums.top = 0.0f, row.sums.sum = 1.0;
      const bool ignored = f.ignored(r);
      const float* const p = ignored ? nullptr : f.shares(r, scratch.row(1));
      if (!ignored) row = result_of(f, r, p, scratch.row(0));
      const float zloss = square * row.lse * row.lse;
      const auto sum = static_cast<float>(row.sums.sum);
      float* const state = args.state + kLossState * r;
      state[0] = row.sums.top, state[1] = sum, state[2] = row.shares;
      args.lse[r] = row.lse, args.row_zloss[r] = zloss;
      args.row_loss[r] = reduced ? row.loss : row.loss + zloss;
      if (!grad.given()) continue;
      const float of_row = args.dloss ? args.dloss[r] : 1.0f;
      const LossCoefficients k =
          loss_coefficients(args, row.shares, row.lse, of_row * dloss, of_row * dzloss, 0.0f);
      f.gradient(r, row.sums.top, sum, k.softmax, k.target, p, grad, scratch.row(0),
                 scratch.row(2));
    }
  });
  if (!reduced || !args.loss || args.totals) return;
  sums.row_loss = args.row_loss, sums.row_zloss = args.row_zloss;
  sums.loss = args.loss, sums.zloss = args.zloss;
  sums.totals_given = true;
  loss_sums(sums);
}

void loss_sums(const LossSums& args) {
  if (!args.totals_given) {
    double weight_sum = 0.0, count = 0.0;
    if (args.reduction != Reduction::mean) {
      weight_sum = count = 1.0;
    } else if (!args.target.data) {
      weight_sum = count = static_cast<double>(args.rows);
    } else {
      const Parameters weight(args.weight, args.weight.given() ? args.classes : 0, 0.0f, 1.0f);
      for (std::int64_t r = 0; r < args.rows; ++r) {
        const std::int64_t t = args.target.narrow
                                   ? static_cast<const std::int32_t*>(args.target.data)[r]
                                   : static_cast<const std::int64_t*>(args.target.data)[r];
        if (t == args.ignore_index) continue;
        FK_CHECK(t >= 0 && t < args.classes, args.op, ": target must hold classes from 0 to ",
                 args.classes - 1, " or ignore_index (", args.ignore_index, "), got ", t,
                 " for row ", r);
        weight_sum += args.weight.given() ? weight.row(0)[t] : 1.0f;
        count += 1.0;
      }
    }
    args.totals[0] = static_cast<float>(weight_sum), args.totals[1] = static_cast<float>(count);
  }
  if (!args.loss) return;
  double loss = 0.0, zloss = 0.0;
  for (std::int64_t r = 0; r < args.rows; ++r) {
    loss += args.row_loss[r];
    zloss += args.row_zloss[r];
  }
  const bool mean = args.reduction == Reduction::mean;
  const double mean_zloss = mean ? zloss / args.totals[1] : zloss;
  *args.zloss = static_cast<float>(mean_zloss);
  *args.loss = static_cast<float>((mean ? loss / args.totals[0] : loss) + mean_zloss);
}

}  // namespace fastkern::cpu
