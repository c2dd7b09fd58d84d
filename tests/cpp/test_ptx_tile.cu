// SPDX-License-Identifier: Apache-2.0
// The primitives of cuda/ptx and cuda/tile, each alone, against host code.
#include <bit>
#include <cmath>
#include <limits>

#include "support.cuh"
#include "tile/pack.cuh"
#include "tile/reduce.cuh"

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
  static constexpr DType kDType = DType::f32;
};
template <>
struct HostType<Half> {
  using Type = f16;
  static constexpr DType kDType = DType::f16;
};
template <>
struct HostType<Bfloat> {
  using Type = bf16;
  static constexpr DType kDType = DType::bf16;
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

// ---- rows in and out
// -----------------------------------------------------------------------------------------------

/// Thread t takes the pack of columns from t · kVector on: what it loaded, in both ways, and the
/// store of it.
template <class T, class Column>
__global__ void load_store_kernel(const T* in, T* out, Pack<T>* loaded, Pack<T>* loaded_async,
                                  Column n, bool in_whole, bool out_whole) {
  __shared__ uint4 shared[32];
  const Column column = static_cast<Column>(threadIdx.x) * kVector<T>;
  tile::load_async(&shared[threadIdx.x], in, column, n, in_whole);
  ptx::cp_async_commit();
  const Pack<T> pack = tile::load(in, column, n, in_whole);
  loaded[threadIdx.x] = pack;
  tile::store(out, column, n, out_whole, pack);
  ptx::cp_async_wait<0>();
  loaded_async[threadIdx.x].bits = shared[threadIdx.x];
}

/// Every row length up to four packs, at every offset of source and target from a 16-byte boundary.
template <class T, class Column>
void expect_loads_and_stores() {
  constexpr int kV = kVector<T>, kPacks = 5, kSpan = (kPacks + 2) * kV;
  constexpr DType kDType = HostType<T>::kDType;
  const std::vector<Host<T>> values = random_elements<T>(kSpan, 1);
  std::vector<Host<T>> canary(kSpan);
  std::memset(canary.data(), 0xA5, kSpan * sizeof(T));
  const DeviceArray<Host<T>> in(values), out(canary), loaded(kPacks * kV),
      loaded_async(kPacks * kV);
  for (int n = 0; n <= 4 * kV; ++n) {
    for (int in_offset = 0; in_offset < kV; ++in_offset) {
      for (const int out_offset : {0, 1, in_offset}) {
        for (const bool allow_whole : {true, false}) {
          const TensorRef source = dense(in.data() + in_offset, kDType, 1, n);
          const TensorRef target = dense(out.data() + out_offset, kDType, 1, n);
          const auto gX = tile::row_view<T>(source, rows_of(source, "test", "x"), "test");
          const auto gY = tile::row_view<T>(target, rows_of(target, "test", "y"), "test");
          ASSERT_EQ(gX.whole, in_offset == 0 && n % kV == 0);
          ASSERT_EQ(gY.whole, out_offset == 0 && n % kV == 0);
          test::cuda_ok(
              cudaMemcpy(out.data(), canary.data(), kSpan * sizeof(T), cudaMemcpyHostToDevice));
          load_store_kernel<T, Column>
              <<<1, kPacks>>>(gX.data, gY.data, reinterpret_cast<Pack<T>*>(loaded.data()),
                              reinterpret_cast<Pack<T>*>(loaded_async.data()), Column{n},
                              gX.whole && allow_whole, gY.whole && allow_whole);
          test::cuda_ok(cudaGetLastError());
          const std::vector<Host<T>> registers = loaded.download(),
                                     shared = loaded_async.download(), stored = out.download();
          for (int c = 0; c < kPacks * kV; ++c) {
            const std::uint32_t expected = c < n ? bits_of(values[in_offset + c]) : 0u;
            ASSERT_EQ(bits_of(registers[c]), expected)
                << "column " << c << " of " << n << " from " << in_offset;
            ASSERT_EQ(bits_of(shared[c]), expected)
                << "column " << c << " of " << n << " from " << in_offset;
          }
          for (int c = 0; c < kSpan; ++c) {
            const bool written = c >= out_offset && c < out_offset + n;
            const std::uint32_t expected =
                bits_of(written ? values[in_offset + c - out_offset] : canary[c]);
            ASSERT_EQ(bits_of(stored[c]), expected)
                << "column " << c << " of " << n << " to " << out_offset;
          }
        }
      }
    }
  }
}

TEST_F(Primitives, F32LoadsAndStores) { expect_loads_and_stores<float, int>(); }
TEST_F(Primitives, F16LoadsAndStores) { expect_loads_and_stores<Half, int>(); }
TEST_F(Primitives, Bf16LoadsAndStores) { expect_loads_and_stores<Bfloat, int>(); }
TEST_F(Primitives, Bf16LoadsAndStoresWith64BitColumns) {
  expect_loads_and_stores<Bfloat, std::int64_t>();
}

template <int kCount, class Column>
__global__ void column_kernel(tile::ColumnView view, Column n, float* out) {
  const Column column = static_cast<Column>(threadIdx.x) * kCount;
  float v[kCount];
  view.load(column, n, v);
  for (int i = 0; i < kCount; ++i) out[column + i] = v[i];
}

template <class W, int kCount, class Column>
void expect_columns_load() {
  constexpr int kThreads = 4, kSpan = kThreads * kCount;
  const std::vector<Host<W>> values = random_elements<W>(kSpan + 8, 1);
  const DeviceArray<Host<W>> weight(values);
  for (int n = 0; n <= kSpan; ++n) {
    for (const int offset : {0, 1, 3}) {
      const DeviceArray<float> out(kSpan, -7.0f);
      const tile::ColumnView view =
          tile::column_view(dense(weight.data() + offset, HostType<W>::kDType, n));
      column_kernel<kCount, Column><<<1, kThreads>>>(view, Column{n}, out.data());
      test::cuda_ok(cudaGetLastError());
      const std::vector<float> found = out.download();
      for (int c = 0; c < kSpan; ++c) {
        ASSERT_EQ(found[c], c < n ? to_float(values[offset + c]) : 0.0f)
            << "column " << c << " of " << n << ", offset " << offset << ", " << kCount
            << " at once";
      }
    }
  }
}

template <class W>
void expect_columns_load_in_any_count() {
  expect_columns_load<W, 1, int>();
  expect_columns_load<W, 2, int>();
  expect_columns_load<W, 4, int>();
  expect_columns_load<W, 8, int>();
  expect_columns_load<W, 16, int>();
  expect_columns_load<W, 8, std::int64_t>();
}

TEST_F(Primitives, F32ColumnsLoad) { expect_columns_load_in_any_count<float>(); }
TEST_F(Primitives, F16ColumnsLoad) { expect_columns_load_in_any_count<Half>(); }
TEST_F(Primitives, Bf16ColumnsLoad) { expect_columns_load_in_any_count<Bfloat>(); }

TEST_F(Primitives, MissingColumnsAreOnes) {
  const DeviceArray<float> out(4 * 8);
  column_kernel<8, int><<<1, 4>>>(tile::column_view(TensorRef{}), 32, out.data());
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(out.download(), std::vector<float>(32, 1.0f));
}

template <class T>
__global__ void row_kernel(tile::RowView<T> view, const std::int64_t* rows, int count,
                           std::int64_t* starts) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) starts[i] = view.row(rows[i]) - view.data;
}

