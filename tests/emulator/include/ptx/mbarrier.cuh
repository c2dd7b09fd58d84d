// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/mbarrier.cuh.
#pragma once

#include "ptx/cluster.cuh"
#include "ptx/shared.cuh"

namespace fastkern::ptx {

inline void mbarrier_init(std::uint64_t* barrier, int arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(std::uint64_t* barrier) { emulator::mbarrier_expect(barrier, 0); }
inline void mbarrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  emulator::mbarrier_expect(barrier, bytes);
}
inline bool mbarrier_try_wait(std::uint64_t* barrier, std::uint32_t parity) {
  return emulator::mbarrier_try_wait(barrier, parity);
}
inline void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
inline void mbarrier_sleep(std::uint64_t* barrier, std::uint32_t parity) {
  mbarrier_wait(barrier, parity);
}
inline void st_async(void* shared, std::uint32_t value, std::uint64_t* barrier,
                     std::uint32_t rank) {
  emulator::st_async(shared, value, barrier, rank);
}

}  // namespace fastkern::ptx
