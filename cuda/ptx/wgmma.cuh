// SPDX-License-Identifier: Apache-2.0
// Tensor cores of a warpgroup, four warps that begin at a multiple of four, and how registers are
// shared out among warpgroups (sm_90a and nothing else). One function, one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/fp8.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

/// Registers of each thread of the warpgroup from here on; all of its warps call it. In a kernel
/// with __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void registers_give_back() {
  if constexpr (kHasWgmma) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_take() {
  if constexpr (kHasWgmma) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Which dimension of an operand lies side by side in memory: the one that is summed over, or rows
/// of a (columns of b).
enum class Major { k, mn };

/// Where an operand lies in shared memory: rows of 128 bytes, 64 elements, as TMA with the swizzle
/// of 128 bytes writes them, in panels that begin at multiples of 1024 bytes.
/// Major::k: a row of the panel is a row of a, 64 of its k; `panel` is not looked at.
/// Major::mn: a row of the panel is one k, 64 columns of b; the next 64 columns are in the panel
/// `panel` bytes on.
/// Steps of 16 k: 32 bytes on, or 16 rows.
/// Of 8 bits a row of a panel has 128 elements, steps of 32 k are 32 bytes on, and there is no
/// Major::mn.
using MatrixDescriptor = std::uint64_t;
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(SharedAddress at, int panel = 16) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | static_cast<std::uint64_t>(panel / 16) << 16 |
         (at & 0x3ffff) / 16;
}
/// The same, `bytes` on.
__device__ __forceinline__ MatrixDescriptor matrix_right(MatrixDescriptor from, int bytes) {
  return from + bytes / 16;
}

/// Before the first product, and before one that reads or adds to registers changed since the last.
__device__ __forceinline__ void wgmma_fence() {
  if constexpr (kHasWgmma) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  if constexpr (kHasWgmma) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  if constexpr (kHasWgmma) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  }
}
/// What the compiler may not look at before here: results of products, after wgmma_wait.
template <int kCount>
__device__ __forceinline__ void registers_arrived(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// Traps below 0: what a number depends on that is never there is computed before the next wait.
/// ptxas moves exponentials behind it otherwise.
__device__ __forceinline__ void computed(float x) {
  if constexpr (kHasWgmma) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p trap;\n}" ::"f"(x)
                 : "memory");
  }
}

// clang-format off
#define FASTKERN_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTKERN_FLOATS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTKERN_ALL_8(d) FASTKERN_FLOATS_8(d, 0)
#define FASTKERN_NAMES_16 FASTKERN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTKERN_ALL_16(d) FASTKERN_ALL_8(d), FASTKERN_FLOATS_8(d, 8)
#define FASTKERN_NAMES_24 FASTKERN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FASTKERN_ALL_24(d) FASTKERN_ALL_16(d), FASTKERN_FLOATS_8(d, 16)
#define FASTKERN_NAMES_32 FASTKERN_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTKERN_ALL_32(d) FASTKERN_ALL_24(d), FASTKERN_FLOATS_8(d, 24)
#define FASTKERN_NAMES_40 FASTKERN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTKERN_ALL_40(d) FASTKERN_ALL_32(d), FASTKERN_FLOATS_8(d, 32)
#define FASTKERN_NAMES_48 FASTKERN_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTKERN_ALL_48(d) FASTKERN_ALL_40(d), FASTKERN_FLOATS_8(d, 40)
#define FASTKERN_NAMES_56 FASTKERN_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTKERN_ALL_56(d) FASTKERN_ALL_48(d), FASTKERN_FLOATS_8(d, 48)
#define FASTKERN_NAMES_64 FASTKERN_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTKERN_ALL_64(d) FASTKERN_ALL_56(d), FASTKERN_FLOATS_8(d, 56)
#define FASTKERN_NAMES_72 FASTKERN_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FASTKERN_ALL_72(d) FASTKERN_ALL_64(d), FASTKERN_FLOATS_8(d, 64)
#define FASTKERN_NAMES_80 FASTKERN_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTKERN_ALL_80(d) FASTKERN_ALL_72(d), FASTKERN_FLOATS_8(d, 72)
#define FASTKERN_NAMES_88 FASTKERN_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FASTKERN_ALL_88(d) FASTKERN_ALL_80(d), FASTKERN_FLOATS_8(d, 80)
#define FASTKERN_NAMES_96 FASTKERN_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTKERN_ALL_96(d) FASTKERN_ALL_88(d), FASTKERN_FLOATS_8(d, 88)
#define FASTKERN_NAMES_104 FASTKERN_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FASTKERN_ALL_104(d) FASTKERN_ALL_96(d), FASTKERN_FLOATS_8(d, 96)
#define FASTKERN_NAMES_112 FASTKERN_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTKERN_ALL_112(d) FASTKERN_ALL_104(d), FASTKERN_FLOATS_8(d, 104)
#define FASTKERN_NAMES_120 FASTKERN_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FASTKERN_ALL_120(d) FASTKERN_ALL_112(d), FASTKERN_FLOATS_8(d, 112)
#define FASTKERN_NAMES_128 FASTKERN_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTKERN_ALL_128(d) FASTKERN_ALL_120(d), FASTKERN_FLOATS_8(d, 120)
// clang-format on

