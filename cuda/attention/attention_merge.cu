// SPDX-License-Identifier: Apache-2.0
// Attention over parts of the keys, put together; and the mask of dropout as a tensor.
//
//   work     merge: a warp has a query of a head. mask: a thread has four neighbours
//   sync     none
//   cost     merge: reads K · M · Dv elements, writes M · Dv
#include "attention/attention_scores.cuh"
#include "dispatch.h"

namespace fastkern::cuda {
namespace attention_detail {
namespace {

struct Merge {
  const char* outs;
  const float* lses;
  char* out;
  float* lse;
  std::int64_t out_part, out_batch, out_row, out_head;  // strides in elements
  std::int64_t lse_part, lse_batch, lse_head, lse_row;
  std::int64_t rows;
  int parts, queries, heads, width;
};

template <class T>
__global__ void __launch_bounds__(128) merge_attention_kernel(const Merge p) {
  const int lane = threadIdx.x % 32;
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (r >= p.rows) return;
  const std::int64_t h = r % p.heads, i = r / p.heads % p.queries, b = r / p.heads / p.queries;
  const float* const lses = p.lses + b * p.lse_batch + h * p.lse_head + i * p.lse_row;
  const T* const outs =
      reinterpret_cast<const T*>(p.outs) + b * p.out_batch + h * p.out_head + i * p.out_row;
  float top = -INFINITY, total = 0.0f;
  for (int k = 0; k < p.parts; ++k) top = fmaxf(top, lses[k * p.lse_part]);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int k = 0; k < p.parts; ++k) total += expf(lses[k * p.lse_part] - base);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int c = lane; c < p.width; c += 32) {
    float sum = 0.0f;
    for (int k = 0; k < p.parts; ++k) {
      const float lse = lses[k * p.lse_part];
      if (lse == -INFINITY) continue;  // saw nothing: what its out is does not matter
      sum = fmaf(expf(lse - base), static_cast<float>(outs[k * p.out_part + c]), sum);
    }
    reinterpret_cast<T*>(p.out)[r * p.width + c] = T(sum * inverse);
  }
  if (lane == 0) {
    p.lse[(b * p.heads + h) * p.queries + i] = total == 0.0f ? -INFINITY : base + logf(total);
  }
}

struct MergeGradients {
  const char* dout;
  const float* dlse;
  char* douts;   // dense
  float* dlses;  // dense
  std::int64_t dout_batch, dout_row, dout_head, dlse_batch, dlse_head, dlse_row;
};

template <class T>
__global__ void __launch_bounds__(128)
    merge_attention_bwd_kernel(const Merge p, const MergeGradients g) {
  const int lane = threadIdx.x % 32;
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (r >= p.rows) return;
  const std::int64_t h = r % p.heads, i = r / p.heads % p.queries, b = r / p.heads / p.queries;
  const std::int64_t of_lse = (b * p.heads + h) * p.queries + i;  // in dense dlses
  const float* const lses = p.lses + b * p.lse_batch + h * p.lse_head + i * p.lse_row;
  const T* const outs =
      reinterpret_cast<const T*>(p.outs) + b * p.out_batch + h * p.out_head + i * p.out_row;
  const T* const dout =
      reinterpret_cast<const T*>(g.dout) + b * g.dout_batch + h * g.dout_head + i * g.dout_row;
  float top = -INFINITY, total = 0.0f;
  for (int k = 0; k < p.parts; ++k) top = fmaxf(top, lses[k * p.lse_part]);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int k = 0; k < p.parts; ++k) total += expf(lses[k * p.lse_part] - base);
  const auto weight = [&](int k) {
    const float lse = lses[k * p.lse_part];
    return lse == -INFINITY ? 0.0f : expf(lse - base) / total;
  };
  const auto product = [&](int k) {  // dout . outs[k], in all lanes
    float sum = 0.0f;
    if (lses[k * p.lse_part] == -INFINITY) return sum;
    for (int c = lane; c < p.width; c += 32) {
      sum = fmaf(static_cast<float>(outs[k * p.out_part + c]), static_cast<float>(dout[c]), sum);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  };
  if (g.douts) {
    for (int k = 0; k < p.parts; ++k) {
      const float w = weight(k);
      const bool nothing = lses[k * p.lse_part] == -INFINITY;
      T* const to = reinterpret_cast<T*>(g.douts) + (k * p.rows + r) * p.width;
      for (int c = lane; c < p.width; c += 32) {
        to[c] = T(nothing ? 0.0f : w * static_cast<float>(dout[c]));
      }
    }
  }
  if (!g.dlses) return;
  float all = 0.0f;
  for (int k = 0; k < p.parts; ++k) all = fmaf(weight(k), product(k), all);
  const float dlse = g.dlse ? g.dlse[b * g.dlse_batch + h * g.dlse_head + i * g.dlse_row] : 0.0f;
  for (int k = 0; k < p.parts; ++k) {
    const float v = top == -INFINITY ? 0.0f : weight(k) * (product(k) - all + dlse);
    if (lane == 0) g.dlses[k * p.rows + of_lse] = v;
  }
}

__global__ void __launch_bounds__(256)
    attention_dropout_mask_kernel(std::int8_t* mask, std::int64_t groups, int rows, int columns,
                                  DropoutRows dropout) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  ptx::grid_wait();
  ptx::grid_launch_next();
  if (at >= groups) return;
  const int across = (columns + 3) / 4, j = static_cast<int>(at % across);
  const std::int64_t i = at / across % rows, head = at / across / rows;
  const std::uint64_t first = dropout.offset ? static_cast<std::uint64_t>(*dropout.offset) : 0;
  const PhiloxWords words = philox(static_cast<std::uint64_t>(*dropout.seed),
                                   first + (static_cast<std::uint64_t>(head) << 32),
                                   (static_cast<std::uint64_t>(i) << 30) + j);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (4 * j + w < columns) {
      mask[(head * rows + i) * columns + 4 * j + w] = words.word[w] >= dropout.threshold;
    }
  }
}

}  // namespace
}  // namespace attention_detail

