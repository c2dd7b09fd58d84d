// SPDX-License-Identifier: Apache-2.0
// Group normalisation on the CPU, backward.
//   dz = dy * act'(z),  g = dz * weight
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dweight = sum dz * xhat,  dbias = sum dz
#include "fastkern/group_norm.h"
#include "group_pieces.h"

namespace fastkern::cpu {
namespace {

using namespace groups;

constexpr std::int64_t kKeepMost = 256 * 1024;
constexpr std::int64_t kShort = 64;  // positions that are summed in 8 lanes

template <class T, bool kSilu>
struct Backward {
  const Cut& cut;
  const GroupNormBwd& args;
  const Floats &weight, &bias;  // columns
  const float* stats;
  float *sum_dz, *sum_xhat;  // (N, C): sums over positions of dz and of dz * xhat
  float* means;              // (N, G, 2): of g and of g * xhat
  const T* x = static_cast<const T*>(args.x.data);
  const T* dy = static_cast<const T*>(args.dy.data);
  T* dx = static_cast<T*>(args.dx.data);
  // A group's dz waits for the second phase where that is cheaper than to compute it again.
  bool keep_dz = kSilu && dx && !cut.by_rows && cut.shape.group_size() <= kKeepMost &&
                 one_thread_a_unit(cut.units(), cut.shape.group_channels());

  // ---- channels-first: units are groups, pieces their channels ----

  FASTKERN_INLINE void plane_sums(std::int64_t group, std::int64_t piece, float* scratch) const {
    const GroupShape& s = cut.shape;
    const std::int64_t plane = group * s.group_channels() + piece, c = plane % s.channels;
    const float mean = stats[2 * group], rstd = stats[2 * group + 1], w = weight[c], b = bias[c];
    float dz_total = 0.0f, xhat_total = 0.0f;
    for (std::int64_t first = 0; first < s.positions; first += kPiece) {
      const T* __restrict in = x + plane * s.positions + first;
      const T* __restrict grad = dy + plane * s.positions + first;
      float* __restrict kept = scratch + piece * s.positions + first;
      const std::int64_t n = std::min(kPiece, s.positions - first);
      float dz_lanes[kLanes] = {}, xhat_lanes[kLanes] = {};
      const auto add = [&](std::int64_t i, int l, bool keep) __attribute__((always_inline)) {
        const float xhat = (to_float(in[i]) - mean) * rstd;
        const float dz = activate_grad<kSilu>(to_float(grad[i]), xhat * w + b);
        if (keep) kept[i] = dz;
        dz_lanes[l] += dz;
        xhat_lanes[l] += dz * xhat;
      };
      const auto add_all = [&]<int kWidth>(bool keep) __attribute__((always_inline)) {
        std::int64_t i = 0;
        for (; i + kWidth <= n; i += kWidth) {
          for (int l = 0; l < kWidth; ++l) add(i + l, l, keep);
        }
        for (int l = 0; i < n; ++i, ++l) add(i, l, keep);
        dz_total += fold_lanes<kWidth>(dz_lanes);
        xhat_total += fold_lanes<kWidth>(xhat_lanes);
      };
      if (s.positions < kShort) {
        add_all.template operator()<8>(kSilu && keep_dz);
      } else if (kSilu && keep_dz) {
        add_all.template operator()<kLanes>(true);
      } else {
        add_all.template operator()<kLanes>(false);
      }
    }
    sum_dz[plane] = dz_total;
    sum_xhat[plane] = xhat_total;
  }

  FASTKERN_INLINE void plane_dx(std::int64_t group, std::int64_t piece,
                                const float* scratch) const {
    const GroupShape& s = cut.shape;
    const std::int64_t plane = group * s.group_channels() + piece, c = plane % s.channels;
    const float mean = stats[2 * group], rstd = stats[2 * group + 1], w = weight[c], b = bias[c];
    const float mean_g = means[2 * group], mean_xhat = means[2 * group + 1];
    const T* __restrict in = x + plane * s.positions, * __restrict grad = dy + plane * s.positions;
    T* __restrict out = dx + plane * s.positions;
    const auto store = [&](std::int64_t i, float xhat, float dz) __attribute__((always_inline)) {
      out[i] = from_float<T>(rstd * (dz * w - mean_g - xhat * mean_xhat));
    };
    if (kSilu && keep_dz) {
      const float* __restrict kept = scratch + piece * s.positions;
      for (std::int64_t i = 0; i < s.positions; ++i)
        store(i, (to_float(in[i]) - mean) * rstd, kept[i]);
      return;
    }
    for (std::int64_t i = 0; i < s.positions; ++i) {
      const float xhat = (to_float(in[i]) - mean) * rstd;
      store(i, xhat, activate_grad<kSilu>(to_float(grad[i]), xhat * w + b));
    }
  }

