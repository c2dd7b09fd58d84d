// SPDX-License-Identifier: Apache-2.0
// attention on CUDA, forward: which kernel a call takes.
#include <climits>

#include "attention/attention_launch.h"
#include "dispatch.h"

#ifndef FASTKERN_HAS_SM90
#define FASTKERN_HAS_SM90 0
#endif

namespace fastkern::cuda {
namespace attention_detail {

View view_of(const TensorRef& t) {
  if (!t.given()) return {};
  const std::int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data), t.ndim == 4 ? t.strides[0] * size : 0,
          t.strides[t.ndim - 3] * size, t.strides[t.ndim - 2] * size};
}

bool in_vectors(const View& v, std::int64_t width_bytes) {
  return (reinterpret_cast<std::uintptr_t>(v.data) | static_cast<std::uintptr_t>(v.batch) |
          static_cast<std::uintptr_t>(v.row) | static_cast<std::uintptr_t>(v.head) |
          static_cast<std::uintptr_t>(width_bytes)) %
             16 ==
         0;
}

namespace {

int fits_int(std::int64_t value, const char* op, const char* what) {
  FK_CHECK(value >= 0 && value < (std::int64_t{1} << 30), op, ": ", what,
           " must be below 2^30, got ", value);
  return static_cast<int>(value);
}

}  // namespace

Forward forward_params(const AttentionFwd& a) {
  Forward p{};
  p.q = view_of(a.q), p.k = view_of(a.k), p.v = view_of(a.v), p.out = view_of(a.out);
  p.lse = static_cast<float*>(a.lse.data);
  const bool packed = a.q.ndim == 3;
  const auto size = [](const TensorRef& t, int from_end) { return t.sizes[t.ndim - from_end]; };
  p.batch = fits_int(packed ? a.lengths.batch : a.q.sizes[0], a.op, "the batch");
  p.heads = fits_int(size(a.q, 2), a.op, "the number of heads");
  p.group = size(a.k, 2) > 0 ? p.heads / fits_int(size(a.k, 2), a.op, "the number of heads") : 1;
  p.queries = fits_int(size(a.q, 3), a.op, "the number of queries");
  p.keys = fits_int(size(a.k, 3), a.op, "the number of keys");
  p.d = fits_int(size(a.q, 1), a.op, "the head dimension");
  p.dv = fits_int(size(a.v, 1), a.op, "the head dimension");
  p.scale = static_cast<float>(a.scale), p.scale_log2 = p.scale * kLog2e;
  p.softcap = static_cast<float>(a.softcap);
  const std::int64_t bytes = size_of(a.q.dtype);
  p.vectors = in_vectors(p.q, p.d * bytes) && in_vectors(p.k, p.d * bytes) &&
              in_vectors(p.v, p.dv * bytes) && in_vectors(p.out, p.dv * bytes);
  p.lengths = a.lengths;
  p.mask = a.mask;
  if (a.sinks.given()) p.sinks = {static_cast<const char*>(a.sinks.data), a.sinks.dtype};
  if (a.slopes.given()) {
    p.slopes = {static_cast<const char*>(a.slopes.data), a.slopes.dtype};
    p.slopes_batch = a.slopes.ndim == 2 ? p.heads : 0;
  }
  if (a.bias.given()) {
    const auto stride = [&](int d) { return a.bias.sizes[d] == 1 ? 0 : a.bias.strides[d]; };
    p.bias = {static_cast<const char*>(a.bias.data),
              a.bias.dtype,
              stride(0),
              stride(1),
              stride(2),
              stride(3)};
  }
  if (const TensorRef& m = a.mask.blocks; m.given()) {
    p.block_mask = {static_cast<const std::int8_t*>(m.data), m.sizes[0] == 1 ? 0 : m.strides[0],
                    m.strides[1], m.strides[2], fits_int(a.mask.block_size, a.op, "block_size")};
  }
  if (a.dropout.p > 0.0) {
    p.dropout = {a.dropout.seed, a.dropout.offset, dropout_threshold(a.dropout.p),
                 dropout_scale(a.dropout.p)};
  }
  return p;
}

bool has_extras(const Forward& p) {
  // The plain kernel looks for the largest product: a scale of 0 or less makes another the largest.
  return !(p.scale > 0.0f) || p.softcap > 0.0f || p.bias.data || p.slopes.data ||
         p.block_mask.data || p.dropout.threshold > 0 || p.mask.prefix;
}

bool in_boxes(const View& v, bool many_rows, bool many_heads, bool many_entries) {
  const auto fits = [](bool many, std::int64_t stride) {
    return !many || (stride > 0 && stride < std::int64_t{1} << 40);
  };
  return fits(many_rows, v.row) && fits(many_heads, v.head) && fits(many_entries, v.batch);
}

namespace {

struct Refusal {
  const char* why;
  bool (*of)(const Forward& p);
};
constexpr Refusal kHopperRefusals[] = {
    {"bias", [](const Forward& p) { return p.bias.data != nullptr; }},
    {"block mask", [](const Forward& p) { return p.block_mask.data != nullptr; }},
    {"dropout", [](const Forward& p) { return p.dropout.threshold > 0; }},
    {"prefix", [](const Forward& p) { return p.mask.prefix != nullptr; }},
    {"scale not positive", [](const Forward& p) { return !(p.scale > 0.0f); }},
    {"no keys", [](const Forward& p) { return p.keys == 0; }},
    {"head dimension above 256", [](const Forward& p) { return std::max(p.d, p.dv) > 256; }},
    {"rows not in 16 bytes", [](const Forward& p) { return !p.vectors; }},
    {"expanded tensor",
     [](const Forward& p) {
       const bool entries = !p.lengths.start_q && p.batch > 1, heads = p.heads > p.group;
       return !in_boxes(p.q, p.queries > 1, p.heads > 1, entries) ||
              !in_boxes(p.k, p.keys > 1, heads, entries) ||
              !in_boxes(p.v, p.keys > 1, heads, entries);
     }},
    {"more than 2^30 blocks of queries",
     [](const Forward& p) {
       const std::int64_t packed = p.lengths.start_q ? p.batch : 0;
       const std::int64_t units = p.lengths.start_q ? p.heads : std::int64_t{p.heads} * p.batch;
       return (p.queries / 64 + 1 + packed) * units > std::int64_t{1} << 30;
     }},
};

}  // namespace

