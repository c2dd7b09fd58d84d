// SPDX-License-Identifier: Apache-2.0
// Between the host's dispatch (norm.cu) and the kernels: each .cu beside this header compiles the
// kernels of one operator.
#pragma once

#include <initializer_list>

#include "fastkern/norm.h"

namespace fastkern::cuda::norm_detail {

/// What a kernel knows of the residual stream: nothing; h = residual + x; dropout and row scales
/// as well.
enum class Residual { none, add, dropout };

/// Which sums over the rows a backward kernel keeps.
enum class Sums { weight = 1, affine = 2, two_outputs = 4 };

/// H of vectors (H, N), 1 of vectors (N).
inline std::int64_t heads_of(std::initializer_list<const TensorRef*> vectors) {
  for (const TensorRef* t : vectors) {
    if (t->ndim == 2) return t->sizes[0];
  }
  return 1;
}

/// How the sums over the rows of a call are split, and where the partial ones lie in the workspace.
struct Split {
  Plan plan;
  DType type = DType::f32;  // of the kernel; `mixed`: operands in their own types
  bool mixed = false;
  bool own_weight =
      false;  // of the kernel's type, in packs, without an offset, the same for all rows
  std::int64_t rows = 0, n = 0, heads = 1;
  std::int64_t teams = 0;          // clusters, blocks or parts of blocks that walk over the rows
  std::int64_t slots = 0;          // teams in use: a multiple of heads
  std::int64_t partial_rows = 0;   // of each sum
  std::int64_t column_blocks = 0;  // long rows
  int sums = 0;                    // 0, 1, 2 or 4
  std::int64_t statistics = 0;     // floats before the partial sums: mean and rstd of long rows
  std::size_t bytes() const {
    return 4 * static_cast<std::size_t>(statistics + sums * partial_rows * n);
  }
};

/// Where a sum over the rows goes: (heads, N) of any float type; nullptr: not wanted.
struct Finish {
  void* to[4];
  DType dtype[4];
};

inline Finish finish_of(const NormBwd& a) {
  Finish finish{};
  const TensorRef* const outputs[] = {&a.dweight, &a.dbias, &a.dweight2, &a.dbias2};
  for (int i = 0; i < 4; ++i) finish.to[i] = outputs[i]->data, finish.dtype[i] = outputs[i]->dtype;
  return finish;
}

/// Partial rows of a launch that has finished the sums itself.
inline constexpr std::int64_t kFinished = -1;

// Each is defined in the file of its operator, for the types of `Split::type` and `mixed`.
template <NormKind kNorm, Residual kResidual, bool kQuant>
void launch_fwd(const NormFwd& args, const Plan& plan, DType type, bool mixed, Stream stream);
/// Returns how many partial rows of each sum it writes: those of `split`, or fewer, or kFinished.
template <NormKind kNorm, Residual kResidual, Sums kSums>
std::int64_t launch_bwd(const NormBwd& args, const Split& split, Stream stream);

void launch_fwd_long(const NormFwd& args, Stream stream);
std::int64_t launch_bwd_long(const NormBwd& args, const Split& split, Stream stream);

/// Most clusters of this many blocks that the device runs at a time.
std::int64_t resident_clusters(const void* kernel, int cluster, int block, std::size_t shared,
                               Stream stream, const char* op);

}  // namespace fastkern::cuda::norm_detail
