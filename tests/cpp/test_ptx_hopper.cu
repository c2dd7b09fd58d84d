// SPDX-License-Identifier: Apache-2.0
// What only Hopper has of cuda/ptx: the copy engine, tensor cores of a warpgroup, registers that
// change hands. Each alone, against host loops; with small integers, so that every sum is exact.
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "support.cuh"
#include "tensor_map.cuh"

namespace fastkern {
namespace {

using test::cuda_ok;
using test::DeviceArray;
using Word = std::uint16_t;

class Hopper : public test::CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped() && cuda::capability(0, "test") != 90) {
      GTEST_SKIP() << "no device of capability 9.0";
    }
  }
};

/// Where 16 bytes of a row of a panel lie.
__device__ int swizzled(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

std::vector<Word> random_words(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Word> words(count);
  for (Word& word : words) word = static_cast<Word>(random());
  return words;
}

// ---- the copy engine
// -----------------------------------------------------------------------------------------------

/// A box of 64 columns and kRows rows, read through its swizzle, and stored elsewhere.
template <int kRows>
__global__ void box_kernel(const __grid_constant__ CUtensorMap from,
                           const __grid_constant__ CUtensorMap to, int c0, int c1, int c2, int c3,
                           uint4* seen) {
  // Nothing is static: the box must begin at a multiple of 1024.
  extern __shared__ __align__(1024) char box[];
  std::uint64_t* const there = reinterpret_cast<std::uint64_t*>(box + kRows * 128);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&from);
    ptx::mbarrier_init(there, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect(there, kRows * 128);
    ptx::tma_load(ptx::shared_address(box), &from, c0, c1, c2, c3, there, ptx::Keep::shortly);
  }
  ptx::mbarrier_wait(there, 0);
  for (int e = threadIdx.x; e < kRows * 8; e += 128) {
    seen[e] = *reinterpret_cast<const uint4*>(box + swizzled(e / 8, e % 8));
  }
  __syncthreads();
  // Kernels store what begins inside.
  if (threadIdx.x == 0 && c1 >= 0) {
    ptx::tma_store(&to, c0, c1, c2, c3, ptx::shared_address(box));
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
  }
}

TEST_F(Hopper, BoxesOfTensors) {
  constexpr int kRows = 48, kColumns = 96, kLength = 70, kHeads = 3, kEntries = 2;
  // Heads are beside each other, with 16 elements more after each row.
  constexpr int kHead = kColumns, kRow = kHeads * kHead + 16, kEntry = kLength * kRow;
  const std::vector<Word> words = random_words(kEntries * kEntry, 1);
  const DeviceArray<Word> in(words), out(words.size(), 0xabcd);
  const auto map = [&](const DeviceArray<Word>& of) {
    return cuda::tensor_map({of.data(),
                             DType::bf16,
                             {kColumns, kLength, kHeads, kEntries},
                             {kRow * 2, kHead * 2, kEntry * 2},
                             {64, kRows, 1, 1}},
                            "test");
  };
  std::vector<Word> stored(words.size(), 0xabcd);
  for (const auto& [c0, c1, c2, c3] : std::vector<std::array<int, 4>>{
           {0, 0, 0, 0}, {64, 0, 2, 1}, {0, 40, 1, 0}, {64, 69, 2, 0}, {0, -7, 0, 1}}) {
    SCOPED_TRACE(::testing::Message() << "box at " << c0 << ", " << c1 << ", " << c2 << ", " << c3);
    const DeviceArray<uint4> seen(kRows * 8, uint4{7, 7, 7, 7});
    box_kernel<kRows><<<1, 128, kRows * 128 + 8>>>(map(in), map(out), c0, c1, c2, c3, seen.data());
    cuda_ok(cudaDeviceSynchronize());
    const std::vector<uint4> found = seen.download();
    const Word* const of = reinterpret_cast<const Word*>(found.data());
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int row = c1 + r, column = c0 + c;
        const bool inside = row >= 0 && row < kLength && column < kColumns;
        const std::size_t at = inside ? c3 * kEntry + row * kRow + c2 * kHead + column : 0;
        ASSERT_EQ(of[r * 64 + c], inside ? words[at] : 0)
            << c0 << " " << c1 << ": " << r << " " << c;
        if (inside && c1 >= 0) stored[at] = words[at];
      }
    }
  }
  EXPECT_EQ(out.download(), stored);
}

