// SPDX-License-Identifier: Apache-2.0
// The bias in front of an activation: the kernels of columns.cuh for it.
#include "activation/columns.cuh"

namespace fastkern::cuda {

using namespace activation_detail;  // NOLINT: all of it is about this

void bias_act(const BiasAct& args, Stream stream) {
  if (args.x.numel() == 0) return;
  dispatch(args.x.dtype, [&]<class T>() {
    constexpr ColumnOp kOp = ColumnOp::bias_act;
    const std::int64_t n = args.x.sizes[args.x.ndim - 1];
    const ColumnPlan plan =
        column_plan(args.x.numel() / n, n, args.x.dtype, at_once(kOp), sums_up(kOp));
    Columns<T> p = column_params<T>(args.x, plan);
    p.first = tile::row_view<T>(args.x, args.op, "x");
    p.out = tile::row_view<T>(args.y, args.op, "y");
    p.bias = tile::column_view(args.bias, n);
    p.kind = args.kind;
    launch_columns<kOp>(p, plan, args.op, stream);
  });
}

void bias_act_bwd(const BiasActBwd& args, Stream stream) {
  if (args.x.numel() == 0) return;
  FK_CHECK(args.workspace_size >= column_sums_workspace(args.dy, args.dbias), args.op,
           ": workspace must be at least ", column_sums_workspace(args.dy, args.dbias),
           " bytes, got ", args.workspace_size);
  dispatch(args.x.dtype, [&]<class T>() {
    constexpr ColumnOp kOp = ColumnOp::bias_act_bwd;
    const std::int64_t n = args.x.sizes[args.x.ndim - 1];
    const ColumnPlan plan =
        column_plan(args.x.numel() / n, n, args.x.dtype, at_once(kOp), sums_up(kOp));
    Columns<T> p = column_params<T>(args.x, plan);
    p.first = tile::row_view<T>(args.dy, args.op, "dy");
    p.second = tile::row_view<T>(args.x, args.op, "x");
    p.out = tile::row_view<T>(args.dx, args.op, "dx");
    p.bias = tile::column_view(args.bias, n);
    p.kind = args.kind;
    p.sums = args.dbias.given() ? static_cast<float*>(args.workspace) : nullptr;
    launch_columns<kOp>(p, plan, args.op, stream);
    if (p.sums) launch_column_sums(p.sums, args.dbias, plan.slices, args.op, stream);
  });
}

}  // namespace fastkern::cuda
