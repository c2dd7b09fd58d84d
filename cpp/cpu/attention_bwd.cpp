// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU, backward. With p = exp(s - lse), dropped and scaled where there is dropout
// (f: its factors),
//
//   dv = (p f)^T dout,  dp = (dout v^T) f,  ds = p (dp - delta),  delta = sum of dout out - dlse
//   dq = scale ds' k,   dk = scale ds'^T q,  ds' = ds (1 - (s / cap)^2)   s: before the bias
//   dbias = ds,  dsink = -sum over queries of exp(sink - lse) delta
//
// A unit of work has one key head of one entry and adds to dk and dv of all its keys in f32, query
// block after query block; dq of a block is complete when its keys are through. Few heads are cut
// into several units by query blocks, whose dk and dv are added in order: the cut is a function of
// the shapes, so the result does not depend on the number of threads.
#include "attention_blocks.h"

namespace fastkern::cpu {
namespace {

using namespace attention_detail;

struct Backward {
  explicit Backward(const AttentionBwd& a)
      : p(a.fwd), dout(a.dout), dq(a.dq), dk(a.dk), dv(a.dv), dlse(a.dlse) {}

  Problem p;
  Operand dout, dq, dk, dv;
  TensorRef dlse;
};

struct Workspace {
  Workspace(std::int64_t d, std::int64_t dv)
      : qt(d * kBlock),
        dot(dv * kBlock),
        q(kBlock * padded(d)),
        dout(kBlock * padded(dv)),
        k(kBlock * padded(d)),
        v(kBlock * padded(dv)),
        s(kBlock * kBlock),
        ds(kBlock * kBlock),
        capped(kBlock * kBlock),
        factors(kBlock * kBlock),
        dq(kBlock * padded(d)),
        lse(kBlock),
        delta(kBlock) {}

