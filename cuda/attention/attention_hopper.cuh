// SPDX-License-Identifier: Apache-2.0
// What attention kernels of Hopper share: their tiles, what lies where in shared memory, which
// queries a block of threads takes when, and the parameters.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "attention/attention_scores.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/shared.cuh"

namespace fastkern::cuda::attention_detail {

/// Panels of 64 columns, rows of 128 bytes each, swizzled by the copy engine.
constexpr int panels_of(int columns) { return (columns + 63) / 64; }
inline constexpr int kPanelRow = 128;

/// Of forward: kD and kDv columns, kGroups warpgroups with 64 queries each, kN keys at a time, room
/// for kStages blocks of keys and of values (2 or 4) and for queries of kQueries tiles (1 or 2).
/// kOwn: a warpgroup stores its results from room of its own. Else warps that do not compute store
/// them, from room for 64 queries that the warpgroups have in turn, and a warpgroup has room of its
/// own for its queries. kTurns: the warpgroups issue their products in turn. kLazy: scores are
/// measured in a tile's first blocks only, and where they turn out to be too large. (nvcc 13.0 takes
/// no values of classes as template arguments of kernels.)
template <int kColumns, int kValueColumns, int kWarpgroups, int kKeys, int kBlocks,
          int kQueryBlocks, bool kStoresOwn, bool kInTurn, bool kFewMaxima = false>
struct HopperTile {
  static constexpr int kD = kColumns, kDv = kValueColumns, kGroups = kWarpgroups, kN = kKeys;
  static constexpr int kStages = kBlocks, kQueries = kQueryBlocks;
  static constexpr bool kOwn = kStoresOwn, kTurns = kInTurn, kLazy = kFewMaxima;
  // Softmax takes as long as the products: what else a warp does between them counts.
  static constexpr bool kNarrow = kColumns <= 96;
  static constexpr int kM = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kRooms = kOwn ? kQueries : kGroups, kRoomRows = kOwn ? kM : 64;
  // Of a thread that computes, and of one that does not: 65536 are there, given out in eights.
  static constexpr int kRegisters = kGroups == 3 ? 160 : 232,
                       kOtherRegisters = kGroups == 3 ? 32 : 40;
};

/// What a block of threads does next: queries i0 to i1 of one head of one entry, or of as many as
/// are packed, and blocks `begin` to `end` of keys.
struct HopperJob {
  int b, h, i0, i1;  // b < 0: nothing, and nothing after it
  int stored;        // queries of the tensor from i0 on: those beyond the sequence get zeros
  int first_q, first_k;
  int begin, end;
  AttentionSight<int> sight;
  std::int64_t lse_at;
};

/// Blocks of keys that any of a warpgroup's queries sees, and those that all of them see whole.
/// `half`: of the last one nobody sees more than its first half.
struct HopperSeen {
  int begin, end, whole_begin, whole_end;
  bool half;
};
template <class Tile>
__device__ __forceinline__ HopperSeen hopper_seen(const HopperJob& job, int group, int pack) {
  constexpr int kN = Tile::kN;
  const int first = job.i0 + (group * 64 >> pack);
  const int last = min(job.i0 + ((group * 64 + 63) >> pack), job.i1 - 1);
  HopperSeen seen{job.begin, job.begin, 0, 0, false};
  if (first > last) return seen;
  seen.end = max(min((job.sight.high(last) + kN - 1) / kN, job.end), job.begin);
  seen.begin = min(max(job.sight.low(first) / kN, job.begin), seen.end);
  seen.half = 2 * (seen.end * kN - job.sight.high(last)) >= kN;
  seen.whole_end = job.sight.high(first) / kN;
  seen.whole_begin = (job.sight.low(last) + kN - 1) / kN;
  return seen;
}

/// Of queries, keys and values: stages, each with a barrier that it is there and one that it is
/// free.
template <class Tile>
struct HopperShared {
  static constexpr int kQuery = panels_of(Tile::kD) * Tile::kRoomRows * kPanelRow;
  static constexpr int kKeys = panels_of(Tile::kD) * Tile::kN * kPanelRow;
  static constexpr int kValues = panels_of(Tile::kDv) * Tile::kN * kPanelRow;
  static constexpr int kOut = panels_of(Tile::kDv) * Tile::kRoomRows * kPanelRow;
  // Planned two ahead of what is fetched, which is two ahead of what is computed at most, and
  // looked at to its end: five, in a power of two.
  static constexpr int kJobs = 8;

