// SPDX-License-Identifier: Apache-2.0
// Group normalisation, backward, channels-last: partial sums of dweight and dbias, and dx. The
// formula, and what lies between the two, are in group_norm_bwd.cu.
//
//   work     a thread keeps one pack of channels and walks through positions; a block is a slab of
//            at most 16 packs at 16 positions a thread
//   memory   shared: two f32 for each thread's channel
//   sync     one barrier a block
//   measured not yet
#include "dispatch.h"
#include "norm/group_norm_bwd.cuh"
#include "norm/group_rows.cuh"

namespace fastkern::cuda::group_detail {
namespace {

constexpr int kSteps = 4;  // a tile is so many times kPacks positions a thread

/// A block's slab, at some positions of a sample.
struct Tile {
  std::uint32_t sample;
  std::int64_t row;  // sample and tile
  std::int64_t first;
  int positions;

  template <class T>
  static __device__ __forceinline__ Tile of(const Backward<T>& p, std::uint32_t row, int size) {
    const std::uint32_t tile = row % p.parts;
    const std::int64_t first = static_cast<std::int64_t>(tile) * size;
    return {row / p.parts, row, first,
            static_cast<int>(min(p.positions - first, static_cast<std::int64_t>(size)))};
  }
};

/// mean, rstd, weight and bias of this thread's channels, and their group.
template <class T>
__device__ __forceinline__ void load_scales(const Backward<T>& p, const Cell& cell,
                                            std::uint32_t sample, ChannelScale (&out)[kVector<T>]) {
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    // Beyond the end: any.
    const std::uint32_t channel = static_cast<std::uint32_t>(cell.channel) +
                                  tile::opaque(min(cell.x * kVector<T> + j, cell.width - 1));
    const float2 stats = p.stats[static_cast<std::int64_t>(sample) * p.groups +
                                 channel / static_cast<std::uint32_t>(p.group_channels)];
    out[j] = {stats.x, stats.y, p.weight.at(channel, 1.0f), p.bias.at(channel, 0.0f)};
  }
}

template <class T, bool kSilu, bool kWhole>
__global__ void __launch_bounds__(kLastBlock, kWhole ? 2 : 1)
    group_norm_bwd_last_sums_kernel(const Backward<T> p, const Slabs slabs) {
  constexpr int kV = kVector<T>, kPacks = 4;
  extern __shared__ float4 memory[];
  ptx::grid_launch_next();
  const Cell cell = Cell::of<kV>(slabs, blockIdx.x % slabs.count);
  const Tile tile = Tile::of(p, blockIdx.x / slabs.count, cell.rows * kPacks * kSteps);
  const std::int64_t start =
      (tile.sample * p.positions + tile.first) * slabs.channels + cell.channel;
  ChannelScale scale[kV];
  load_scales(p, cell, tile.sample, scale);
  float dz_sum[kV] = {}, xhat_sum[kV] = {};
#pragma unroll 1
  for (int first = cell.y; first < tile.positions; first += cell.rows * kPacks) {
    Pack<T> x[kPacks], dy[kPacks];
    load_cells<kWhole>(p.x + start, cell, first, cell.rows, tile.positions, x);
    load_cells<kWhole>(p.dy + start, cell, first, cell.rows, tile.positions, dy);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV], g[kV];
      tile::unpack(x[i], v);
      tile::unpack(dy[i], g);
      if (first + i * cell.rows >= tile.positions) continue;  // 0 times an infinite rstd
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        const Grad grad = grad_of<T, kSilu>(v[j], g[j], scale[j]);
        dz_sum[j] += grad.dz;
        xhat_sum[j] = fmaf(grad.dz, grad.xhat, xhat_sum[j]);
      }
    }
  }
  const int channels = cell.packs * kV, pitch = row_pitch(channels);
  float* const sDz = reinterpret_cast<float*>(memory);
  float* const sXhat = sDz + cell.rows * pitch;
  if (cell.y < cell.rows) {
    put(sDz + cell.y * pitch + cell.x * kV, dz_sum);
    put(sXhat + cell.y * pitch + cell.x * kV, xhat_sum);
  }
  __syncthreads();
  for_slab_channels(channels, [&](int channel, int part, bool inside) {
    float dz = 0.0f, xhat = 0.0f;
    for (int y = part; inside && y < cell.rows; y += 4) {
      dz += sDz[y * pitch + channel];
      xhat += sXhat[y * pitch + channel];
    }
    dz = sum_of_four(dz), xhat = sum_of_four(xhat);
    if (part == 0 && channel < cell.width)
      p.partial[tile.row * slabs.channels + cell.channel + channel] = {dz, xhat};
  });
}