namespace attention_detail {
namespace {

Merge merge_params(const char* op, const TensorRef& outs, const TensorRef& lses) {
  FK_CHECK(outs.ndim == 5, op, ": outs must have 5 dimensions, got ", outs.ndim);
  FK_CHECK(lses.ndim == 4, op, ": lses must have 4 dimensions, got ", lses.ndim);
  const auto& s = outs.strides;
  const auto& l = lses.strides;
  Merge p{static_cast<const char*>(outs.data),
          static_cast<const float*>(lses.data),
          nullptr,
          nullptr,
          s[0],
          s[1],
          s[2],
          s[3],
          l[0],
          l[1],
          l[2],
          l[3]};
  p.rows = outs.sizes[1] * outs.sizes[2] * outs.sizes[3];
  p.parts = static_cast<int>(outs.sizes[0]), p.queries = static_cast<int>(outs.sizes[2]);
  p.heads = static_cast<int>(outs.sizes[3]), p.width = static_cast<int>(outs.sizes[4]);
  return p;
}

}  // namespace
}  // namespace attention_detail

void merge_attention(const MergeFwd& a, Stream stream) {
  using namespace attention_detail;
  Merge p = merge_params(a.op, a.outs, a.lses);
  p.out = static_cast<char*>(a.out.data), p.lse = static_cast<float*>(a.lse.data);
  dispatch(a.outs.dtype, [&]<class T>() {
    launch(merge_attention_kernel<T>,
           {.op = a.op, .grid = ceil_div(p.rows, 4), .block = 128, .overlap = true}, stream, p);
  });
}

void merge_attention_bwd(const MergeBwd& a, Stream stream) {
  using namespace attention_detail;
  const Merge p = merge_params(a.op, a.outs, a.lses);
  FK_CHECK(a.dout.ndim == 4, a.op, ": dout must have 4 dimensions, got ", a.dout.ndim);
  const auto& s = a.dout.strides;
  const auto& l = a.dlse.strides;
  const MergeGradients g{static_cast<const char*>(a.dout.data),
                         a.dlse.given() ? static_cast<const float*>(a.dlse.data) : nullptr,
                         a.douts.given() ? static_cast<char*>(a.douts.data) : nullptr,
                         a.dlses.given() ? static_cast<float*>(a.dlses.data) : nullptr,
                         s[0],
                         s[1],
                         s[2],
                         l[0],
                         l[1],
                         l[2]};
  dispatch(a.outs.dtype, [&]<class T>() {
    launch(merge_attention_bwd_kernel<T>,
           {.op = a.op, .grid = ceil_div(p.rows, 4), .block = 128, .overlap = true}, stream, p, g);
  });
}

void attention_dropout_mask(const TensorRef& mask, const AttentionDropout& dropout, const char* op,
                            Stream stream) {
  using namespace attention_detail;
  FK_CHECK(mask.ndim == 4, op, ": mask must have 4 dimensions, got ", mask.ndim);
  const std::int64_t groups =
      mask.sizes[0] * mask.sizes[1] * mask.sizes[2] * ((mask.sizes[3] + 3) / 4);
  launch(attention_dropout_mask_kernel,
         {.op = op, .grid = ceil_div(groups, 256), .block = 256, .overlap = true}, stream,
         static_cast<std::int8_t*>(mask.data), groups, static_cast<int>(mask.sizes[2]),
         static_cast<int>(mask.sizes[3]),
         DropoutRows{dropout.seed, dropout.offset, dropout_threshold(dropout.p), 0.0f});
}

}  // namespace fastkern::cuda