  alignas(1024) char query[Tile::kRooms][kQuery];
  alignas(1024) char keys[Tile::kStages][kKeys];
  alignas(1024) char values[Tile::kStages][kValues];
  alignas(1024) char out[kOut];
  std::uint64_t query_there[Tile::kRooms], query_free[Tile::kRooms];
  std::uint64_t keys_there[Tile::kStages], keys_free[Tile::kStages];
  std::uint64_t values_there[Tile::kStages], values_free[Tile::kStages];
  std::uint64_t job_there[2], job_free[2];
  HopperJob jobs[kJobs];
  HopperSeen seen[kJobs][Tile::kGroups];
  int exceeded[2][Tile::kLazy ? Tile::kGroups : 1];  // kLazy: the block to be measured again
  // Stored by others: room for results, first and last panels, after each warpgroup. One barrier
  // for both would be two phases on for who waits next.
  std::uint64_t out_free[2][2];
  float2 sums[Tile::kOwn ? 1 : 64];  // of exponentials, and maxima, with the first ones
};

/// Barriers besides those: of the warpgroup whose turn it is (one each), of all that compute, of a
/// warpgroup (one each), of a warpgroup and the warp that stores its results (two each for both
/// parts, for tiles in turn: the next tile's may come before the warp looks at this one's).
enum HopperBarrier : int { kTurn = 1, kComputing = 4, kGroup = 5, kStore = 8 };
/// The one of these for a part of the results of the tile with number t.
__device__ __forceinline__ int hopper_store_barrier(int group, int part, int t) {
  return kStore + group * 4 + part * 2 + t % 2;
}

/// In which order blocks of queries are taken. A tile has the queries of 2^pack heads that share
/// their keys, which together count as a head here. `units`: heads of entries. Longest first goes
/// through `section` of them side by side.
struct HopperSchedule {
  int tiles, units, section, heads, pack;
  bool longest_first;
};
/// f.blocks is set.
inline HopperSchedule hopper_schedule(const Forward& f, int units, int section, int pack = 0) {
  return {.tiles = f.blocks * units,
          .units = units,
          .section = std::min(section, units),
          .heads = f.heads >> pack,
          .pack = pack,
          .longest_first = f.mask.right >= 0 && f.mask.left < 0};
}
/// Of how many heads tiles are computed at a time: four blocks of queries of each, which share its
/// keys in L2, or more where there are few heads.
inline int hopper_section(int units, int multiprocessors) {
  return units <= multiprocessors / 2 ? units : std::max(multiprocessors / 4, 1);
}

struct HopperForward {
  CUtensorMap q, k, v, out;
  Forward f;
  HopperSchedule schedule;
};

/// The `turn`th tile of this block of threads in a fixed order. Longest first, every other round
/// goes backwards: whoever had the longest has the shortest next. Else rounds are shifted against
/// each other, so that nobody always has the last queries of a head, of which there may be few.
__device__ __forceinline__ int hopper_fixed_tile(const HopperSchedule& s, int turn) {
  const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  if (!s.longest_first) return turn * grid + (block + turn) % grid;
  return turn * grid + (turn & 1 ? grid - 1 - block : block);
}

/// The tile of the round, for a whole warp: of those that are left by `given`, or in a fixed order.
__device__ __forceinline__ int hopper_tile(const HopperSchedule& s, int* given, int round) {
  if (!given) return hopper_fixed_tile(s, round);
  int id = static_cast<int>(blockIdx.x);
  if (round > 0) {
    if (threadIdx.x % 32 == 0) id = static_cast<int>(gridDim.x) + ptx::draw_number(given);
    id = __shfl_sync(~0u, id, 0);
  }
  return id;
}

/// Tile `id` of tensors that are not packed.
template <class Tile>
__device__ __forceinline__ Place hopper_place(const Forward& p, const HopperSchedule& s, int id) {
  const int section = id / (s.section * p.blocks), first = section * s.section;
  const int rest = id - first * p.blocks, width = min(s.section, s.units - first);
  const int index = s.longest_first ? p.blocks - 1 - rest / width : rest % p.blocks;
  const int unit = first + (s.longest_first ? rest % width : rest / p.blocks);
  return {unit / s.heads, unit % s.heads << s.pack, index * (Tile::kM >> s.pack)};
}
/// The same of packed ones, for a whole warp. The last queries of a sequence first.
template <class Tile>
__device__ __forceinline__ Place hopper_packed_place(const Forward& p, const HopperSchedule& s,
                                                     int id) {
  const int queries = Tile::kM >> s.pack;
  const Unit unit = unit_of(p.lengths, id, p.blocks, s.heads, p.batch, [&](int b) {
    return (attention_sequence(p.lengths, b, p.queries, p.keys).queries + queries - 1) / queries;
  });
  return {unit.b, unit.h << s.pack, (unit.count - 1 - unit.index) * queries};
}

/// For a whole warp.
template <class Tile>
__device__ __forceinline__ HopperJob hopper_job(const Forward& p, const HopperSchedule& s, int id) {
  constexpr int kN = Tile::kN;
  const int queries = Tile::kM >> s.pack;
  const Place place =
      p.lengths.start_q ? hopper_packed_place<Tile>(p, s, id) : hopper_place<Tile>(p, s, id);
  HopperJob job{};
  job.b = place.b, job.h = place.h, job.i0 = job.i1 = place.i0;
  if (place.b < 0) return job;
  const AttentionSequence<int> at = attention_sequence(p.lengths, place.b, p.queries, p.keys);
  const bool packed = p.lengths.start_q;
  job.i1 = max(min(job.i0 + queries, at.queries), job.i0);
  job.stored = packed ? job.i1 - job.i0 : min(queries, p.queries - job.i0);
  job.first_q = at.first_q, job.first_k = at.first_k;
  job.sight = attention_sight(p.mask, at, place.b);
  if (job.i1 > job.i0) {
    job.begin = job.sight.begin(job.i0) / kN;
    job.end = max((job.sight.end(job.i1) + kN - 1) / kN, job.begin);
  }
  const std::int64_t row =
      packed ? place.h : static_cast<std::int64_t>(place.b) * p.heads + place.h;
  job.lse_at = row * p.queries + at.first_q + job.i0;
  return job;
}

}  // namespace fastkern::cuda::attention_detail
