// SPDX-License-Identifier: Apache-2.0
// What the threads that own a row share: cuda/tile/team.cuh and dropout.cuh, against host code.
#include <bit>
#include <cmath>
#include <limits>

#include "fastkern/philox.h"
#include "ptx/cluster.cuh"
#include "support.cuh"
#include "tile/dropout.cuh"
#include "tile/team.cuh"

namespace fastkern {
namespace {

using test::DeviceArray;

class Teams : public test::CudaTest {};

std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits;
  for (const float v : values) bits.push_back(std::bit_cast<std::uint32_t>(v));
  return bits;
}

// ---- on the host, in the order of the device ----------------------------------------------------

template <class Op>
float apply(float a, float b) {
  if constexpr (std::is_same_v<Op, tile::Sum>) return a + b;
  return std::bit_cast<float>(
      std::max(std::bit_cast<std::uint32_t>(a), std::bit_cast<std::uint32_t>(b)));
}

template <class Op>
float butterfly(std::vector<float> values) {
  for (std::size_t offset = values.size() / 2; offset > 0; offset /= 2) {
    std::vector<float> next(values.size());
    for (std::size_t i = 0; i < values.size(); ++i)
      next[i] = apply<Op>(values[i], values[i ^ offset]);
    values = next;
  }
  return values[0];
}

/// A lane first takes those `share` apart.
template <class Op>
float over_lanes(const std::vector<float>& values, int share) {
  std::vector<float> lanes(share, 0.0f);
  for (std::size_t i = 0; i < values.size(); ++i)
    lanes[i % share] = apply<Op>(lanes[i % share], values[i]);
  return butterfly<Op>(lanes);
}

/// Of one value over the threads of a team: within warps, then over the warps of a block, then over
/// the blocks.
template <class Op>
float reduced(const std::vector<float>& values, int blocks, int share) {
  if (values.size() <= 32) return butterfly<Op>(values);
  std::vector<float> of_blocks;
  const std::size_t block = values.size() / blocks;
  for (std::size_t first = 0; first < values.size(); first += block) {
    std::vector<float> of_warps;
    for (std::size_t warp = first; warp < first + block; warp += 32)
      of_warps.push_back(butterfly<Op>(
          {values.begin() + warp, values.begin() + std::min(warp + 32, first + block)}));
    of_blocks.push_back(over_lanes<Op>(of_warps, share));
  }
  return blocks == 1 ? of_blocks[0] : over_lanes<Op>(of_blocks, share);
}

// ---- warps --------------------------------------------------------------------------------------

template <class Op, int kValues>
__global__ void warp_reduce_kernel(const float* in, float* out) {
  std::uint32_t values[kValues];
  for (int i = 0; i < kValues; ++i) values[i] = __float_as_uint(in[i * 32 + threadIdx.x]);
  out[threadIdx.x] = __uint_as_float(tile::warp_reduce<Op>(values, threadIdx.x));
}

template <class Op, int kValues>
void expect_warp_reduce() {
  std::vector<float> values = random_floats(32 * kValues, 1);
  if constexpr (std::is_same_v<Op, tile::Largest>) {
    for (float& v : values) v = std::abs(v);
  }
  const DeviceArray<float> in(values), out(32);
  warp_reduce_kernel<Op, kValues><<<1, 32>>>(in.data(), out.data());
  test::cuda_ok(cudaGetLastError());
  const std::vector<float> found = out.download();
  for (int lane = 0; lane < 32; ++lane) {
    const auto first = values.begin() + lane / (32 / kValues) * 32;
    EXPECT_EQ(found[lane], (butterfly<Op>({first, first + 32})))
        << kValues << " values, lane " << lane;
  }
}

TEST_F(Teams, WarpsReduceSeveralValuesAtOnce) {
  expect_warp_reduce<tile::Sum, 1>();
  expect_warp_reduce<tile::Sum, 2>();
  expect_warp_reduce<tile::Sum, 4>();
  expect_warp_reduce<tile::Largest, 1>();
  expect_warp_reduce<tile::Largest, 2>();
  expect_warp_reduce<tile::Largest, 4>();
}

__global__ void lanes_reduce_kernel(const float* in, float* out, int width) {
  const std::uint32_t v = __float_as_uint(in[threadIdx.x]);
  out[threadIdx.x] = __uint_as_float(tile::lanes_reduce<tile::Sum>(v, width));
}

TEST_F(Teams, GroupsOfLanesReduce) {
  const std::vector<float> values = random_floats(64, 1);
  const DeviceArray<float> in(values), out(64);
  for (int width = 1; width <= 32; width *= 2) {
    lanes_reduce_kernel<<<1, 64>>>(in.data(), out.data(), width);
    test::cuda_ok(cudaGetLastError());
    const std::vector<float> found = out.download();
    for (int lane = 0; lane < 64; ++lane) {
      const auto first = values.begin() + lane / width * width;
      EXPECT_EQ(found[lane], (butterfly<tile::Sum>({first, first + width})))
          << width << " lanes, lane " << lane;
    }
  }
}

// ---- exchanges ----------------------------------------------------------------------------------

/// [turn][value][thread of the grid] in and out. `delay`: warps take turns at being late.
template <class Op, int kValues, bool kApart, int kAhead>
__global__ void exchange_kernel(const float* in, float* out, int threads, int blocks, int turns,
                                int delay) {
  extern __shared__ uint4 memory[];
  const tile::Team team{threads, blocks, blocks > 1 ? static_cast<int>(ptx::cluster_rank()) : 0};
  tile::Exchange<Op, kValues, kApart, kAhead> exchange(team, memory);
  if (blocks > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const std::int64_t all = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t me = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t warp = me / 32;
  const auto send = [&](int turn) {
    if (delay > 0 && (warp * 7 + turn * 13) % 5 == 0) __nanosleep(delay);
    float values[kValues];
    for (int i = 0; i < kValues; ++i) values[i] = in[(turn * kValues + i) * all + me];
    exchange.send(values);
  };
  for (int turn = 0; turn < kAhead - 1; ++turn) send(turn);
  for (int turn = 0; turn < turns; ++turn) {
    if (turn + kAhead - 1 < turns) send(turn + kAhead - 1);
    if (delay > 0 && (warp * 11 + turn * 3) % 5 == 0) __nanosleep(delay);
    float values[kValues];
    exchange.receive(values);
    for (int i = 0; i < kValues; ++i) out[(turn * kValues + i) * all + me] = values[i];
  }
}

struct Shape {
  int threads, block, blocks, grid;
};

template <class Op, int kValues, bool kApart, int kAhead>
void expect_exchange(const Shape& shape, std::vector<float> values, int turns, int delay) {
  const std::size_t all = static_cast<std::size_t>(shape.grid) * shape.block;
  const std::size_t team = static_cast<std::size_t>(shape.threads) * shape.blocks;
  using Exchange = tile::Exchange<Op, kValues, kApart, kAhead>;
  const int bytes = Exchange::bytes(shape.block, shape.blocks);
  ASSERT_EQ(bytes % 128, 0);
  const DeviceArray<float> in(values), out(values.size(), -7.0f);
  cuda::launch(exchange_kernel<Op, kValues, kApart, kAhead>,
               {.op = "test",
                .grid = shape.grid,
                .block = shape.block,
                .shared = static_cast<std::size_t>(bytes),
                .cluster = shape.blocks},
               Stream{}, in.data(), out.data(), shape.threads, shape.blocks, turns, delay);
  test::cuda_ok(cudaDeviceSynchronize(), "exchange_kernel");
  const std::vector<float> found = out.download();
  for (std::size_t first = 0; first < values.size(); first += team) {
    const float expected = reduced<Op>({values.begin() + first, values.begin() + first + team},
                                       shape.blocks, Exchange::kShare);
    for (std::size_t i = first; i < first + team; ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(found[i]), std::bit_cast<std::uint32_t>(expected))
          << "turn " << i / all / kValues << ", value " << i / all % kValues << ", thread "
          << i % all << ": " << found[i] << ", expected " << expected << "; teams of "
          << shape.threads << " threads in blocks of " << shape.block << ", " << shape.blocks
          << " blocks, " << kValues << " values, delay " << delay;
    }
  }
}

template <class Op, int kValues>
void expect_exchanges(const Shape& shape) {
  constexpr int kTurns = 21;
  const std::size_t all = static_cast<std::size_t>(shape.grid) * shape.block;
  std::vector<float> values = random_floats(kTurns * kValues * all, shape.threads + shape.blocks);
  if constexpr (std::is_same_v<Op, tile::Largest>) {
    for (float& v : values) v = std::abs(v);
  }
  for (const int delay : {0, 2000}) {
    expect_exchange<Op, kValues, false, 1>(shape, values, kTurns, delay);
    expect_exchange<Op, kValues, true, 1>(shape, values, kTurns, delay);
    if (shape.threads > 32) expect_exchange<Op, kValues, false, 2>(shape, values, kTurns, delay);
    if (testing::Test::HasFailure()) return;
  }
}

void expect_all_exchanges(const Shape& shape) {
  expect_exchanges<tile::Sum, 1>(shape);
  expect_exchanges<tile::Sum, 2>(shape);
  expect_exchanges<tile::Sum, 4>(shape);
  expect_exchanges<tile::Largest, 1>(shape);
  expect_exchanges<tile::Largest, 2>(shape);
}

/// One team in each block, or several.
TEST_F(Teams, PartsOfBlocksExchange) {
  for (int threads = 2; threads <= 512; threads *= 2) {
    for (int block = std::max(threads, 32); block <= 512; block *= 2) {
      expect_all_exchanges({threads, block, 1, 3});
      if (HasFailure()) return;
    }
  }
}

TEST_F(Teams, ClustersExchange) {
  if (cuda::capability(0, "test") < 90) GTEST_SKIP() << "no clusters";
  for (const int blocks : {2, 4, 8, 16}) {
    for (const int block : {64, 256, 512}) {
      expect_all_exchanges({block, block, blocks, 3 * blocks});
      if (HasFailure()) return;
    }
  }
}

/// NaN is above infinity, wherever in the team it is.
TEST_F(Teams, TheLargestIsNanIfAnyIs) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<Shape> shapes{{2, 32, 1, 1}, {16, 32, 1, 1}, {128, 128, 1, 1}, {64, 512, 1, 1}};
  if (cuda::capability(0, "test") >= 90) shapes.push_back({128, 128, 4, 4});
  for (const Shape& shape : shapes) {
    const int all = shape.grid * shape.block, turns = 8;
    std::vector<float> values = random_floats(turns * all, 1);
    for (float& v : values) v = std::abs(v);
    for (int turn = 0; turn < turns; ++turn) {
      values[turn * all + turn * 37 % all] = infinity;
      if (turn % 2 == 1) values[turn * all + turn * 53 % all] = std::nanf("");
    }
    expect_exchange<tile::Largest, 1, false, 1>(shape, values, turns, 0);
  }
}

