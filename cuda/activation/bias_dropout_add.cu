// SPDX-License-Identifier: Apache-2.0
// Bias, dropout and residual: the kernels of columns.cuh for it. Where operands have several types,
// each is read and written in its own, four columns at a time.
#include "activation/columns.cuh"

namespace fastkern::cuda {

using namespace activation_detail;  // NOLINT: all of it is about this

namespace {

tile::DropoutView drops_of(const Dropout& d) {
  if (d.p == 0.0) return {};
  return {d.seed, d.offset, dropout_threshold(d.p), dropout_scale(d.p)};
}

/// f<T>() with the type of the operands, or Mixed.
template <class F>
void dispatch_type(std::initializer_list<const TensorRef*> operands, const F& f) {
  if (is_mixed(operands)) return f.template operator()<tile::Mixed>();
  dispatch((*operands.begin())->dtype, f);
}

/// What a plan is made for: of mixed operands packs have as many columns as of f32.
template <class T>
constexpr DType kPlanned = kVector<T> == 4 ? DType::f32 : DType::bf16;

}  // namespace

void bias_dropout_add(const BiasDropoutAdd& args, Stream stream) {
  if (args.x.numel() == 0) return;
  dispatch_type({&args.x, &args.residual, &args.y}, [&]<class T>() {
    constexpr ColumnOp kOp = ColumnOp::bias_dropout_add;
    const std::int64_t n = args.x.sizes[args.x.ndim - 1];
    const ColumnPlan plan =
        column_plan(args.x.numel() / n, n, kPlanned<T>, at_once(kOp), sums_up(kOp));
    Columns<T> p = column_params<T>(args.x, plan);
    p.first = tile::row_view<T>(args.x, args.op, "x");
    p.second = tile::row_view<T>(args.residual, args.op, "residual");
    p.out = tile::row_view<T>(args.y, args.op, "y");
    p.bias = tile::column_view(args.bias, n);
    p.dropout = drops_of(args.dropout);
    launch_columns<kOp>(p, plan, args.op, stream);
  });
}

void bias_dropout_add_bwd(const BiasDropoutAddBwd& args, Stream stream) {
  if (args.dy.numel() == 0) return;
  FK_CHECK(args.workspace_size >= column_sums_workspace(args.dy, args.dbias), args.op,
           ": workspace must be at least ", column_sums_workspace(args.dy, args.dbias),
           " bytes, got ", args.workspace_size);
  dispatch_type({&args.dy, &args.dx}, [&]<class T>() {
    constexpr ColumnOp kOp = ColumnOp::bias_dropout_add_bwd;
    const std::int64_t n = args.dy.sizes[args.dy.ndim - 1];
    const ColumnPlan plan =
        column_plan(args.dy.numel() / n, n, kPlanned<T>, at_once(kOp), sums_up(kOp));
    Columns<T> p = column_params<T>(args.dy, plan);
    p.first = tile::row_view<T>(args.dy, args.op, "dy");
    p.out = tile::row_view<T>(args.dx, args.op, "dx");
    p.dropout = drops_of(args.dropout);
    p.sums = args.dbias.given() ? static_cast<float*>(args.workspace) : nullptr;
    launch_columns<kOp>(p, plan, args.op, stream);
    if (p.sums) launch_column_sums(p.sums, args.dbias, plan.slices, args.op, stream);
  });
}

}  // namespace fastkern::cuda