/// d += a b, or d = a b without `add`: a 64 x 16, b 16 x kN, d 64 x kN in f32. Thread t has of row
/// 16 (t / 32) + t % 32 / 4 columns 8 c + 2 (t % 4) and the next in d[4 c] and d[4 c + 1], of the
/// row eight below in d[4 c + 2] and d[4 c + 3]. `a` in registers: as of mma_16x8x16. P0 to P3 are
/// the numbers of the operands after the kN / 2 = kR sums.
#define FASTKERN_WGMMA(kN, kR, P0, P1, P2, P3, P4, P5, P6, Type, type)                           \
  template <Major kA, Major kB>                                                                  \
  __device__ __forceinline__ void wgmma(float (&d)[kR], MatrixDescriptor a, MatrixDescriptor b,  \
                                        bool add, Type) {                                        \
    if constexpr (kHasWgmma) {                                                                   \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P2                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type        \
                   " {" FASTKERN_NAMES_##kR "}, %" #P0 ", %" #P1 ", add, 1, 1, %" #P3 ", %" #P4  \
                                            ";\n}"                                               \
                   : FASTKERN_ALL_##kR(d)                                                        \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kA == Major::mn),           \
                     "n"(kB == Major::mn));                                                      \
    }                                                                                            \
  }                                                                                              \
  template <Major kB>                                                                            \
  __device__ __forceinline__ void wgmma(float (&d)[kR], const std::uint32_t (&a)[4],             \
                                        MatrixDescriptor b, bool add, Type) {                    \
    if constexpr (kHasWgmma) {                                                                   \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P5                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type        \
                   " {" FASTKERN_NAMES_##kR "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 \
                                            ", add, 1, 1, %" #P6 ";\n}"                          \
                   : FASTKERN_ALL_##kR(d)                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                         \
                     "r"(static_cast<int>(add)), "n"(kB == Major::mn));                          \
    }                                                                                            \
  }

#define FASTKERN_WGMMAS(kN, kR, ...)                 \
  FASTKERN_WGMMA(kN, kR, __VA_ARGS__, __half, "f16") \
  FASTKERN_WGMMA(kN, kR, __VA_ARGS__, __nv_bfloat16, "bf16")
