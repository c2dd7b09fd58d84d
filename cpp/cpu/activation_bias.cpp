// SPDX-License-Identifier: Apache-2.0
// The bias in front of an activation, and sums over rows for its gradient, on the CPU.
#include "activation_rows.h"
#include "fastkern/activation.h"

namespace fastkern::cpu {

namespace {

constexpr std::int64_t kRowGroups = 64, kGroupRows = 64, kMostSums = 1 << 18;

std::int64_t groups_of(std::int64_t m, std::int64_t n, bool wanted) {
  if (m * n == 0) return 0;
  const std::int64_t most = std::max(kRowGroups, kMostSums / n);
  return wanted ? std::min({m, std::max(kRowGroups, m / kGroupRows), most})
                : std::min(m, std::max(kRowGroups, m * n / 65536));
}

}  // namespace

// Many short rows make more groups, so that no sum has very many terms.
ColumnSums::ColumnSums(std::int64_t m, std::int64_t n, bool wanted)
    : m_(m), n_(n), groups_(groups_of(m, n, wanted)), sums_(wanted ? groups_ * n : 0) {
  std::fill_n(sums_.data(), sums_.size(), 0.0f);
}

void ColumnSums::finish(const TensorRef& out) const {
  constexpr std::int64_t kBlock = 512;
  const std::int64_t groups = groups_, n = n_;
  const float* const sums = sums_.data();
  dispatch(out.dtype, [&]<class T>() {
    T* result = static_cast<T*>(out.data);
    parallel_for((n + kBlock - 1) / kBlock, 4, [&](std::int64_t begin, std::int64_t end) {
      with_best_isa([&]() __attribute__((always_inline)) {
        for (std::int64_t block = begin; block < end; ++block) {
          const std::int64_t first = block * kBlock, count = std::min(kBlock, n - first);
          float total[kBlock] = {};
          for (std::int64_t group = 0; group < groups;) {
            float some[kBlock] = {};
            for (const std::int64_t last = std::min(groups, group + 32); group < last; ++group) {
              const float* sum = sums + group * n + first;
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

void bias_act(const BiasAct& a) {
  const RowTensor x(a.x, a.op, "x", RowTensor::required);
  const RowTensor y(a.y, a.op, "y", RowTensor::required);
  const Parameters bias(a.bias, x.rows.length, 0.0f, 0.0f);
  each_piece(x.rows.count, x.rows.length, 2,
             [&](std::int64_t row, std::int64_t first, std::int64_t count, Scratch& scratch) {
               const float* const in = read_piece(x, row, first, count, scratch.row(0));
               const float* const b = bias.row(0) + first;
               float* const out = target_piece(y, row, first, scratch.row(1));
               with_math(y.dtype(), [&]<class M>() {
                 formula::with_activation(a.kind, [&]<ActivationKind kKind>() {
                   for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                     out[c] = formula::value<kKind, M>(in[c] + b[c], {});
                   });
                 });
               });
               write_piece(y, row, first, count, out);
             });
}

void bias_act_bwd(const BiasActBwd& a) {
  const RowTensor dy(a.dy, a.op, "dy", RowTensor::required);
  const RowTensor x(a.x, a.op, "x", RowTensor::required);
  const RowTensor dx(a.dx, a.op, "dx");
  const std::int64_t m = x.rows.count, n = x.rows.length;
  const Parameters bias(a.bias, n, 0.0f, 0.0f);
  const bool wanted = a.dbias.given();
  const ColumnSums sums(m, n, wanted);
  parallel_for(sums.groups(), 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(3, kPiece);
    for (std::int64_t group = begin; group < end; ++group) {
      for (std::int64_t row = sums.begin(group); row < sums.begin(group + 1); ++row) {
        for (std::int64_t first = 0; first < n; first += kPiece) {
          const std::int64_t count = std::min(kPiece, n - first);
          const float* const d = read_piece(dy, row, first, count, scratch.row(0));
          const float* const in = read_piece(x, row, first, count, scratch.row(1));
          const float* const b = bias.row(0) + first;
          float* const out =
              dx.given() ? target_piece(dx, row, first, scratch.row(2)) : scratch.row(2);
          with_math(dy.dtype(), [&]<class M>() {
            formula::with_activation(a.kind, [&]<ActivationKind kKind>() {
              for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                out[c] = formula::gradient<kKind, M>(d[c], in[c] + b[c]);
              });
            });
          });
          if (dx.given()) write_piece(dx, row, first, count, out);
          if (!wanted) continue;
          float* const sum = sums.of(group) + first;
          for_columns(count,
                      [=](std::int64_t c) __attribute__((always_inline)) { sum[c] += out[c]; });
        }
      }
    }
  });
  if (wanted) sums.finish(a.dbias);
}

}  // namespace fastkern::cpu
