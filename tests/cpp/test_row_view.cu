// SPDX-License-Identifier: Apache-2.0
// Rows and columns of tensors in packs: cuda/tile/pack.cuh against host code.
#include <bit>

#include "support.cuh"
#include "tile/pack.cuh"

namespace fastkern {
namespace {

using test::DeviceArray;
using test::Sizes;
using test::Tensor;
using tile::kVector;
using tile::Mixed;
using tile::Pack;
using tile::RowView;

using Half = __half;
using Bfloat = __nv_bfloat16;

template <class T>
constexpr DType kTypeOf = std::is_same_v<T, Half>     ? DType::f16
                          : std::is_same_v<T, Bfloat> ? DType::bf16
                                                      : DType::f32;

class RowsOnDevice : public test::CudaTest {};

// ---- one pack of a row --------------------------------------------------------------------------

/// Thread t takes the pack of columns from t · kVector on: what it loaded, in both ways, and the
/// store of it.
template <class T, class Column>
__global__ void load_store_kernel(const T* in, T* out, float* loaded, float* loaded_async, Column n,
                                  bool in_whole, bool out_whole) {
  __shared__ uint4 shared[32];
  const Column column = static_cast<Column>(threadIdx.x) * kVector<T>;
  tile::load_async(&shared[threadIdx.x], in, column, n, in_whole);
  ptx::cp_async_commit();
  const Pack<T> pack = tile::load(in, column, n, in_whole);
  tile::store(out, column, n, out_whole, pack);
  ptx::cp_async_wait<0>();
  float v[kVector<T>];
  tile::unpack(pack, v);
  for (int i = 0; i < kVector<T>; ++i) loaded[column + i] = v[i];
  tile::unpack(Pack<T>{shared[threadIdx.x]}, v);
  for (int i = 0; i < kVector<T>; ++i) loaded_async[column + i] = v[i];
}

/// Every row length up to four packs, at every offset of source and target from a 16-byte boundary.
template <class T, class Column>
void expect_loads_and_stores() {
  constexpr int kV = kVector<T>, kPacks = 5;
  for (int n = 0; n <= 4 * kV; ++n) {
    for (int in_offset = 0; in_offset < kV; ++in_offset) {
      const Tensor source = Tensor(kTypeOf<T>, test::dense_layout({n}, in_offset)).fill(1);
      const test::DeviceTensor in(source);
      for (const int out_offset : {0, 1, in_offset}) {
        for (const bool allow_whole : {true, false}) {
          const test::DeviceTensor out(Tensor(kTypeOf<T>, test::dense_layout({n}, out_offset)));
          const DeviceArray<float> loaded(kPacks * kV, -7.0f), loaded_async(kPacks * kV, -7.0f);
          const bool in_whole = in_offset == 0 && n % kV == 0 && allow_whole;
          const bool out_whole = out_offset == 0 && n % kV == 0 && allow_whole;
          load_store_kernel<T, Column>
              <<<1, kPacks>>>(static_cast<const T*>(in.ref().data), static_cast<T*>(out.ref().data),
                              loaded.data(), loaded_async.data(), Column{n}, in_whole, out_whole);
          test::cuda_ok(cudaGetLastError());
          const std::string where = std::to_string(n) + " columns from " +
                                    std::to_string(in_offset) + " to " + std::to_string(out_offset);
          const std::vector<float> registers = loaded.download(), shared = loaded_async.download();
          for (int c = 0; c < kPacks * kV; ++c) {
            const double expected = c < n ? source.get(c) : 0.0;
            ASSERT_EQ(registers[c], expected) << "column " << c << " of " << where;
            ASSERT_EQ(shared[c], expected) << "column " << c << " of " << where;
          }
          const Tensor stored = out.download();
          ASSERT_TRUE(stored.gaps_intact()) << where;
          ASSERT_TRUE(stored.same_bits(source)) << where;
        }
      }
    }
  }
}

TEST_F(RowsOnDevice, F32PacksLoadAndStore) { expect_loads_and_stores<float, int>(); }
TEST_F(RowsOnDevice, F16PacksLoadAndStore) { expect_loads_and_stores<Half, int>(); }
TEST_F(RowsOnDevice, Bf16PacksLoadAndStore) { expect_loads_and_stores<Bfloat, int>(); }
TEST_F(RowsOnDevice, Bf16PacksLoadAndStoreWith64BitColumns) {
  expect_loads_and_stores<Bfloat, std::int64_t>();
}

// ---- all packs of a thread ----------------------------------------------------------------------

constexpr int kThreads = 8, kPacks = 2;

/// Block r takes row r: what it loaded, in both ways, and the store of it as `out` has it.
template <class T>
__global__ void view_kernel(RowView<T> in, RowView<T> out, int n, float* loaded,
                            float* loaded_async) {
  constexpr int kV = kVector<T>;
  __shared__ uint4 shared[kPacks * kThreads];
  const int thread = threadIdx.x;
  const auto column_of = [&](int i) { return (i * kThreads + thread) * kV; };
  const char* const row = in.row(blockIdx.x);
  in.template load_async<kPacks>(shared + thread, kThreads, row, column_of, n);
  ptx::cp_async_commit();
  Pack<T> packs[kPacks], rounded[kPacks];
  in.load(row, column_of, n, packs);
  ptx::cp_async_wait<0>();
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kPacks * kThreads * kV;
  for (int i = 0; i < kPacks; ++i) {
    float v[kV];
    in.unpack({ptx::ld_shared(shared + i * kThreads + thread)}, v);
    for (int j = 0; j < kV; ++j) loaded_async[first + column_of(i) + j] = v[j];
    in.unpack(packs[i], v);
    for (int j = 0; j < kV; ++j) loaded[first + column_of(i) + j] = v[j];
    rounded[i] = out.pack(v);
  }
  out.store(out.row(blockIdx.x), column_of, n, rounded);
}

template <class T>
void expect_view(const test::Layout& from, const test::Layout& to, DType in_type, DType out_type) {
  constexpr int kSpan = kPacks * kThreads * kVector<T>;
  const std::int64_t n = from.sizes.back();
  const Tensor source = Tensor(in_type, from).fill(1);
  const std::int64_t m = n > 0 ? source.numel() / n : 2;
  const Tensor blank(out_type, to), expected = Tensor(blank).copy_from(source);
  const test::DeviceTensor in(source);
  for (const bool allow_whole : {true, false}) {
    SCOPED_TRACE(std::string(name_of(in_type)) + " " + from.name + " to " + name_of(out_type) +
                 " " + to.name + ", " + std::to_string(n) + " columns" +
                 (allow_whole ? "" : ", element by element"));
    const DeviceArray<float> loaded(m * kSpan, -7.0f), loaded_async(m * kSpan, -7.0f);
    const test::DeviceTensor out(blank);
    RowView<T> gX = tile::row_view<T>(in.ref(), "test", "x"),
               gY = tile::row_view<T>(out.ref(), "test", "y");
    gX.whole &= allow_whole, gY.whole &= allow_whole;
    view_kernel<T><<<static_cast<int>(m), kThreads>>>(gX, gY, static_cast<int>(n), loaded.data(),
                                                      loaded_async.data());
    test::cuda_ok(cudaDeviceSynchronize());
    const std::vector<float> registers = loaded.download(), shared = loaded_async.download();
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t c = 0; c < kSpan; ++c) {
        const double value = c < n ? source.get(r * n + c) : 0.0;
        ASSERT_EQ(registers[r * kSpan + c], value) << "row " << r << ", column " << c;
        ASSERT_EQ(shared[r * kSpan + c], value) << "row " << r << ", column " << c;
      }
    }
    const Tensor stored = out.download();
    ASSERT_TRUE(stored.gaps_intact());
    ASSERT_TRUE(stored.same_bits(expected));
  }
}