FASTKERN_WGMMAS(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTKERN_WGMMAS(80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTKERN_WGMMAS(96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTKERN_WGMMAS(112, 56, 56, 57, 58, 59, 60, 61, 62)
FASTKERN_WGMMAS(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTKERN_WGMMAS(144, 72, 72, 73, 74, 75, 76, 77, 78)
FASTKERN_WGMMAS(160, 80, 80, 81, 82, 83, 84, 85, 86)
FASTKERN_WGMMAS(176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTKERN_WGMMAS(192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTKERN_WGMMAS(256, 128, 128, 129, 130, 131, 132, 133, 134)

/// The same of 8 bits: a 64 x 32, b 32 x kN, both Major::k. `a` in registers: thread t has of row
/// 16 (t / 32) + t % 32 / 4 columns 4 (t % 4) to 4 (t % 4) + 3 in a[0] and 16 on in a[2], of the
/// row eight below in a[1] and a[3]. Sums have some 14 bits on the way.
#define FASTKERN_WGMMA_E4M3(kN, kR, P0, P1, P2, P3, P4, P5)                                       \
  __device__ __forceinline__ void wgmma(float (&d)[kR], MatrixDescriptor a, MatrixDescriptor b,   \
                                        bool add, E4m3) {                                         \
    if constexpr (kHasWgmma) {                                                                    \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P2                                   \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN                                  \
                   "k32.f32.e4m3.e4m3 {" FASTKERN_NAMES_##kR "}, %" #P0 ", %" #P1                 \
                                                             ", add, 1, 1;\n}"                    \
                   : FASTKERN_ALL_##kR(d)                                                         \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                 \
    }                                                                                             \
  }                                                                                               \
  __device__ __forceinline__ void wgmma(float (&d)[kR], const std::uint32_t (&a)[4],              \
                                        MatrixDescriptor b, bool add, E4m3) {                     \
    if constexpr (kHasWgmma) {                                                                    \
      asm volatile(                                                                               \
          "{\n.reg .pred add;\nsetp.ne.b32 add, %" #P5                                            \
          ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" FASTKERN_NAMES_##kR \
          "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", add, 1, 1;\n}"                  \
          : FASTKERN_ALL_##kR(d)                                                                  \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));      \
    }                                                                                             \
  }
FASTKERN_WGMMA_E4M3(64, 32, 32, 33, 34, 35, 36, 37)
FASTKERN_WGMMA_E4M3(96, 48, 48, 49, 50, 51, 52, 53)
FASTKERN_WGMMA_E4M3(128, 64, 64, 65, 66, 67, 68, 69)
FASTKERN_WGMMA_E4M3(256, 128, 128, 129, 130, 131, 132, 133)

#undef FASTKERN_WGMMA_E4M3
#undef FASTKERN_WGMMAS
#undef FASTKERN_WGMMA
#undef FASTKERN_FLOATS_8
#undef FASTKERN_NAMES_8
#undef FASTKERN_ALL_8
#undef FASTKERN_NAMES_16
#undef FASTKERN_ALL_16
#undef FASTKERN_NAMES_24
#undef FASTKERN_ALL_24
#undef FASTKERN_NAMES_32
#undef FASTKERN_ALL_32
#undef FASTKERN_NAMES_40
#undef FASTKERN_ALL_40
#undef FASTKERN_NAMES_48
#undef FASTKERN_ALL_48
#undef FASTKERN_NAMES_56
#undef FASTKERN_ALL_56
#undef FASTKERN_NAMES_64
#undef FASTKERN_ALL_64
#undef FASTKERN_NAMES_72
#undef FASTKERN_ALL_72
#undef FASTKERN_NAMES_80
#undef FASTKERN_ALL_80
#undef FASTKERN_NAMES_88
#undef FASTKERN_ALL_88
#undef FASTKERN_NAMES_96
#undef FASTKERN_ALL_96
#undef FASTKERN_NAMES_104
#undef FASTKERN_ALL_104
#undef FASTKERN_NAMES_112
#undef FASTKERN_ALL_112
#undef FASTKERN_NAMES_120
#undef FASTKERN_ALL_120
#undef FASTKERN_NAMES_128
#undef FASTKERN_ALL_128

}  // namespace fastkern::ptx
