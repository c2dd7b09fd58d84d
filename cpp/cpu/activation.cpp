// SPDX-License-Identifier: Apache-2.0
// Gated activations on the CPU: fallback for CPU tensors and oracle of the CUDA tests. Pieces of a
// row as f32, one loop for each kind.
#include "fastkern/activation.h"

#include "activation_rows.h"

namespace fastkern::cpu {
namespace {

/// gate and up of a piece, from two operands or from one of pairs.
struct Inputs {
  Inputs(const TensorRef& gate, const TensorRef& up, const TensorRef& pairs, const char* op)
      : gate(gate, op, "gate"), up(up, op, "up"), pairs(pairs, op, "pairs") {}

  std::pair<const float*, const float*> read(std::int64_t row, std::int64_t first,
                                             std::int64_t count, Scratch& scratch) const {
    float* const g = scratch.row(0);
    float* const u = scratch.row(1);
    if (!pairs.given())
      return {read_piece(gate, row, first, count, g), read_piece(up, row, first, count, u)};
    dispatch(pairs.dtype(), [&]<class T>() {
      const T* in = pairs.row<const T>(row) + 2 * first;
      for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
        g[c] = to_float(in[2 * c]);
        u[c] = to_float(in[2 * c + 1]);
      });
    });
    return {g, u};
  }

  RowTensor gate, up, pairs;
};

void gated_piece(DType type, ActivationKind kind, const ActivationNumbers& numbers,
                 std::int64_t count, const float* gate, const float* up, float* y) {
  with_math(type, [&]<class M>() {
    formula::with_gate(kind, [&]<ActivationKind kKind>() {
      for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
        y[c] = formula::gated<kKind, M>(gate[c], up[c], numbers);
      });
    });
  });
}

void gated_bwd_piece(DType type, ActivationKind kind, const ActivationNumbers& numbers,
                     std::int64_t count, const float* dy, const float* gate, const float* up,
                     float* dgate, float* dup) {
  with_math(type, [&]<class M>() {
    formula::with_gate(kind, [&]<ActivationKind kKind>() {
      for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
        const auto slopes = formula::gated_slopes<kKind, M>(dy[c], gate[c], up[c], numbers);
        dgate[c] = slopes.gate;
        dup[c] = slopes.up;
      });
    });
  });
}

}  // namespace

void gated(const GatedFwd& args) {
  GatedFwd a = args;
  flatten({&a.gate, &a.up, &a.pairs, &a.y}, a.op);
  const Inputs in(a.gate, a.up, a.pairs, a.op);
  const RowTensor y(a.y, a.op, "y", RowTensor::required);
  const bool quant = a.scale.given();
  const float inverse = quant ? 1.0f / *static_cast<const float*>(a.scale.data) : 1.0f;
  each_piece(y.rows.count, y.rows.length, 3,
             [&](std::int64_t row, std::int64_t first, std::int64_t count, Scratch& scratch) {
               const auto [gate, up] = in.read(row, first, count, scratch);
               float* const out =
                   quant ? scratch.row(2) : target_piece(y, row, first, scratch.row(2));
               gated_piece(quant ? DType::f32 : y.dtype(), a.kind, a.numbers, count, gate, up, out);
               if (!quant) return write_piece(y, row, first, count, out);
               dispatch_stored(y.dtype(), [&]<class T>() {
                 T* q = y.row<T>(row) + first;
                 for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                   q[c] = from_float<T>(out[c] * inverse);
                 });
               });
             });
}

void gated_bwd(const GatedBwd& args) {
  GatedBwd a = args;
  flatten({&a.gate, &a.up, &a.pairs, &a.dy, &a.dgate, &a.dup, &a.dpairs}, a.op);
  const Inputs in(a.gate, a.up, a.pairs, a.op);
  const RowTensor dy(a.dy, a.op, "dy", RowTensor::required);
  const RowTensor dgate(a.dgate, a.op, "dgate"), dup(a.dup, a.op, "dup");
  const RowTensor dpairs(a.dpairs, a.op, "dpairs");
  each_piece(dy.rows.count, dy.rows.length, 5,
             [&](std::int64_t row, std::int64_t first, std::int64_t count, Scratch& scratch) {
               const auto [gate, up] = in.read(row, first, count, scratch);
               const float* const d = read_piece(dy, row, first, count, scratch.row(2));
               float* const dg =
                   dgate.given() ? target_piece(dgate, row, first, scratch.row(3)) : scratch.row(3);
               float* const du =
                   dup.given() ? target_piece(dup, row, first, scratch.row(4)) : scratch.row(4);
               gated_bwd_piece(dy.dtype(), a.kind, a.numbers, count, d, gate, up, dg, du);
               if (dgate.given()) write_piece(dgate, row, first, count, dg);
               if (dup.given()) write_piece(dup, row, first, count, du);
               if (!dpairs.given()) return;
               dispatch(dpairs.dtype(), [&]<class T>() {
                 T* out = dpairs.row<T>(row) + 2 * first;
                 for_columns(count, [=](std::int64_t c) __attribute__((always_inline)) {
                   out[2 * c] = from_float<T>(dg[c]);
                   out[2 * c + 1] = from_float<T>(du[c]);
                 });
               });
             });
}

}  // namespace fastkern::cpu