  // ---- by rows: units are samples, pieces are some of their positions ----

  FASTKERN_INLINE void row_sums(std::int64_t sample, std::int64_t piece, float* out,
                                float* scratch) const {
    const std::int64_t width = cut.width(), channels = cut.shape.channels;
    const std::int64_t start = cut.row_start(sample, piece);
    float* __restrict mean = scratch, * __restrict rstd = scratch + width;
    float* __restrict dz_sum = scratch + 2 * width, * __restrict xhat_sum = scratch + 3 * width;
    const float* __restrict w = weight.data(), * __restrict b = bias.data();
    const T* __restrict in = x + start, * __restrict grad = dy + start;
    spread(cut, stats + 2 * sample * cut.shape.groups, 2, mean);
    spread(cut, stats + 2 * sample * cut.shape.groups + 1, 2, rstd);
    std::fill_n(dz_sum, 2 * width, 0.0f);
    for_columns(cut.rows_of(piece) * channels, width,
                [&](std::int64_t i, std::int64_t column) __attribute__((always_inline)) {
                  const float xhat = (to_float(in[i]) - mean[column]) * rstd[column];
                  const float dz =
                      activate_grad<kSilu>(to_float(grad[i]), xhat * w[column] + b[column]);
                  dz_sum[column] += dz;
                  xhat_sum[column] += dz * xhat;
                });
    for (const float* sums : {dz_sum, xhat_sum}) {
      std::copy_n(sums, channels, out);
      for (std::int64_t f = 1; f < cut.fold; ++f) {
        for (std::int64_t c = 0; c < channels; ++c) out[c] += sums[f * channels + c];
      }
      out += channels;
    }
  }

  FASTKERN_INLINE void row_dx(std::int64_t sample, std::int64_t piece, float* scratch) const {
    const std::int64_t width = cut.width(), start = cut.row_start(sample, piece);
    const std::int64_t first = 2 * sample * cut.shape.groups;
    float* __restrict mean = scratch, * __restrict rstd = scratch + width;
    float* __restrict mean_g = scratch + 2 * width, * __restrict mean_xhat = scratch + 3 * width;
    const float* __restrict w = weight.data(), * __restrict b = bias.data();
    const T* __restrict in = x + start, * __restrict grad = dy + start;
    T* __restrict out = dx + start;
    spread(cut, stats + first, 2, mean);
    spread(cut, stats + first + 1, 2, rstd);
    spread(cut, means + first, 2, mean_g);
    spread(cut, means + first + 1, 2, mean_xhat);
    for_columns(cut.rows_of(piece) * cut.shape.channels, width,
                [&](std::int64_t i, std::int64_t column) __attribute__((always_inline)) {
                  const float xhat = (to_float(in[i]) - mean[column]) * rstd[column];
                  const float dz =
                      activate_grad<kSilu>(to_float(grad[i]), xhat * w[column] + b[column]);
                  out[i] = from_float<T>(
                      rstd[column] * (dz * w[column] - mean_g[column] - xhat * mean_xhat[column]));
                });
  }

  /// Means of a group from the sums of its channels.
  void finish_group(std::int64_t group) const {
    const std::int64_t d = cut.shape.group_channels(), first = group * d;
    const float* const w = weight.data() + first % cut.shape.channels;
    const auto weighted = [&](const float* sums) {
      const auto term = [&](std::int64_t i)
                            __attribute__((always_inline)) { return sums[first + i] * w[i]; };
      if (d >= kLanes) return lane_sum(d, term);
      float total = 0.0f;
      for (std::int64_t i = 0; i < d; ++i) total += term(i);
      return total;
    };
    const float total = weighted(sum_dz), xhat_total = weighted(sum_xhat);
    means[2 * group] = total / static_cast<float>(cut.shape.group_size());
    means[2 * group + 1] = xhat_total / static_cast<float>(cut.shape.group_size());
  }

