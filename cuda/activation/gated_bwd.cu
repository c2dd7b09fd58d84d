// SPDX-License-Identifier: Apache-2.0
// Gated activations, backward: the kernels of gated.cuh for it.
#include "activation/gated.cuh"

namespace fastkern::cuda {

using namespace activation_detail;  // NOLINT: all of it is about this

void gated_bwd(const GatedBwd& args, Stream stream) {
  GatedBwd a = args;
  if (a.dy.numel() == 0) return;
  const bool pairs = a.pairs.given();
  TensorRef& x = pairs ? a.pairs : a.gate;
  TensorRef& dx = pairs ? a.dpairs : a.dgate;
  const bool flat = flatten({&x, &dx, &a.up, &a.dy, &a.dup}, a.op);
  dispatch(x.dtype, [&]<class T>() {
    const Rows rows = rows_of(x, a.op, pairs ? "pairs" : "gate");
    const Extent e = flat ? flat_extent<T>(rows.length, kBackwardPacks)
                          : row_extent<T>(rows.count, rows.length, kBackwardPacks);
    Gated<T> p{.gate = view_of<T>(x, e, a.op, pairs ? "pairs" : "gate"),
               .dgate = view_of<T>(dx, e, a.op, pairs ? "dpairs" : "dgate"),
               .extent = e,
               .kind = a.kind,
               .numbers = a.numbers};
    const Launch shape{.op = a.op, .grid = e.grid, .block = e.block, .overlap = true};
    if (pairs) {
      p.dy = half_view<T>(a.dy, e, a.op, "dy");
      return launch(gated_pairs_bwd_kernel<T>, shape, stream, p);
    }
    p.up = view_of<T>(a.up, e, a.op, "up");
    p.dy = view_of<T>(a.dy, e, a.op, "dy");
    p.dup = view_of<T>(a.dup, e, a.op, "dup");
    const auto plain = [](const RowView<T>& view) { return !view.data || view.plain(); };
    const bool all = plain(p.dy) && plain(p.gate) && plain(p.up) && plain(p.dgate) && plain(p.dup);
    dispatch_plain(all, a.kind, [&]<bool kPlain, int kOnly>() {
      launch(gated_bwd_kernel<T, kPlain, kOnly>, shape, stream, p);
    });
  });
}

}  // namespace fastkern::cuda
