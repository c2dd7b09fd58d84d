// SPDX-License-Identifier: Apache-2.0
#include "optim_written.h"

#include <algorithm>
#include <functional>

#include "fastkern/core.h"

namespace fastkern::torch_layer {

void WrittenMemory::check(const char* op) {
  const auto before = [](const Part& a, const Part& b) {
    return std::less<const char*>{}(a.begin, b.begin);
  };
  if (!std::is_sorted(parts_.begin(), parts_.end(), before)) {
    std::sort(parts_.begin(), parts_.end(), before);
  }
  for (std::size_t k = 1; k < parts_.size(); ++k) {
    const Part &a = parts_[k - 1], &b = parts_[k];
    FK_CHECK(!std::less<const char*>{}(b.begin, a.begin + a.bytes), op, ": ", b.list, "[", b.i,
             "] must have memory of its own, got some of ", a.list, "[", a.i, "]");
  }
}

}  // namespace fastkern::torch_layer
