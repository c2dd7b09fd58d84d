// SPDX-License-Identifier: Apache-2.0
// The norm of all gradients, and gradients times a factor.
//
//   formula  norm = sqrt(Σ g²) / grad_scale, or the largest |g|; factor = min(1, max_norm / (norm +
//   1e-6)) work     a block has a chunk of 16384 elements, a thread packs of it, as in
//   optim_step.cuh sync     a block leaves its sum in `partials` and draws a number; the one that
//   draws the last
//            adds them up in float64, thread t those of chunks t, t + 256, ...: one launch, and an
//            order of sums that depends on the tensors alone
//   cost     reads each gradient once. Scaling reads and writes it, but where the factor is 1
#include "optim/block_sum.cuh"
#include "optim/optim_step.cuh"

namespace fastkern::cuda {
namespace {

struct NormParams : TableParams {
  DType grad;
  bool largest, first, last;
  double max_norm;
  const float* grad_scale;
  float* partials;
  double* sum;
  float *norm, *factor;
};

struct ScaleParams : TableParams {
  DType grad;
  const float* factor;
};

/// f(element of the chunk, its values, how many of them) for the elements of a thread.
template <int kVec, class F>
__device__ __forceinline__ void for_elements(const Operand& grad, int count, const F& f) {
  constexpr int kPacks = 4;
  const int bytes = grad.bytes();
  const bool aligned = (reinterpret_cast<std::uintptr_t>(grad.at) & (kVec * bytes - 1)) == 0;
  const int packs = aligned ? count / kVec : 0;
  for (int pack = static_cast<int>(threadIdx.x); pack < packs; pack += kPacks * kOptimThreads) {
    RawPack<kVec> raw[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      raw[i].load(grad, at * kVec, at < packs);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = pack + i * kOptimThreads;
      if (at >= packs) break;
      float v[kVec];
      raw[i].unpack(grad.type, v);
      f.template operator()<kVec>(at * kVec, v);
    }
  }
#pragma unroll 1
  for (int e = packs * kVec + static_cast<int>(threadIdx.x); e < count; e += kOptimThreads) {
    float v[1] = {load_one(grad, e)};
    f.template operator()<1>(e, v);
  }
}

template <class F>
__device__ __forceinline__ void for_elements(const Operand& grad, int count, const F& f) {
  if (grad.type == DType::f32) return for_elements<4>(grad, count, f);
  for_elements<8>(grad, count, f);
}

/// The gradient of the block's chunk and how many elements it has there; none without one.
__device__ __forceinline__ Operand chunk_of(const TableParams& a, DType type, int& count) {
  const ChunkPlace place = place_of(a, static_cast<int>(blockIdx.x));
  char* const grad = static_cast<char*>(const_cast<void*>(place.grad));
  const std::int64_t left = a.tensor[place.tensor].numel - place.first;
  count = grad ? static_cast<int>(min(kOptimChunk, left)) : 0;
  return {grad + place.first * (type == DType::f32 ? 4 : 2), type};
}

__global__ void __launch_bounds__(kOptimThreads)
    optim_norm_kernel(const __grid_constant__ NormParams a) {
  __shared__ double sSums[kOptimThreads / 32];
  __shared__ int sLast[1];
  ptx::grid_wait();
  int count;
  const Operand grad = chunk_of(a, a.grad, count);
  float total = 0.0f;
  for_elements(grad, count, [&]<int kCount>(int, const float (&v)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      total = a.largest ? optim::larger(total, fabsf(v[j])) : optim::fma(v[j], v[j], total);
    }
  });
  const auto fold = [&](double x, double y) {
    return a.largest
               ? static_cast<double>(optim::larger(static_cast<float>(x), static_cast<float>(y)))
               : optim::add(x, y);
  };
  const double sum = block_fold<kOptimThreads>(static_cast<double>(total), sSums, fold);
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = static_cast<float>(sum);
    __threadfence();
    sLast[0] = ptx::draw_number_ordered(a.counter) == a.chunks - 1;
  }
  __syncthreads();
  if (!sLast[0]) return;
  ptx::fence_acquire();
  double all = 0.0;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < a.chunks; i += kOptimThreads) {
    all = fold(all, static_cast<double>(ptx::ld_global_cg(a.partials + i)));
  }
  all = block_fold<kOptimThreads>(all, sSums, fold);
  if (threadIdx.x == 0) {
    *a.counter = 0;
    if (!a.first) all = fold(*a.sum, all);
    *a.sum = all;
    if (a.last) {
      const optim::Clip clip = optim::clip_of(all, a.largest, a.grad_scale, a.max_norm);
      *a.norm = clip.norm;
      *a.factor = clip.factor;
    }
  }
}

__global__ void __launch_bounds__(kOptimThreads)
    optim_scale_kernel(const __grid_constant__ ScaleParams a) {
  ptx::grid_wait();
  const float factor = *a.factor;
  if (factor == 1.0f) return;
  int count;
  const Operand grad = chunk_of(a, a.grad, count);
  for_elements(grad, count, [&]<int kCount>(int at, float (&v)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = optim::mul(v[j], factor);
    if constexpr (kCount == 1) {
      store_one(grad, at, v[0]);
    } else {
      RawPack<kCount>::store(grad, at, v);
    }
  });
}

}  // namespace

void optim_norm(const OptimNorm& args, Stream stream) {
  NormParams a;
  static_cast<TableParams&>(a) = table_params(args.host, args.table, args.tensors);
  a.grad = args.grad;
  a.largest = args.largest, a.first = args.first, a.last = args.last;
  a.max_norm = args.max_norm;
  a.grad_scale = args.grad_scale;
  a.partials = args.partials, a.sum = args.sum, a.norm = args.norm, a.factor = args.factor;
  // A table without elements still has its turn.
  FK_CHECK(a.chunks > 0, args.op, ": the gradients of a norm must have elements, got none");
  launch(optim_norm_kernel,
         {.op = args.op, .grid = a.chunks, .block = kOptimThreads, .overlap = true}, stream, a);
}

void optim_scale(const OptimScale& args, Stream stream) {
  ScaleParams a;
  static_cast<TableParams&>(a) = table_params(args.host, args.table, args.tensors);
  a.grad = args.grad;
  a.factor = args.factor;
  launch(optim_scale_kernel,
         {.op = args.op, .grid = a.chunks, .block = kOptimThreads, .overlap = true}, stream, a);
}

}  // namespace fastkern::cuda
