// SPDX-License-Identifier: Apache-2.0
// Norms on the CPU, backward.
//
//   xhat = norm(x),  g = dy * w + dy2 * w2            w: weight_offset + weight, or 1
//   d  = rstd * (g - xhat * mean(g * xhat)) + dh                  rms
//      = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh        layer
//   dx = d,  dbranch = dropout(d) * rowscale,  dweight = sum of dy * xhat,  dbias = sum of dy
//
// Two loops over a row: one for the sums that xhat and d need, one that writes d and adds to the
// weight gradients. What else there may be has loops of its own.
#include "fastkern/norm.h"

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "rowwise.h"

namespace fastkern::cpu {
namespace {

// Weight gradients are summed over fixed groups of rows, then over the groups: the split depends on
// M, H and N alone, so the result does not depend on the number of threads. Many short rows make
// more groups, so that no sum has very many terms.
constexpr std::int64_t kRowGroups = 64, kGroupRows = 64, kMostSums = 1 << 18;

/// All heads of a group are summed at once, so a group has at least one row of each.
std::int64_t row_groups(const NormBwd& a, std::int64_t m, std::int64_t n) {
  std::int64_t heads = 1;
  for (const TensorRef* t : {&a.dweight, &a.dbias, &a.dweight2, &a.dbias2}) {
    if (t->ndim == 2) heads = std::max(heads, t->sizes[0]);
  }
  FK_CHECK(m % heads == 0, a.op, ": x must have rows for each of ", heads, " heads, got ", m);
  const std::int64_t most = std::max(kRowGroups, kMostSums / std::max<std::int64_t>(heads * n, 1));
  return std::min({m / heads, std::max(kRowGroups, m / heads / kGroupRows), most});
}

/// Memory for the sums, which a thread keeps for its next call: the first touch of fresh pages can
/// take as long as all the rest.
class KeptFloats {
 public:
  explicit KeptFloats(std::int64_t count) : floats_(std::exchange(kept(), Floats())) {
    if (floats_.size() < count) floats_ = Floats(count);
  }
  ~KeptFloats() {
    constexpr std::int64_t kMost = 1 << 21;  // 8 MiB
    if (floats_.size() <= kMost) kept() = std::move(floats_);
  }
  KeptFloats(const KeptFloats&) = delete;

  float* data() const { return floats_.data(); }

 private:
  static Floats& kept() {
    thread_local Floats floats;
    return floats;
  }

  Floats floats_;
};

/// A weight gradient: its sums over the rows of each group.
struct Sums {
  Sums(const TensorRef& t, std::int64_t n, std::int64_t groups)
      : out(t),
        groups(groups),
        n(n),
        heads(t.ndim == 2 ? std::max<std::int64_t>(t.sizes[0], 1) : 1),
        size(t.given() ? heads * n : 0) {}

  TensorRef out;
  std::int64_t groups, n, heads, size;
  float* sums = nullptr;

  bool wanted() const { return size > 0; }
  std::int64_t floats() const { return (groups * size + 15) / 16 * 16; }

  /// Where row r of a group adds to.
  FASTKERN_INLINE float* row(std::int64_t group, std::int64_t r) const {
    return sums + group * size + (heads > 1 ? r % heads * n : 0);
  }

  void finish() const {
    if (!wanted()) return;
    dispatch(out.dtype, [&]<class T>() {
      T* result = static_cast<T*>(out.data);
      constexpr std::int64_t kBlock = 512;
      parallel_for((size + kBlock - 1) / kBlock, 4, [&](std::int64_t begin, std::int64_t end) {
        with_best_isa([&]() __attribute__((always_inline)) {
          for (std::int64_t block = begin; block < end; ++block) {
            const std::int64_t first = block * kBlock, count = std::min(kBlock, size - first);
            float total[kBlock] = {};
            for (std::int64_t group = 0; group < groups;) {
              float some[kBlock] = {};
              for (const std::int64_t last = std::min(groups, group + 32); group < last; ++group) {
                const float* sum = sums + group * size + first;
                for (std::int64_t c = 0; c < count; ++c) some[c] += sum[c];
              }
              for (std::int64_t c = 0; c < count; ++c) total[c] += some[c];
            }
            for (std::int64_t c = 0; c < count; ++c) result[first + c] = from_float<T>(total[c]);
          }
        });
      });
    });
  }
};

struct Backward {
  explicit Backward(const NormBwd& a)
      : kind(a.kind),
        eps(a.eps),
        dy(a.dy, a.op, "dy", RowTensor::required),
        x(a.x, a.op, "x", RowTensor::required),
        dx(a.dx, a.op, "dx"),
        dh(a.dh, a.op, "dh"),
        dbranch(a.dbranch, a.op, "dbranch"),
        dy2(a.dy2, a.op, "dy2"),
        m(x.rows.count),
        n(x.rows.length),
        weight(a.weight, n, static_cast<float>(a.weight_offset), 1.0f),
        weight2(a.weight2, n, static_cast<float>(a.weight_offset), 1.0f),
        rowscale{a.rowscale},
        dropout(a.dropout.p, a.dropout.seed, a.dropout.offset),
        groups(row_groups(a, m, n)),
        dweight(a.dweight, n, groups),
        dbias(a.dbias, n, groups),
        dweight2(a.dweight2, n, groups),
        dbias2(a.dbias2, n, groups),
        memory(dweight.floats() + dbias.floats() + dweight2.floats() + dbias2.floats()),
        zeros(n),
        bf16_in(!dy2.given() && x.dtype() == DType::bf16 && dy.dtype() == DType::bf16 &&
                (dh.given() ? dh.dtype() == DType::bf16
                            : dx.given() && dx.dtype() == DType::bf16 && !dbranch.given())) {
    std::fill_n(zeros.data(), n, 0.0f);
    float* next = memory.data();
    for (Sums* s : {&dweight, &dbias, &dweight2, &dbias2}) {
      s->sums = next;
      next += s->floats();
    }
  }

