// SPDX-License-Identifier: Apache-2.0
// A plan in the form the CUDA kernel reads: which elements go as vectors, how each operand is
// accessed, divisions as multiplications. Plain C++; made on the host, once a launch.
//
// The kernel works on groups of `vector` elements that lie one after the other in the result, and
// on single elements: what is left over on both sides of the groups, or everything where there are
// no groups.
#pragma once

#include <bit>
#include <cstdint>

#include "fastkern/pointwise_plan.h"

namespace fastkern {

/// How the elements of a group come out of an operand.
enum class Access : std::uint8_t {
  number,    // a number of the call
  repeated,  // one element for all of the group
  packs,     // one aligned access
  each,      // element by element, at one stride
  gathered,  // element by element, each with its own index
  staged,    // through a tile in shared memory
};

/// n / size for n < 2^31 without a division: (high half of n * multiplier + n) >> shift.
struct Divider {
  std::uint32_t size = 1, multiplier = 1, shift = 0;
};
constexpr Divider divider(std::int64_t size) {
  const auto d = static_cast<std::uint32_t>(size);
  const auto shift = static_cast<std::uint32_t>(std::bit_width(d - 1));  // 2^shift >= d
  const std::uint64_t over = (std::uint64_t{1} << shift) - d;
  return {d, static_cast<std::uint32_t>((over << 32) / d + 1), shift};
}

/// Strides count elements.
struct PointwiseAccess {
  char* data = nullptr;
  DType dtype = DType::f32;
  Access access = Access::number;
  std::uint8_t log_size = 0;      // of an element's bytes
  std::int32_t group_stride = 0;  // from a group to the next in the innermost dimension
  std::int32_t strides[kMaxDims]{};
};

struct PointwiseLayout {
  PointwiseAccess out;
  PointwiseAccess in[kMaxInputs];
  Divider dims[kMaxDims];  // innermost first
  Divider inner_groups;    // of the innermost dimension
  int ndim = 1;
  bool paired = false;  // a thread's groups lie two by two beside each other
  bool flat = false;    // groups are counted through all dimensions of a dense result
  int staged = 0;       // operands through shared memory: blocks are tiles
  std::uint32_t tile_count = 0;
  Divider tiles[2];            // in dimensions 0 and 1
  std::uint32_t groups = 0;    // after the first `head` elements
  std::uint32_t head = 0;      // single elements before the groups
  std::uint32_t elements = 0;  // single elements: the first `head`, then those from `tail` on
  std::uint32_t tail = 0;
};

/// A set of types.
constexpr std::uint32_t types_of() { return 0; }
template <class... Types>
constexpr std::uint32_t types_of(DType first, Types... others) {
  return std::uint32_t{1} << static_cast<int>(first) | types_of(others...);
}

/// What a kernel does with a thread.
struct PointwiseShape {
  int vector = 4;                         // elements in a group: 16 bytes of the compute type
  int groups = 4;                         // of a thread
  int elements = 2;                       // single ones of a thread
  int compute_size = 4;                   // bytes
  std::uint32_t inputs = 0, outputs = 0;  // types that groups may have; all else goes one by one
  bool stages = false;                    // there is a kernel of tiles
};

inline constexpr int kPointwiseThreads = 256;
/// Elements of a tile along dimensions 0 and 1, and from one row of it to the next.
inline constexpr int kTile = 64, kTilePitch = kTile + 1;

/// For parts that split_plan() makes.
FASTKERN_API PointwiseLayout pointwise_layout(const char* op, const PointwisePlan& plan,
                                              const PointwiseShape& shape);

/// The dimension at which a plan must be cut in two for 32 bits to number its elements and to tell
/// one place in an operand from another; -1 where it need not.
FASTKERN_API int dimension_to_split(const PointwisePlan& plan, std::int64_t most);

/// f(part) for parts of the plan, of at most `most` elements and steps of an element each.
template <class F>
void split_plan(const PointwisePlan& plan, const F& f, std::int64_t most = std::int64_t{1} << 30) {
  const int d = dimension_to_split(plan, most);
  if (d < 0) return f(plan);
  PointwisePlan first = plan, second = plan;
  std::int64_t half = plan.sizes[d] / 2;
  if (d == 0 && half > 64) half = half / 64 * 64;  // both parts equally far off 16 bytes
  first.sizes[d] = half;
  second.sizes[d] = plan.sizes[d] - half;
  const auto move = [&](PointwiseView& v) {
    if (v.data) v.data += half * v.strides[d];
  };
  move(second.out);
  for (PointwiseView& v : second.in) move(v);
  for (PointwisePlan* part : {&first, &second}) {
    part->numel = plan.numel / plan.sizes[d] * part->sizes[d];
    split_plan(*part, f, most);
  }
}

}  // namespace fastkern
