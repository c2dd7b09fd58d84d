// SPDX-License-Identifier: Apache-2.0
// Between the files of attention on CUDA.
#pragma once

#include <algorithm>

#include "attention/attention_bwd_bias.cuh"
#include "attention/attention_scores.cuh"
#include "dispatch.h"

namespace fastkern::cuda::attention_detail {

View view_of(const TensorRef& t);
/// Whether all rows, of so many bytes, lie in whole vectors.
bool in_vectors(const View& v, std::int64_t row_bytes);
Forward forward_params(const AttentionFwd& a);
/// Whether it takes the kernel with extras.
bool has_extras(const Forward& p);
/// p.blocks is set here.
template <class T, bool kExtras>
void launch_fwd_as(Forward& p, Stream stream, const char* op);
void launch_fwd_f32(Forward& p, Stream stream, const char* op);
/// What the copy engine can go along; tensors that were expanded it cannot.
bool in_boxes(const View& v, bool many_rows, bool many_heads, bool many_entries);
/// Which calls with 16-bit operands the kernel for Hopper leaves to the others, and why; nullptr:
/// not this one.
const char* hopper_refuses(const Forward& p);
/// Why a call takes the portable kernel; nullptr: it does not.
const char* portable_because(const AttentionFwd& args, const Forward& p, Stream stream);
/// Of packed tensors: out = 0 and lse = -inf for queries that are in no sequence.
void launch_rest(const Forward& p, DType dtype, Stream stream, const char* op);
/// Where FASTKERN_HAS_SM90 and the device has capability 9.0. kChanges: there is a soft cap or
/// ALiBi.
template <class T, bool kChanges>
void launch_hopper_fwd_as(Forward& p, Stream stream, const char* op);
template <class T, bool kExtras>
void launch_bwd_as(Backward& p, Stream stream, const char* op);
void launch_bwd_f32(Backward& p, Stream stream, const char* op);
/// Where bwd_portable_because() has nothing to say.
template <class T>
void launch_hopper_bwd_as(Backward& p, Stream stream, const char* op);
/// The same above kHopperBwdColumns.
template <class T>
void launch_hopper_bwd_wide_as(Backward& p, Stream stream, const char* op);
template <class T>
void launch_bwd_first(const Backward& p, Stream stream, const char* op);
template <class T>
void launch_bwd_bias(const Backward& p, const BiasGradient& to, Stream stream, const char* op);
template <>
void launch_bwd_bias<float>(const Backward&, const BiasGradient&, Stream, const char*);

/// Of all that this build has code for.
template <bool kExtras>
inline constexpr SharedMemory kShared = [] {
#ifdef __CUDA_ARCH_LIST__
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
#else
  constexpr int kArchs[] = {800, 900};
#endif
  SharedMemory all{227, 99};
  for (const int arch : kArchs) {
    const SharedMemory one = shared_memory(arch, kExtras);
    all = {std::min(all.least, one.least), std::max(all.most, one.most)};
  }
  return all;
}();

/// Whether a block with so much dynamic shared memory runs on all devices that this build has code
/// for, on some, or on the device. Kernels have a little besides. The device is asked for its
/// capability, from which taken_somewhere() concludes the same.
template <bool kExtras>
constexpr bool fits_all(int bytes) {
  return bytes + 1024 <= kShared<kExtras>.least * 1024;
}
template <bool kExtras>
constexpr bool fits_some(int bytes) {
  return bytes + 1024 <= kShared<kExtras>.most * 1024;
}
template <bool kExtras>
bool fits(int bytes, Stream stream, const char* op) {
  const int most = shared_memory(10 * capability(stream.device, op), kExtras).most;
  return fits_some<kExtras>(bytes) && bytes + 1024 <= most * 1024;
}

/// Of the tiles of backward: memory between launches does not depend on which is taken.
inline constexpr int kLeastQueries = 32, kMostQueries = 128;
/// Of the kernel for Hopper that adds up dq: the most columns.
inline constexpr int kHopperBwdColumns = 128;
/// Of those above, that leave ds in memory: in how many bytes at most; where that holds one key
/// head but not two, in twice as many: of one, blocks of a causal mask are too unequal.
inline constexpr std::int64_t kMostDs = std::int64_t{1} << 29;
/// How many of so many bytes they take: for as many key heads at a time as have room; 0: for none.
inline std::int64_t wide_ds_bytes(const Forward& f, int kv_heads, std::int64_t bytes) {
  const AttentionLengths& lengths = f.lengths;
  if (lengths.start_q || lengths.used_q || lengths.used_k) return 0;
  const auto blocks = [](std::int64_t rows) { return (rows + 63) / 64; };
  const std::int64_t head = f.group * blocks(f.queries) * blocks(f.keys) * (64 * 64 * 2);
  const std::int64_t heads = static_cast<std::int64_t>(f.batch) * kv_heads;
  if (head == 0 || heads == 0 || head > std::min(bytes, kMostDs)) return 0;
  bytes = std::min(bytes, std::max(kMostDs, 2 * head));
  const std::int64_t turns = (heads - 1) / std::min(heads, bytes / head) + 1;
  return (heads + turns - 1) / turns * head;
}

/// The gradient of 16-bit attention, for the head dimensions there are kernels for.
template <class F>
void dispatch_columns(int columns, const char* op, F&& f) {
  FK_CHECK(columns <= 256, op,
           ": there is no CUDA kernel for the gradient with head dimensions above 256, got ",
           columns);
  dispatch_ceil<32, 64, 96, 128, 192, 256>(columns, f);
}

}  // namespace fastkern::cuda::attention_detail
