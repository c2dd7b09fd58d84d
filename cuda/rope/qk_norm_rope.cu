// SPDX-License-Identifier: Apache-2.0
// An RMS norm of each head of q and k, then rotary embeddings, in one launch.
//
//   work     as rope.cu, but for a power of two of threads to a head, up to a warp: those of 16
//            columns each, and idle ones. A thread has up to four heads of one token (f32: two),
//            and the same heads of another: blocks that have whole tokens together have as many
//            behind those, so that weights and all but the token are found once
//   memory   a thread copies the heads of its next token into its own part of shared memory while
//   it
//            computes: how many bytes are under way does not depend on registers. A head is read
//            from there twice, for its sum and for its rotation
//   sync     shuffles within the threads of a head; each thread waits for its own copies; overlaps
//            the launch before it
//   cost     as rope.cu: reads and writes q and k once
#include <numeric>

#include "rope/qk_norm_rope.cuh"

namespace fastkern::cuda {
namespace rope_detail {
namespace {

constexpr int kNormBlock = 64;
constexpr int kTurns = 2;     // tokens of a thread, one after another
constexpr int kStages = 2;    // of those, copied or computed
constexpr int kResident = 8;  // blocks of a multiprocessor
template <class T>
inline constexpr int kPacks = sizeof(T) / 2;  // of eight columns

struct NormParams {
  HeadsView q, k, q_out, k_out;
  AnglesView angles;
  Split split;
  Side of_q, of_k;
  int width;
  std::uint32_t units, tokens_each;  // of a sequence
  std::uint32_t gang;                // blocks that have whole tokens together
  std::uint32_t step, step_batches;  // between tokens of a thread: tokens, and whole sequences
  Divider groups, tokens;
  float eps, weight_offset, count;
};

/// Which token a thread works on.
struct Place {
  std::uint32_t unit, b, s;

  __device__ __forceinline__ void next(const NormParams& p, std::uint32_t units) {
    unit += units;
    b += p.step_batches, s += p.step;
    if (s >= p.tokens_each) s -= p.tokens_each, ++b;
  }
};

/// Columns first to first + 7 on their way into shared memory, those before `end`, zeros for
/// others. `inside`: first < end.
template <class T, bool kWhole>
__device__ __forceinline__ void stage(uint4* to, const char* head, int first, int end,
                                      bool inside) {
  if constexpr (kWhole) {
    const T* const from = reinterpret_cast<const T*>(head) + first;
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i)
      ptx::cp_async_16(to + i * kNormBlock, from + i * tile::kVector<T>, inside ? 16 : 0);
  } else {
    const Eight<T> eight = load<T, false>(head, first, inside ? end : 0);
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i) to[i * kNormBlock] = eight.bits[i];
  }
}

template <class T>
__device__ __forceinline__ void unpack_staged(const uint4* from, float (&out)[kColumns]) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < kPacks<T>; ++i) eight.bits[i] = ptx::ld_shared(from + i * kNormBlock);
  unpack(eight, out);
}

template <class T, bool kInterleaved, bool kWhole>
__global__ void __launch_bounds__(kNormBlock, kWhole ? kResident : 1)
    qk_norm_rope_kernel(const __grid_constant__ NormParams p) {
  constexpr int kMost = kHeads<T>, kOfHead = 2 * kPacks<T> * kNormBlock, kOfStage = kMost * kOfHead;
  constexpr int kSecond = kPacks<T> * kNormBlock;
  extern __shared__ uint4 shared[];
  ptx::grid_wait();
  ptx::grid_launch_next();
  const int width = p.width, lane = threadIdx.x & (width - 1);
  const std::uint32_t slots = kNormBlock / width, stride = p.gang * slots;
  const std::uint32_t gang = blockIdx.x / p.gang, member = blockIdx.x - gang * p.gang;
  const std::uint32_t start = (gang * kTurns * p.gang + member) * slots;
  const std::uint32_t end = min(p.units, start + kTurns * stride);
  Place now;
  now.unit = start + threadIdx.x / width;
  std::uint32_t group;
  now.b = p.tokens(p.groups(now.unit, group), now.s);
  const bool of_k = group >= static_cast<std::uint32_t>(p.of_q.groups);
  group -= of_k ? p.of_q.groups : 0;
  const int groups = of_k ? p.of_k.groups : p.of_q.groups;
  const int heads = (of_k ? p.of_k.heads : p.of_q.heads) - static_cast<int>(group);
  HeadsView in = pick(of_k, p.q, p.k), out = pick(of_k, p.q_out, p.k_out);
  in.data += group * in.head, out.data += group * out.head;
  in.head *= groups, out.head *= groups;
  const Columns c = Columns::of<kInterleaved>(p.split, lane);

  uint4* const own = shared + threadIdx.x;
  int held_a = 0, held_b = 0;  // heads that have the first pack, and the second
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    held_a += i * groups < heads && c.a < c.a_end;
    held_b += i * groups < heads && c.b < c.b_end;
  }
  const auto fetch = [&](uint4* to, const Place& at) {
    const bool active = at.unit < end;
    const int of_a = active ? held_a : 0, of_b = active ? held_b : 0;
    const char* from = in.data + (at.b * in.batch + at.s * in.token);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      stage<T, kWhole>(to + i * kOfHead, from, c.a, c.a_end, i < of_a);
      stage<T, kWhole>(to + i * kOfHead + kSecond, from, c.b, c.b_end, i < of_b);
      from += in.head;
    }
  };
  Place ahead = now;
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) {
    fetch(own + i * kOfStage, ahead);
    ptx::cp_async_commit();
    ahead.next(p, stride);
  }
  Weights weight;
  weight.load(of_k ? p.of_k.weight : p.of_q.weight, c, p.weight_offset);
  int current = 0;