__global__ void add_kernel(float* to, int count) {
  __shared__ __align__(128) float values[256];
  values[threadIdx.x] = static_cast<float>(threadIdx.x + blockIdx.x);
  ptx::fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_add(to, ptx::shared_address(values), count * 4);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

TEST_F(Hopper, BulkAdditions) {
  constexpr int kCount = 200, kBlocks = 16;
  const DeviceArray<float> sums(256, 0.5f);
  add_kernel<<<kBlocks, 256>>>(sums.data(), kCount);
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<float> found = sums.download();
  for (int i = 0; i < 256; ++i) {
    ASSERT_EQ(found[i], 0.5f + (i < kCount ? kBlocks * i + kBlocks * (kBlocks - 1) / 2 : 0)) << i;
  }
}

/// From one place to another through shared memory.
__global__ void bulk_kernel(const float* from, float* to, int count) {
  __shared__ __align__(128) float values[256];
  __shared__ std::uint64_t there;
  if (threadIdx.x > 0) return;
  ptx::mbarrier_init(&there, 1);
  ptx::mbarrier_init_fence();
  ptx::mbarrier_expect(&there, count * 4);
  ptx::bulk_load(ptx::shared_address(values), from, count * 4, &there);
  ptx::mbarrier_wait(&there, 0);
  ptx::fence_async();
  ptx::bulk_store(to, ptx::shared_address(values), count * 4);
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
  ptx::fence_async_global();
}

TEST_F(Hopper, BulkCopies) {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) values[i] = static_cast<float>(i);
  const DeviceArray<float> from(values), to(256, -1.0f);
  bulk_kernel<<<1, 32>>>(from.data(), to.data(), 200);
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<float> found = to.download();
  for (int i = 0; i < 256; ++i) ASSERT_EQ(found[i], i < 200 ? values[i] : -1.0f) << i;
}

/// Matrices of fragments, one a warp, as rows of 32 bytes.
__global__ void stmatrix_kernel(Word* out) {
  __shared__ __align__(128) Word tile[4][16 * 16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  std::uint32_t r[4];
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e % 2 * 8, column = lane % 4 * 2 + e / 2 * 8;
    r[e] = warp * 256 + row * 16 + column;
    r[e] |= (r[e] + 1) << 16;
  }
  ptx::stmatrix_4(ptx::shared_address(tile[warp] + lane % 16 * 16 + lane / 16 * 8), r);
  __syncthreads();
  for (int e = lane; e < 256; e += 32) out[warp * 256 + e] = tile[warp][e];
}

TEST_F(Hopper, MatricesOfFragments) {
  const DeviceArray<Word> out(1024);
  stmatrix_kernel<<<1, 128>>>(out.data());
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<Word> found = out.download();
  for (int i = 0; i < 1024; ++i) ASSERT_EQ(found[i], i);
}

// ---- tensor cores of a warpgroup
// -----------------------------------------------------------------------------------

constexpr int kDepth = 128;  // that is summed over