/// Lengths up to all packs of all threads; dense, padded, misaligned and two-level rows.
template <class T>
void expect_views(DType in_type, DType out_type) {
  constexpr int kV = kVector<T>, kSpan = kPacks * kThreads * kV;
  for (const int n : {1, kV - 1, kV, kV + 1, kSpan / 2 - 1, kSpan / 2, kSpan / 2 + kV, kSpan - kV,
                      kSpan - 1, kSpan}) {
    const std::vector<test::Layout> layouts = test::row_layouts(4, n);
    for (std::size_t i = 0; i < layouts.size(); ++i) {
      expect_view<T>(layouts[i], layouts[i], in_type, out_type);
      expect_view<T>(layouts[i], layouts[(i + 1) % layouts.size()], in_type, out_type);
      if (testing::Test::HasFailure()) return;
    }
    for (std::int64_t offset = 0; offset < kV; ++offset) {
      expect_view<T>(test::dense_layout({4, n}, offset), test::dense_layout({4, n}), in_type,
                     out_type);
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST_F(RowsOnDevice, F32Views) { expect_views<float>(DType::f32, DType::f32); }
TEST_F(RowsOnDevice, F16Views) { expect_views<Half>(DType::f16, DType::f16); }
TEST_F(RowsOnDevice, Bf16Views) { expect_views<Bfloat>(DType::bf16, DType::bf16); }
TEST_F(RowsOnDevice, MixedViews) {
  for (const DType in : test::kDTypes) {
    for (const DType out : test::kDTypes) expect_views<Mixed>(in, out);
  }
}

// ---- where rows start ---------------------------------------------------------------------------

TensorRef nowhere(std::initializer_list<std::int64_t> sizes,
                  std::initializer_list<std::int64_t> strides, DType dtype = DType::bf16,
                  std::uintptr_t address = 1 << 20) {
  TensorRef t{reinterpret_cast<void*>(address), dtype, static_cast<int>(sizes.size()), {}, {}};
  std::copy(sizes.begin(), sizes.end(), t.sizes.begin());
  std::copy(strides.begin(), strides.end(), t.strides.begin());
  return t;
}

/// Bytes from the first row: of the row asked for, and of a walk's row after `steps` steps.
template <class T>
__global__ void row_kernel(RowView<T> view, const std::int64_t* rows, int count,
                           std::int64_t* starts) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) starts[i] = view.row(rows[i]) - view.data;
}

template <class T>
__global__ void walk_kernel(RowView<T> view, std::int64_t first, std::int64_t step, int count,
                            std::int64_t* starts) {
  tile::RowWalk<T> walk(view, first, step);
  std::int64_t row = first;
  for (int i = 0; i < count; ++i) {
    starts[i] = walk.at - view.data;
    row += step;
    walk.next(row);
  }
}

/// Only addresses are computed, none is read.
template <class T>
void expect_row_starts(const TensorRef& t, std::vector<std::int64_t> which, std::int64_t first,
                       std::int64_t step) {
  const Rows rows = rows_of(t, "test", "x");
  const auto view = tile::row_view<T>(t, "test", "x");
  std::erase_if(which, [&](std::int64_t row) { return row >= rows.count; });
  const auto starts_of = [&](const std::vector<std::int64_t>& some) {
    std::vector<std::int64_t> starts;
    for (const std::int64_t row : some) starts.push_back(rows.start(row) * size_of(t.dtype));
    return starts;
  };
  const int count = static_cast<int>(which.size());
  const DeviceArray<std::int64_t> in(which), starts(which.size());
  row_kernel<T><<<(count + 127) / 128, 128>>>(view, in.data(), count, starts.data());
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(starts.download(), starts_of(which)) << t.shape();

  std::vector<std::int64_t> walked;
  for (std::int64_t row = first; row < rows.count && walked.size() < 20; row += step)
    walked.push_back(row);
  const DeviceArray<std::int64_t> walk(walked.size());
  walk_kernel<T><<<1, 1>>>(view, first, step, static_cast<int>(walked.size()), walk.data());
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(walk.download(), starts_of(walked)) << t.shape() << " from " << first << " by " << step;
}

TEST_F(RowsOnDevice, StartsUnderOneStride) {
  const std::int64_t large = std::int64_t{1} << 33;
  for (const std::int64_t stride : {24, 0, 8}) {
    const TensorRef t = nowhere({2 * large, 8}, {stride, 1}, DType::f32);
    expect_row_starts<float>(t, {0, 1, 2, 1000, large - 1, large, large + 1}, large - 7, 5);
    expect_row_starts<Mixed>(t, {0, 1, 2, 1000, large - 1, large, large + 1}, 3, large / 4);
  }
  expect_row_starts<Half>(nowhere({6, 8}, {8, 1}, DType::f16), {0, 3, 5}, 1, 2);
}

TEST_F(RowsOnDevice, StartsUnderTwoStrides) {
  const std::int64_t limit = std::int64_t{1} << 32;
  for (const std::int64_t inner : {2, 3, 7, 4096, 65537}) {
    const std::int64_t outer = limit / inner - (limit % inner == 0);
    const TensorRef t = nowhere({outer, inner, 8}, {1000 * inner, 16, 1});
    const std::int64_t count = outer * inner;
    const std::vector<std::int64_t> which{0,
                                          1,
                                          inner - 1,
                                          inner,
                                          inner + 1,
                                          10 * inner - 1,
                                          limit / 2 - 1,
                                          limit / 2,
                                          limit / 2 + 1,
                                          count - 1};
    expect_row_starts<Bfloat>(t, which, 1, inner + 1);
    expect_row_starts<Mixed>(t, which, limit / 2 - 3, 1);
  }
  // The second stride is the smaller one, and strides may be negative.
  expect_row_starts<Bfloat>(nowhere({3, 4, 8}, {8, 24, 1}), {0, 1, 3, 4, 11}, 0, 1);
  expect_row_starts<Bfloat>(nowhere({3, 4, 8}, {-8, 24, 1}), {0, 1, 3, 4, 11}, 2, 3);
}

TEST(RowView, WholeOnlyIfEveryRowIsAligned) {
  const auto whole = []<class T>(T, DType dtype, std::uintptr_t address, std::int64_t length,
                                 std::int64_t inner_stride, std::int64_t outer_stride) {
    const TensorRef t = nowhere({2, 3, length}, {outer_stride, inner_stride, 1}, dtype, address);
    return tile::row_view<T>(t, "test", "x").whole;
  };
  const auto bf16 = [&](auto... at) { return whole(Bfloat{}, DType::bf16, at...); };
  EXPECT_TRUE(bf16(4096, 64, 64, 640));
  EXPECT_FALSE(bf16(4098, 64, 64, 640));
  EXPECT_FALSE(bf16(4104, 64, 64, 640));
  EXPECT_FALSE(bf16(4096, 63, 64, 640));
  EXPECT_FALSE(bf16(4096, 64, 68, 640));
  EXPECT_FALSE(bf16(4096, 64, 64, 644));
  // Four columns at a time: 8 bytes.
  const auto mixed = [&](auto... at) { return whole(Mixed{}, DType::bf16, at...); };
  EXPECT_TRUE(mixed(4104, 64, 68, 644));
  EXPECT_FALSE(mixed(4100, 64, 64, 640));
  EXPECT_FALSE(mixed(4096, 62, 64, 640));
  EXPECT_FALSE(mixed(4096, 64, 66, 640));
  EXPECT_FALSE(whole(Mixed{}, DType::f32, 4104, 64, 64, 640));
  EXPECT_TRUE(whole(Mixed{}, DType::f32, 4112, 64, 68, 644));
  // Quantised results: a byte for each column.
  EXPECT_TRUE(whole(Bfloat{}, DType::i8, 4104, 64, 72, 648));
  EXPECT_FALSE(whole(Bfloat{}, DType::i8, 4100, 64, 64, 640));
  EXPECT_TRUE(whole(Mixed{}, DType::f8e4m3, 4100, 64, 68, 644));
  EXPECT_FALSE(whole(Mixed{}, DType::f8e4m3, 4098, 64, 64, 640));
}

TEST(RowView, RefusesMoreRowsThanItsDivisionTakes) {
  const std::int64_t half = std::int64_t{1} << 31;
  const std::string message = test::error_of([&] {
    tile::row_view<float>(nowhere({half, 2, 8}, {64, 8, 1}, DType::f32), "fastkern::op", "x");
  });
  EXPECT_TRUE(test::contains(message, "fastkern::op: 4294967296 rows")) << message;
  EXPECT_EQ(tile::row_view<float>(TensorRef{}, "fastkern::op", "x").data, nullptr);
}

// ---- columns ------------------------------------------------------------------------------------

template <int kCount>
__global__ void column_kernel(tile::ColumnView view, std::int64_t start, std::int64_t n,
                              float missing, float* out) {
  const std::int64_t column = threadIdx.x * kCount;
  float v[kCount];
  view.load(start, column, n, missing, v);
  for (int i = 0; i < kCount; ++i) out[column + i] = v[i];
}

/// The second of three vectors too: heads.
template <int kCount>
void expect_columns_load(DType dtype) {
  constexpr int kSpan = 4 * kCount;
  for (int n = 0; n <= kSpan; ++n) {
    for (const int offset : {0, 1, 3}) {
      const Tensor vectors = Tensor(dtype, test::dense_layout({3, n}, offset)).fill(1);
      const test::DeviceTensor device(vectors);
      for (const int head : {0, 1, 2}) {
        const DeviceArray<float> out(kSpan, -7.0f);
        column_kernel<kCount>
            <<<1, 4>>>(tile::column_view(device.ref(), n), head * n, n, 5.0f, out.data());
        test::cuda_ok(cudaGetLastError());
        const std::vector<float> found = out.download();
        for (int c = 0; c < kSpan; ++c) {
          ASSERT_EQ(found[c], c < n ? vectors.get(head * n + c) : 0.0)
              << name_of(dtype) << ", column " << c << " of " << n << ", head " << head
              << ", offset " << offset << ", " << kCount << " at once";
        }
      }
    }
  }
}

TEST_F(RowsOnDevice, ColumnsLoadInAnyCount) {
  for (const DType dtype : test::kDTypes) {
    expect_columns_load<1>(dtype);
    expect_columns_load<2>(dtype);
    expect_columns_load<4>(dtype);
    expect_columns_load<8>(dtype);
    expect_columns_load<16>(dtype);
  }
}

TEST_F(RowsOnDevice, MissingColumnsAreWhatTheCallerSays) {
  const DeviceArray<float> out(4 * 8);
  column_kernel<8><<<1, 4>>>(tile::column_view(TensorRef{}, 32), 0, 32, 1.5f, out.data());
  test::cuda_ok(cudaGetLastError());
  EXPECT_EQ(out.download(), std::vector<float>(32, 1.5f));
}

template <class T, class W>
__global__ void column_pack_kernel(tile::ColumnView view, std::int64_t start, int n, float* out) {
  const int column = threadIdx.x * kVector<T>;
  tile::ColumnPack<T, W> pack;
  pack.load(view, start, column, n);
  float v[kVector<T>];
  pack.unpack(v);
  for (int i = 0; i < kVector<T>; ++i) out[column + i] = v[i];
}

/// Of whole vectors alone. A pack of T may end in the middle of two of W.
template <class T, class W>
void expect_column_packs() {
  constexpr int kSpan = 4 * kVector<T>;
  for (int n = 0; n <= kSpan; n += kVector<W>) {
    const Tensor vectors = Tensor(kTypeOf<W>, Sizes{2, n}).fill(1);
    const test::DeviceTensor device(vectors);
    const tile::ColumnView view = tile::column_view(device.ref(), n);
    ASSERT_TRUE(view.whole);
    for (const int head : {0, 1}) {
      const DeviceArray<float> out(kSpan, -7.0f);
      column_pack_kernel<T, W><<<1, 4>>>(view, head * n, n, out.data());
      test::cuda_ok(cudaGetLastError());
      const std::vector<float> found = out.download();
      for (int c = 0; c < kSpan; ++c) {
        ASSERT_EQ(found[c], c < n ? vectors.get(head * n + c) : 0.0)
            << "column " << c << " of " << n << ", head " << head;
      }
    }
  }
}

TEST_F(RowsOnDevice, ColumnPacksLoad) {
  expect_column_packs<float, float>();
  expect_column_packs<Mixed, float>();
  expect_column_packs<Half, float>();
  expect_column_packs<Bfloat, float>();
  expect_column_packs<Half, Half>();
  expect_column_packs<Bfloat, Bfloat>();
}

}  // namespace
}  // namespace fastkern
