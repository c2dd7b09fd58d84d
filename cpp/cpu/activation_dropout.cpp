// SPDX-License-Identifier: Apache-2.0
// Dropout, alone and between a bias and a residual stream, on the CPU. The factors of elements are
// those of dropout.cpp.
#include "activation_rows.h"
#include "fastkern/dropout.h"

namespace fastkern::cpu {

void dropout(const DropoutCall& args) {
  DropoutCall a = args;
  flatten({&a.x, &a.y}, a.op);
  const RowTensor x(a.x, a.op, "x", RowTensor::required);
  const RowTensor y(a.y, a.op, "y", RowTensor::required);
  const DropoutRows drops(a.dropout.p, a.dropout.seed, a.dropout.offset);
  const std::int64_t n = x.rows.length;
  each_piece(x.rows.count, n, 3,
             [&](std::int64_t row, std::int64_t first, std::int64_t count, Scratch& scratch) {
               const float* const in = read_piece(x, row, first, count, scratch.row(0));
               float* const out = target_piece(y, row, first, scratch.row(1));
               if (drops.active) {
                 const float* const f = drops.factors_from(row * n + first, count, scratch.row(2));
                 for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                   out[c] = dropped(in[c], f[c]);
                 });
               } else {
                 for_columns(
                     count, [=](std::int64_t c) __attribute__((always_inline)) { out[c] = in[c]; });
               }
               write_piece(y, row, first, count, out);
             });
}

void bias_dropout_add(const BiasDropoutAdd& a) {
  const RowTensor x(a.x, a.op, "x", RowTensor::required);
  const RowTensor residual(a.residual, a.op, "residual", RowTensor::required);
  const RowTensor y(a.y, a.op, "y", RowTensor::required);
  const std::int64_t n = x.rows.length;
  const Parameters bias(a.bias, n, 0.0f, 0.0f);
  const DropoutRows drops(a.dropout.p, a.dropout.seed, a.dropout.offset);
  each_piece(x.rows.count, n, 4,
             [&](std::int64_t row, std::int64_t first, std::int64_t count, Scratch& scratch) {
               const float* const in = read_piece(x, row, first, count, scratch.row(0));
               const float* const r = read_piece(residual, row, first, count, scratch.row(1));
               const float* const b = bias.row(0) + first;
               float* const out = target_piece(y, row, first, scratch.row(2));
               if (drops.active) {
                 const float* const f = drops.factors_from(row * n + first, count, scratch.row(3));
                 for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                   out[c] = r[c] + dropped(in[c] + b[c], f[c]);
                 });
               } else {
                 for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                   out[c] = r[c] + (in[c] + b[c]);
                 });
               }
               write_piece(y, row, first, count, out);
             });
}

void bias_dropout_add_bwd(const BiasDropoutAddBwd& a) {
  const RowTensor dy(a.dy, a.op, "dy", RowTensor::required);
  const RowTensor dx(a.dx, a.op, "dx");
  const std::int64_t m = dy.rows.count, n = dy.rows.length;
  const DropoutRows drops(a.dropout.p, a.dropout.seed, a.dropout.offset);
  const bool wanted = a.dbias.given();
  const ColumnSums sums(m, n, wanted);
  parallel_for(sums.groups(), 1, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(3, kPiece);
    for (std::int64_t group = begin; group < end; ++group) {
      for (std::int64_t row = sums.begin(group); row < sums.begin(group + 1); ++row) {
        for (std::int64_t first = 0; first < n; first += kPiece) {
          const std::int64_t count = std::min(kPiece, n - first);
          const float* d = read_piece(dy, row, first, count, scratch.row(0));
          if (drops.active) {
            const float* const f = drops.factors_from(row * n + first, count, scratch.row(1));
            float* const out = scratch.row(2);
            for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
              out[c] = dropped(d[c], f[c]);
            });
            d = out;
          }
          if (dx.given()) {
            if (dx.dtype() == DType::f32) {
              std::copy_n(d, count, dx.row<float>(row) + first);
            } else {
              write_piece(dx, row, first, count, d);
            }
          }
          if (!wanted) continue;
          float* const sum = sums.of(group) + first;
          for_columns(count,
                      [=](std::int64_t c) __attribute__((always_inline)) { sum[c] += d[c]; });
        }
      }
    }
  });
  if (wanted) sums.finish(a.dbias);
}

}  // namespace fastkern::cpu
