// SPDX-License-Identifier: Apache-2.0
// From arguments to kernel parameters, and which kernel: included by the .cu of each operator,
// which compiles launch_fwd and launch_bwd for its combinations.
#pragma once

#include "norm/norm_bwd.cuh"
#include "norm/norm_shared.cuh"

namespace fastkern::cuda::norm_detail {

inline tile::DropoutView dropout_view(const Dropout& d) {
  if (d.p == 0.0) return {};
  return {d.seed, d.offset, dropout_threshold(d.p), dropout_scale(d.p)};
}

template <class T>
Forward<T> forward_params(const NormFwd& a) {
  Forward<T> p{};
  p.x = tile::row_view<T>(a.x, a.op, "x");
  p.y = tile::row_view<T>(a.y, a.op, "y");
  p.residual = tile::row_view<T>(a.residual, a.op, "residual");
  p.h = tile::row_view<T>(a.h, a.op, "h");
  p.y2 = tile::row_view<T>(a.y2, a.op, "y2");
  const Rows rows = rows_of(a.x, a.op, "x");
  p.rows = rows.count, p.n = rows.length;
  p.heads = heads_of({&a.weight, &a.bias, &a.weight2, &a.bias2});
  p.weight = tile::column_view(a.weight, p.n), p.bias = tile::column_view(a.bias, p.n);
  p.weight2 = tile::column_view(a.weight2, p.n), p.bias2 = tile::column_view(a.bias2, p.n);
  p.rowscale = tile::column_view(a.rowscale, 1);
  p.dropout = dropout_view(a.dropout);
  p.scale = a.scale.given() ? static_cast<float*>(a.scale.data) : nullptr;
  p.static_scale = a.static_scale;
  p.inverse_n = 1.0f / static_cast<float>(p.n);
  p.eps = static_cast<float>(a.eps);
  p.weight_offset = a.weight_offset == 0.0 ? -0.0f : static_cast<float>(a.weight_offset);
  return p;
}

template <class T>
Backward<T> backward_params(const NormBwd& a) {
  Backward<T> p{};
  p.dy = tile::row_view<T>(a.dy, a.op, "dy");
  p.x = tile::row_view<T>(a.x, a.op, "x");
  p.dx = tile::row_view<T>(a.dx, a.op, "dx");
  p.dh = tile::row_view<T>(a.dh, a.op, "dh");
  p.dbranch = tile::row_view<T>(a.dbranch, a.op, "dbranch");
  p.dy2 = tile::row_view<T>(a.dy2, a.op, "dy2");
  const Rows rows = rows_of(a.x, a.op, "x");
  p.rows = rows.count, p.n = rows.length;
  p.weight = tile::column_view(a.weight, p.n), p.weight2 = tile::column_view(a.weight2, p.n);
  p.rowscale = tile::column_view(a.rowscale, 1);
  p.dropout = dropout_view(a.dropout);
  p.inverse_n = 1.0f / static_cast<float>(p.n);
  p.eps = static_cast<float>(a.eps), p.weight_offset = static_cast<float>(a.weight_offset);
  return p;
}

/// Whether there is a plain kernel for a call: what norm_ring_kernel and norm_fwd_kernel say.
template <class T, Residual kResidual>
inline constexpr bool kHasPlain = kResidual != Residual::dropout && !std::is_same_v<T, tile::Mixed>;

template <class T>
bool has_plain_rows(const Forward<T>& p) {
  const auto plain = [](const RowView<T>& rows) { return !rows.data || rows.plain(); };
  return plain(p.x) && plain(p.y) && plain(p.residual) && plain(p.h) && !p.y2.data;
}

template <NormKind kNorm, class T>
bool has_plain_vectors(const Forward<T>& p) {
  const DType type = p.weight.dtype;
  return p.weight.data && p.weight.whole && (type == DType::f32 || type == dtype_of(T{})) &&
         (kNorm == NormKind::rms ? !p.bias.data
                                 : p.weight_offset == 0.0f &&
                                       (!p.bias.data || (p.bias.whole && p.bias.dtype == type)));
}

/// Up to so many rows registers are no matter: few blocks have a multiprocessor each.
inline constexpr std::int64_t kFew = 128;

/// f.operator()<T>() with the element type of a kernel.
template <class F>
void dispatch_type(DType type, bool mixed, F&& f) {
  if (mixed) return f.template operator()<tile::Mixed>();
  dispatch(type, f);
}

template <NormKind kNorm, Residual kResidual, bool kQuant>
void launch_fwd(const NormFwd& args, const Plan& plan, DType type, bool mixed, Stream stream) {
  dispatch_type(type, mixed, [&]<class T>() {
    Forward<T> p = forward_params<T>(args);
    p.threads = plan.threads_per_row, p.blocks = plan.blocks_per_row;
    const int packs = plan.elements_per_thread / kVector<T>;
    const bool plain_vectors = has_plain_vectors<kNorm>(p);
    if (plan.blocks_per_sm == 0 && plan.shared_bytes > 0) {
      auto kernel = norm_shared_kernel<T, kNorm, kResidual, kQuant, false>;
      if constexpr (kHasPlain<T, kResidual>) {
        if (has_plain_rows(p) && plain_vectors)
          kernel = norm_shared_kernel<T, kNorm, kResidual, kQuant, true>;
      }
      return launch(kernel,
                    {.op = args.op,
                     .grid = p.rows,
                     .block = plan.threads_per_block,
                     .shared = shared_bytes(plan.threads_per_block, packs),
                     .overlap = true},
                    stream, p);
    }
    if (plan.blocks_per_sm == 0) {
      const Launch shape{.op = args.op,
                         .grid = ceil_div(p.rows, plan.rows_per_block),
                         .block = plan.threads_per_block,
                         .shared = static_cast<std::size_t>(fwd_bytes(plan.threads_per_block)),
                         .overlap = true};
      const auto run = [&]<int kPacks>() {
        if constexpr (kHasPlain<T, kResidual>) {
          if (has_plain_rows(p) && plain_vectors) {
            if constexpr (kNorm == NormKind::layer && kPacks == 4) {
              if (p.rows <= kFew && p.bias.data && p.weight.dtype == dtype_of(T{})) {
                launch(norm_fwd_kernel<T, kPacks, kNorm, kResidual, kQuant, 256, true, true>, shape,
                       stream, p);
                return;
              }
            }
            launch(norm_fwd_kernel<T, kPacks, kNorm, kResidual, kQuant, 256, true>, shape, stream,
                   p);
            return;
          }
        }
        launch(norm_fwd_kernel<T, kPacks, kNorm, kResidual, kQuant, 256, false>, shape, stream, p);
      };
      // The packs that norm_plan gives.
      return dispatch_ceil<2, 3, 4>(packs, run);
    }
    const auto ring = [&]<int kBlock>() {
      const std::size_t shared =
          ring_bytes<T, kResidual, kBlock>(plan.blocks_per_row, args.y2.given());
      const int limit =
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device, args.op);
      if (shared > static_cast<std::size_t>(limit)) return launch_fwd_long(args, stream);
      auto kernel = norm_ring_kernel<T, kNorm, kResidual, kQuant, kBlock, false>;
      if constexpr (kHasPlain<T, kResidual> && !kQuant) {
        if (has_plain_rows(p) && p.heads == 1)
          kernel = norm_ring_kernel<T, kNorm, kResidual, kQuant, kBlock, true>;
      }
      const std::int64_t most =
          resident_clusters(reinterpret_cast<const void*>(kernel), plan.blocks_per_row, kBlock,
                            shared, stream, args.op);
      launch(kernel,
             {.op = args.op,
              .grid = std::min(p.rows, most) * plan.blocks_per_row,
              .block = kBlock,
              .shared = shared,
              .cluster = plan.blocks_per_row,
              .overlap = true},
             stream, p);
    };
    if (plan.threads_per_block == 256) return ring.template operator()<256>();
    if constexpr (kResidual == Residual::none && !kQuant) return ring.template operator()<512>();
    launch_fwd_long(args, stream);
  });
}