const char* hopper_refuses(const Forward& p) {
  for (const Refusal& refusal : kHopperRefusals) {
    if (refusal.of(p)) return refusal.why;
  }
  return nullptr;
}

namespace {

/// Whether tiles of the kernel for Hopper are better given out as they are asked for: of sequences
/// that may differ in length, and under a causal mask where keys are read often enough for their
/// place in L2 to count for more than the time that setting a counter to zero takes.
bool gains_from_counter(const Forward& p) {
  const bool packed = p.lengths.start_q, causal = p.mask.right >= 0 && p.mask.left < 0;
  const std::int64_t entries = packed ? 1 : p.batch;
  const bool many = entries * p.heads * p.queries >= 256 * 128;  // two tiles a multiprocessor
  const std::int64_t enough = p.d > 128 ? 1 << 17 : 1 << 18;
  return many && (packed || (causal && std::int64_t{p.keys} * p.d >= enough));
}

}  // namespace

const char* portable_because(const AttentionFwd& args, const Forward& p, Stream stream) {
  if (!FASTKERN_HAS_SM90) return "this build has no code for sm_90a";
  if (capability(stream.device, args.op) != 90) return "device is not of capability 9.0";
  if (args.q.dtype == DType::f32) return "f32";
  return hopper_refuses(p);
}

namespace {

/// out = 0 and lse = -inf for the queries of packed tensors that are in no sequence: block b has
/// those between the used ones of entry b and the next entry, the last block those around them all.
template <class T>
__global__ void __launch_bounds__(128) attention_rest_kernel(const Forward p) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  const int b = static_cast<int>(blockIdx.x);
  if (p.given && b == 0 && threadIdx.x == 0) *p.given = 0;
  const auto cut = [&](int row) { return max(0, min(row, p.queries)); };
  const auto clear = [&](int from, int to) {
    for (int row = from; row < to; ++row) {
      for (int h = 0; h < p.heads; ++h) {
        if (threadIdx.x == 0) p.lse[static_cast<std::int64_t>(h) * p.queries + row] = -INFINITY;
        T* const out = reinterpret_cast<T*>(p.out.at(0, row, h));
        for (int c = static_cast<int>(threadIdx.x); c < p.dv; c += 128) out[c] = T(0.0f);
      }
    }
  };
  if (b < p.batch) {
    const AttentionSequence<int> at = attention_sequence(p.lengths, b, p.queries, p.keys);
    clear(at.first_q + at.queries, cut(p.lengths.start_q[b + 1]));
  } else {
    clear(0, cut(p.lengths.start_q[0]));
    clear(cut(p.lengths.start_q[p.batch]), p.queries);
  }
}

}  // namespace

void launch_rest(const Forward& p, DType dtype, Stream stream, const char* op) {
  dispatch(dtype, [&]<class T>() {
    launch(attention_rest_kernel<T>, {.op = op, .grid = p.batch + 1, .block = 128, .overlap = true},
           stream, p);
  });
}

}  // namespace attention_detail

const char* attention_portable_because(const AttentionFwd& args, Stream stream) {
  return attention_detail::portable_because(args, attention_detail::forward_params(args), stream);
}

std::size_t attention_workspace(const AttentionFwd& args, Stream stream) {
  using namespace attention_detail;
  const Forward p = forward_params(args);
  return gains_from_counter(p) && !portable_because(args, p, stream) ? sizeof(int) : 0;
}

void attention(const AttentionFwd& args, Stream stream) {
  using namespace attention_detail;
  Forward p = forward_params(args);
  if (p.heads == 0 || p.queries == 0) return;
  const bool hopper = p.batch > 0 && !portable_because(args, p, stream);
  if (hopper && args.workspace_size >= sizeof(int)) p.given = static_cast<int*>(args.workspace);
  if (p.lengths.start_q) {
    launch_rest(p, args.q.dtype, stream, args.op);
  } else if (p.given) {
    const DeviceGuard guard(stream.device, args.op);
    check(cudaMemsetAsync(p.given, 0, sizeof(int), static_cast<cudaStream_t>(stream.handle)),
          args.op, "cudaMemsetAsync");
  }
  if (hopper) {
#if FASTKERN_HAS_SM90
    dispatch_bool(p.softcap > 0.0f || p.slopes.data, [&]<bool kChanges>() {
      args.q.dtype == DType::f16
          ? launch_hopper_fwd_as<__half, kChanges>(p, stream, args.op)
          : launch_hopper_fwd_as<__nv_bfloat16, kChanges>(p, stream, args.op);
    });
#endif
  } else if (p.batch > 0) {
    dispatch_bool(has_extras(p), [&]<bool kExtras>() {
      if (args.q.dtype == DType::f32) return launch_fwd_f32(p, stream, args.op);
      if (args.q.dtype == DType::f16) return launch_fwd_as<__half, kExtras>(p, stream, args.op);
      launch_fwd_as<__nv_bfloat16, kExtras>(p, stream, args.op);
    });
  }
}

}  // namespace fastkern::cuda