  Floats qt, dot, q, dout, k, v, s, ds, capped, factors, dq, lse, delta;
};

/// The queries of a block, their dout and what is one number for each of them. A query that saw
/// nothing becomes 0, with its dout: whatever there is, NaN too, changes no gradient.
void load_queries(const Backward& b, const Sequence& at, std::int64_t h, std::int64_t i0,
                  std::int64_t i1, Workspace& work) {
  const Problem& p = b.p;
  const std::int64_t rows = i1 - i0, d = padded(p.d), dv = padded(p.dv), first = at.first_q + i0;
  float *const q = work.q.data(), *const dout = work.dout.data(), *const out = work.v.data();
  load_rows(p.q, at.batch, first, rows, h, q);
  load_rows(b.dout, at.batch, first, rows, h, dout);
  load_rows(p.out, at.batch, first, rows, h, out);  // for this only
  const float* const lse = static_cast<const float*>(p.args.lse.data);
  const float* const dlse = static_cast<const float*>(b.dlse.data);
  float *const to_lse = work.lse.data(), *const to_delta = work.delta.data();
  for (std::int64_t i = 0; i < kBlock; ++i) {
    to_lse[i] = kInfinity, to_delta[i] = 0.0f;  // probabilities of 0
    if (i >= rows) continue;
    const std::int64_t place = p.lse_at(at, h, i0 + i);
    float *const g = dout + i * dv, *const o = out + i * dv;
    if (lse[place] == -kInfinity) {
      std::fill_n(q + i * d, d, 0.0f);
      std::fill_n(g, dv, 0.0f);
      continue;
    }
    to_lse[i] = lse[place];
    with_best_isa([=]() __attribute__((always_inline)) {
      to_delta[i] = lane_sums<1>(dv, [=](std::int64_t c) __attribute__((always_inline)) {
        return std::array{o[c] * g[c]};
      })[0];
    });
    if (b.dlse.given()) to_delta[i] -= dlse[place];
  }
  transpose(rows, p.d, q, d, p.scale, work.qt.data());
  transpose(rows, p.dv, dout, dv, 1.0f, work.dot.data());
}

/// work.s: probabilities as they multiply v; work.ds: gradients of the scores or, `of_products`,
/// of what a softcap was put on.
void block_gradients(const Backward& b, const Sequence& at, const Sight& sight, std::int64_t h,
                     std::int64_t i0, std::int64_t i1, std::int64_t j0, std::int64_t j1,
                     bool of_products, Workspace& work) {
  const Problem& p = b.p;
  const std::int64_t rows = j1 - j0, columns = padded(i1 - i0), g = p.kv_head(h);
  load_rows(p.k, at.batch, at.first_k + j0, rows, g, work.k.data());
  load_rows(p.v, at.batch, at.first_k + j0, rows, g, work.v.data());
  float *const s = work.s.data(), *const ds = work.ds.data();
  const bool capped = p.softcap > 0.0f && of_products;
  block_scores(p, at, sight, h, i0, i1, j0, j1, work.qt.data(), work.k.data(), s,
               capped ? work.capped.data() : nullptr);
  matmul<false>(rows, columns, p.dv, work.v.data(), padded(p.dv), 1, work.dot.data(), kBlock, ds,
                kBlock);
  const float *const lse = work.lse.data(), *const delta = work.delta.data();
  const float* const f = work.factors.data();
  const auto gradients = [=]<bool kDropout>() {
    with_best_isa([=]() __attribute__((always_inline)) {
      for (std::int64_t j = 0; j < rows; ++j) {
#pragma GCC ivdep
        for (std::int64_t i = 0; i < columns; ++i) {
          const std::int64_t e = j * kBlock + i;
          const float probability = exp_to_zero(s[e] - lse[i]), factor = kDropout ? f[e] : 1.0f;
          ds[e] = probability * (ds[e] * factor - delta[i]);
          s[e] = probability * factor;
        }
      }
    });
  };
  if (p.threshold > 0) {
    block_dropout(p, at, h, i0, i1, j0, j1, work.factors.data());
    gradients.template operator()<true>();
  } else {
    gradients.template operator()<false>();
  }
  if (!capped) return;
  const float* const of = work.capped.data();
  const float inverse = 1.0f / p.softcap;
  with_best_isa([=]() __attribute__((always_inline)) {
    for (std::int64_t j = 0; j < rows; ++j) {
#pragma GCC ivdep
      for (std::int64_t i = 0; i < columns; ++i) {
        const float ratio = of[j * kBlock + i] * inverse;
        ds[j * kBlock + i] *= 1.0f - ratio * ratio;
      }
    }
  });
}

/// dq of queries i0 to i1, and what they add to dk and dv, which have padded rows.
void query_block(const Backward& b, const Sequence& at, std::int64_t h, std::int64_t i0, float* dk,
                 float* dv, Workspace& work) {
  const Problem& p = b.p;
  const Sight sight = p.sight(at);
  const std::int64_t i1 = std::min(at.queries, i0 + kBlock), rows = i1 - i0;
  const std::int64_t wide = padded(p.d), wide_v = padded(p.dv);
  load_queries(b, at, h, i0, i1, work);
  std::fill_n(work.dq.data(), rows * wide, 0.0f);
  each_key_block(p, sight, h, i0, i1, [&](std::int64_t j0, std::int64_t j1) {
    block_gradients(b, at, sight, h, i0, i1, j0, j1, true, work);
    const std::int64_t keys = j1 - j0;
    const float *const s = work.s.data(), *const ds = work.ds.data();
    if (b.dv.present) {
      matmul<true>(keys, wide_v, rows, s, kBlock, 1, work.dout.data(), wide_v, dv + j0 * wide_v,
                   wide_v);
    }
    if (b.dk.present) {
      matmul<true>(keys, wide, rows, ds, kBlock, 1, work.q.data(), wide, dk + j0 * wide, wide);
    }
    if (b.dq.present) {
      matmul<true>(rows, wide, keys, ds, 1, kBlock, work.k.data(), wide, work.dq.data(), wide);
    }
  });
  if (!b.dq.present) return;
  std::fill_n(work.lse.data(), kBlock, p.scale);
  store_rows(b.dq, at.batch, at.first_q + i0, rows, h, work.dq.data(), wide, work.lse.data());
}

void store_all(const Operand& to, const Sequence& at, std::int64_t g, const float* from,
               std::int64_t wide, float scale) {
  float scales[kBlock];
  std::fill_n(scales, kBlock, scale);
  for (std::int64_t j0 = 0; j0 < at.keys; j0 += kBlock) {
    store_rows(to, at.batch, at.first_k + j0, std::min(kBlock, at.keys - j0), g, from + j0 * wide,
               wide, scales);
  }
}

void gradients_of_operands(const Backward& b) {
  const Problem& p = b.p;
  constexpr std::int64_t kUnits = 16;           // at least, if there is that much to do
  constexpr std::int64_t kMostParts = 1 << 26;  // floats, if they are to be kept: 256 MiB
  const std::int64_t group = p.heads / p.kv_heads, pairs = p.batch * p.kv_heads;
  const std::int64_t wide = padded(p.d), wide_v = padded(p.dv);
  const std::int64_t row = wide + wide_v, size = std::max<std::int64_t>(p.total_k * row, 1);
  const std::int64_t cuts =
      std::clamp<std::int64_t>(std::min((kUnits + pairs - 1) / pairs, kMostParts / (pairs * size)),
                               1, group * blocks_of(p.total_q));
  // Of a cut pair all parts are kept; they are added up by the last loop.
  Floats parts(cuts > 1 ? pairs * cuts * p.total_k * row : 0);
  parallel_for(pairs * cuts, 1, [&](std::int64_t begin, std::int64_t end) {
    Workspace work(p.d, p.dv);
    Floats own(cuts > 1 ? 0 : p.total_k * row);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t cut = unit % cuts, g = unit / cuts % p.kv_heads;
      const Sequence at = p.sequence(unit / cuts / p.kv_heads);
      float* const dk = cuts > 1 ? parts.data() + unit * p.total_k * row : own.data();
      float* const dv = dk + at.keys * wide;
      std::fill_n(dk, at.keys * row, 0.0f);
      // Every cuts-th block: under a causal mask they then take about as long.
      const std::int64_t blocks = blocks_of(at.queries);
      for (std::int64_t i = cut; i < group * blocks; i += cuts) {
        query_block(b, at, g * group + i / blocks, i % blocks * kBlock, dk, dv, work);
      }
      if (cuts > 1) continue;
      if (b.dk.present) store_all(b.dk, at, g, dk, wide, p.scale);
      if (b.dv.present) store_all(b.dv, at, g, dv, wide_v, 1.0f);
    }
  });
  if (cuts == 1) return;
  parallel_for(pairs, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pair = begin; pair < end; ++pair) {
      const Sequence at = p.sequence(pair / p.kv_heads);
      float* const sum = parts.data() + pair * cuts * p.total_k * row;
      for (std::int64_t cut = 1; cut < cuts; ++cut) {
        const float* const part = sum + cut * p.total_k * row;
        with_best_isa([=, count = at.keys * row]() __attribute__((always_inline)) {
          for (std::int64_t e = 0; e < count; ++e) sum[e] += part[e];
        });
      }
      if (b.dk.present) store_all(b.dk, at, pair % p.kv_heads, sum, wide, p.scale);
      if (b.dv.present) {
        store_all(b.dv, at, pair % p.kv_heads, sum + at.keys * wide, wide_v, 1.0f);
      }
    }
  });
}