template <NormKind kNorm, Residual kResidual, Sums kSums>
std::int64_t launch_bwd(const NormBwd& args, const Split& split, Stream stream) {
  const Plan& plan = split.plan;
  std::int64_t partial_rows = split.partial_rows;
  dispatch_type(split.type, split.mixed, [&]<class T>() {
    Backward<T> p = backward_params<T>(args);
    p.threads = plan.threads_per_row, p.blocks = plan.blocks_per_row;
    p.heads = split.heads, p.slots = split.slots, p.partial_rows = split.partial_rows;
    p.sums = split.sums;
    p.partial = split.sums > 0 ? static_cast<float*>(args.workspace) : nullptr;
    p.merge = split.heads == 1;
    const auto run = [&]<int kPacks, int kBlock, Weights kWeights, Weights kGeneral = kWeights>() {
      constexpr bool kPlain =
          kHasPlain<T, kResidual> && kSums != Sums::two_outputs && kWeights != Weights::cache;
      const bool plain = kPlain && split.heads == 1 && p.rows >> 30 == 0 && p.dx.data &&
                         p.x.plain() && p.dy.plain() && p.dx.plain() &&
                         (!p.dh.data || p.dh.plain());
      auto kernel = norm_bwd_kernel<T, kPacks, kNorm, kResidual, kSums, kBlock, kGeneral, false>;
      if constexpr (kPlain) {
        if (plain)
          kernel = norm_bwd_kernel<T, kPacks, kNorm, kResidual, kSums, kBlock, kWeights, true>;
      }
      const std::size_t shared = bwd_bytes<T, kPacks, kNorm, kSums, kBlock, kWeights>(
          plan.threads_per_row, plan.blocks_per_row, kResidual != Residual::none);
      std::int64_t teams = split.teams;
      if (plan.blocks_per_row > 1) {
        teams = std::min(
            teams, resident_clusters(reinterpret_cast<const void*>(kernel), plan.blocks_per_row,
                                     kBlock, shared, stream, args.op));
        p.slots = p.partial_rows = partial_rows = teams;
      }
      p.finished = split.heads == 1 && teams <= plan.rows_per_block;
      if (p.finished) partial_rows = kFinished, p.finish = finish_of(args);
      launch(kernel,
             {.op = args.op,
              .grid = ceil_div(teams, plan.rows_per_block) * plan.blocks_per_row,
              .block = kBlock,
              .shared = shared,
              .cluster = plan.blocks_per_row,
              .overlap = true},
             stream, p);
    };
    const int packs = plan.elements_per_thread / kVector<T>;
    if (packs == 2 && plan.threads_per_block == 256)
      return run.template operator()<2, 256, Weights::shared>();
    if constexpr (kSums != Sums::two_outputs) {
      if constexpr (kResidual == Residual::none) {
        if (packs == 4 && split.own_weight)
          return run.template operator()<4, 512, Weights::registers, Weights::cache>();
        if (packs == 4) return run.template operator()<4, 512, Weights::cache>();
        if (packs == 3) return run.template operator()<3, 512, Weights::shared>();
      }
      return run.template operator()<2, 512, Weights::shared>();
    }
  });
  return partial_rows;
}

}  // namespace fastkern::cuda::norm_detail
