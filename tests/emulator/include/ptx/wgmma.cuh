// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/wgmma.cuh. Products are computed when they are waited for, by each thread
// those it has the sums of; operands in registers are shown to the warp when they are issued.
#pragma once

#include <array>

#include "ptx/fp8.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

template <int kRegisters>
inline void registers_give_back() {}
template <int kRegisters>
inline void registers_take() {}

enum class Major { k, mn };

struct MatrixDescriptor {
  SharedAddress at;
  int panel;
};
inline MatrixDescriptor matrix_descriptor(SharedAddress at, int panel = 16) { return {at, panel}; }
inline MatrixDescriptor matrix_right(MatrixDescriptor from, int bytes) {
  return {from.at + bytes, from.panel};
}

// All lanes come to each of these together.
inline void wgmma_fence() { emulator::warp_barrier(~0u); }
inline void wgmma_commit() {
  emulator::warp_barrier(~0u);
  emulator::later_commit(emulator::Later::products);
}
template <int kPending>
inline void wgmma_wait() {
  emulator::later_wait(emulator::Later::products, kPending);
  emulator::warp_barrier(~0u);
}
template <int kCount>
inline void registers_arrived(float (&)[kCount]) {}

inline void computed(float x) {
  if (x < 0.0f) emulator::fault("a trap");
}

namespace wgmma_detail {

/// Element k of row (or column) `row` of an operand.
template <Major kMajor, class T>
inline float element(const MatrixDescriptor& m, int row, int k, T type) {
  const SharedAddress at = kMajor == Major::k ? m.at + row * 128 + k * 2
                                              : m.at + row / 64 * m.panel + k * 128 + row % 64 * 2;
  return mma_detail::number(mma_detail::element(swizzled_address(at), 0), type);
}

using Rows = std::array<std::array<float, 16>, 2>;  // of a, that a thread has sums of

template <Major kB, int kR, class T>
void multiply(float (&d)[kR], const Rows& a, const MatrixDescriptor& b, bool add, T type) {
  const int pair = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < kR; ++i) {
    float sum = add ? d[i] : 0.0f;
    for (int k = 0; k < 16; ++k) {
      sum += a[i / 2 % 2][k] * element<kB>(b, i / 4 * 8 + pair * 2 + i % 2, k, type);
    }
    d[i] = sum;
  }
}

}  // namespace wgmma_detail

template <Major kA, Major kB, int kR, class T>
inline void wgmma(float (&d)[kR], MatrixDescriptor a, MatrixDescriptor b, bool add, T type) {
  float* const sums = d;
  emulator::later(emulator::Later::products, [=] {
    const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    wgmma_detail::Rows rows;
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        rows[half][k] = wgmma_detail::element<kA>(a, row + half * 8, k, type);
      }
    }
    wgmma_detail::multiply<kB>(*reinterpret_cast<float (*)[kR]>(sums), rows, b, add, type);
  });
}

template <Major kB, int kR, class T>
inline void wgmma(float (&d)[kR], const std::uint32_t (&a)[4], MatrixDescriptor b, bool add,
                  T type) {
  const void* const* const lanes = mma_detail::show(a);
  wgmma_detail::Rows rows;
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const void* const of = lanes[threadIdx.x % 32 / 4 * 4 + k % 8 / 2];
      rows[half][k] =
          mma_detail::number(mma_detail::element(of, 2 * (half + k / 8 * 2) + k % 2), type);
    }
  }
  mma_detail::leave();
  float* const sums = d;
  emulator::later(emulator::Later::products, [=] {
    wgmma_detail::multiply<kB>(*reinterpret_cast<float (*)[kR]>(sums), rows, b, add, type);
  });
}

// ---- of 8 bits

namespace wgmma_detail {

inline float element_8(const MatrixDescriptor& m, int row, int k) {
  std::uint8_t bits;
  std::memcpy(&bits, swizzled_address(m.at + row * 128 + k), 1);
  return to_float(f8e4m3{bits});
}

using Rows8 = std::array<std::array<float, 32>, 2>;

template <int kR>
void multiply_8(float* d, const Rows8& a, const MatrixDescriptor& b, bool add) {
  const int pair = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < kR; ++i) {
    float sum = add ? d[i] : 0.0f;
    for (int k = 0; k < 32; ++k) {
      sum += a[i / 2 % 2][k] * element_8(b, i / 4 * 8 + pair * 2 + i % 2, k);
    }
    d[i] = sum;
  }
}

}  // namespace wgmma_detail

template <int kR>
inline void wgmma(float (&d)[kR], MatrixDescriptor a, MatrixDescriptor b, bool add, E4m3) {
  float* const sums = d;
  emulator::later(emulator::Later::products, [=] {
    const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    wgmma_detail::Rows8 rows;
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 32; ++k) rows[half][k] = wgmma_detail::element_8(a, row + half * 8, k);
    }
    wgmma_detail::multiply_8<kR>(sums, rows, b, add);
  });
}

template <int kR>
inline void wgmma(float (&d)[kR], const std::uint32_t (&a)[4], MatrixDescriptor b, bool add, E4m3) {
  const void* const* const lanes = mma_detail::show(a);
  wgmma_detail::Rows8 rows;
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 32; ++k) {
      const void* const of = lanes[threadIdx.x % 32 / 4 * 4 + k % 16 / 4];
      const int byte = 4 * (half + k / 16 * 2) + k % 4;
      rows[half][k] = to_float(f8e4m3{static_cast<const std::uint8_t*>(of)[byte]});
    }
  }
  mma_detail::leave();
  float* const sums = d;
  emulator::later(emulator::Later::products,
                  [=] { wgmma_detail::multiply_8<kR>(sums, rows, b, add); });
}

}  // namespace fastkern::ptx
