// SPDX-License-Identifier: Apache-2.0
// Parameters and formula of the backward kernels of group normalisation, for both layouts.
#pragma once

#include "norm/group_norm.cuh"

namespace fastkern::cuda::group_detail {

constexpr const char* kBackward = "fastkern::group_norm_bwd";

template <class T>
struct Backward {
  const T *x, *dy;
  T* dx;                // nullptr: not wanted
  const float2* stats;  // (N, G): mean, rstd
  float2* partial;      // sums over parts of a channel: dz, dz * xhat
  float2* totals;       // (N, C): the same over all positions
  float2* means;        // (N, G): of dz * w, of dz * w * xhat
  ChannelVector weight, bias;
  std::int64_t group_size, positions, channels;
  std::uint32_t group_count, groups;
  std::int32_t group_channels;
  bool whole;  // x, dy and dx may be accessed in packs

  // channels-first
  Planes planes;
  std::int32_t team, blocks;  // threads of a block, and blocks, that hold a group
  std::uint32_t chunks;       // of a group that is not held, for dx
  std::int32_t part_team;     // threads of a part
  std::int64_t part_size;     // elements

  // Sum `part` of channel c of sample n lies at partial[n * sample + c * channel + part * step].
  std::uint32_t parts;
  std::int64_t partial_sample, partial_channel, partial_step;
};

/// What is known of an element's channel.
struct ChannelScale {
  float mean, rstd, weight, bias;
};

struct Grad {
  float xhat, dz;
};

template <class T, bool kSilu>
__device__ __forceinline__ Grad grad_of(float x, float dy, const ChannelScale& of) {
  const float xhat = (x - of.mean) * of.rstd;
  return {xhat, activate_grad<T, kSilu>(dy, fmaf(xhat, of.weight, of.bias))};
}

/// `means` of dz * w and of dz * w * xhat over the group.
__device__ __forceinline__ float dx_of(const Grad& grad, const ChannelScale& of, float2 means) {
  return of.rstd * (fmaf(grad.dz, of.weight, -means.x) - grad.xhat * means.y);
}

constexpr int kPartBlock = 256;  // threads of the kernel of partial sums
// Packs of a thread at a time: of a group that is held, of a part, of a chunk for dx.
constexpr int kHeldPacks = 4, kPartPacks = 4, kDxPacks = 4;

/// Small groups lie side by side in a block.
constexpr int groups_per_block(int team) { return team < 128 ? 128 / team : 1; }

/// Channels-first, in group_norm_bwd_first.cu: everything; or partial sums, and dx.
template <class T>
void held_first(const Backward<T>& p, Activation activation, Stream stream);
template <class T>
void sums_first(const Backward<T>& p, Activation activation, Stream stream);
template <class T>
void dx_first(const Backward<T>& p, Activation activation, Stream stream);

/// Channels-last, in group_norm_bwd_last.cu: partial sums, and dx.
template <class T>
void sums_last(const Backward<T>& p, const GroupShape& shape, Activation activation, Stream stream);
template <class T>
void dx_last(const Backward<T>& p, const GroupShape& shape, Activation activation, Stream stream);
std::int64_t last_tiles(const GroupShape& shape, DType dtype);

}  // namespace fastkern::cuda::group_detail
