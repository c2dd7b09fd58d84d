// SPDX-License-Identifier: Apache-2.0
// Parameters of the forward kernels of group normalisation, for both layouts.
#pragma once

#include "norm/group_norm.cuh"

namespace fastkern::cuda::group_detail {

constexpr const char* kForward = "fastkern::group_norm";
constexpr int kChunkPacks = 8;

template <class T>
struct Forward {
  const T* x;
  T* y;           // nullptr: only statistics are wanted
  float2* stats;  // (N, G) mean and rstd; nullptr: not wanted
  ChannelVector weight, bias;
  std::int64_t group_size, positions;
  std::uint32_t group_count, groups;
  std::int32_t group_channels;
  float eps;
  bool whole;  // x and y may be accessed in packs

  // channels-first
  Planes planes;
  std::int32_t team, blocks;  // threads of a block, and blocks, that hold a group
  std::uint32_t chunks;       // of a group that is not held
  std::int64_t chunk_size;
  float2* partial;  // moments of chunks

  std::uint32_t tiles;  // channels-last: stretches of positions of a slab that is not held
};

template <class T>
Forward<T> forward_params(const GroupNormFwd& args, const GroupShape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  FK_CHECK(shape.group_count() < kMost && shape.channels < kMost, kForward,
           ": x must have less than 2^31 channels, and groups in all samples, got ",
           args.x.shape());
  Forward<T> p{};
  p.x = static_cast<const T*>(args.x.data);
  p.y = args.y.given() ? static_cast<T*>(args.y.data) : nullptr;
  p.stats = args.stats.given() ? static_cast<float2*>(args.stats.data) : nullptr;
  p.weight = channel_vector(args.weight), p.bias = channel_vector(args.bias);
  p.group_count = static_cast<std::uint32_t>(shape.group_count());
  p.group_size = shape.group_size();
  p.positions = shape.positions;
  p.groups = static_cast<std::uint32_t>(shape.groups);
  p.group_channels = static_cast<std::int32_t>(shape.group_channels());
  p.eps = static_cast<float>(args.eps);
  p.partial = static_cast<float2*>(args.workspace);
  return p;
}

/// Channels-last, in group_norm_last.cu.
template <class T>
void forward_last(const GroupNormFwd& args, const GroupShape& shape, Stream stream);
std::size_t last_workspace(const GroupShape& shape, DType dtype, bool clusters);

}  // namespace fastkern::cuda::group_detail
