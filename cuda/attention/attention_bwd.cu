// SPDX-License-Identifier: Apache-2.0
// attention on CUDA, backward: what is launched, and the memory between the launches.
#include <algorithm>

#include "attention/attention_launch.h"

#ifndef FASTKERN_HAS_SM90
#define FASTKERN_HAS_SM90 0
#endif

namespace fastkern::cuda {
namespace attention_detail {
namespace {

/// Where the parts of the workspace begin.
struct Parts {
  std::size_t turns = 0, sums = 0, end = 0;  // rows are the first
  std::int64_t turn_count = 0;
};

Parts parts_of(const Forward& f, const AttentionBwd& args) {
  const auto up = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
  const bool packed = f.lengths.start_q;
  const std::int64_t heads = static_cast<std::int64_t>(packed ? 1 : f.batch) * f.heads;
  Parts parts;
  parts.turns = up(static_cast<std::size_t>(heads * f.queries) * 8);
  parts.turn_count = 1;
  parts.sums = parts.end = parts.turns + 256;
  if (!args.dq.given() || args.fwd.q.dtype == DType::f32) return parts;
  dispatch_columns(std::max(f.d, f.dv), "fastkern::flash_attn", [&]<int kD>() {
    // Of packed tensors the last block of each sequence may not be full.
    const std::int64_t more = packed ? f.batch : 0;
    const std::int64_t blocks = ceil_div(f.queries, kLeastQueries) + more;
    parts.turn_count = heads * blocks + 1;
    parts.sums = parts.turns + up(static_cast<std::size_t>(parts.turn_count) * 4);
    const std::int64_t rows = heads * (ceil_div(f.queries, kMostQueries) + more) * kMostQueries;
    // A tile for Hopper has 64 or 128 columns.
    const int columns = kD <= 64 ? 64 : std::max(kD, kHopperBwdColumns);
    parts.end = parts.sums + static_cast<std::size_t>(rows * columns) * 4;
  });
  return parts;
}

/// But for the workspace.
Backward backward_params(const AttentionBwd& args) {
  Backward p{};
  p.f = forward_params(args.fwd);
  p.dout = view_of(args.dout), p.dq = view_of(args.dq);
  p.dk = view_of(args.dk), p.dv = view_of(args.dv);
  p.f.vectors = p.f.vectors && in_vectors(p.dout, p.f.dv * size_of(args.fwd.q.dtype));
  p.kv_heads = p.f.group > 0 ? p.f.heads / p.f.group : 0;
  const auto fours = [](const View& v, int width) {
    return (reinterpret_cast<std::uintptr_t>(v.data) | static_cast<std::uintptr_t>(v.batch) |
            static_cast<std::uintptr_t>(v.row) | static_cast<std::uintptr_t>(v.head) |
            static_cast<std::uintptr_t>(2 * width)) %
               8 ==
           0;
  };
  p.fours = fours(p.dq, p.f.d) && fours(p.dk, p.f.d) && fours(p.dv, p.f.dv);
  p.dlse = args.dlse.given() ? static_cast<const float*>(args.dlse.data) : nullptr;
  return p;
}

struct BwdRefusal {
  const char* why;
  bool (*of)(const Backward& p);
};
/// What the kernel for Hopper leaves to the others besides what forward does.
constexpr BwdRefusal kHopperBwdRefusals[] = {
    {"not all of dq, dk and dv",
     [](const Backward& p) { return !p.dq.data || !p.dk.data || !p.dv.data; }},
    {"expanded dout",
     [](const Backward& p) {
       const bool entries = !p.f.lengths.start_q && p.f.batch > 1;
       return !in_boxes(p.dout, p.f.queries > 1, p.f.heads > 1, entries);
     }},
};

const char* bwd_portable_because(const AttentionFwd& args, const Backward& p, Stream stream) {
  if (const char* const why = portable_because(args, p.f, stream)) return why;
  for (const BwdRefusal& refusal : kHopperBwdRefusals) {
    if (refusal.of(p)) return refusal.why;
  }
  return nullptr;
}

/// dsinks = -sum over entries and queries of exp(sink - lse) * delta.
__global__ void __launch_bounds__(256)
    attention_bwd_sinks_kernel(const __grid_constant__ Backward p, char* to, DType dtype) {
  const Forward& f = p.f;
  const int h = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ float parts[8];
  ptx::grid_wait();
  ptx::grid_launch_next();
  const float sink = f.sinks.at(h, 0.0f);
  const int batch = f.lengths.start_q ? 1 : f.batch;
  float sum = 0.0f;
  for (int b = 0; b < batch; ++b) {
    const std::int64_t row = (static_cast<std::int64_t>(b) * f.heads + h) * f.queries;
    for (int i = static_cast<int>(threadIdx.x); i < f.queries; i += 256) {
      const float2 of_row = p.rows[row + i];  // inf: of no sequence, and delta is 0
      sum -= ptx::exp2_approx(sink * kLog2e - of_row.x) * of_row.y;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) parts[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < 8; ++w) sum += parts[w];
  store_float(to, dtype, h, sum);
}

/// dk and dv of the keys of packed tensors that are in no sequence, as in attention_rest_kernel.
template <class T>
__global__ void __launch_bounds__(128) attention_bwd_rest_kernel(const Backward p) {
  ptx::grid_wait();
  ptx::grid_launch_next();
  const auto cut = [&](int row) { return max(0, min(row, p.f.keys)); };
  const auto clear = [&](int from, int to) {
    for (int row = from; row < to; ++row) {
      for (int g = 0; g < p.kv_heads; ++g) {
        T* const dk = reinterpret_cast<T*>(p.dk.at(0, row, g));
        T* const dv = reinterpret_cast<T*>(p.dv.at(0, row, g));
        for (int c = static_cast<int>(threadIdx.x); p.dk.data && c < p.f.d; c += 128) {
          dk[c] = T(0.0f);
        }
        for (int c = static_cast<int>(threadIdx.x); p.dv.data && c < p.f.dv; c += 128) {
          dv[c] = T(0.0f);
        }
      }
    }
  };
  clear(0, cut(p.f.lengths.start_k[0]));
  clear(cut(p.f.lengths.start_k[p.f.batch]), p.f.keys);
}

template <class T>
void launch_all(Backward& p, const AttentionBwd& args, Stream stream) {
  const char* const op = args.fwd.op;
  launch_bwd_first<T>(p, stream, op);
  if constexpr (std::is_same_v<T, float>) {
    launch_bwd_f32(p, stream, op);
  } else if (!bwd_portable_because(args.fwd, p, stream)) {
#if FASTKERN_HAS_SM90
    if (std::max(p.f.d, p.f.dv) <= kHopperBwdColumns) {
      launch_hopper_bwd_as<T>(p, stream, op);
    } else {
      launch_hopper_bwd_wide_as<T>(p, stream, op);
    }
#endif
  } else if (p.dq.data || p.dk.data || p.dv.data) {
    dispatch_bool(has_extras(p.f),
                  [&]<bool kExtras>() { launch_bwd_as<T, kExtras>(p, stream, op); });
  }
  if (args.dbias.given()) {
    const TensorRef& bias = args.fwd.bias;
    // Sizes of 1 are broadcast; of one entry, head or query that is the same thing.
    launch_bwd_bias<T>(
        p,
        {static_cast<char*>(args.dbias.data), args.dbias.dtype, static_cast<int>(bias.sizes[0]),
         static_cast<int>(bias.sizes[1]), static_cast<int>(bias.sizes[2])},
        stream, op);
  }
  if (args.dsinks.given()) {
    launch(attention_bwd_sinks_kernel, {.op = op, .grid = p.f.heads, .block = 256, .overlap = true},
           stream, p, static_cast<char*>(args.dsinks.data), args.dsinks.dtype);
  }
  if (p.f.lengths.start_q && (p.dk.data || p.dv.data)) {
    launch(attention_bwd_rest_kernel<T>, {.op = op, .grid = 1, .block = 128, .overlap = true},
           stream, p);
  }
}

}  // namespace
}  // namespace attention_detail

const char* attention_bwd_portable_because(const AttentionBwd& args, Stream stream) {
  using namespace attention_detail;
  return bwd_portable_because(args.fwd, backward_params(args), stream);
}

std::size_t attention_bwd_workspace(const AttentionBwd& args, Stream stream) {
  using namespace attention_detail;
  const Backward p = backward_params(args);
  const Parts parts = parts_of(p.f, args);
  if (std::max(p.f.d, p.f.dv) <= kHopperBwdColumns || bwd_portable_because(args.fwd, p, stream)) {
    return parts.end;
  }
  const std::int64_t ds = wide_ds_bytes(p.f, p.kv_heads, 2 * kMostDs);
  return std::max(parts.end, parts.sums + static_cast<std::size_t>(ds));
}

void attention_bwd(const AttentionBwd& args, Stream stream) {
  using namespace attention_detail;
  const char* const op = args.fwd.op;
  Backward p = backward_params(args);
  if (p.f.heads == 0 || p.f.batch == 0 || p.f.queries == 0) {  // gradients are 0
    const DeviceGuard guard(stream.device, op);
    for (const TensorRef* t : {&args.dq, &args.dk, &args.dv, &args.dbias, &args.dsinks}) {
      if (!t->given() || t->numel() == 0) continue;
      check(cudaMemsetAsync(t->data, 0, static_cast<std::size_t>(t->numel() * size_of(t->dtype)),
                            static_cast<cudaStream_t>(stream.handle)),
            op, "cudaMemsetAsync");
    }
    return;
  }
  const Parts parts = parts_of(p.f, args);
  FK_CHECK(args.workspace_size >= parts.end, op, ": workspace must have at least ", parts.end,
           " bytes, got ", args.workspace_size);
  char* const workspace = static_cast<char*>(args.workspace);
  p.rows = reinterpret_cast<float2*>(workspace);
  p.turns = reinterpret_cast<int*>(workspace + parts.turns);
  p.dq_sums = reinterpret_cast<float*>(workspace + parts.sums);
  p.turn_count = parts.turn_count;
  p.ds = workspace + parts.sums;
  p.ds_bytes =
      wide_ds_bytes(p.f, p.kv_heads, static_cast<std::int64_t>(args.workspace_size - parts.sums));
  dispatch(args.fwd.q.dtype, [&]<class T>() { launch_all<T>(p, args, stream); });
}

}  // namespace fastkern::cuda
