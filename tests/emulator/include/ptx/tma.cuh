// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/tma.cuh: boxes of rows of 128 bytes.
#pragma once

#include <array>

#include "ptx/shared.cuh"
#include "tensor_map.cuh"

namespace fastkern::ptx {

enum class Keep : std::uint64_t { normal, shortly, long_ };

inline void prefetch_map(const CUtensorMap*) {}

namespace tma_detail {

/// visit(element of the tensor or nullptr, element of the box in shared memory).
template <class Visit>
void each(const cuda::MapShape& map, const std::array<int, 4>& first, SharedAddress box,
          const Visit& visit) {
  const int bytes = static_cast<int>(size_of(map.dtype));
  for (int row = 0; row < map.box[1] * map.box[2]; ++row) {
    for (int column = 0; column < map.box[0]; ++column) {
      const long at[] = {first[0] + column, first[1] + row % map.box[1],
                         first[2] + row / map.box[1], first[3]};
      char* element = static_cast<char*>(map.data) + at[0] * bytes;
      for (int i = 0; i < 4; ++i) {
        if (at[i] < 0 || at[i] >= map.sizes[i]) element = nullptr;
        if (i > 0 && element) element += map.sizes[i] == 1 ? 0 : at[i] * map.strides[i - 1];
      }
      visit(element, swizzled_address(box + row * 128 + column * bytes));
    }
  }
}

inline cuda::MapShape shape_of(const CUtensorMap* map, SharedAddress box) {
  cuda::MapShape shape;
  std::memcpy(&shape, map, sizeof shape);
  if (shape.box[0] * size_of(shape.dtype) != 128 || shape.box[3] != 1)
    emulator::fault("boxes of %d columns are not emulated", shape.box[0]);
  emulator::check_aligned(reinterpret_cast<const void*>(box), 128);
  return shape;
}

}  // namespace tma_detail

inline void tma_load(SharedAddress to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                     std::uint64_t* barrier, Keep = Keep::normal) {
  const cuda::MapShape shape = tma_detail::shape_of(map, to);
  if (!emulator::running->waited) emulator::fault("a box before grid_wait()");
  emulator::box_arrives(
      reinterpret_cast<void*>(to), shape.box[1] * shape.box[2] * 128l,
      [=] {
        const auto bytes = static_cast<std::size_t>(size_of(shape.dtype));
        tma_detail::each(shape, {c0, c1, c2, c3}, to, [=](const char* from, char* at) {
          const char zeros[8] = {};
          std::memcpy(at, from ? from : zeros, bytes);
        });
      },
      barrier);
}

inline void tma_prefetch(const CUtensorMap*, int, int, int, int) {
  if (!emulator::running->waited) emulator::fault("a box before grid_wait()");
}

inline void tma_store(const CUtensorMap* map, int c0, int c1, int c2, int c3, SharedAddress from) {
  const cuda::MapShape shape = tma_detail::shape_of(map, from);
  if (!emulator::running->waited) emulator::fault("a box before grid_wait()");
  emulator::later(emulator::Later::bulk, [=] {
    const auto bytes = static_cast<std::size_t>(size_of(shape.dtype));
    tma_detail::each(shape, {c0, c1, c2, c3}, from, [=](char* to, const char* at) {
      if (to) std::memcpy(to, at, bytes);
    });
  });
}

inline void bulk_add(float* to, SharedAddress from, int bytes) {
  emulator::later(emulator::Later::bulk, [=] {
    for (int i = 0; i < bytes / 4; ++i) to[i] += reinterpret_cast<const float*>(from)[i];
  });
}

inline void bulk_store(void* to, SharedAddress from, int bytes) {
  emulator::check_aligned(to, 16);
  emulator::later(emulator::Later::bulk,
                  [=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); });
}
inline void bulk_load(SharedAddress to, const void* from, int bytes, std::uint64_t* barrier) {
  emulator::check_aligned(from, 16);
  emulator::box_arrives(
      reinterpret_cast<void*>(to), bytes,
      [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); }, barrier);
}

inline void bulk_prefetch(const void* from, int bytes) {
  emulator::check_aligned(from, 16);
  if (bytes % 16 != 0) emulator::fault("a size that is no multiple of 16");
  for (int at = 0; at < bytes; at += 16)
    emulator::check_load(static_cast<const char*>(from) + at, 16);
}

inline void bulk_commit() { emulator::later_commit(emulator::Later::bulk); }
template <int kPending>
inline void bulk_wait_read() {
  emulator::later_wait(emulator::Later::bulk, kPending);
}
template <int kPending>
inline void bulk_wait() {
  emulator::later_wait(emulator::Later::bulk, kPending);
}
inline void fence_async() {}
inline void fence_async_global() {}

}  // namespace fastkern::ptx
