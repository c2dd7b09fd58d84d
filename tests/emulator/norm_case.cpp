// SPDX-License-Identifier: Apache-2.0
#include "norm_case.h"

#include <sstream>

namespace emulator {

using namespace fastkern;

namespace {

const std::int64_t kDropoutSeed = 0x123456789abcdef0, kDropoutOffset = -3;

/// Tensors of a case. Seed 0: an output.
class Maker {
 public:
  Maker(const NormCase& c, bool dense) : c_(c), dense_(dense) {}

  /// (..., N). Each call takes the next layout where a case wants all of them.
  Tensor rows(bool given, DType dtype, unsigned seed, double mean = 0.0) {
    const int layout = dense_ ? 0 : c_.layout < 6 ? c_.layout : turn_ % 6;
    ++turn_;
    if (!given) return {};
    return filled(laid_out(layout, dtype), seed, mean);
  }
  Tensor weights(bool given, unsigned seed) {
    if (!given) return {};
    const DType own = c_.types->weight;
    const DType other = own == DType::f32 ? DType::bf16 : DType::f32;
    const DType dtype = c_.other_weight_type ? other : own;
    const int shift = !dense_ && c_.odd_vectors;
    Tensor t = c_.heads > 0 ? Tensor(dtype, {c_.heads, c_.n}, {c_.n, 1}, shift)
                            : Tensor(dtype, {c_.n}, {1}, shift);
    return filled(std::move(t), seed, 1.0 - c_.weight_offset);
  }
  Tensor rowscale() {
    if (!c_.rowscale) return {};
    return filled(Tensor(c_.types->x, {c_.m}, {1}, !dense_ && c_.odd_vectors), 5, 1.0);
  }

 private:
  static Tensor filled(Tensor t, unsigned seed, double mean) {
    if (seed == 0) {
      t.allow_writes();
    } else {
      t.fill(seed, mean);
    }
    return t;
  }
  Tensor laid_out(int layout, DType dtype) const {
    const std::int64_t m = c_.m, n = c_.n, vector = 16 / size_of(dtype);
    const bool even = m % 2 == 0;
    switch (layout) {
      case 0:
        return {dtype, {m, n}, {n, 1}};
      case 1:
        return {dtype, {m, n}, {n + 2 * vector, 1}};
      case 2:
        return {dtype, {m, n}, {n, 1}, 1};
      case 3:
        return {dtype, {m, n}, {n + 1, 1}};
      case 4:
        if (!even) return {dtype, {1, m, n}, {0, n + vector, 1}};
        return {dtype, {m / 2, 2, n}, {2 * n + 5 * vector, n + vector, 1}};
      default:
        if (!even) return {dtype, {m, 1, n}, {n + 5, 1, 1}, 1};
        return {dtype, {2, m / 2, n}, {n + 3, 2 * n + 7, 1}, 3};
    }
  }

