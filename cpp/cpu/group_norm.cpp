// SPDX-License-Identifier: Apache-2.0
// Group normalisation on the CPU, forward: fallback for CPU tensors and oracle of the CUDA tests.
#include "fastkern/group_norm.h"

#include <cmath>

#include "group_pieces.h"

namespace fastkern::cpu {
namespace {

using namespace groups;

/// mean and rstd of a group, of whose pieces all but the last hold `each` elements.
void combine(const Moments* pieces, std::int64_t count, std::int64_t stride, std::int64_t each,
             std::int64_t total, double eps, float* stats) {
  const auto size_of_piece = [&](std::int64_t i) {
    return static_cast<double>(std::min(each, total - i * each));
  };
  double mean = 0.0, m2 = 0.0;
  for (std::int64_t i = 0; i < count; ++i) mean += size_of_piece(i) * pieces[i * stride].mean;
  mean /= static_cast<double>(total);
  for (std::int64_t i = 0; i < count; ++i) {
    const double distance = pieces[i * stride].mean - mean;
    m2 += pieces[i * stride].m2 + size_of_piece(i) * distance * distance;
  }
  stats[0] = static_cast<float>(mean);
  stats[1] = static_cast<float>(1.0 / std::sqrt(m2 / static_cast<double>(total) + eps));
}

template <class T, bool kSilu>
struct Forward {
  const Cut& cut;
  const GroupNormFwd& args;
  const Floats &weight, &bias;  // columns
  float* stats;
  const T* x = static_cast<const T*>(args.x.data);
  T* y = static_cast<T*>(args.y.data);

  // ---- channels-first: units are groups, pieces are stretches of them ----

  FASTKERN_INLINE std::int64_t stretch(std::int64_t piece) const {
    return std::min(kPiece, cut.shape.group_size() - piece * kPiece);
  }

  FASTKERN_INLINE Moments stretch_moments(std::int64_t group, std::int64_t piece) const {
    const T* __restrict in = x + group * cut.shape.group_size() + piece * kPiece;
    return moments_of(stretch(piece), [&](std::int64_t i) __attribute__((always_inline)) {
      return to_float(in[i]);
    });
  }

  FASTKERN_INLINE void stretch_apply(std::int64_t group, std::int64_t piece) const {
    const std::int64_t positions = cut.shape.positions;
    const std::int64_t begin = piece * kPiece, end = begin + stretch(piece);
    const std::int64_t channel = group % cut.shape.groups * cut.shape.group_channels();
    const float mean = stats[2 * group], rstd = stats[2 * group + 1];
    const T* __restrict in = x + group * cut.shape.group_size();
    T* __restrict out = y + group * cut.shape.group_size();
    for (std::int64_t c = begin / positions, i = begin; i < end; ++c) {
      const float scale = rstd * weight[channel + c], shift = bias[channel + c];
      const std::int64_t stop = std::min(end, (c + 1) * positions);
      for (; i < stop; ++i)
        out[i] = from_float<T>(activate<kSilu>((to_float(in[i]) - mean) * scale + shift));
    }
  }

  // ---- by rows: units are samples, pieces are some of their positions ----

  FASTKERN_INLINE void row_moments(std::int64_t sample, std::int64_t piece, Moments* out,
                                   float* scratch) const {
    const std::int64_t width = cut.width(), channels = cut.shape.channels;
    const std::int64_t d = cut.shape.group_channels(), rows = cut.rows_of(piece);
    const T* __restrict in = x + cut.row_start(sample, piece);
    float* __restrict sum = scratch;
    float* __restrict squares = scratch + width;
    float* __restrict mean = scratch + 2 * width;
    const float count = static_cast<float>(rows * d);
    const auto group_sum = [&](const float* columns, std::int64_t g) {
      float total = 0.0f;
      for (std::int64_t f = g * d; f < width; f += channels) total += sum_of(columns + f, d);
      return total;
    };
    std::fill_n(sum, 2 * width, 0.0f);
    sum_columns(rows * channels, width,
                [&](std::int64_t column, const auto& over_rows) __attribute__((always_inline)) {
                  sum[column] += over_rows([&](std::int64_t i) __attribute__((always_inline)) {
                    return to_float(in[i]);
                  });
                });
    for (std::int64_t g = 0; g < cut.shape.groups; ++g) out[g].mean = group_sum(sum, g) / count;
    spread(cut, &out->mean, 2, mean);
    std::fill_n(sum, width, 0.0f);
    sum_columns(rows * channels, width,
                [&](std::int64_t column, const auto& over_rows) __attribute__((always_inline)) {
                  const auto distance = [&](std::int64_t i) __attribute__((always_inline)) {
                    return to_float(in[i]) - mean[column];
                  };
                  sum[column] += over_rows(distance);
                  squares[column] += over_rows([&](std::int64_t i) __attribute__((always_inline)) {
                    return distance(i) * distance(i);
                  });
                });
    for (std::int64_t g = 0; g < cut.shape.groups; ++g) {
      const float off = group_sum(sum, g) / count;
      out[g] = {out[g].mean + off, corrected(group_sum(squares, g), off, count)};
    }
  }