/// A unit has an entry and a head of the bias, and a block of its queries or all: it adds up, in
/// f32 and with a row for each key, what all the entries, heads and blocks give that share it.
void gradient_of_bias(const Backward& b, const TensorRef& bias, const TensorRef& to) {
  const Problem& p = b.p;
  const bool each_entry = bias.sizes[0] > 1, each_head = bias.sizes[1] > 1;
  const bool each_query = bias.sizes[2] > 1 || p.total_q == 1;
  const std::int64_t blocks = blocks_of(p.total_q), parts = each_query ? blocks : 1;
  const std::int64_t units = bias.sizes[0] * bias.sizes[1] * parts;
  parallel_for(units, 1, [&](std::int64_t begin, std::int64_t end) {
    Workspace work(p.d, p.dv);
    Floats sums(p.total_k * kBlock);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t part = unit % parts, head = unit / parts % bias.sizes[1],
                         entry = unit / parts / bias.sizes[1];
      std::fill_n(sums.data(), p.total_k * kBlock, 0.0f);
      for (std::int64_t e = each_entry ? entry : 0; e < (each_entry ? entry + 1 : p.batch); ++e) {
        const Sequence at = p.sequence(e);
        const Sight sight = p.sight(at);
        const std::int64_t last = each_head ? head + 1 : p.heads;
        for (std::int64_t h = each_head ? head : 0; h < last; ++h) {
          for (std::int64_t block = part; block < (each_query ? part + 1 : blocks); ++block) {
            const std::int64_t i0 = block * kBlock, i1 = std::min(at.queries, i0 + kBlock);
            if (i0 >= i1) continue;
            load_queries(b, at, h, i0, i1, work);
            each_key_block(p, sight, h, i0, i1, [&](std::int64_t j0, std::int64_t j1) {
              block_gradients(b, at, sight, h, i0, i1, j0, j1, false, work);
              const float* const ds = work.ds.data();
              float* const sum = sums.data() + j0 * kBlock;
              with_best_isa([=, rows = j1 - j0, columns = i1 - i0]()
                                __attribute__((always_inline)) {
                                  for (std::int64_t j = 0; j < rows; ++j) {
                                    for (std::int64_t i = 0; i < columns; ++i) {
                                      sum[j * kBlock + i] += ds[j * kBlock + i];
                                    }
                                  }
                                });
            });
          }
        }
      }
      dispatch(to.dtype, [&]<class T>() {
        T* const out = static_cast<T*>(to.data) +
                       (entry * bias.sizes[1] + head) * (bias.sizes[2] * bias.sizes[3]);
        if (each_query) {
          const std::int64_t i0 = part * kBlock;
          for (std::int64_t i = i0; i < std::min(p.total_q, i0 + kBlock); ++i) {
            for (std::int64_t j = 0; j < p.total_k; ++j) {
              out[i * p.total_k + j] = from_float<T>(sums.data()[j * kBlock + i - i0]);
            }
          }
        } else {
          for (std::int64_t j = 0; j < p.total_k; ++j) {
            float total = 0.0f;
            for (std::int64_t i = 0; i < kBlock; ++i) total += sums.data()[j * kBlock + i];
            out[j] = from_float<T>(total);
          }
        }
      });
    }
  });
}

