// SPDX-License-Identifier: Apache-2.0
#include "optim_call.h"

#include <algorithm>
#include <array>
#include <utility>

#include "optim_written.h"

namespace fastkern::torch_layer {
namespace {

constexpr const char* kRoundings[] = {"nearest", "stochastic", "kahan", "master", "remainder"};

std::string item(const char* list, std::size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_length(const TensorList& list, std::size_t count, const char* op, const char* name,
                  bool optional) {
  FK_CHECK(list.size() == count || (optional && list.empty()), op, ": ", name, " must have ", count,
           " tensors", optional ? " or none" : "", ", one for each parameter, got ", list.size());
}

/// fail() unless `t` has the shape, the strides and the device of a parameter.
void check_like(const Tensor& t, const TensorRef& ref, const TensorRef& like, Device device,
                const char* op, const std::string& name, const std::string& of) {
  check_shape(ref, like.sizes.data(), like.ndim, op, name.c_str());
  for (int d = 0; d < ref.ndim; ++d) {
    FK_CHECK(ref.strides[d] == like.strides[d] || ref.sizes[d] <= 1 || ref.numel() == 0, op, ": ",
             name, " must have the strides of ", of, ", got others");
  }
  check_device(t, device, op, name.c_str(), of.c_str());
}

/// The scales of a state of 8 bits.
float* scales_of(const Tensor& t, const TensorRef& state, Device device, const char* op,
                 const std::string& name) {
  const TensorRef ref = ref_of(t, op, name.c_str());
  const std::int64_t blocks = (state.numel() + kOptimCodeBlock - 1) / kOptimCodeBlock;
  FK_CHECK(ref.dtype == DType::f32, op, ": ", name, " must be torch.float32, got ",
           dtype_text(ref.dtype));
  FK_CHECK(ref.ndim == 1 && ref.sizes[0] == blocks && (ref.strides[0] == 1 || blocks <= 1), op,
           ": ", name, " must be contiguous and have shape (", blocks, ",), one element for each ",
           kOptimCodeBlock, " of the parameter's, got ", ref.shape());
  check_device(t, device, op, name.c_str(), "params[0]");
  return static_cast<float*>(ref.data);
}

const float* float_or_null(const OptionalTensor& t, Device device, const char* op,
                           const char* name) {
  return t ? one_float(*t, device, op, name) : nullptr;
}

}  // namespace

bool is_dense(const TensorRef& t) {
  std::array<int, kMaxDims> order{};
  int n = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] == 0) return true;
    if (t.sizes[d] > 1) order[n++] = d;
  }
  std::sort(order.begin(), order.begin() + n,
            [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  std::int64_t stride = 1;
  for (int i = 0; i < n; ++i) {
    if (t.strides[order[i]] != stride) return false;
    stride *= t.sizes[order[i]];
  }
  return true;
}

TableMemory::TableMemory(std::int64_t tensors, Device device)
    : tensors_(tensors), device_(device), host_(OptimTable::bytes(tensors) / 8) {}

void* TableMemory::write(const char* op) {
  if (!device_.is_cuda) return host_.data();
  if constexpr (kHasCuda) {
    memory_ = new_bytes(host_.size() * 8, device_);
    cuda::optim_write(data_of(*memory_), host_.data(), static_cast<std::int64_t>(host_.size() * 8),
                      op, current_stream(device_));
    return data_of(*memory_);
  }
  fail(op, ": this build has no CUDA kernels");
}

void run_step(OptimStep a, const OptimGroup& group, const TensorList& params,
              const TensorList& grads, const std::vector<StepList>& states, const TensorList& steps,
              const TensorList& products, const TensorList& extras, const TensorList& scales,
              std::int64_t rounding, const StepOptions& options) {
  const char* const op = a.op;
  const std::size_t count = params.size();
  FK_CHECK(rounding >= 0 && rounding < 5, op, ": rounding must be in [0, 5), got ", rounding);
  a.rounding = static_cast<OptimRounding>(rounding);
  check_length(grads, count, op, "grads", false);
  for (const StepList& list : states) {
    check_length(list.tensors, count, op, list.name, list.optional);
  }
  const bool timeless =
      (a.kind == OptimKind::sgd && group.beta1 == 0.0) || a.kind == OptimKind::lion;
  check_length(steps, count, op, "steps", timeless && a.rounding != OptimRounding::stochastic);
  check_length(products, count, op, "mu_products", a.kind != OptimKind::nadam);
  const bool has_extra = rounding >= 2;
  check_length(extras, has_extra ? count : 0, op, "extras", false);
  if (count == 0) return;
  std::size_t coded = 0;  // lists of scales
  for (const StepList& list : states) {
    if (optim_has_codes(a.kind) && !list.tensors.empty() &&
        type_of(list.tensors[0]) == torch_type(DType::u8)) {
      ++coded;
    }
  }
  FK_CHECK(scales.size() == coded * count, op, ": scales must have ", coded * count,
           " tensors, one for each state in torch.uint8, got ", scales.size());

  const Device device = device_of(params[0]);
  TableMemory memory(static_cast<std::int64_t>(count), device);
  const OptimTable table = memory.table();
  // The type of list `name`, that of all of its tensors.
  const auto typed = [&](const TensorList& list, const char* name, std::size_t i, DType& type,
                         bool first) {
    const std::string own = item(name, i);
    const bool coded =
        &type == &a.state && optim_has_codes(a.kind) && type_of(list[i]) == torch_type(DType::u8);
    TensorRef ref = coded ? view_of(list[i], op, own.c_str()) : ref_of(list[i], op, own.c_str());
    if (coded) ref.dtype = DType::u8;
    if (first) type = ref.dtype;
    FK_CHECK(ref.dtype == type, op, ": ", own, " must be ", dtype_text(type), " like ",
             item(name, 0), ", got ", dtype_text(ref.dtype));
    return ref;
  };
  bool first_state = true;
  WrittenMemory written;
  for (std::size_t i = 0; i < count; ++i) {
    OptimTensor& t = table.tensor()[i];
    t = {};
    const std::string of = item("params", i);
    const TensorRef param = typed(params, "params", i, a.param, i == 0);
    check_device(params[i], device, op, of.c_str(), "params[0]");
    FK_CHECK(is_dense(param), op, ": ", of,
             " must be dense (contiguous in some order of dimensions), got shape ", param.shape(),
             " with gaps");
    t.param = param.data, t.numel = param.numel(), t.index = static_cast<std::uint32_t>(i);
    written.add(param.data, t.numel * size_of(a.param), "params", i);
    const TensorRef grad = typed(grads, "grads", i, a.grad, i == 0);
    check_like(grads[i], grad, param, device, op, item("grads", i), of);
    table.grad()[i] = t.numel > 0 ? grad.data : &a;
    for (std::size_t k = 0; k < states.size(); ++k) {
      if (states[k].tensors.empty()) continue;
      const TensorRef state = typed(states[k].tensors, states[k].name, i, a.state, first_state);
      first_state = false;
      check_like(states[k].tensors[i], state, param, device, op, item(states[k].name, i), of);
      t.state[k] = state.data;
      if (state.dtype == DType::u8) {
        const std::size_t at = k * count + i;
        t.scale[k] = scales_of(scales[at], state, device, op, item("scales", at));
        written.add(t.scale[k], (t.numel + kOptimCodeBlock - 1) / kOptimCodeBlock * 4, "scales",
                    at);
      }
      written.add(state.data, t.numel * size_of(a.state), states[k].name, i);
    }
    if (!steps.empty()) t.step = one_float(steps[i], device, op, item("steps", i).c_str());
    if (!steps.empty()) written.add(t.step, 4, "steps", i);
    if (!products.empty()) {
      t.product = one_float(products[i], device, op, item("mu_products", i).c_str());
      written.add(t.product, 4, "mu_products", i);
    }
    if (has_extra) {
      const std::string own = item("extras", i);
      TensorRef extra = view_of(extras[i], op, own.c_str());
      const std::int32_t found = type_of(extras[i]);
      const std::int32_t wanted = a.rounding == OptimRounding::master      ? torch_type(DType::f32)
                                  : a.rounding == OptimRounding::remainder ? int16_type()
                                                                           : torch_type(a.param);
      FK_CHECK(found == wanted, op, ": ", own, " must be ", type_text(wanted), ", got ",
               type_text(found));
      check_like(extras[i], extra, param, device, op, own, of);
      t.extra = extra.data;
      written.add(extra.data, t.numel * (a.rounding == OptimRounding::master ? 4 : 2), "extras", i);
    }
  }
  FK_CHECK((a.rounding != OptimRounding::stochastic && a.rounding != OptimRounding::remainder) ||
               a.param == DType::bf16,
           op, ": rounding ", kRoundings[rounding], " must have parameters in torch.bfloat16, got ",
           dtype_text(a.param));
  written.check(op);
  table.number_chunks(op);
  a.tensors = static_cast<std::int64_t>(count);
  a.groups = 1;
  a.group[0] = group;
  a.group[0].lr_tensor = float_or_null(options.lr_tensor, device, op, "lr_tensor");
  a.grad_scale = float_or_null(options.grad_scale, device, op, "grad_scale");
  a.found_inf = float_or_null(options.found_inf, device, op, "found_inf");
  a.grad_factor = float_or_null(options.grad_factor, device, op, "grad_factor");
  const std::int64_t bytes = optim_workspace(a.kind, a.tensors, table.chunks());
  OptionalTensor workspace;
  if (bytes > 0) {
    workspace = new_bytes(static_cast<std::size_t>(bytes), device);
    a.workspace = static_cast<float*>(data_of(*workspace));
  }
  a.host = memory.host();
  a.table = memory.write(op);
  if (!device.is_cuda) {
    cpu::optim_step(a);
  } else if constexpr (kHasCuda) {
    cuda::optim_step(a, current_stream(device));
  }
}

}  // namespace fastkern::torch_layer
