// SPDX-License-Identifier: Apache-2.0
// Attention, backward, on Hopper, above 128 columns: what its two kernels share. One has dk and dv
// of 64 keys in registers and goes through the queries, the other dq of 128 queries and goes
// through the keys. Scores and dp are computed in both: seven products instead of five, but nothing
// is added up in memory, in whatever order.
#pragma once

#include "attention/attention_hopper_bwd.cuh"

namespace fastkern::cuda::attention_detail {

struct HopperBwdWide : HopperBackward {
  HopperSchedule schedule;  // of dq
  // Where ds is left in memory: tiles of 64 keys x 64 queries, those of the same queries side by
  // side; in bytes from a block of queries to the next, from a head to the next.
  char* ds;
  std::int64_t ds_row, ds_head;
  // That is done for some of the heads of all entries at a time: from this one on, in these tiles.
  int first_head, first_key_tile, first_query_tile;
};
inline constexpr int kWideDsTile = 64 * kPanelRow;

__device__ __forceinline__ char* wide_ds_tile(const HopperBwdWide& all, int head, int m, int n) {
  return all.ds + head * all.ds_head + m * all.ds_row + n * kWideDsTile;
}

/// Of operands in panels of 64 rows.
inline constexpr int kWidePanel = 64 * kPanelRow;

/// d (64 x 64) = a times b transposed, both of 64 rows and kColumns columns.
template <int kColumns, class T>
__device__ __forceinline__ void issue_wide_scores(float (&d)[32], ptx::SharedAddress a,
                                                  ptx::SharedAddress b, T) {
  const ptx::MatrixDescriptor dA = ptx::matrix_descriptor(a), dB = ptx::matrix_descriptor(b);
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kColumns / 16; ++kk) {
    const int at = kk / 4 * kWidePanel + kk % 4 * 32;
    ptx::wgmma<ptx::Major::k, ptx::Major::k>(d, ptx::matrix_right(dA, at),
                                             ptx::matrix_right(dB, at), kk > 0, T{});
  }
  ptx::wgmma_commit();
}

/// d (64 rows x columns) += a (64 x 64) times 64 rows. Not yet committed.
template <int kR, class T>
__device__ __forceinline__ void issue_wide_gradient(float (&d)[kR], const std::uint32_t (&a)[4][4],
                                                    ptx::SharedAddress rows, T) {
  const ptx::MatrixDescriptor dB = ptx::matrix_descriptor(rows, kWidePanel);
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    ptx::wgmma<ptx::Major::mn>(d, a[kk], ptx::matrix_right(dB, kk * (16 * kPanelRow)), true, T{});
  }
}

/// Scores or their gradients as left sides.
template <class T>
__device__ __forceinline__ void pack_wide(std::uint32_t (&to)[4][4], const float (&from)[32], T) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[kk][e] = ptx::pack_2(from[kk * 8 + e * 2], from[kk * 8 + e * 2 + 1], T{});
    }
  }
}

/// Rows `from` on of 64 in panels are zeros; `threads` of them share that.
template <int kColumns>
__device__ __forceinline__ void clear_wide_rows(char* panels, int from, int thread, int threads) {
  const int chunks = (64 - from) * 8;
  for (int e = thread; e < panels_of(kColumns) * chunks; e += threads) {
    *reinterpret_cast<uint4*>(panels + e / chunks * kWidePanel + from * kPanelRow +
                              e % chunks * 16) = uint4{};
  }
}

/// All panels of 64 rows.
template <int kColumns>
__device__ __forceinline__ void fetch_wide(char* to, const CUtensorMap* map, int row, int head,
                                           int entry, std::uint64_t* there, ptx::Keep keep) {
  ptx::mbarrier_expect(there, panels_of(kColumns) * kWidePanel);
  for (int panel = 0; panel < panels_of(kColumns); ++panel) {
    ptx::tma_load(ptx::shared_address(to) + panel * kWidePanel, map, panel * 64, row, head, entry,
                  there, keep);
  }
}

}  // namespace fastkern::cuda::attention_detail