  const NormCase& c_;
  bool dense_;
  int turn_ = 0;
};

double mean_of(const NormCase& c) { return c.kind == NormKind::layer ? 0.7 : 0.0; }

Dropout dropout_of(const NormCase& c) {
  if (c.dropout == 0.0) return {};
  return {c.dropout, &kDropoutSeed, &kDropoutOffset};
}

}  // namespace

std::string NormCase::text() const {
  std::ostringstream out;
  const auto flag = [&](bool set, const char* word) {
    if (set) out << ' ' << word;
  };
  out << (backward                       ? "bwd "
          : quantised == Quantised::none ? "fwd "
                                         : "quant ")
      << (kind == NormKind::rms ? "rms " : "layer ") << types->name << " N " << n << " M " << m
      << " layout " << layout << " device " << device << ':';
  flag(weight, "weight"), flag(bias, "bias"), flag(two, "two");
  flag(stream, "stream"), flag(residual, "residual"), flag(in_place, "in-place");
  flag(rowscale, "rowscale"), flag(dh, "dh"), flag(dbranch, "dbranch");
  flag(!dx, "no-dx"), flag(!dweight, "no-dweight"), flag(!dbias, "no-dbias");
  flag(odd_vectors, "odd-vectors"), flag(other_weight_type, "other-weight-type");
  if (quantised != Quantised::none) out << (fp8() ? " f8" : " i8");
  flag(static_scale(), "static");
  if (dropout > 0.0) out << " p " << dropout;
  if (weight_offset != 0.0) out << " weight-offset " << weight_offset;
  if (heads > 0) out << " heads " << heads;
  if (eps != NormCase{}.eps) out << " eps " << eps;
  return out.str();
}

ForwardCall::ForwardCall(const NormCase& c, bool dense) {
  Maker make(c, dense);
  const DType quantised = c.fp8() ? DType::f8e4m3 : DType::i8;
  x = make.rows(true, c.types->x, 1, mean_of(c));
  y = make.rows(true, c.quantised == Quantised::none ? c.types->y : quantised, 0);
  residual = make.rows(c.residual, c.types->stream, 2, mean_of(c));
  if (c.in_place) residual.allow_writes();
  h = make.rows(c.stream && !c.in_place, c.types->stream, 0);
  y2 = make.rows(c.two, c.types->y, 0);
  weight = make.weights(c.weight, 3), bias = make.weights(c.bias, 4);
  weight2 = make.weights(c.two && c.weight, 6), bias2 = make.weights(c.two && c.bias, 7);
  rowscale = make.rowscale();
  if (c.quantised != Quantised::none) {
    scale = Tensor(DType::f32, {c.static_scale() ? 1 : c.m}, {1});
    if (c.static_scale()) {
      scale.set(0, 0.02f);
    } else {
      scale.allow_writes();
    }
  }
  args = {.kind = c.kind,
          .x = x.ref(),
          .weight = weight.ref(),
          .bias = bias.ref(),
          .y = y.ref(),
          .eps = c.eps,
          .weight_offset = c.weight_offset,
          .residual = residual.ref(),
          .h = c.in_place ? residual.ref() : h.ref(),
          .rowscale = rowscale.ref(),
          .dropout = dropout_of(c),
          .weight2 = weight2.ref(),
          .bias2 = bias2.ref(),
          .y2 = y2.ref(),
          .scale = scale.ref(),
          .static_scale = c.static_scale()};
}

NamedTensors ForwardCall::tensors() {
  return {{"x", &x},
          {"y", &y},
          {"residual", &residual},
          {"h", &h},
          {"y2", &y2},
          {"weight", &weight},
          {"bias", &bias},
          {"weight2", &weight2},
          {"bias2", &bias2},
          {"rowscale", &rowscale},
          {"scale", &scale}};
}

BackwardCall::BackwardCall(const NormCase& c, bool dense) {
  Maker make(c, dense);
  const DType normed = c.dh || c.dbranch ? c.types->stream : c.types->x;
  x = make.rows(true, normed, 1, mean_of(c));
  dy = make.rows(true, c.types->y, 2);
  dx = make.rows(c.dx, normed, 0);
  dy2 = make.rows(c.two, c.types->y, 8);
  dh = make.rows(c.dh, c.types->stream, 9);
  dbranch = make.rows(c.dbranch, c.types->x, 0);
  weight = make.weights(c.weight, 3), weight2 = make.weights(c.two && c.weight, 6);
  rowscale = make.rowscale();
  dweight = make.weights(c.weight && c.dweight, 0);
  dbias = make.weights(c.bias && c.dbias, 0);
  dweight2 = make.weights(c.two && c.weight && c.dweight, 0);
  dbias2 = make.weights(c.two && c.bias && c.dbias, 0);
  args = {.kind = c.kind,
          .dy = dy.ref(),
          .x = x.ref(),
          .weight = weight.ref(),
          .eps = c.eps,
          .weight_offset = c.weight_offset,
          .dx = dx.ref(),
          .dweight = dweight.ref(),
          .dbias = dbias.ref(),
          .dh = dh.ref(),
          .dbranch = dbranch.ref(),
          .rowscale = rowscale.ref(),
          .dropout = dropout_of(c),
          .dy2 = dy2.ref(),
          .weight2 = weight2.ref(),
          .dweight2 = dweight2.ref(),
          .dbias2 = dbias2.ref()};
  const std::size_t bytes = cuda::norm_bwd_workspace(args, c.device);
  if (bytes == 0) return;
  workspace = Tensor(DType::f32, {static_cast<std::int64_t>(bytes / 4)}, {1});
  workspace.allow_writes();
  args.workspace = workspace.ref().data, args.workspace_size = bytes;
}

NamedTensors BackwardCall::tensors() {
  return {{"x", &x},
          {"dy", &dy},
          {"dx", &dx},
          {"dy2", &dy2},
          {"dh", &dh},
          {"dbranch", &dbranch},
          {"weight", &weight},
          {"weight2", &weight2},
          {"rowscale", &rowscale},
          {"dweight", &dweight},
          {"dbias", &dbias},
          {"dweight2", &dweight2},
          {"dbias2", &dbias2},
          {"workspace", &workspace}};
}

}  // namespace emulator
