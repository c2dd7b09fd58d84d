// SPDX-License-Identifier: Apache-2.0
// The primitives of cuda/ptx and cuda/tile, each alone, against host code. Teams: test_team.cu.
#include <bit>
#include <cmath>
#include <limits>

#include "support.cuh"
#include "tile/pack.cuh"

namespace fastkern {
namespace {

using test::DeviceArray;
using tile::kVector;
using tile::Pack;

using Half = __half;
using Bfloat = __nv_bfloat16;

template <class T>
struct HostType;
template <>
struct HostType<float> {
  using Type = float;
};
template <>
struct HostType<Half> {
  using Type = f16;
};
template <>
struct HostType<Bfloat> {
  using Type = bf16;
};
/// The host's storage type, of the same size and bits.
template <class T>
using Host = typename HostType<T>::Type;

template <class T>
std::vector<Host<T>> random_elements(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<Host<T>> values(count);
  for (Host<T>& value : values) value = from_float<Host<T>>(normal(random));
  return values;
}

template <class T>
std::uint32_t bits_of(T element) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &element, sizeof(T));
  return bits;
}

class Primitives : public test::CudaTest {};

// ---- ptx
// -----------------------------------------------------------------------------------------------------------

__global__ void copy_kernel(const uint4* in, uint4* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  ptx::st_global(out + i, ptx::ld_global_nc(in + i));
}

/// Three groups under way at once; of every third thread's last copy nothing is read.
__global__ void copy_async_kernel(const uint4* in, uint4* out, int count) {
  __shared__ uint4 ring[3][128];
  for (int group = 0; group < 3; ++group) {
    ring[group][threadIdx.x] = {1, 2, 3, 4};
    const int bytes = group == 2 && threadIdx.x % 3 == 0 ? 0 : 16;
    ptx::cp_async_16(&ring[group][threadIdx.x], in + group * count + threadIdx.x, bytes);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<2>();
  out[threadIdx.x] = ring[0][threadIdx.x];
  ptx::cp_async_wait<0>();
  for (int group = 1; group < 3; ++group)
    out[group * count + threadIdx.x] = ring[group][threadIdx.x];
}

std::vector<uint4> random_words(int count) {
  std::vector<uint4> values(count);
  std::mt19937 random(1);
  const auto word = [&] { return static_cast<unsigned>(random()); };
  for (uint4& v : values) v = {word(), word(), word(), word()};
  return values;
}

/// Loads of which every third is left out, by 16 bytes and by 8, and the way through shared memory.
__global__ void conditional_kernel(const uint4* in, uint4* out, uint2* out_8, uint4* shared_8,
                                   const void* nowhere) {
  __shared__ uint4 ring[128];
  const int i = threadIdx.x;
  const bool inside = i % 3 != 0;
  out[i] = ptx::ld_global_nc_if(inside ? in + i : nowhere, inside);
  const uint2 half = ptx::ld_global_nc_8_if(inside ? &in[i].z : nowhere, inside);
  ptx::st_global_8(out_8 + i, half);
  ring[i] = {1, 2, 3, 4};
  ptx::cp_async_8(&ring[i], &in[i].z, inside ? 8 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  shared_8[i] = ptx::ld_shared(&ring[i]);
}

void expect_equal(const std::vector<uint4>& found, const std::vector<uint4>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(uint4)), 0);
}

TEST_F(Primitives, SixteenByteAccesses) {
  constexpr int kCount = 4 * 256;
  const std::vector<uint4> values = random_words(kCount);
  const DeviceArray<uint4> in(values), out(kCount);
  copy_kernel<<<4, 256>>>(in.data(), out.data());
  test::cuda_ok(cudaGetLastError());
  expect_equal(out.download(), values);
}

TEST_F(Primitives, AsynchronousCopies) {
  constexpr int kCount = 128;
  std::vector<uint4> values = random_words(3 * kCount);
  const DeviceArray<uint4> in(values), out(3 * kCount);
  copy_async_kernel<<<1, kCount>>>(in.data(), out.data(), kCount);
  test::cuda_ok(cudaGetLastError());
  for (int thread = 0; thread < kCount; thread += 3) values[2 * kCount + thread] = {};
  expect_equal(out.download(), values);
}

TEST_F(Primitives, ConditionalAndEightByteAccesses) {
  constexpr int kCount = 128;
  const std::vector<uint4> values = random_words(kCount);
  const DeviceArray<uint4> in(values), out(kCount, uint4{9, 9, 9, 9}), shared_8(kCount);
  const DeviceArray<uint2> out_8(kCount, uint2{9, 9});
  conditional_kernel<<<1, kCount>>>(in.data(), out.data(), out_8.data(), shared_8.data(), nullptr);
  test::cuda_ok(cudaDeviceSynchronize());
  const std::vector<uint4> all = out.download(), shared = shared_8.download();
  const std::vector<uint2> halves = out_8.download();
  for (int i = 0; i < kCount; ++i) {
    const bool inside = i % 3 != 0;
    const uint4 v = inside ? values[i] : uint4{};
    EXPECT_TRUE(all[i].x == v.x && all[i].y == v.y && all[i].z == v.z && all[i].w == v.w) << i;
    EXPECT_TRUE(halves[i].x == v.z && halves[i].y == v.w) << i;
    EXPECT_TRUE(shared[i].x == v.z && shared[i].y == v.w) << i;
    EXPECT_TRUE(shared[i].z == 3 && shared[i].w == 4) << i;
  }
}