  /// Where the gradient of row r goes before dbranch is made of it: a row of dx, or scratch.
  template <class Out>
  FASTKERN_INLINE Out* d_row(std::int64_t r, Scratch& scratch) const {
    if constexpr (std::is_same_v<Out, float>) {
      return dx.given() && dx.dtype() == DType::f32 ? dx.row<float>(r) : scratch.row(0);
    } else {
      return dx.row<Out>(r);
    }
  }

  NormKind kind;
  double eps;
  RowTensor dy, x, dx, dh, dbranch, dy2;
  std::int64_t m, n;
  Parameters weight, weight2;
  RowScale rowscale;
  DropoutRows dropout;
  std::int64_t groups;
  Sums dweight, dbias, dweight2, dbias2;
  KeptFloats memory;
  Floats zeros;  // what the first row of a group and head adds to, sparing a clear
  bool bf16_in;  // x, dy and dh are bf16, and so is all that comes out if there is no dh
};

/// xhat = (x - pivot - shift) * rstd,  d = rstd * (g - mean_g - xhat * mean_gx).
struct Statistics {
  float pivot = 0.0f, shift = 0.0f, rstd = 0.0f, mean_g = 0.0f, mean_gx = 0.0f;
};

template <class X, class G>
FASTKERN_INLINE Statistics statistics_of(const Backward& b, const X& x, const G& g) {
  const float count = static_cast<float>(b.n);
  if (b.kind == NormKind::rms) {
    const auto [squares, dot] =
        lane_sums<2>(b.n, [=](std::int64_t c) __attribute__((always_inline)) {
          const float v = x(c);
          return std::array{v * v, g(c) * v};
        });
    const float rstd = rstd_of(squares / count, b.eps);
    return {.rstd = rstd, .mean_gx = dot * rstd / count};
  }
  float sum_g = 0.0f, dot = 0.0f;
  const Moments m = moments_of(b.n, x, [&](float pivot) __attribute__((always_inline)) {
    const auto sums = lane_sums<4>(b.n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float d = x(c) - pivot, v = g(c);
      return std::array{d, d * d, v, v * d};
    });
    sum_g = sums[2], dot = sums[3];
    return std::array{sums[0], sums[1]};
  });
  const float rstd = rstd_of(m.var, b.eps);
  return {m.pivot, m.shift, rstd, sum_g / count, (dot - m.shift * sum_g) * rstd / count};
}

/// g of row r if there are two outputs.
const float* sum_of_outputs(const Backward& b, std::int64_t r, const float* dy, const float* dy2,
                            float* g) {
  const float *w = b.weight.row(r), *w2 = b.weight2.row(r);
  for_columns(b.n, [=](std::int64_t c)
                       __attribute__((always_inline)) { g[c] = dy[c] * w[c] + dy2[c] * w2[c]; });
  return g;
}

/// Row r of dx and dbranch from d, which may be that row of dx.
void finish_row(const Backward& b, std::int64_t r, const float* d, float* scratch) {
  if (b.dx.given() && b.dx.dtype() != DType::f32) {
    store_row(b.dx, r, [=](std::int64_t c) __attribute__((always_inline)) { return d[c]; });
  }
  if (!b.dbranch.given()) return;
  const float scale = b.rowscale.at(r);
  if (b.dropout.active) {
    const float* factors = b.dropout.factors(r, b.n, scratch);
    store_row(b.dbranch, r, [=](std::int64_t c) __attribute__((always_inline)) {
      return dropped(d[c], factors[c]) * scale;
    });
  } else {
    store_row(b.dbranch, r,
              [=](std::int64_t c) __attribute__((always_inline)) { return d[c] * scale; });
  }
}

/// What the loops are compiled for.
struct Variant {
  bool dweight = false, dbias = false;  // sums that are wanted; dbias alone drags a dweight along
  bool dh = false, second = false;      // whether there is a dh, and a second output
};

/// The rows of a group; x, dy and dh are read as In, d is written as Out.
template <class In, class Out, Variant kV>
FASTKERN_INLINE void group_gradients(const Backward& b, std::int64_t group, Scratch& scratch) {
  const std::int64_t n = b.n, first = b.m * group / b.groups, last = b.m * (group + 1) / b.groups;
  // What a row adds to: zeros if it is the first of its group and head, which spares a clear.
  const auto before = [&](const Sums& sums, std::int64_t r) __attribute__((always_inline)) {
    return r - first < sums.heads ? b.zeros.data() : sums.row(group, r);
  };
  for (std::int64_t r = first; r < last; ++r) {
    b.dx.prefetch<true>(r);
    const In* x = typed_row<In>(b.x, r, scratch.row(2));
    const In* dy = typed_row<In>(b.dy, r, scratch.row(3));
    const In* dh = nullptr;
    if constexpr (kV.dh) dh = typed_row<In>(b.dh, r, scratch.row(4));
    const float *weight = b.weight.row(r), *dy2 = nullptr, *sum = nullptr;
    if constexpr (kV.second) {
      dy2 = load_row(b.dy2, r, scratch.row(5));
      sum = sum_of_outputs(b, r, dy, dy2, scratch.row(6));
    }
    const auto g = [=](std::int64_t c) __attribute__((always_inline)) {
      return kV.second ? sum[c] : to_float(dy[c]) * weight[c];
    };
    const auto value = [=](std::int64_t c)
                           __attribute__((always_inline)) { return to_float(x[c]); };
    const Statistics s = statistics_of(b, value, g);
    b.x.prefetch<false>(r + 1);
    b.dy.prefetch<false>(r + 1);
    const auto xhat = [=](std::int64_t c) __attribute__((always_inline)) {
      return (value(c) - s.pivot - s.shift) * s.rstd;
    };

    Out* d = b.d_row<Out>(r, scratch);
    const bool dump = !b.dweight.wanted();
    float* dw = dump ? scratch.row(1) : b.dweight.row(group, r);
    const float* dw0 = dump ? b.zeros.data() : before(b.dweight, r);
    float* db = b.dbias.row(group, r);
    const float* db0 = before(b.dbias, r);
    columns(n, [=](std::int64_t c) __attribute__((always_inline)) {
      const float h = xhat(c);
      if constexpr (kV.dweight) dw[c] = dw0[c] + to_float(dy[c]) * h;
      if constexpr (kV.dbias) db[c] = db0[c] + to_float(dy[c]);
      const float of_x = s.rstd * (g(c) - s.mean_g - h * s.mean_gx);
      if constexpr (kV.dh) {
        d[c] = from_float<Out>(of_x + to_float(dh[c]));
      } else {
        d[c] = from_float<Out>(of_x);
      }
    });
    if constexpr (kV.second) {
      const auto add = [&](const Sums& sums, const auto& term) {
        if (!sums.wanted()) return;
        float* to = sums.row(group, r);
        const float* from = before(sums, r);
        for_columns(
            n, [=](std::int64_t c) __attribute__((always_inline)) { to[c] = from[c] + term(c); });
      };
      add(b.dweight2,
          [=](std::int64_t c) __attribute__((always_inline)) { return dy2[c] * xhat(c); });
      add(b.dbias2, [=](std::int64_t c) __attribute__((always_inline)) { return dy2[c]; });
    }
    if constexpr (std::is_same_v<Out, float>) finish_row(b, r, d, scratch.row(1));
  }
}

/// run<In, Out, kV>() for what is asked for. Rows of bf16 are read, and dx of bf16 is written, as
/// they lie; other types are converted on the way, which f32 does not need.
template <class Run>
void pick(const Backward& b, const Run& run) {
  const auto with_types = [&]<class In, class Out, bool kDh, bool kSecond>() {
    if (b.dbias.wanted()) {
      run.template operator()<In, Out, Variant{true, true, kDh, kSecond}>();
    } else if (b.dweight.wanted()) {
      run.template operator()<In, Out, Variant{true, false, kDh, kSecond}>();
    } else {
      run.template operator()<In, Out, Variant{false, false, kDh, kSecond}>();
    }
  };
  if (b.dy2.given()) {
    b.dh.given() ? with_types.template operator()<float, float, true, true>()
                 : with_types.template operator()<float, float, false, true>();
  } else if (b.bf16_in && b.dh.given()) {
    with_types.template operator()<bf16, float, true, false>();
  } else if (b.bf16_in) {
    with_types.template operator()<bf16, bf16, false, false>();
  } else {
    b.dh.given() ? with_types.template operator()<float, float, true, false>()
                 : with_types.template operator()<float, float, false, false>();
  }
}

}  // namespace

void norm_bwd(const NormBwd& args) {
  const Backward b(args);
  if (b.n == 0) return;
  const std::int64_t grain = 1 + b.groups * row_grain(b.n) / std::max<std::int64_t>(b.m, 1);
  parallel_for(b.groups, grain, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(7, b.n);
    pick(b, [&]<class In, class Out, Variant kV>() {
      with_best_isa([&]() __attribute__((always_inline)) {
        for (std::int64_t group = begin; group < end; ++group) {
          group_gradients<In, Out, kV>(b, group, scratch);
        }
      });
    });
  });
  for (const Sums* s : {&b.dweight, &b.dbias, &b.dweight2, &b.dbias2}) s->finish();
}

}  // namespace fastkern::cpu