/// Long runs with exact sums: every phase of every barrier, many times.
TEST_F(Teams, ManyTurnsStayInStep) {
  std::vector<Shape> shapes{{128, 256, 1, 8}};
  if (cuda::capability(0, "test") >= 90) {
    shapes.insert(shapes.end(), {{64, 64, 16, 32}, {128, 128, 2, 16}});
  }
  constexpr int kTurns = 1000;
  for (const Shape& shape : shapes) {
    std::vector<float> values(static_cast<std::size_t>(kTurns) * shape.grid * shape.block);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 7919 % 1009);
    for (const int delay : {0, 300}) {
      expect_exchange<tile::Sum, 1, false, 1>(shape, values, kTurns, delay);
      expect_exchange<tile::Sum, 1, false, 2>(shape, values, kTurns, delay);
    }
  }
}

// ---- dropout ------------------------------------------------------------------------------------

template <int kCount>
__global__ void dropout_kernel(tile::DropoutView dropout, std::int64_t first, const float* in,
                               float* out) {
  float v[kCount];
  const int start = static_cast<int>(threadIdx.x) * kCount;
  for (int i = 0; i < kCount; ++i) v[i] = in[start + i];
  dropout.apply(first + start, v);
  for (int i = 0; i < kCount; ++i) out[start + i] = v[i];
}

