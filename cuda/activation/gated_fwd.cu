// SPDX-License-Identifier: Apache-2.0
// Gated activations, forward: the kernels of gated.cuh for it.
#include "activation/gated.cuh"

namespace fastkern::cuda {

using namespace activation_detail;  // NOLINT: all of it is about this

void gated(const GatedFwd& args, Stream stream) {
  GatedFwd a = args;
  if (a.y.numel() == 0) return;
  const bool pairs = a.pairs.given(), quant = a.scale.given();
  TensorRef& x = pairs ? a.pairs : a.gate;
  const bool flat = flatten({&x, &a.up, &a.y}, a.op);
  dispatch(x.dtype, [&]<class T>() {
    const Rows rows = rows_of(x, a.op, pairs ? "pairs" : "gate");
    const Extent e = flat ? flat_extent<T>(rows.length, kForwardPacks)
                          : row_extent<T>(rows.count, rows.length, kForwardPacks);
    Gated<T> p{.gate = view_of<T>(x, e, a.op, pairs ? "pairs" : "gate"),
               .extent = e,
               .kind = a.kind,
               .numbers = a.numbers,
               .scale = static_cast<const float*>(a.scale.data)};
    const Launch shape{.op = a.op, .grid = e.grid, .block = e.block, .overlap = true};
    if (pairs) {
      p.y = half_view<T>(a.y, e, a.op, "y");
      dispatch_bool(quant, [&]<bool kQuant>() {
        launch(gated_pairs_fwd_kernel<T, kQuant>, shape, stream, p);
      });
      return;
    }
    p.up = view_of<T>(a.up, e, a.op, "up");
    p.y = view_of<T>(a.y, e, a.op, "y");
    if (quant) return launch(gated_fwd_kernel<T, false, true, kAnyKind>, shape, stream, p);
    dispatch_plain(p.gate.plain() && p.up.plain() && p.y.plain(), a.kind,
                   [&]<bool kPlain, int kOnly>() {
                     launch(gated_fwd_kernel<T, kPlain, false, kOnly>, shape, stream, p);
                   });
  });
}

}  // namespace fastkern::cuda