#pragma unroll 1
  for (std::uint32_t begin = start; begin < end; begin += stride) {
    const bool active = now.unit < end;
    const std::uint32_t b = active ? now.b : 0, s = active ? now.s : 0;
    const int of_a = active ? held_a : 0, of_b = active ? held_b : 0;
    Turn<kInterleaved> turn;
    const std::int64_t row = row_of(p.angles, b, s);
    turn.ask(p.angles, b, row, c, p.split.half);  // ahead of the copies, else they are first
    const bool turned = c.turned && row != kNoSequence;
    fetch(own + (current == 0 ? kStages - 1 : current - 1) * kOfStage, ahead);
    ptx::cp_async_commit();
    ahead.next(p, stride);
    const uint4* const from = own + current * kOfStage;
    ptx::cp_async_wait<kStages - 1>();

    float squares[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      float x[kColumns], y[kColumns];
      unpack_staged<T>(from + i * kOfHead, x);
      unpack_staged<T>(from + i * kOfHead + kSecond, y);
      squares[i] = dot(y, y, dot(x, x, 0.0f));
    }
    sum_lanes(squares, width);
    turn.settle(p.angles);
    __syncwarp();  // heads are read again: ptxas would keep all of them in registers
    char* to = out.data + b * out.batch + s * out.token;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const float rstd = rsqrtf(__fmaf_rn(squares[i], p.count, p.eps));
      float x[kColumns], y[kColumns];
      unpack_staged<T>(from + i * kOfHead, x);
      unpack_staged<T>(from + i * kOfHead + kSecond, y);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        x[j] = __fmul_rn(__fmul_rn(x[j], rstd), weight.a[j]);
        y[j] = __fmul_rn(__fmul_rn(y[j], rstd), weight.b[j]);
      }
      if (turned) turn.apply(x, y);
      store<T, kWhole>(to, c.a, i < of_a ? c.a_end : 0, pack<T>(x));
      store<T, kWhole>(to, c.b, i < of_b ? c.b_end : 0, pack<T>(y));
      to += out.head;
    }
    now.next(p, stride);
    current = current + 1 == kStages ? 0 : current + 1;
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
  p.tokens = divider(tokens), p.tokens_each = static_cast<std::uint32_t>(tokens);
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
                   if (p.units == 0) return;
                   p.groups = divider(groups);
                   const std::int64_t slots = kNormBlock / p.width;
                   const std::int64_t gang = groups / std::gcd(groups, slots);
                   const std::int64_t step = gang * slots / groups;
                   p.gang = static_cast<std::uint32_t>(gang);
                   p.step = static_cast<std::uint32_t>(step % tokens);
                   p.step_batches = static_cast<std::uint32_t>(step / tokens);
                   const Launch shape{.op = op,
                                      .grid = ceil_div(p.units, gang * slots * kTurns) * gang,
                                      .block = kNormBlock,
                                      .shared = sizeof(uint4) * 8 * kStages * kNormBlock,
                                      .overlap = true};
                   launch(qk_norm_rope_kernel<T, kInterleaved, kWhole>, shape, stream, p);
                 });
}

}  // namespace fastkern::cuda
