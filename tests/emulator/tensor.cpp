// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <sys/mman.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fastkern/scalar.h"

namespace emulator {

using namespace fastkern;

namespace {
constexpr std::int64_t kPage = 4096;

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
}  // namespace

Tensor::Tensor(DType dtype, const Sizes& sizes, const Sizes& strides, std::int64_t shift) {
  std::int64_t extent = 1;
  for (std::size_t d = 0; d < sizes.size(); ++d) extent += (sizes[d] - 1) * strides[d];
  for (const std::int64_t size : sizes) {
    if (size == 0) extent = 0;
  }
  const std::int64_t bytes = round_up((extent + shift) * size_of(dtype), 16);
  size_ = round_up(bytes, kPage) + 2 * kPage;
  void* const p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  mapped_ = static_cast<char*>(p);
  std::memset(mapped_ + kPage, 0xff, size_ - 2 * kPage);
  mprotect(mapped_, kPage, PROT_NONE);
  mprotect(mapped_ + size_ - kPage, kPage, PROT_NONE);
  ref_.data = mapped_ + size_ - kPage - bytes + shift * size_of(dtype);
  ref_.dtype = dtype;
  ref_.ndim = static_cast<int>(sizes.size());
  for (std::size_t d = 0; d < sizes.size(); ++d)
    ref_.sizes[d] = sizes[d], ref_.strides[d] = strides[d];
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(ref_, other.ref_);
  std::swap(mapped_, other.mapped_);
  std::swap(size_, other.size_);
  std::swap(writable_, other.writable_);
  std::swap(before_, other.before_);
  return *this;
}

Tensor::~Tensor() {
  if (mapped_) munmap(mapped_, size_);
}

std::int64_t Tensor::offset(std::int64_t element) const {
  std::int64_t from_begin = 0;
  for (int d = ref_.ndim - 1; d >= 0; --d) {
    from_begin += element % ref_.sizes[d] * ref_.strides[d];
    element /= ref_.sizes[d];
  }
  return static_cast<char*>(ref_.data) - mapped_ + from_begin * size_of(ref_.dtype);
}

unsigned Tensor::bits(std::int64_t element) const {
  unsigned value = 0;
  std::memcpy(&value, at(element), size_of(ref_.dtype));
  return value;
}

float Tensor::get(std::int64_t element) const {
  const unsigned value = bits(element);
  switch (ref_.dtype) {
    case DType::f32:
      return std::bit_cast<float>(value);
    case DType::bf16:
      return to_float(bf16{static_cast<std::uint16_t>(value)});
    case DType::f16:
      return to_float(f16{static_cast<std::uint16_t>(value)});
    case DType::f8e4m3:
      return to_float(f8e4m3{static_cast<std::uint8_t>(value)});
    default:
      return static_cast<std::int8_t>(value);
  }
}

void Tensor::set(std::int64_t element, float value) {
  const auto put = [&](auto v) { std::memcpy(at(element), &v, sizeof v); };
  if (ref_.dtype == DType::f32) put(value);
  if (ref_.dtype == DType::bf16) put(from_float<bf16>(value));
  if (ref_.dtype == DType::f16) put(from_float<f16>(value));
  if (ref_.dtype == DType::f8e4m3) put(from_float<f8e4m3>(value));
}

std::vector<double> Tensor::values() const {
  std::vector<double> all(numel());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = get(static_cast<std::int64_t>(i));
  return all;
}

bool Tensor::same_bits(const Tensor& other) const {
  for (std::int64_t e = 0, n = std::min(numel(), other.numel()); e < n; ++e) {
    if (bits(e) != other.bits(e)) return false;
  }
  return true;
}

void Tensor::fill(unsigned seed, double mean) {
  std::uint64_t state = seed * 0x9e3779b97f4a7c15ull + 77;
  const auto uniform = [&] {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state >> 40) * 0x1p-24;
  };
  for (std::int64_t e = 0, n = numel(); e < n; ++e) {
    const double sum = uniform() + uniform() + uniform() + uniform();
    set(e, static_cast<float>(mean + 1.7 * (sum - 2.0)));
  }
}

void Tensor::remember() {
  if (given()) before_.assign(mapped_ + kPage, mapped_ + size_ - kPage);
}

std::string Tensor::damage() const {
  if (!given()) return "";
  std::vector<bool> may_change(before_.size());
  if (writable_) {
    for (std::int64_t e = 0, n = numel(); e < n; ++e) {
      for (std::int64_t i = 0; i < size_of(ref_.dtype); ++i)
        may_change[offset(e) - kPage + i] = true;
    }
  }
  const std::int64_t begin = static_cast<char*>(ref_.data) - mapped_ - kPage;
  for (std::size_t i = 0; i < before_.size(); ++i) {
    if (!may_change[i] && before_[i] != mapped_[kPage + i])
      return "byte " + std::to_string(static_cast<std::int64_t>(i) - begin) + " was written";
  }
  return "";
}

}  // namespace emulator