// ---- packs
// ---------------------------------------------------------------------------------------------------------

template <class T>
__global__ void round_trip_kernel(const Pack<T>* in, float* widened, Pack<T>* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Pack<T> pack = in[i];
  float v[kVector<T>];
  tile::unpack(pack, v);
  for (int j = 0; j < kVector<T>; ++j) widened[i * kVector<T> + j] = v[j];
  tile::keep_packed(pack);
  tile::unpack(pack, v);
  out[i] = tile::pack_of<T>(v);
}

template <class T>
void expect_all_codes_round_trip() {
  constexpr int kCount = 65536;
  std::vector<Host<T>> codes(kCount);
  for (int code = 0; code < kCount; ++code) codes[code].bits = static_cast<std::uint16_t>(code);
  const DeviceArray<Host<T>> in(codes), out(kCount);
  const DeviceArray<float> widened(kCount);
  round_trip_kernel<T>
      <<<kCount / kVector<T> / 128, 128>>>(reinterpret_cast<const Pack<T>*>(in.data()),
                                           widened.data(), reinterpret_cast<Pack<T>*>(out.data()));
  test::cuda_ok(cudaGetLastError());
  const std::vector<Host<T>> back = out.download();
  const std::vector<float> floats = widened.download();
  for (int code = 0; code < kCount; ++code) {
    const float expected = to_float(codes[code]);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(floats[code])) << code;
      ASSERT_TRUE(std::isnan(to_float(back[code]))) << code;
    } else {
      ASSERT_EQ(bits_of(floats[code]), bits_of(expected)) << code;
      ASSERT_EQ(back[code].bits, code);
    }
  }
}

TEST_F(Primitives, F16PacksRoundTrip) { expect_all_codes_round_trip<Half>(); }
TEST_F(Primitives, Bf16PacksRoundTrip) { expect_all_codes_round_trip<Bfloat>(); }

TEST_F(Primitives, F32PacksKeepEveryBit) {
  constexpr int kCount = 4 * 1024;
  std::vector<std::uint32_t> words(kCount);
  std::mt19937 random(1);
  for (std::uint32_t& word : words)
    word = static_cast<std::uint32_t>(random());  // NaN payloads among them
  const DeviceArray<std::uint32_t> in(words), widened(kCount), out(kCount);
  round_trip_kernel<float><<<kCount / 4 / 128, 128>>>(
      reinterpret_cast<const Pack<float>*>(in.data()), reinterpret_cast<float*>(widened.data()),
      reinterpret_cast<Pack<float>*>(out.data()));
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(widened.download(), words);
  EXPECT_EQ(out.download(), words);
}

template <class T>
__global__ void pack_kernel(const float* in, Pack<T>* packed, T* scalar) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v[kVector<T>];
  for (int j = 0; j < kVector<T>; ++j) {
    v[j] = in[i * kVector<T> + j];
    scalar[i * kVector<T> + j] = tile::from_float<T>(v[j]);
  }
  packed[i] = tile::pack_of<T>(v);
}

/// Any float, and all ties between neighbours with the floats beside them: rounded as on the host.
template <class T>
void expect_rounds_like_the_host() {
  std::vector<float> values;
  std::mt19937 random(1);
  for (int i = 0; i < 100'000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  for (int code = 0; code < 65535; ++code) {
    const float low = to_float(Host<T>{static_cast<std::uint16_t>(code)});
    const float high = to_float(Host<T>{static_cast<std::uint16_t>(code + 1)});
    if (!std::isfinite(low) || !std::isfinite(high) || std::signbit(low) != std::signbit(high))
      continue;
    const float tie = static_cast<float>((static_cast<double>(low) + high) / 2);
    values.insert(values.end(), {tie, std::nextafter(tie, low), std::nextafter(tie, high)});
  }
  const float infinity = std::numeric_limits<float>::infinity();
  values.insert(values.end(), {65504.0f, 65519.996f, 65520.0f, -65520.0f, infinity, -infinity, 0.0f,
                               -0.0f, std::numeric_limits<float>::max(), std::nanf("")});
  values.resize((values.size() + 1023) / 1024 * 1024, 0.0f);
  const DeviceArray<float> in(values);
  const DeviceArray<Host<T>> packed(values.size()), scalar(values.size());
  const int blocks = static_cast<int>(values.size()) / kVector<T> / 128;
  pack_kernel<T><<<blocks, 128>>>(in.data(), reinterpret_cast<Pack<T>*>(packed.data()),
                                  reinterpret_cast<T*>(scalar.data()));
  test::cuda_ok(cudaGetLastError());
  const std::vector<Host<T>> from_packs = packed.download(), from_scalars = scalar.download();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Host<T> expected = from_float<Host<T>>(values[i]);
    if (std::isnan(values[i])) {
      ASSERT_TRUE(std::isnan(to_float(from_packs[i]))) << i;
      ASSERT_TRUE(std::isnan(to_float(from_scalars[i]))) << i;
    } else {
      ASSERT_EQ(from_packs[i].bits, expected.bits) << std::hexfloat << values[i];
      ASSERT_EQ(from_scalars[i].bits, expected.bits) << std::hexfloat << values[i];
    }
  }
}

TEST_F(Primitives, F16RoundsLikeTheHost) { expect_rounds_like_the_host<Half>(); }
TEST_F(Primitives, Bf16RoundsLikeTheHost) { expect_rounds_like_the_host<Bfloat>(); }

}  // namespace
}  // namespace fastkern
