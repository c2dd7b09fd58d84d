// SPDX-License-Identifier: Apache-2.0
// Dropout of a tensor, forward and backward alike.
//
//   work     elements on their own, shared out by extent.cuh
//   memory   the four packs of a thread are under way before the first is used
//   sync     none
//   cost     reads and writes each number once. Four elements share ten rounds of Philox, two wide
//            multiplications each: some 12 instructions an element, for 16-bit types not far from
//            what a multiprocessor has time for
#include "activation/extent.cuh"
#include "dispatch.h"
#include "fastkern/dropout.h"
#include "tile/dropout.cuh"

namespace fastkern::cuda {
namespace activation_detail {
namespace {

constexpr int kDropoutPacks = 4;

template <class T>
struct Dropped {
  RowView<T> x, y;
  Extent extent;
  tile::DropoutView dropout;
  std::int64_t n;  // of the rows
};

template <class T, bool kPlain>
__global__ void __launch_bounds__(kMostThreads, 3)
    dropout_kernel(const __grid_constant__ Dropped<T> p) {
  constexpr int kPacks = kDropoutPacks, kV = kVector<T>;
  const Place<T, kPacks> at(p.extent);
  const auto columns = at.columns(p.extent);
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at.row >= p.extent.rows) return;
  Pack<T> x[kPacks];
  load_packs<kPlain>(p.x, at.template of<kPlain>(p.x), p.extent, at, columns, x);
  if (p.dropout.seed) {
    const std::uint64_t seed = *p.dropout.seed, offset = *p.dropout.offset;
    const std::int64_t first = at.row * p.n + at.first;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kV];
      tile::unpack(x[i], v);
      p.dropout.apply(seed, offset, first + columns(i), v);
      x[i] = tile::pack_of<T>(v);
    }
  }
  store_packs<kPlain>(p.y, at.template of<kPlain>(p.y), p.extent, at, columns, x);
}

}  // namespace
}  // namespace activation_detail

void dropout(const DropoutCall& args, Stream stream) {
  using namespace activation_detail;  // NOLINT: all of it is about this
  DropoutCall a = args;
  if (a.x.numel() == 0) return;
  const bool flat = flatten({&a.x, &a.y}, a.op);
  const Dropout& d = a.dropout;
  dispatch(a.x.dtype, [&]<class T>() {
    const Rows rows = rows_of(a.x, a.op, "x");
    const Extent e = flat ? flat_extent<T>(rows.length, kDropoutPacks)
                          : row_extent<T>(rows.count, rows.length, kDropoutPacks);
    const Dropped<T> p{.x = view_of<T>(a.x, e, a.op, "x"),
                       .y = view_of<T>(a.y, e, a.op, "y"),
                       .extent = e,
                       .dropout = d.p == 0.0
                                      ? tile::DropoutView{}
                                      : tile::DropoutView{d.seed, d.offset, dropout_threshold(d.p),
                                                          dropout_scale(d.p)},
                       .n = rows.length};
    const Launch shape{.op = a.op, .grid = e.grid, .block = e.block, .overlap = true};
    dispatch_bool(p.x.plain() && p.y.plain(),
                  [&]<bool kPlain>() { launch(dropout_kernel<T, kPlain>, shape, stream, p); });
  });
}

}  // namespace fastkern::cuda
