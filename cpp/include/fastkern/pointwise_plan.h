// SPDX-License-Identifier: Apache-2.0
// How a pointwise call goes through memory: which dimensions are left, in which order, and which
// kernel takes them. Plain C++ on the host; it looks at sizes, strides, types and addresses, never
// at elements.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "fastkern/core.h"
#include "fastkern/elementwise.h"

namespace fastkern {

enum class PointwisePath : std::uint8_t {
  empty,       // nothing to do
  dense,       // one dense dimension, all operands of one type and equally far off 16 bytes
  mixed,       // one dense dimension, any types and addresses
  rows,        // rows that are dense, or one element repeated, in every operand
  transposed,  // an operand is dense along another dimension than the result
  strided,     // any other strides
};

constexpr const char* name_of(PointwisePath path) {
  constexpr const char* kNames[] = {"empty", "dense", "mixed", "rows", "transposed", "strided"};
  return kNames[static_cast<int>(path)];
}

/// One operand over the dimensions of a plan. Strides count bytes; 0 repeats.
struct PointwiseView {
  char* data = nullptr;  // nullptr: the number
  DType dtype = DType::f32;
  Number number;
  std::array<std::int64_t, kMaxDims> strides{};
};

struct PointwisePlan {
  PointwisePath path = PointwisePath::empty;
  int ndim = 0;                                // at least 1, unless empty
  std::array<std::int64_t, kMaxDims> sizes{};  // innermost first
  std::int64_t numel = 0;
  int inputs = 0;
  PointwiseView out;
  std::array<PointwiseView, kMaxInputs> in;

  FASTKERN_API std::string describe() const;  // for people: path, sizes, strides
};

/// Dimensions of size 1 dropped, ordered by the strides of `out`, coalesced. Throws where shapes do
/// not match, where `out` holds an element twice, or where it shares memory with an input other
/// than element by element.
FASTKERN_API PointwisePlan pointwise_plan(const char* op, const TensorRef& out,
                                          std::span<const Operand> in);

/// The same call as one of fewer functions: pow of floats with a number that is 2, 1/2, -1/2, 1 or
/// -1 is something cheaper; rsub, gt, ge, clamp_min and clamp_max are others with their inputs
/// swapped or not; booleans are computed as integers.
FASTKERN_API PointwiseCall pointwise_simplified(const PointwiseCall& call);

/// The shape that the operands broadcast to; throws where they do not. Strides are row-major.
FASTKERN_API TensorRef broadcast_shape(const char* op, std::span<const TensorRef> inputs);

/// Fills out.strides as torch lays out a new result: dense, its dimensions in the order that the
/// strides of the inputs ask for, those of the first input before all.
FASTKERN_API void layout_like(TensorRef& out, std::span<const TensorRef> inputs);

}  // namespace fastkern
