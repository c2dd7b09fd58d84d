// SPDX-License-Identifier: Apache-2.0
// Operands of attention on the device, and the way back.
#pragma once

#include <deque>
#include <map>

#include "attention_reference.h"
#include "support.cuh"

namespace fastkern::test {

/// Copies of the operands on the device, alive as long as it is; made as they are asked for.
struct OnDevice {
  mutable std::deque<DeviceTensor> tensors;
  mutable std::map<const Tensor*, const DeviceTensor*> where;
  mutable std::deque<DeviceArray<std::int32_t>> ints;
  mutable std::deque<DeviceArray<std::int64_t>> longs;

  TensorRef operator()(Tensor& t) const {
    if (!t.given()) return {};
    const DeviceTensor*& known = where[&t];
    if (!known) known = &tensors.emplace_back(t);
    return known->ref();
  }
  const std::int32_t* operator()(const std::vector<std::int32_t>& v) const {
    return v.empty() ? nullptr : ints.emplace_back(v).data();
  }
  const std::int64_t* operator()(const std::vector<std::int64_t>& v) const {
    return v.empty() ? nullptr : longs.emplace_back(v).data();
  }
};

}  // namespace fastkern::test
