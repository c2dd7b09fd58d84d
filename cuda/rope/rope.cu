// SPDX-License-Identifier: Apache-2.0
// Rotary embeddings of q and k in one launch: (a, b) -> (a cos - b sin, b cos + a sin).
//
//   work     a thread has two packs of eight columns of up to four heads of one token (f32: two);
//            lanes, then groups of heads, then tokens. Thread g of the heads of q takes heads g,
//            g + groups, ...: a warp's packs lie side by side
//   memory   16-byte loads, all of them issued before the first use; then the angles, which follow
//            the token's position: 64 bytes a thread of f32, from the caches but for the first
//            heads
//   sync     none; overlaps the launch before it
//   cost     reads and writes q and k once, the table once for all heads: 2 * B * S * (H + G) * D
//            elements
#include "dispatch.h"
#include "rope/rope.cuh"

namespace fastkern::cuda {
namespace rope_detail {
namespace {

constexpr int kRopeBlock = 128;

struct Params {
  HeadsView q, k, q_out, k_out;
  AnglesView angles;
  Split split;
  int q_heads, k_heads, q_groups, k_groups;
  std::uint32_t units;
  Divider groups_lanes, lanes, tokens;
};

template <class T, bool kInterleaved, bool kWhole>
__global__ void __launch_bounds__(kRopeBlock, kWhole ? 3 : 1) rope_kernel(const Params p) {
  constexpr int kMost = kHeads<T>;
  ptx::grid_wait();
  ptx::grid_launch_next();
  const std::uint32_t unit = blockIdx.x * kRopeBlock + threadIdx.x;
  if (unit >= p.units) return;
  std::uint32_t within, lane, s;
  const std::uint32_t token = p.groups_lanes(unit, within);
  std::uint32_t group = p.lanes(within, lane);
  const std::uint32_t b = p.tokens(token, s);
  const bool of_k = group >= static_cast<std::uint32_t>(p.q_groups);
  group -= of_k ? p.q_groups : 0;
  const int groups = of_k ? p.k_groups : p.q_groups, heads = of_k ? p.k_heads : p.q_heads;
  const HeadsView in = pick(of_k, p.q, p.k), out = pick(of_k, p.q_out, p.k_out);
  const Columns c = Columns::of<kInterleaved>(p.split, static_cast<int>(lane));

  Eight<T> first[kMost], second[kMost];
  const char* from = in.data + b * in.batch + s * in.token + group * in.head;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const bool inside = static_cast<int>(group) + i * groups < heads;
    first[i] = load<T, kWhole>(from, c.a, inside ? c.a_end : 0);
    second[i] = load<T, kWhole>(from, c.b, inside ? c.b_end : 0);
    from += groups * in.head;
  }
  Turn<kInterleaved> turn;
  const std::int64_t row = row_of(p.angles, b, s);
  turn.load(p.angles, b, row, c, p.split.half);
  const bool turned = c.turned && row != kNoSequence;
  char* to = out.data + b * out.batch + s * out.token + group * out.head;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const bool inside = static_cast<int>(group) + i * groups < heads;
    if (turned) {
      float x[kColumns], y[kColumns];
      unpack(first[i], x);
      unpack(second[i], y);
      turn.apply(x, y);
      first[i] = pack<T>(x), second[i] = pack<T>(y);
    }
    store<T, kWhole>(to, c.a, inside ? c.a_end : 0, first[i]);
    store<T, kWhole>(to, c.b, inside ? c.b_end : 0, second[i]);
    to += groups * out.head;
  }
}

}  // namespace
}  // namespace rope_detail

void rope(const RopeFwd& args, Stream stream) {
  using namespace rope_detail;  // NOLINT: all of it is about this
  const char* const op = args.op;
  Params p{};
  p.q = heads_view(args.q, op, "q"), p.q_out = heads_view(args.q_out, op, "q_out");
  p.k = heads_view(args.k, op, "k"), p.k_out = heads_view(args.k_out, op, "k_out");
  const std::int64_t tokens = args.q.sizes[1], n = args.q.sizes[3];
  const auto in_place = [](const TensorRef& in, const TensorRef& out) {
    return in.data == out.data || !in.given();
  };
  const bool with_rest = !in_place(args.q, args.q_out) || !in_place(args.k, args.k_out);
  p.split = split_of(n, args.angles, with_rest);
  p.angles = angles_view(args.angles, tokens, op);
  const bool packs =
      in_packs(p.split) && whole(args.q) && whole(args.q_out) && whole(args.k) && whole(args.k_out);
  dispatch_heads(
      args.q.dtype, args.angles.interleaved, packs, [&]<class T, bool kInterleaved, bool kWhole>() {
        p.q_heads = static_cast<int>(args.q.sizes[2]);
        p.k_heads = args.k.given() ? static_cast<int>(args.k.sizes[2]) : 0;
        p.q_groups = static_cast<int>(ceil_div(p.q_heads, kHeads<T>));
        p.k_groups = static_cast<int>(ceil_div(p.k_heads, kHeads<T>));
        const std::int64_t groups = p.q_groups + p.k_groups, lanes = p.split.lanes;
        p.units = counted(args.q.sizes[0] * tokens * groups * lanes, op);
        p.groups_lanes = divider(groups * lanes);
        p.lanes = divider(lanes), p.tokens = divider(tokens);
        const Launch shape{
            .op = op, .grid = ceil_div(p.units, kRopeBlock), .block = kRopeBlock, .overlap = true};
        launch(rope_kernel<T, kInterleaved, kWhole>, shape, stream, p);
      });
}

}  // namespace fastkern::cuda