  FASTKERN_INLINE void row_apply(std::int64_t sample, std::int64_t piece, float* scratch) const {
    const std::int64_t width = cut.width();
    const T* __restrict in = x + cut.row_start(sample, piece);
    T* __restrict out = y + cut.row_start(sample, piece);
    float* __restrict mean = scratch, * __restrict scale = scratch + width;
    const float* __restrict w = weight.data(), * __restrict shift = bias.data();
    spread(cut, stats + 2 * sample * cut.shape.groups, 2, mean);
    spread(cut, stats + 2 * sample * cut.shape.groups + 1, 2, scale);
    for (std::int64_t i = 0; i < width; ++i) scale[i] *= w[i];
    for_columns(cut.rows_of(piece) * cut.shape.channels, width,
                [&](std::int64_t i, std::int64_t column) __attribute__((always_inline)) {
                  const float z = (to_float(in[i]) - mean[column]) * scale[column] + shift[column];
                  out[i] = from_float<T>(activate<kSilu>(z));
                });
  }

  void run() const {
    const GroupShape& s = cut.shape;
    const std::int64_t pieces =
        cut.by_rows ? cut.row_pieces() : (s.group_size() + kPiece - 1) / kPiece;
    const auto first = [&](std::int64_t unit, std::int64_t piece, Moments* out, float* scratch)
                           __attribute__((always_inline)) {
                             if (cut.by_rows) {
                               row_moments(unit, piece, out, scratch);
                             } else {
                               *out = stretch_moments(unit, piece);
                             }
                           };
    const auto finish = [&](std::int64_t unit, const Moments* all) {
      if (!cut.by_rows)
        return combine(all, pieces, 1, kPiece, s.group_size(), args.eps, stats + 2 * unit);
      for (std::int64_t g = 0; g < s.groups; ++g) {
        combine(all + g, pieces, s.groups, cut.piece_rows() * s.group_channels(), s.group_size(),
                args.eps, stats + 2 * (unit * s.groups + g));
      }
    };
    const auto second = [&](std::int64_t unit, std::int64_t piece, float* scratch)
                            __attribute__((always_inline)) {
                              if (!y) return;
                              if (cut.by_rows) {
                                row_apply(unit, piece, scratch);
                              } else {
                                stretch_apply(unit, piece);
                              }
                            };
    run_units<Moments>(cut.units(), pieces, cut.by_rows ? s.groups : 1, s.numel() / cut.units(),
                       3 * cut.width(), first, finish, second);
  }
};

}  // namespace

void group_norm(const GroupNormFwd& args) {
  constexpr const char* kOp = "fastkern::group_norm";
  const GroupShape shape = group_shape(args.x, args.num_groups, kOp);
  if (args.y.given()) check_group_layout(args.y, args.x, kOp, "y");
  if (shape.numel() == 0) return;
  const Cut cut(shape);
  const Floats weight = columns_of(args.weight, cut, 1.0f), bias = columns_of(args.bias, cut, 0.0f);
  Floats own(args.stats.given() ? 0 : 2 * shape.group_count());
  float* const stats = args.stats.given() ? static_cast<float*>(args.stats.data) : own.data();
  dispatch(args.x.dtype, [&]<class T>() {
    dispatch_activation(args.activation, [&]<bool kSilu>() {
      Forward<T, kSilu>{cut, args, weight, bias, stats}.run();
    });
  });
}

}  // namespace fastkern::cpu
