// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the cross entropy share: rows of logits as z, what a row's target
// asks for, and the gradient of a row.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "exponential.h"
#include "fastkern/loss.h"
#include "rowwise.h"

namespace fastkern::cpu {

// A row is worked on so many columns at a time, which stay in the nearest cache between the steps.
constexpr std::int64_t kLossBlock = 4096;

class LossRows {
 public:
  explicit LossRows(const CrossEntropy& a)
      : args(a),
        logits(a.logits, a.op, "logits", RowTensor::required),
        probabilities(a.probabilities, a.op, "target"),
        rows(logits.rows.count),
        classes(logits.rows.length),
        scale(static_cast<float>(a.logit_scale)),
        cap(static_cast<float>(a.softcap)),
        hard_share(static_cast<float>(1.0 - a.label_smoothing)),
        even_share(static_cast<float>(a.label_smoothing / static_cast<double>(classes))) {
    if (a.weight.given() || spread()) weight_.emplace(a.weight, classes, 0.0f, 1.0f);
    if (soft()) return;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t t = class_of(r);
      FK_CHECK(t == a.ignore_index || (t >= 0 && t < classes), a.op,
               ": target must hold classes from 0 to ", classes - 1, " or ignore_index (",
               a.ignore_index, "), got ", t, " for row ", r);
    }
  }

  bool soft() const { return probabilities.given(); }
  /// Every class has a share of the loss, not the target alone.
  bool spread() const { return soft() || args.label_smoothing > 0.0; }
  std::int64_t class_of(std::int64_t r) const {
    return args.target.narrow ? static_cast<const std::int32_t*>(args.target.data)[r]
                              : static_cast<const std::int64_t*>(args.target.data)[r];
  }
  bool ignored(std::int64_t r) const { return !soft() && class_of(r) == args.ignore_index; }
  float weight_of(std::int64_t c) const { return weight_ ? weight_->row(0)[c] : 1.0f; }
  const float* weights() const { return weight_->row(0); }

  /// z of `count` columns from `begin` on: where the logits lie, if that is what they are, else in
  /// `scratch`.
  const float* z(std::int64_t r, std::int64_t begin, std::int64_t count, float* scratch) const {
    if (logits.dtype() == DType::f32 && cap == 0.0f && scale == 1.0f)
      return logits.row<const float>(r) + begin;
    dispatch(logits.dtype(), [&]<class T>() {
      const T* in = logits.row<const T>(r) + begin;
      if (cap == 0.0f) {
        for_columns(count, [in, scratch, s = scale](std::int64_t c) __attribute__((always_inline)) {
          scratch[c] = to_float(in[c]) * s;
        });
      } else {
        for_columns(count, [in, scratch, s = scale, top = cap](std::int64_t c)
                               __attribute__((always_inline)) {
                                 scratch[c] = top * tanh_of(to_float(in[c]) * s / top);
                               });
      }
    });
    return scratch;
  }
  float z_at(std::int64_t r, std::int64_t c) const {
    float value[1];
    return *z(r, c, 1, value);
  }

  /// The probabilities of row r in f32; nullptr for hard targets.
  const float* shares(std::int64_t r, float* scratch) const {
    return soft() ? load_row(probabilities, r, scratch) : nullptr;
  }

  /// Writes row r of the gradient `a * softmax - b * w q` by logits, for the row's maximum and sum;
  /// `g`, `slopes`: scratch.
  void gradient(std::int64_t r, float top, float sum, float a, float b, const float* p,
                const RowTensor& out, float* g, float* slopes) const;

  const CrossEntropy& args;
  RowTensor logits, probabilities;
  std::int64_t rows, classes;
  float scale, cap, hard_share, even_share;

 private:
  /// dz / dx under a softcap.
  void slopes_of(std::int64_t r, std::int64_t begin, std::int64_t count, float* slopes) const;

  std::optional<Parameters> weight_;
};

/// What a row's gradient is made of: the coefficient of softmax, that of the target's shares.
struct LossCoefficients {
  float softmax, target;
};

/// Coefficients for d(loss) = dloss, and so on; `shares`: sum_j w_j q_j of the row.
inline LossCoefficients loss_coefficients(const CrossEntropy& a, float shares, float lse,
                                          float dloss, float dzloss, float dlse) {
  const float square = 2.0f * static_cast<float>(a.lse_square_scale) * lse;
  return {dloss * shares + dzloss * square + dlse, dloss};
}

}  // namespace fastkern::cpu
