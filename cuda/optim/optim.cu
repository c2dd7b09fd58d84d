// SPDX-License-Identifier: Apache-2.0
// Steps: which kernel; and tables on their way to the device.
#include <algorithm>
#include <cstring>

#include "launch.cuh"
#include "optim/optim_launch.h"
#include "optim/optim_table.cuh"
#include "ptx/cluster.cuh"

namespace fastkern::cuda {
namespace {

/// As much as is an argument of any kernel, since the first CUDA.
struct Words {
  uint4 word[240];
};
constexpr std::int64_t kWordBytes = sizeof(Words);

// Memory is written by a kernel whose arguments hold what is written: no pinned buffer that must
// outlive a copy, and a captured graph holds the values, not an address on the host.
__global__ void optim_write_kernel(uint4* to, int count, const __grid_constant__ Words words) {
  ptx::grid_wait();
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = words.word[threadIdx.x];
}

}  // namespace

void optim_write(void* device, const void* host, std::int64_t bytes, const char* op,
                 Stream stream) {
  FK_CHECK(bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(device) % 16 == 0, op,
           ": a table must be at a multiple of 16 bytes and as long as one");
  for (std::int64_t at = 0; at < bytes; at += kWordBytes) {
    const std::int64_t size = std::min(kWordBytes, bytes - at);
    Words words;
    std::memcpy(&words, static_cast<const char*>(host) + at, static_cast<std::size_t>(size));
    launch(optim_write_kernel, {.op = op, .grid = 1, .block = 256, .overlap = true}, stream,
           reinterpret_cast<uint4*>(static_cast<char*>(device) + at), static_cast<int>(size / 16),
           words);
  }
}

void optim_step(const OptimStep& args, Stream stream) {
  if (args.tensors == 0) return;
  FK_CHECK(args.tensors > 0 && args.tensors < (std::int64_t{1} << 31), args.op,
           ": the number of tensors must be in [0, 2^31), got ", args.tensors);
  const OptimTable seen(const_cast<void*>(args.host), args.tensors);
  StepParams a;
  static_cast<TableParams&>(a) = table_params(args.host, args.table, args.tensors);
  if (a.chunks == 0) return;
  a.param = args.param, a.grad = args.grad, a.state = args.state;
  a.rounding = args.rounding;
  a.counts = seen.tensor()[0].step != nullptr;
  a.grad_scale = args.grad_scale, a.grad_factor = args.grad_factor, a.found_inf = args.found_inf;
  a.seed = args.seed;
  a.workspace = args.workspace;
  std::copy(args.group, args.group + args.groups, a.group);
  if (args.state == DType::u8) return launch_codes(args, a, stream);
  switch (args.kind) {
    case OptimKind::adam:
      return launch_adam(args, a, stream);
    case OptimKind::sgd:
      return launch_sgd(args, a, stream);
    case OptimKind::lion:
      return launch_lion(args, a, stream);
    case OptimKind::lamb:
      return launch_lamb(args, a, stream);
    default:
      return launch_other(args, a, stream);
  }
}

}  // namespace fastkern::cuda
