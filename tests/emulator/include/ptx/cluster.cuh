// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ptx/cluster.cuh. Launches run one after the other, so that grid_wait() only
// has to be there.
#pragma once

#include <cuda_runtime.h>

namespace fastkern::ptx {

inline constexpr bool kHasClusters = true;

inline std::uint32_t cluster_rank() { return emulator::running->rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void grid_wait() { emulator::running->waited = true; }
inline void grid_launch_next() {}

}  // namespace fastkern::ptx
