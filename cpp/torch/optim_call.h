// SPDX-License-Identifier: Apache-2.0
// What the operators of optimizers share: lists of tensors into a table, checks, launch.
#pragma once

#include <string>
#include <vector>

#include "fastkern/optim.h"
#include "tensor.h"

namespace fastkern::torch_layer {

/// What every step takes beside its lists and numbers.
struct StepOptions {
  const OptionalTensor& lr_tensor;
  const OptionalTensor& grad_scale;
  const OptionalTensor& found_inf;
  const OptionalTensor& grad_factor;
};

/// One list of an operator: as long as the parameters or, if `optional`, empty.
struct StepList {
  const TensorList& tensors;
  const char* name;
  bool optional = false;
};

/// The table of a call's lists, in host memory and, for CUDA, in the device's too.
class TableMemory {
 public:
  TableMemory(std::int64_t tensors, Device device);
  OptimTable table() { return {host_.data(), tensors_}; }
  const void* host() const { return host_.data(); }
  /// The device's copy; the host's for the CPU.
  void* write(const char* op);

 private:
  std::int64_t tensors_;
  Device device_;
  std::vector<std::uint64_t> host_;
  OptionalTensor memory_;
};

/// Every element at one address, none between them that is not the tensor's.
bool is_dense(const TensorRef& t);

/// One step of lists of tensors; `group` says how, `args` what else there is.
void run_step(OptimStep args, const OptimGroup& group, const TensorList& params,
              const TensorList& grads, const std::vector<StepList>& states, const TensorList& steps,
              const TensorList& products, const TensorList& extras, const TensorList& scales,
              std::int64_t rounding, const StepOptions& options);

}  // namespace fastkern::torch_layer
