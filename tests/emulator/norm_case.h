// SPDX-License-Identifier: Apache-2.0
// A call of norm or norm_bwd: what is asked of it, and its operands.
#pragma once

#include <string>

#include "fastkern/norm.h"
#include "options.h"
#include "tensor.h"

namespace emulator {

/// The types of operands that have one in common.
struct NormTypes {
  const char* name;
  fastkern::DType x, stream, y, weight;
};

enum class Quantised { none, f8_dynamic, i8_dynamic, f8_static, i8_static };

struct NormCase {
  fastkern::NormKind kind = fastkern::NormKind::rms;
  const NormTypes* types = nullptr;
  std::int64_t m = 0, n = 0;
  bool backward = false;

  bool weight = true, bias = false;
  std::int64_t heads = 0;  // 0: weights have one dimension
  double weight_offset = 0.0, eps = 1e-2;
  bool two = false;  // outputs
  bool rowscale = false;
  double dropout = 0.0;
  // forward: h is written, residual read; in place, h is residual
  bool stream = false, residual = false, in_place = false;
  Quantised quantised = Quantised::none;
  // backward: gradient of h, of the branch; which gradients are wanted
  bool dh = false, dbranch = false;
  bool dx = true, dweight = true, dbias = true;

  // where and how operands lie
  int layout = 0, device = 0;
  bool odd_vectors = false;        // weights an element off a boundary
  bool other_weight_type = false;  // than that of the types

  bool fp8() const {
    return quantised == Quantised::f8_dynamic || quantised == Quantised::f8_static;
  }
  bool static_scale() const {
    return quantised == Quantised::f8_static || quantised == Quantised::i8_static;
  }
  std::string text() const;
};

/// `dense`: whatever the case says of layouts.
struct ForwardCall {
  ForwardCall(const NormCase& c, bool dense);
  NamedTensors tensors();

  Tensor x, y, residual, h, y2, weight, bias, weight2, bias2, rowscale, scale;
  fastkern::NormFwd args;
};

struct BackwardCall {
  BackwardCall(const NormCase& c, bool dense);
  NamedTensors tensors();

  Tensor x, dy, dx, dy2, dh, dbranch, weight, weight2, rowscale, dweight, dbias, dweight2, dbias2;
  Tensor workspace;
  fastkern::NormBwd args;
};

/// norm_check.cpp. `same_bits`: compares with dense operands and plain settings besides.
void check_norm(const NormCase& c, bool same_bits);
void check_norm_bwd(const NormCase& c, bool same_bits);

}  // namespace emulator
