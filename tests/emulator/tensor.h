// SPDX-License-Identifier: Apache-2.0
// Tensors of a driver: what lies behind one traps, and what is not of it must not change.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "fastkern/core.h"

namespace emulator {

using Sizes = std::vector<std::int64_t>;

class Tensor {
 public:
  Tensor() = default;
  /// Not-a-number throughout. `shift`: elements from a 16-byte boundary to the first one. It must
  /// be a multiple of 16 bytes long, or up to 15 bytes behind it do not trap.
  Tensor(fastkern::DType dtype, const Sizes& sizes, const Sizes& strides, std::int64_t shift = 0);
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();

  bool given() const { return ref_.given(); }
  const fastkern::TensorRef& ref() const { return ref_; }
  fastkern::DType dtype() const { return ref_.dtype; }
  std::int64_t numel() const { return given() ? ref_.numel() : 0; }
  std::int64_t columns() const { return ref_.sizes[ref_.ndim - 1]; }

  /// All of the memory that belongs to it.
  std::pair<const void*, const void*> range() const { return {mapped_, mapped_ + size_}; }

  float get(std::int64_t element) const;
  unsigned bits(std::int64_t element) const;
  void set(std::int64_t element, float value);
  std::vector<double> values() const;
  bool same_bits(const Tensor& other) const;
  /// Bell-shaped around `mean` with deviation 1, nearly.
  void fill(unsigned seed, double mean);

  /// It may be written.
  Tensor& allow_writes() {
    writable_ = true;
    return *this;
  }
  bool writable() const { return writable_; }
  void remember();
  /// What was written since remember() that should not have been, in words; or nothing.
  std::string damage() const;

 private:
  std::int64_t offset(std::int64_t element) const;  // bytes from the begin of what is mapped
  char* at(std::int64_t element) const { return mapped_ + offset(element); }

  fastkern::TensorRef ref_;
  char* mapped_ = nullptr;
  std::int64_t size_ = 0;  // of what is mapped, with the page that traps on either side
  bool writable_ = false;
  std::vector<char> before_;
};

}  // namespace emulator
