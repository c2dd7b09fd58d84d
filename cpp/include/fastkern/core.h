// SPDX-License-Identifier: Apache-2.0
// The words every fastkern call is made of: element types, tensor references, streams, errors.
// Plain C++20: needs neither torch nor the CUDA toolkit.
#pragma once

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#define FASTKERN_API __attribute__((visibility("default")))

namespace fastkern {

enum class DType : std::uint8_t {
  f32,
  f16,
  bf16,
  f8e4m3,
  i8,
  f64,
  u8,
  i16,
  i32,
  i64,
  boolean,  // a byte, 0 or 1
  c64,      // two f32: real and imaginary part
  c128,     // two f64
};

/// What computing operands may be. The others are for quantised results, and for elementwise.h.
constexpr bool is_float(DType dtype) { return dtype <= DType::bf16; }

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f8e4m3:
    case DType::i8:
    case DType::u8:
    case DType::boolean:
      return 1;
    case DType::f16:
    case DType::bf16:
    case DType::i16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f64:
    case DType::i64:
    case DType::c64:
      return 8;
    case DType::c128:
      return 16;
  }
  return 1;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"f32", "f16", "bf16", "f8e4m3",  "i8",  "f64", "u8",
                                    "i16", "i32", "i64",  "boolean", "c64", "c128"};
  return dtype <= DType::c128 ? kNames[static_cast<int>(dtype)] : "unknown";
}

inline constexpr int kMaxDims = 16;

/// A view of memory owned by somebody else. Strides count elements. `data == nullptr` with
/// `ndim == 0` means "not given" (an optional operand); an empty tensor may have any pointer.
struct TensorRef {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> sizes{};
  std::array<std::int64_t, kMaxDims> strides{};

  bool given() const { return ndim > 0; }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= sizes[d];
    return n;
  }
  std::string shape() const {
    std::string text = "(";
    for (int d = 0; d < ndim; ++d) text += std::to_string(sizes[d]) + (d + 1 < ndim ? ", " : "");
    return text + (ndim == 1 ? ",)" : ")");
  }
};

/// A dense row-major tensor over `data`: the shortest way to a TensorRef.
template <class... Sizes>
TensorRef dense(void* data, DType dtype, Sizes... sizes) {
  TensorRef ref{data, dtype, static_cast<int>(sizeof...(Sizes)), {}, {}};
  ref.sizes = {static_cast<std::int64_t>(sizes)...};
  std::int64_t stride = 1;
  for (int d = ref.ndim - 1; d >= 0; --d) {
    ref.strides[d] = stride;
    stride *= ref.sizes[d];
  }
  return ref;
}

/// A CUDA stream (cudaStream_t, nullptr for the default one) and the device it belongs to.
struct Stream {
  void* handle = nullptr;
  int device = 0;
};

/// Everything fastkern throws. The message names the op, the argument, what was expected and what
/// came.
class FASTKERN_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

/// FK_CHECK(cond, "fastkern::op: ", "argument must be ..., got ", value)
#define FK_CHECK(cond, ...)          \
  do {                               \
    if (!(cond)) [[unlikely]]        \
      ::fastkern::fail(__VA_ARGS__); \
  } while (0)

/// What this library was built from and for.
struct BuildInfo {
  const char* version;
  const char* commit;
  const char* compiler;
  bool cuda;                 // CUDA kernels compiled in
  const char* cuda_version;  // toolkit; "" without CUDA
  const char* cuda_archs;    // separated by spaces, e.g. "80 90a"; "" without CUDA
};
FASTKERN_API const BuildInfo& build_info();

/// The launch configuration a call would take; `kernel` is a static string.
struct Plan {
  const char* kernel = "";
  int threads_per_block = 0;
  int rows_per_block = 0;
  int threads_per_row = 0;
  int elements_per_thread = 0;
  bool resident = true;  // a row stays on the multiprocessor after its reduction; else read again
  std::int64_t shared_bytes = 0;  // dynamic shared memory
  int stages = 1;          // rows of a block's ring in shared memory, of which one is worked on
  int blocks_per_sm = 0;   // of a persistent kernel; 0: one block for each group of rows
  int blocks_per_row = 1;  // of a cluster that owns a row together
};

/// How the CPU kernels share work: body(context, begin, end) over [0, count), at least `grain`
/// items a piece. The default uses std::thread; a framework installs its own pool (fastkern's torch
/// layer installs torch's).
using ParallelBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
using ParallelFor = void (*)(std::int64_t count, std::int64_t grain, ParallelBody body,
                             void* context);
FASTKERN_API void set_parallel_for(ParallelFor run);

namespace cuda {

struct DeviceInfo {
  std::string name;
  int capability_major = 0;
  int capability_minor = 0;
  int multiprocessors = 0;
  std::int64_t shared_memory_per_block = 0;  // opt-in maximum, bytes
  std::int64_t l2_bytes = 0;
  std::int64_t memory_bytes = 0;
};

/// 0 without a driver, without a device, or in a build without CUDA; never throws.
FASTKERN_API int device_count();
FASTKERN_API DeviceInfo device_info(int device);
/// Highest CUDA version the driver takes, as 1000 * major + 10 * minor; 0 without a driver.
FASTKERN_API int driver_version();

}  // namespace cuda
}  // namespace fastkern