template <class T>
void expect_row_starts(const Rows& rows, std::vector<std::int64_t> which) {
  std::erase_if(which, [&](std::int64_t row) { return row >= rows.count; });
  std::vector<std::int64_t> expected;
  for (const std::int64_t row : which) expected.push_back(rows.start(row));
  const int count = static_cast<int>(which.size());
  TensorRef t;  // only addresses are computed, none is read
  t.data = reinterpret_cast<void*>(std::uintptr_t{1} << 20);
  const auto view = tile::row_view<T>(t, rows, "test");
  const DeviceArray<std::int64_t> in(which), starts(which.size());
  row_kernel<T><<<(count + 127) / 128, 128>>>(view, in.data(), count, starts.data());
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(starts.download(), expected);
}

TEST_F(Primitives, RowsUnderOneStride) {
  const std::int64_t large = std::int64_t{1} << 33;
  const Rows rows{
      .count = 2 * large, .length = 8, .inner = 2 * large, .outer_stride = 0, .inner_stride = 24};
  expect_row_starts<float>(rows, {0, 1, 2, 1000, large - 1, large, large + 1});
  expect_row_starts<Half>(
      {.count = 6, .length = 8, .inner = 6, .outer_stride = 0, .inner_stride = 0}, {0, 3, 5});
}

TEST_F(Primitives, RowsUnderTwoStrides) {
  const std::int64_t limit = std::int64_t{1} << 32;
  for (const std::int64_t inner : {2, 3, 7, 4096, 65537}) {
    const Rows rows{.count = limit / inner * inner - (limit % inner == 0 ? inner : 0),
                    .length = 8,
                    .inner = inner,
                    .outer_stride = 1000 * inner,
                    .inner_stride = 16};
    expect_row_starts<Bfloat>(rows, {0, 1, inner - 1, inner, inner + 1, 10 * inner - 1,
                                     limit / 2 - 1, limit / 2, limit / 2 + 1, rows.count - 1});
  }
}

TEST(RowView, WholeOnlyIfEveryRowIsAligned) {
  const auto whole = [](std::uintptr_t address, std::int64_t length, std::int64_t inner_stride,
                        std::int64_t outer_stride) {
    TensorRef t;
    t.data = reinterpret_cast<void*>(address);
    const Rows rows{.count = 6,
                    .length = length,
                    .inner = 3,
                    .outer_stride = outer_stride,
                    .inner_stride = inner_stride};
    return tile::row_view<Bfloat>(t, rows, "test").whole;
  };
  EXPECT_TRUE(whole(4096, 64, 64, 640));
  EXPECT_FALSE(whole(4098, 64, 64, 640));
  EXPECT_FALSE(whole(4096, 63, 64, 640));
  EXPECT_FALSE(whole(4096, 64, 68, 640));
  EXPECT_FALSE(whole(4096, 64, 64, 644));
}