template <int kCount>
void expect_dropout(std::int64_t first, double p) {
  constexpr int kThreads = 64, kAll = kThreads * kCount;
  constexpr std::int64_t kSeed = -0x123456789abcdef, kOffset = std::int64_t{5} << 40;
  const std::vector<float> values = random_floats(kAll, 1);
  const DeviceArray<float> in(values), out(kAll, -7.0f);
  const DeviceArray<std::int64_t> seed(1, kSeed), offset(1, kOffset);
  const tile::DropoutView view{seed.data(), offset.data(), dropout_threshold(p), dropout_scale(p)};
  dropout_kernel<kCount><<<1, kThreads>>>(view, first, in.data(), out.data());
  test::cuda_ok(cudaGetLastError());
  std::vector<float> expected(kAll);
  for (int i = 0; i < kAll; ++i) {
    const bool keep =
        dropout_keeps(static_cast<std::uint64_t>(kSeed), kOffset, first + i, dropout_threshold(p));
    expected[i] = keep ? values[i] * dropout_scale(p) : 0.0f;
  }
  EXPECT_EQ(bits_of(out.download()), bits_of(expected))
      << kCount << " at once from " << first << ", p " << p;
}

TEST_F(Teams, DropsWhatTheHostDrops) {
  for (const std::int64_t first : {std::int64_t{0}, std::int64_t{4}, std::int64_t{1} << 34,
                                   (std::int64_t{1} << 34) - 4, std::int64_t{1} << 50}) {
    for (const std::int64_t shift : {0, 1, 2, 3, 5, 7}) {
      for (const double p : {0.1, 0.5, 1.0}) {
        expect_dropout<4>(first + shift, p);
        expect_dropout<8>(first + shift, p);
      }
    }
  }
}

}  // namespace
}  // namespace fastkern
