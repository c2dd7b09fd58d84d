// SPDX-License-Identifier: Apache-2.0
// An RMS norm of each head of q and k, then rotary embeddings, in one launch.
//
//   work     as rope.cu, but for a power of two of threads to a head, up to a warp: those of 16
//            columns each, and idle ones. A thread has up to four heads of one token (f32: two)
//   memory   a head waits in registers, as packs, between its sum and its rotation; all loads of a
//            thread are issued before the first use
//   sync     shuffles within the threads of a head; overlaps the launch before it
//   cost     as rope.cu: reads and writes q and k once
#include "rope/qk_norm_rope.cuh"

namespace fastkern::cuda {
namespace rope_detail {
namespace {

struct NormParams {
  HeadsView q, k, q_out, k_out;
  AnglesView angles;
  Split split;
  Side of_q, of_k;
  int width;
  std::uint32_t units;
  Divider groups, tokens;
  float eps, weight_offset, count;
};

template <class T, bool kInterleaved, bool kWhole>
__global__ void __launch_bounds__(kBlock, kWhole ? 8 : 1) qk_norm_rope_kernel(const NormParams p) {
  constexpr int kMost = kHeads<T>;
  ptx::grid_wait();
  ptx::grid_launch_next();
  const int width = p.width, lane = threadIdx.x & (width - 1);
  const std::uint32_t slots = kBlock / width;
  const std::uint32_t unit = blockIdx.x * slots + threadIdx.x / width;
  const bool active = unit < p.units;
  std::uint32_t group, s;
  const std::uint32_t token = p.groups(active ? unit : 0, group);
  const std::uint32_t b = p.tokens(token, s);
  const bool of_k = group >= static_cast<std::uint32_t>(p.of_q.groups);
  group -= of_k ? p.of_q.groups : 0;
  const int groups = of_k ? p.of_k.groups : p.of_q.groups;
  const int heads = !active ? 0 : of_k ? p.of_k.heads : p.of_q.heads;
  const HeadsView in = pick(of_k, p.q, p.k), out = pick(of_k, p.q_out, p.k_out);
  const Columns c = Columns::of<kInterleaved>(p.split, lane);

  Eight<T> first[kMost], second[kMost];
  const char* from = in.data + b * in.batch + s * in.token + group * in.head;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const bool inside = static_cast<int>(group) + i * groups < heads;
    first[i] = load<T, kWhole>(from, c.a, inside ? c.a_end : 0);
    second[i] = load<T, kWhole>(from, c.b, inside ? c.b_end : 0);
    from += groups * in.head;
  }
  Weights weight;
  weight.load(of_k ? p.of_k.weight : p.of_q.weight, c, p.weight_offset);
  Turn<kInterleaved> turn;
  const std::int64_t row = row_of(p.angles, b, s);
  turn.load(p.angles, b, row, c, p.split.half);
  const bool turned = c.turned && row != kNoSequence;

  float squares[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    float x[kColumns], y[kColumns];
    unpack(first[i], x);
    unpack(second[i], y);
    squares[i] = dot(y, y, dot(x, x, 0.0f));
    keep_packed(first[i]), keep_packed(second[i]);
  }
  sum_lanes(squares, width);
  char* to = out.data + b * out.batch + s * out.token + group * out.head;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const bool inside = static_cast<int>(group) + i * groups < heads;
    const float rstd = rsqrtf(__fmaf_rn(squares[i], p.count, p.eps));
    float x[kColumns], y[kColumns];
    unpack(first[i], x);
    unpack(second[i], y);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      x[j] = __fmul_rn(__fmul_rn(x[j], rstd), weight.a[j]);
      y[j] = __fmul_rn(__fmul_rn(y[j], rstd), weight.b[j]);
    }
    if (turned) turn.apply(x, y);
    store<T, kWhole>(to, c.a, inside ? c.a_end : 0, pack<T>(x));
    store<T, kWhole>(to, c.b, inside ? c.b_end : 0, pack<T>(y));
    to += groups * out.head;
  }
}

}  // namespace
}  // namespace rope_detail

void qk_norm_rope(const QkNormRopeFwd& args, Stream stream) {
  using namespace rope_detail;  // NOLINT: all of it is about this
  const char* const op = args.op;
  NormParams p{};
  p.q = heads_view(args.q, op, "q"), p.q_out = heads_view(args.q_out, op, "q_out");
  p.k = heads_view(args.k, op, "k"), p.k_out = heads_view(args.k_out, op, "k_out");
  const std::int64_t tokens = args.q.sizes[1], n = args.q.sizes[3];
  p.split = split_of(n, args.angles, true);
  p.angles = angles_view(args.angles, tokens, op);
  p.width = width_of(p.split, op);
  p.tokens = divider(tokens);
  p.eps = static_cast<float>(args.eps), p.weight_offset = static_cast<float>(args.weight_offset);
  p.count = 1.0f / static_cast<float>(n);
  const bool packs =
      in_packs(p.split) && whole(args.q) && whole(args.q_out) && whole(args.k) && whole(args.k_out);
  dispatch_heads(args.q.dtype, args.angles.interleaved, packs,
                 [&]<class T, bool kInterleaved, bool kWhole>() {
                   p.of_q = side_of(args.q, args.q_weight, p.split, kHeads<T>);
                   p.of_k = side_of(args.k, args.k_weight, p.split, kHeads<T>);
                   const std::int64_t groups = p.of_q.groups + p.of_k.groups;
                   p.units = counted(args.q.sizes[0] * tokens * groups, op);
                   p.groups = divider(groups);
                   const Launch shape{.op = op,
                                      .grid = ceil_div(p.units, kBlock / p.width),
                                      .block = kBlock,
                                      .overlap = true};
                   launch(qk_norm_rope_kernel<T, kInterleaved, kWhole>, shape, stream, p);
                 });
}

}  // namespace fastkern::cuda