/// d (64 x kN) = 2 a b: `a` (64 x kDepth), `b` (kN x kDepth), or the other way round where kA, kB
/// are mn.
template <class T, int kN, ptx::Major kB, bool kInRegisters, ptx::Major kA>
__global__ void __launch_bounds__(128) product_kernel(const Word* a, const Word* b, float* d) {
  extern __shared__ __align__(1024) char tiles[];
  char *const sA = tiles, *const sB = tiles + 64 * kDepth * 2;
  const auto place = [](char* to, const Word* from, int rows, int columns) {
    for (int e = threadIdx.x; e < rows * columns / 8; e += 128) {
      const int row = e / (columns / 8), chunk = e % (columns / 8);
      *reinterpret_cast<uint4*>(to + chunk / 8 * (rows * 128) + swizzled(row, chunk % 8)) =
          *reinterpret_cast<const uint4*>(from + row * columns + chunk * 8);
    }
  };
  if (kA == ptx::Major::k) {
    place(sA, a, 64, kDepth);
  } else {
    place(sA, a, kDepth, 64);
  }
  if (kB == ptx::Major::k) {
    place(sB, b, kN, kDepth);
  } else {
    place(sB, b, kDepth, kN);
  }
  ptx::fence_async();
  __syncthreads();
  const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  std::uint32_t rA[kDepth / 16][4];
  for (int kk = 0; kk < kDepth / 16; ++kk) {
    for (int e = 0; e < 4; ++e) {
      const int row = warp * 16 + quad + e % 2 * 8, column = kk * 16 + e / 2 * 8 + pair * 2;
      rA[kk][e] = *reinterpret_cast<const std::uint32_t*>(a + row * kDepth + column);
    }
  }
  const ptx::MatrixDescriptor dA = ptx::matrix_descriptor(ptx::shared_address(sA));
  const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(ptx::shared_address(sB), kDepth * 128);
  float sums[kN / 2];
  for (int twice = 0; twice < 2; ++twice) {
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kDepth / 16; ++kk) {
      const ptx::MatrixDescriptor at = ptx::matrix_right(
          dB, kB == ptx::Major::k ? kk / 4 * (kN * 128) + kk % 4 * 32 : kk * (16 * 128));
      const bool add = twice > 0 || kk > 0;
      if constexpr (kInRegisters) {
        ptx::wgmma<kB>(sums, rA[kk], at, add, T{});
      } else {
        ptx::wgmma<kA, kB>(
            sums,
            ptx::matrix_right(
                dA, kA == ptx::Major::k ? kk / 4 * (64 * 128) + kk % 4 * 32 : kk * (16 * 128)),
            at, add, T{});
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::registers_arrived(sums);
  }
  for (int i = 0; i < kN / 2; ++i) {
    d[(warp * 16 + quad + i / 2 % 2 * 8) * kN + i / 4 * 8 + pair * 2 + i % 2] = sums[i];
  }
}

template <class T, int kN, ptx::Major kB, bool kInRegisters, ptx::Major kA = ptx::Major::k>
void expect_product() {
  using Host = std::conditional_t<std::is_same_v<T, __half>, f16, bf16>;
  std::mt19937 random(kN);
  const auto small = [&](int count) {
    std::vector<Word> words(count);
    for (Word& word : words) {
      const Host value = from_float<Host>(static_cast<float>(static_cast<int>(random() % 9) - 4));
      word = value.bits;
    }
    return words;
  };
  const auto value = [](Word word) { return to_float(Host{word}); };
  const std::vector<Word> a = small(64 * kDepth), b = small(kN * kDepth);
  const DeviceArray<Word> on_a(a), on_b(b);
  const DeviceArray<float> d(64 * kN, -1.0f);
  const auto kernel = product_kernel<T, kN, kB, kInRegisters, kA>;
  // Panels are whole: 64 columns each.
  const int bytes = 64 * kDepth * 2 + (kN + 63) / 64 * 64 * kDepth * 2;
  cuda_ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<1, 128, bytes>>>(on_a.data(), on_b.data(), d.data());
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<float> found = d.download();
  int wrong = 0;
  for (int i = 0; i < 64; ++i) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < kDepth; ++k) {
        sum += value(a[kA == ptx::Major::k ? i * kDepth + k : k * 64 + i]) *
               value(b[kB == ptx::Major::k ? n * kDepth + k : k * kN + n]);
      }
      if (found[i * kN + n] != 2.0f * sum && wrong++ < 4) {
        ADD_FAILURE() << "N " << kN << (kA == ptx::Major::mn ? " mn" : " k")
                      << (kB == ptx::Major::mn ? " mn" : " k")
                      << (kInRegisters ? " registers" : " shared") << ": row " << i << " column "
                      << n << " is " << found[i * kN + n] << ", expected " << 2.0f * sum;
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

template <int kN>
void expect_products() {
  expect_product<__half, kN, ptx::Major::k, false>();
  expect_product<__nv_bfloat16, kN, ptx::Major::k, false>();
  expect_product<__nv_bfloat16, kN, ptx::Major::k, true>();
  expect_product<__half, kN, ptx::Major::mn, true>();
  expect_product<__nv_bfloat16, kN, ptx::Major::mn, true>();
  expect_product<__nv_bfloat16, kN, ptx::Major::mn, false>();
  expect_product<__half, kN, ptx::Major::mn, false, ptx::Major::mn>();
  expect_product<__nv_bfloat16, kN, ptx::Major::mn, false, ptx::Major::mn>();
}

TEST_F(Hopper, Products64) { expect_products<64>(); }
TEST_F(Hopper, Products80) { expect_products<80>(); }
TEST_F(Hopper, Products96) { expect_products<96>(); }
TEST_F(Hopper, Products112) { expect_products<112>(); }
TEST_F(Hopper, Products128) { expect_products<128>(); }
TEST_F(Hopper, Products176) { expect_products<176>(); }
TEST_F(Hopper, Products192) { expect_products<192>(); }
TEST_F(Hopper, Products256) { expect_products<256>(); }

// ---- the same of 8 bits
// -----------------------------------------------------------------------------------------------

/// d (64 x kN) = 2 a b of e4m3: `a` (64 x kDepth), `b` (kN x kDepth), bytes.
template <int kN, bool kInRegisters>
__global__ void __launch_bounds__(128)
    product_8_kernel(const std::uint8_t* a, const std::uint8_t* b, float* d) {
  constexpr int kBytes = 2 * kDepth;  // two panels
  extern __shared__ __align__(1024) char tiles[];
  char *const sA = tiles, *const sB = tiles + 64 * kBytes;
  const auto place = [](char* to, const std::uint8_t* from, int rows) {
    for (int e = threadIdx.x; e < rows * kBytes / 16; e += 128) {
      const int row = e / (kBytes / 16), chunk = e % (kBytes / 16);
      *reinterpret_cast<uint4*>(to + chunk / 8 * (rows * 128) + swizzled(row, chunk % 8)) =
          *reinterpret_cast<const uint4*>(from + row * kBytes + chunk * 16);
    }
  };
  place(sA, a, 64);
  place(sB, b, kN);
  ptx::fence_async();
  __syncthreads();
  const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  std::uint32_t rA[kBytes / 32][4];
  for (int kk = 0; kk < kBytes / 32; ++kk) {
    for (int e = 0; e < 4; ++e) {
      const int row = warp * 16 + quad + e % 2 * 8, column = kk * 32 + e / 2 * 16 + pair * 4;
      rA[kk][e] = *reinterpret_cast<const std::uint32_t*>(a + row * kBytes + column);
    }
  }
  const ptx::MatrixDescriptor dA = ptx::matrix_descriptor(ptx::shared_address(sA));
  const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(ptx::shared_address(sB));
  float sums[kN / 2];
  for (int twice = 0; twice < 2; ++twice) {
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kBytes / 32; ++kk) {
      const ptx::MatrixDescriptor at = ptx::matrix_right(dB, kk / 4 * (kN * 128) + kk % 4 * 32);
      const bool add = twice > 0 || kk > 0;
      if constexpr (kInRegisters) {
        ptx::wgmma(sums, rA[kk], at, add, ptx::E4m3{});
      } else {
        ptx::wgmma(sums, ptx::matrix_right(dA, kk / 4 * (64 * 128) + kk % 4 * 32), at, add,
                   ptx::E4m3{});
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::registers_arrived(sums);
  }
  for (int i = 0; i < kN / 2; ++i) {
    d[(warp * 16 + quad + i / 2 % 2 * 8) * kN + i / 4 * 8 + pair * 2 + i % 2] = sums[i];
  }
}

template <int kN, bool kInRegisters>
void expect_product_8() {
  constexpr int kBytes = 2 * kDepth;
  std::mt19937 random(kN);
  const auto small = [&](int count) {
    std::vector<std::uint8_t> bytes(count);
    for (std::uint8_t& byte : bytes) {
      byte = from_float<f8e4m3>(static_cast<float>(static_cast<int>(random() % 5) - 2)).bits;
    }
    return bytes;
  };
  const std::vector<std::uint8_t> a = small(64 * kBytes), b = small(kN * kBytes);
  const DeviceArray<std::uint8_t> on_a(a), on_b(b);
  const DeviceArray<float> d(64 * kN, -1.0f);
  const auto kernel = product_8_kernel<kN, kInRegisters>;
  const int bytes = (64 + kN) * kBytes;
  cuda_ok(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<1, 128, bytes>>>(on_a.data(), on_b.data(), d.data());
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<float> found = d.download();
  int wrong = 0;
  for (int i = 0; i < 64; ++i) {
    for (int n = 0; n < kN; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < kBytes; ++k) {
        sum += to_float(f8e4m3{a[i * kBytes + k]}) * to_float(f8e4m3{b[n * kBytes + k]});
      }
      if (found[i * kN + n] != 2.0f * sum && wrong++ < 4) {
        ADD_FAILURE() << "N " << kN << (kInRegisters ? " registers" : " shared") << ": row " << i
                      << " column " << n << " is " << found[i * kN + n] << ", expected "
                      << 2.0f * sum;
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST_F(Hopper, ProductsOf8Bits) {
  expect_product_8<64, false>();
  expect_product_8<64, true>();
  expect_product_8<96, false>();
  expect_product_8<96, true>();
  expect_product_8<128, false>();
  expect_product_8<128, true>();
  expect_product_8<256, false>();
  expect_product_8<256, true>();
}

__global__ void pack_8_kernel(const float* in, std::uint32_t* out) {
  const float* const four = in + threadIdx.x * 4;
  out[threadIdx.x] = ptx::pack_4(four[0], four[1], four[2], four[3], ptx::E4m3{});
}

TEST_F(Hopper, NumbersOf8Bits) {
  std::vector<float> values = {0.0f,   -0.0f, 1.0f,    -1.0625f, 1.1875f,    448.0f,
                               449.0f, -1e9f, 0x1p-9f, 0x1p-10f, 0x1.8p-10f, 463.0f,
                               256.0f, 17.0f, -19.0f,  0x1p-7f};
  std::mt19937 random(3);
  while (values.size() < 512) {
    values.push_back(
        std::ldexp(static_cast<float>(random() >> 8), static_cast<int>(random() % 24) - 36));
  }
  const DeviceArray<float> in(values);
  const DeviceArray<std::uint32_t> out(128);
  pack_8_kernel<<<1, 128>>>(in.data(), out.data());
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<std::uint32_t> found = out.download();
  for (int i = 0; i < 512; ++i) {
    EXPECT_EQ(found[i / 4] >> 8 * (i % 4) & 255, from_float<f8e4m3>(values[i]).bits) << values[i];
  }
}

// ---- warpgroups
// ----------------------------------------------------------------------------------------------------

/// The first gives registers to the others, which take turns at one number.
__global__ void __launch_bounds__(384, 1) turns_kernel(int* out, int rounds) {
  __shared__ int number;
  if (threadIdx.x == 0) number = 0;
  __syncthreads();
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1;
  if (group < 0) {
    ptx::registers_give_back<40>();
  } else {
    ptx::registers_take<232>();
    if (group == 0) ptx::bar_arrive(1, 256);
    for (int i = 0; i < rounds; ++i) {
      ptx::bar_sync(1 + group, 256);
      if (threadIdx.x % 128 == 0) {
        out[2 * i + group] = number;
        number += group ? 3 : 5;
      }
      __syncwarp();
      ptx::bar_arrive(1 + (group ^ 1), 256);
    }
  }
}

TEST_F(Hopper, WarpgroupsTakeTurns) {
  constexpr int kRounds = 20;
  const DeviceArray<int> out(2 * kRounds, -1);
  turns_kernel<<<1, 384>>>(out.data(), kRounds);
  cuda_ok(cudaDeviceSynchronize());
  const std::vector<int> found = out.download();
  for (int i = 0; i < kRounds; ++i) {
    ASSERT_EQ(found[2 * i], 8 * i);
    ASSERT_EQ(found[2 * i + 1], 8 * i + 5);
  }
}

}  // namespace
}  // namespace fastkern