TEST(RowView, RefusesMoreRowsThanItsDivisionTakes) {
  const Rows rows{.count = std::int64_t{1} << 32,
                  .length = 8,
                  .inner = 2,
                  .outer_stride = 64,
                  .inner_stride = 8};
  const std::string message =
      test::error_of([&] { tile::row_view<float>(TensorRef{}, rows, "fastkern::op"); });
  EXPECT_TRUE(test::contains(message, "fastkern::op: 4294967296 rows")) << message;
}

// ---- sums
// ----------------------------------------------------------------------------------------------------------

/// The butterfly of lane_sum over the first `width` of consecutive values, bit for bit.
float butterfly(std::vector<float> values) {
  for (std::size_t offset = values.size() / 2; offset > 0; offset /= 2) {
    std::vector<float> next(values.size());
    for (std::size_t lane = 0; lane < values.size(); ++lane)
      next[lane] = values[lane] + values[lane ^ offset];
    values = next;
  }
  return values[0];
}

template <int kWidth>
__global__ void lane_sum_kernel(const float* in, float* out) {
  out[threadIdx.x] = tile::lane_sum<kWidth>(in[threadIdx.x]);
}

template <int kWidth>
void expect_lane_sum() {
  constexpr int kThreads = 128;
  const std::vector<float> values = random_elements<float>(kThreads, kWidth);
  const DeviceArray<float> in(values), out(kThreads);
  lane_sum_kernel<kWidth><<<1, kThreads>>>(in.data(), out.data());
  test::cuda_ok(cudaGetLastError());
  const std::vector<float> found = out.download();
  for (int thread = 0; thread < kThreads; ++thread) {
    const auto first = values.begin() + thread / kWidth * kWidth;
    EXPECT_EQ(bits_of(found[thread]), bits_of(butterfly({first, first + kWidth})))
        << kWidth << ", " << thread;
  }
}

TEST_F(Primitives, LaneSums) {
  expect_lane_sum<1>();
  expect_lane_sum<2>();
  expect_lane_sum<4>();
  expect_lane_sum<8>();
  expect_lane_sum<16>();
  expect_lane_sum<32>();
}

/// Several sums in a row with alternating phases, as a persistent kernel makes them.
template <int kBlock, int kThreads, int kValues>
__global__ void row_sum_kernel(const float* in, float* out, int steps) {
  __shared__ tile::RowSumScratch<kBlock, kThreads, kValues> scratch;
  int phase = 0;
  for (int step = 0; step < steps; ++step, phase ^= 1) {
    float values[kValues];
    for (int i = 0; i < kValues; ++i) values[i] = in[(step * kValues + i) * kBlock + threadIdx.x];
    tile::row_sum<kBlock, kThreads>(values, scratch, phase);
    for (int i = 0; i < kValues; ++i) out[(step * kValues + i) * kBlock + threadIdx.x] = values[i];
  }
}

/// The sum of one row's values in the documented order: within warps, then over the warps' sums.
float row_sum_on_host(const std::vector<float>& values) {
  if (values.size() <= tile::kWarp) return butterfly(values);
  std::vector<float> warps;
  for (auto first = values.begin(); first != values.end(); first += tile::kWarp) {
    warps.push_back(butterfly({first, first + tile::kWarp}));
  }
  return butterfly(warps);
}

template <int kThreads, int kValues>
void expect_row_sum() {
  constexpr int kBlock = std::max(kThreads, 128), kSteps = 5;
  const std::vector<float> values = random_elements<float>(kSteps * kValues * kBlock, kThreads);
  const DeviceArray<float> in(values), out(values.size());
  row_sum_kernel<kBlock, kThreads, kValues><<<1, kBlock>>>(in.data(), out.data(), kSteps);
  test::cuda_ok(cudaGetLastError());
  const std::vector<float> found = out.download();
  for (std::size_t i = 0; i < values.size(); i += kThreads) {
    const auto first = values.begin() + i;
    const float expected = row_sum_on_host({first, first + kThreads});
    for (int lane = 0; lane < kThreads; ++lane) {
      ASSERT_EQ(bits_of(found[i + lane]), bits_of(expected))
          << kThreads << " threads, value " << i + lane;
    }
  }
}

template <int... kThreads>
void expect_row_sums() {
  (expect_row_sum<kThreads, 1>(), ...);
  (expect_row_sum<kThreads, 2>(), ...);
}

TEST_F(Primitives, RowSums) { expect_row_sums<4, 8, 16, 32, 64, 128, 256, 512, 1024>(); }

}  // namespace
}  // namespace fastkern