template <class T, bool kSilu, bool kWhole>
__global__ void __launch_bounds__(kLastBlock, kWhole ? 2 : 1)
    group_norm_bwd_last_dx_kernel(const Backward<T> p, const Slabs slabs) {
  constexpr int kV = kVector<T>, kPacks = 2;
  const unsigned block = gridDim.x - 1 - blockIdx.x;  // what was read last is still in L2
  const Cell cell = Cell::of<kV>(slabs, block % slabs.count);
  const Tile tile = Tile::of(p, block / slabs.count, cell.rows * 4 * kSteps);
  const std::int64_t start =
      (tile.sample * p.positions + tile.first) * slabs.channels + cell.channel;
  ChannelScale scale[kV];
  load_scales(p, cell, tile.sample, scale);
  ptx::grid_wait();
  float2 means[kV];
#pragma unroll
  for (int j = 0; j < kV; ++j) {
    const std::uint32_t channel = static_cast<std::uint32_t>(cell.channel) +
                                  tile::opaque(min(cell.x * kV + j, cell.width - 1));
    means[j] = p.means[static_cast<std::int64_t>(tile.sample) * p.groups +
                       channel / static_cast<std::uint32_t>(p.group_channels)];
  }
#pragma unroll 1
  for (int first = cell.y; first < tile.positions; first += cell.rows * kPacks) {
    Pack<T> x[kPacks], dy[kPacks];
    load_cells<kWhole>(p.x + start, cell, first, cell.rows, tile.positions, x);
    load_cells<kWhole>(p.dy + start, cell, first, cell.rows, tile.positions, dy);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV], g[kV];
      tile::unpack(x[i], v);
      tile::unpack(dy[i], g);
#pragma unroll
      for (int j = 0; j < kV; ++j)
        v[j] = dx_of(grad_of<T, kSilu>(v[j], g[j], scale[j]), scale[j], means[j]);
      store_cell<kWhole>(p.dx + start, cell, first + i * cell.rows, tile.positions,
                         tile::pack_of<T>(v));
    }
  }
}

template <class T, class F>
void run_last(const Backward<T>& p, const GroupShape& shape, Activation activation, const F& f) {
  const Slabs slabs = narrow_slabs(shape.channels, kVector<T>);
  const std::int64_t grid = shape.batch * p.parts * slabs.count;
  dispatch_bool(activation == Activation::silu, [&]<bool kSilu>() {
    dispatch_bool(p.whole,
                  [&]<bool kWhole>() { f.template operator()<kSilu, kWhole>(slabs, grid); });
  });
}

}  // namespace

std::int64_t last_tiles(const GroupShape& shape, DType dtype) {
  const Slabs slabs = narrow_slabs(shape.channels, static_cast<int>(16 / size_of(dtype)));
  return ceil_div(shape.positions, slabs.rows() * 4 * kSteps);
}

template <class T>
void sums_last(const Backward<T>& p, const GroupShape& shape, Activation activation,
               Stream stream) {
  run_last(p, shape, activation, [&]<bool kSilu, bool kWhole>(const Slabs& slabs, auto grid) {
    const int channels = slabs.packs * kVector<T>;
    const std::size_t shared = 2 * sizeof(float) * slabs.rows() * row_pitch(channels);
    launch(group_norm_bwd_last_sums_kernel<T, kSilu, kWhole>, {kBackward, grid, kLastBlock, shared},
           stream, p, slabs);
  });
}

template <class T>
void dx_last(const Backward<T>& p, const GroupShape& shape, Activation activation, Stream stream) {
  run_last(p, shape, activation, [&]<bool kSilu, bool kWhole>(const Slabs& slabs, auto grid) {
    Launch shape_of{kBackward, grid, kLastBlock};
    shape_of.overlap = true;
    launch(group_norm_bwd_last_dx_kernel<T, kSilu, kWhole>, shape_of, stream, p, slabs);
  });
}

#define FASTKERN_INSTANTIATE(T)                                                          \
  template void sums_last<T>(const Backward<T>&, const GroupShape&, Activation, Stream); \
  template void dx_last<T>(const Backward<T>&, const GroupShape&, Activation, Stream)
FASTKERN_INSTANTIATE(float);
FASTKERN_INSTANTIATE(__half);
FASTKERN_INSTANTIATE(__nv_bfloat16);

}  // namespace fastkern::cuda::group_detail