  void run() const {
    const GroupShape& s = cut.shape;
    const std::int64_t pieces = cut.by_rows ? cut.row_pieces() : s.group_channels();
    const auto first = [&](std::int64_t unit, std::int64_t piece, float* out, float* scratch)
                           __attribute__((always_inline)) {
                             if (cut.by_rows) {
                               row_sums(unit, piece, out, scratch);
                             } else {
                               plane_sums(unit, piece, scratch);
                             }
                           };
    const auto finish = [&](std::int64_t unit, const float* all) {
      if (!cut.by_rows) return finish_group(unit);
      const std::int64_t c = s.channels;
      std::copy_n(all, c, sum_dz + unit * c);
      std::copy_n(all + c, c, sum_xhat + unit * c);
      for (std::int64_t p = 1; p < pieces; ++p) {
        for (std::int64_t i = 0; i < c; ++i) sum_dz[unit * c + i] += all[2 * p * c + i];
        for (std::int64_t i = 0; i < c; ++i) sum_xhat[unit * c + i] += all[(2 * p + 1) * c + i];
      }
      for (std::int64_t g = 0; g < s.groups; ++g) finish_group(unit * s.groups + g);
    };
    const auto second = [&](std::int64_t unit, std::int64_t piece, float* scratch)
                            __attribute__((always_inline)) {
                              if (!dx) return;
                              if (cut.by_rows) {
                                row_dx(unit, piece, scratch);
                              } else {
                                plane_dx(unit, piece, scratch);
                              }
                            };
    run_units<float>(cut.units(), pieces, cut.by_rows ? 2 * s.channels : 0, s.numel() / cut.units(),
                     cut.by_rows ? 4 * cut.width()
                     : keep_dz   ? s.group_size()
                                 : 0,
                     first, finish, second);
  }
};

/// The sum over samples, in order, of (N, C) sums.
void sum_samples(const Floats& sums, const GroupShape& shape, const TensorRef& out) {
  if (!out.given()) return;
  const std::int64_t channels = shape.channels;
  dispatch(out.dtype, [&]<class W>() {
    parallel_for(channels, 16 * row_grain(shape.batch), [&](std::int64_t begin, std::int64_t end) {
      Floats total(end - begin);
      for (std::int64_t n = 0; n < shape.batch && !sums.empty(); ++n) {
        const float* row = &sums[n * channels + begin];
        for (std::int64_t c = 0; c < end - begin; ++c) total[c] += row[c];
      }
      W* const values = static_cast<W*>(out.data) + begin;
      for (std::int64_t c = 0; c < end - begin; ++c) values[c] = from_float<W>(total[c]);
    });
  });
}

}  // namespace

void group_norm_bwd(const GroupNormBwd& args) {
  constexpr const char* kOp = "fastkern::group_norm_bwd";
  const GroupShape shape = group_shape(args.x, args.num_groups, kOp);
  check_group_layout(args.dy, args.x, kOp, "dy");
  if (args.dx.given()) check_group_layout(args.dx, args.x, kOp, "dx");
  Floats sum_dz, sum_xhat;
  if (shape.numel() > 0) {
    const Cut cut(shape);
    const Floats weight = columns_of(args.weight, cut, 1.0f);
    const Floats bias = columns_of(args.bias, cut, 0.0f);
    Floats own, means(2 * shape.group_count());
    sum_dz.resize(shape.batch * shape.channels);
    sum_xhat.resize(shape.batch * shape.channels);
    const float* stats = static_cast<const float*>(args.stats.data);
    if (!args.stats.given()) {
      own.resize(2 * shape.group_count());
      GroupNormFwd forward{.x = args.x, .weight = {}, .bias = {}, .y = {}, .stats = {}};
      forward.stats = dense(own.data(), DType::f32, shape.batch, shape.groups, 2);
      forward.num_groups = args.num_groups;
      forward.eps = args.eps;
      group_norm(forward);
      stats = own.data();
    }
    dispatch(args.x.dtype, [&]<class T>() {
      dispatch_activation(args.activation, [&]<bool kSilu>() {
        Backward<T, kSilu>{cut,   args,          weight,          bias,
                           stats, sum_dz.data(), sum_xhat.data(), means.data()}
            .run();
      });
    });
  }
  sum_samples(sum_xhat, shape, args.dweight);
  sum_samples(sum_dz, shape, args.dbias);
}

}  // namespace fastkern::cpu