void gradient_of_sinks(const Backward& b, const TensorRef& to) {
  const Problem& p = b.p;
  parallel_for(p.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    Workspace work(p.d, p.dv);
    for (std::int64_t h = begin; h < end; ++h) {
      const float sink = p.sink(h);
      double total = 0.0;
      for (std::int64_t e = 0; e < p.batch; ++e) {
        const Sequence at = p.sequence(e);
        for (std::int64_t i0 = 0; i0 < at.queries; i0 += kBlock) {
          const std::int64_t i1 = std::min(at.queries, i0 + kBlock);
          load_queries(b, at, h, i0, i1, work);
          float sum = 0.0f;
          for (std::int64_t i = 0; i < i1 - i0; ++i) {
            sum += exp_to_zero(sink - work.lse.data()[i]) * work.delta.data()[i];
          }
          total -= sum;
        }
      }
      dispatch(to.dtype, [&]<class T>() {
        static_cast<T*>(to.data)[h] = from_float<T>(static_cast<float>(total));
      });
    }
  });
}

}  // namespace

void attention_bwd(const AttentionBwd& args) {
  const Backward b(args);
  const bool nothing = b.p.heads == 0 || b.p.batch == 0 || b.p.total_q == 0;
  for (const TensorRef* t : {&args.dq, &args.dk, &args.dv}) {
    if (b.p.ragged() || nothing) clear(*t);
  }
  clear(args.dbias);
  clear(args.dsinks);
  if (nothing) return;
  if (b.dq.present || b.dk.present || b.dv.present) gradients_of_operands(b);
  if (args.dbias.given()) gradient_of_bias(b, args.fwd.bias, args.dbias);
  if (args.dsinks.given()) gradient_of_sinks(b, args.dsinks);
}

}  // namespace fastkern::cpu
