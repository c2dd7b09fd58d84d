// SPDX-License-Identifier: Apache-2.0
// Attention of 8-bit operands on Hopper: its tiles, what lies where in shared memory, and the
// thread that fetches.
#pragma once

#include "attention/attention_fp8.h"
#include "attention/attention_hopper.cuh"
#include "ptx/tma.cuh"

namespace fastkern::cuda::attention_detail {

/// Panels of 128 columns of 8 bits.
constexpr int fp8_panels(int columns) { return (columns + 127) / 128; }

/// kColumns columns of q, k and v, kWarpgroups with 64 queries each, kStagesOf blocks of
/// fp8_keys(kColumns) keys and of values. kOverlapped: scores are issued before results of the
/// block before, of which the tensor cores sum kTogetherOf blocks, or all (0); kFirstOf scores of a
/// thread become weights before those results are waited for. Else one after the other, and the
/// tensor cores sum one block, in kPartsOf parts.
template <int kColumns, int kWarpgroups, int kPartsOf, int kStagesOf, bool kOverlapped,
          int kTogetherOf, int kFirstOf>
struct HopperFp8Tile {
  static constexpr int kD = kColumns, kDv = kColumns, kGroups = kWarpgroups;
  static constexpr int kN = fp8_keys(kColumns);
  static constexpr int kParts = kPartsOf, kStages = kStagesOf;
  static constexpr int kTogether = kTogetherOf, kFirst = kFirstOf;
  static constexpr bool kOverlap = kOverlapped;
  static_assert(!kOverlap || kParts == 1);
  static constexpr int kM = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kRegisters = kGroups == 3 ? 160 : 240,
                       kOtherRegisters = kGroups == 3 ? 32 : 24;
};

template <class Tile>
struct HopperFp8Shared {
  static constexpr int kQuery = fp8_panels(Tile::kD) * Tile::kM * kPanelRow;
  static constexpr int kKeys = fp8_panels(Tile::kD) * Tile::kN * kPanelRow;
  static constexpr int kValues = Tile::kDv * kPanelRow;  // a row for each column of v
  // Of a warpgroup: results as they leave or, before, sums of those so far.
  static constexpr int kLeaving = panels_of(Tile::kDv) * 64 * kPanelRow;
  static constexpr int kOut = Tile::kTogether > 0 ? 64 * Tile::kDv * 4 : kLeaving;

  alignas(1024) char query[kQuery];
  alignas(1024) char keys[Tile::kStages][kKeys];
  alignas(1024) char values[Tile::kStages][kValues];
  alignas(1024) char out[Tile::kGroups][kOut];
  std::uint64_t query_there, query_free;
  std::uint64_t keys_there[Tile::kStages], keys_free[Tile::kStages];
  std::uint64_t values_there[Tile::kStages], values_free[Tile::kStages];
  HopperJob jobs[2];
};

struct HopperFp8Forward {
  CUtensorMap q, k, v, out;  // v: as transposed
  Forward f;
  HopperSchedule schedule;
  Fp8Scale q_scale, k_scale, v_scale;
};

/// Which stage a block of keys and values has, and the parity of its phase there.
template <class Tile>
struct HopperFp8Stage {
  int index = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ HopperFp8Stage next() const {
    const bool wraps = index == Tile::kStages - 1;
    return {wraps ? 0 : index + 1, parity ^ (wraps ? 1u : 0u)};
  }
};

/// One thread that fetches.
template <class Tile>
struct HopperFp8Producer {
  using Shared = HopperFp8Shared<Tile>;
  using Stage = HopperFp8Stage<Tile>;
  const HopperFp8Forward& p;
  Shared& shared;
  Stage stage;  // of the next block of keys; values lag behind

  __device__ __forceinline__ void keys(int row, int head, int entry) {
    ptx::mbarrier_wait(&shared.keys_free[stage.index], stage.parity ^ 1);
    ptx::mbarrier_expect(&shared.keys_there[stage.index], Shared::kKeys);
    for (int panel = 0; panel < fp8_panels(Tile::kD); ++panel) {
      ptx::tma_load(ptx::shared_address(shared.keys[stage.index]) + panel * (Tile::kN * kPanelRow),
                    &p.k, panel * 128, row, head, entry, &shared.keys_there[stage.index],
                    ptx::Keep::long_);
    }
  }
  __device__ __forceinline__ void values(const Stage& to, int key, int head, int entry) {
    ptx::mbarrier_wait(&shared.values_free[to.index], to.parity ^ 1);
    ptx::mbarrier_expect(&shared.values_there[to.index], Shared::kValues);
    ptx::tma_load(ptx::shared_address(shared.values[to.index]), &p.v, key, 0, head, entry,
                  &shared.values_there[to.index], ptx::Keep::long_);
  }

  /// Everything of the job with number t.
  __device__ __forceinline__ void run(const HopperJob& job, int t) {
    const bool packed = p.f.lengths.start_q;
    const int entry = packed ? 0 : job.b, head = job.h / p.f.group;
    const int last = (job.end - 1) * Tile::kN;
    int row = job.first_k + last;
    int key = (packed ? fp8_first_key(job.first_k, job.b) : 0) + last;
    const bool any = job.begin < job.end;
    if (any) keys(row, head, entry);
    ptx::mbarrier_wait(&shared.query_free, (t & 1) ^ 1);
    shared.jobs[t & 1] = job;
    if (!any) {
      ptx::mbarrier_arrive(&shared.query_there);
      return;
    }
    ptx::mbarrier_expect(&shared.query_there, Shared::kQuery);
    for (int panel = 0; panel < fp8_panels(Tile::kD); ++panel) {
      ptx::tma_load(ptx::shared_address(shared.query) + panel * (Tile::kM * kPanelRow), &p.q,
                    panel * 128, job.first_q + job.i0, job.h, entry, &shared.query_there,
                    ptx::Keep::shortly);
    }
    for (int n = job.end - 1; n > job.begin; --n) {
      const Stage before = stage;
      stage = stage.next();
      row -= Tile::kN;
      keys(row, head, entry);
      values(before, key, head, entry);
      key -= Tile::kN;
    }
    values(stage, key, head, entry);
    stage = stage.next();
  }
  __device__ __forceinline__ void finish(int t) {
    ptx::mbarrier_wait(&shared.query_free, (t & 1) ^ 1);
    shared.jobs[t & 1].b = -1;
    ptx::mbarrier_arrive(&shared.query_there);
  }
};

}  // namespace fastkern::cuda::attention_detail
