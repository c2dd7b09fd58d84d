// SPDX-License-Identifier: Apache-2.0
// The memory that a step on lists writes, which no two of its tensors may share.
#pragma once

#include <cstdint>
#include <vector>

namespace fastkern::torch_layer {

class WrittenMemory {
 public:
  /// Element `i` of the argument `list`, dense.
  void add(const void* data, std::int64_t bytes, const char* list, std::size_t i) {
    if (bytes > 0) parts_.push_back({static_cast<const char*>(data), bytes, list, i});
  }
  /// fail() if two have bytes in common.
  void check(const char* op);

 private:
  struct Part {
    const char* begin;
    std::int64_t bytes;
    const char* list;
    std::size_t i;
  };
  std::vector<Part> parts_;
};

}  // namespace fastkern::torch_layer
