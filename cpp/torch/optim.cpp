// SPDX-License-Identifier: Apache-2.0
// The steps of optimizers on lists of tensors.
#include "optim_call.h"

namespace fastkern::torch_layer {
namespace {

OptimStep step_of(const char* op, OptimKind kind, std::int64_t seed) {
  OptimStep step;
  step.op = op;
  step.kind = kind;
  step.seed = static_cast<std::uint64_t>(seed);
  return step;
}

template <bool kDecoupled>
std::tuple<> adam_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                   const TensorList& steps, const TensorList& extras, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize,
                   std::int64_t rounding, std::int64_t seed, const OptionalTensor& lr_tensor,
                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   const OptionalTensor& grad_factor) {
  const OptimKind kind = max_exp_avg_sqs.empty() ? OptimKind::adam : OptimKind::amsgrad;
  run_step(step_of(kDecoupled ? "fastkern::adamw_" : "fastkern::adam_", kind, seed),
           {.lr = lr,
            .beta1 = beta1,
            .beta2 = beta2,
            .eps = eps,
            .weight_decay = weight_decay,
            .decoupled = kDecoupled,
            .maximize = maximize},
           params, grads,
           {{exp_avgs, "exp_avgs"},
            {exp_avg_sqs, "exp_avg_sqs"},
            {max_exp_avg_sqs, "max_exp_avg_sqs", true}},
           steps, {}, extras, rounding, {lr_tensor, grad_scale, found_inf, grad_factor});
  return {};
}

std::tuple<> sgd_(const TensorList& params, const TensorList& grads, const TensorList& buffers,
                  const TensorList& steps, const TensorList& extras, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, bool maximize,
                  std::int64_t rounding, std::int64_t seed, const OptionalTensor& lr_tensor,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  const OptionalTensor& grad_factor) {
  FK_CHECK(momentum == 0.0 || params.empty() || !buffers.empty(),
           "fastkern::sgd_: momentum_buffers must be given with momentum, got none");
  run_step(step_of("fastkern::sgd_", OptimKind::sgd, seed),
           {.lr = lr,
            .beta1 = momentum,
            .beta2 = dampening,
            .weight_decay = weight_decay,
            .nesterov = nesterov,
            .maximize = maximize},
           params, grads, {{buffers, "momentum_buffers", true}}, steps, {}, extras, rounding,
           {lr_tensor, grad_scale, found_inf, grad_factor});
  return {};
}

std::tuple<> lion_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& steps, const TensorList& extras, double lr, double beta1,
                   double beta2, double weight_decay, bool maximize, std::int64_t rounding,
                   std::int64_t seed, const OptionalTensor& lr_tensor,
                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   const OptionalTensor& grad_factor) {
  run_step(step_of("fastkern::lion_", OptimKind::lion, seed),
           {.lr = lr,
            .beta1 = beta1,
            .beta2 = beta2,
            .weight_decay = weight_decay,
            .decoupled = true,
            .maximize = maximize},
           params, grads, {{exp_avgs, "exp_avgs"}}, steps, {}, extras, rounding,
           {lr_tensor, grad_scale, found_inf, grad_factor});
  return {};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string head = "(Tensor(a!)[] params, Tensor[] grads, ";
  const std::string tail =
      "bool maximize, int rounding, int seed, Tensor? lr_tensor, Tensor? grad_scale, Tensor? "
      "found_inf, Tensor? grad_factor) -> ()";
  const auto define = [&](const char* name, const char* states, const char* numbers) {
    m.def((name + head + states + "Tensor(e!)[] steps, Tensor(f!)[] extras, " + numbers + tail)
              .c_str());
  };
  for (const char* name : {"adamw_", "adam_"}) {
    define(name,
           "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, ",
           "float lr, float beta1, float beta2, float eps, float weight_decay, ");
  }
  define("sgd_", "Tensor(b!)[] momentum_buffers, ",
         "float lr, float momentum, float dampening, float weight_decay, bool nesterov, ");
  define("lion_", "Tensor(b!)[] exp_avgs, ",
         "float lr, float beta1, float beta2, float weight_decay, ");
}

FASTKERN_REGISTER(m) {
  m.impl("adamw_", box<&adam_<true>>);
  m.impl("adam_", box<&adam_<false>>);
  m.impl("sgd_", box<&sgd_>);
  m.impl("lion_", box<&lion_>);
}

}  // namespace fastkern::torch_layer
