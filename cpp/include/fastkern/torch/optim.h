// SPDX-License-Identifier: Apache-2.0
// Steps of optimizers on lists of at::Tensor; to be included through fastkern/torch.h, which says
// how it is linked.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "fastkern/optim.h"
#include "fastkern/torch/common.h"

namespace fastkern {

/// What every step takes beside its lists and numbers; as in Python's fastkern.ops.optim.
struct OptimOptions {
  bool maximize = false;
  OptimRounding rounding = OptimRounding::nearest;  // of parameters of 16 bits
  std::vector<at::Tensor> extras = {};              // what the rounding keeps, one a parameter
  std::vector<at::Tensor> scales = {};  // of uint8 states: the first one's, the second's
  std::int64_t seed = 0;                // of stochastic rounding
  // Float32, one element each, on the parameters' device: nothing is read on the host.
  MaybeTensor lr_tensor = std::nullopt;    // in place of lr
  MaybeTensor grad_scale = std::nullopt;   // gradients are divided by it
  MaybeTensor found_inf = std::nullopt;    // if it is not 0, nothing changes
  MaybeTensor grad_factor = std::nullopt;  // gradients are multiplied with it
};

namespace detail {

/// `Middle`: the lists of states, lr, the other numbers.
template <class... Middle>
auto optim_operator(const char* name) {
  using List = at::TensorList;
  using M = const MaybeTensor&;
  return find_operator<void(List, List, List, List, List, Middle..., bool, std::int64_t,
                            std::int64_t, M, M, M, M)>(name);
}

template <class Operator, class... Middle>
void optim_step(const Operator& op, at::TensorList params, at::TensorList grads,
                at::TensorList steps, const OptimOptions& o, Middle... middle) {
  if (params.empty()) return;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.call(params, grads, steps, o.extras, o.scales, middle..., o.maximize,
            static_cast<std::int64_t>(o.rounding), o.seed, given(o.lr_tensor), given(o.grad_scale),
            given(o.found_inf), given(o.grad_factor));
  }
  for (const at::Tensor& p : params) {
    if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace detail

// What they have in common: params, grads and each list of states have one tensor a parameter, of
// its shape, strides and device; float32, float16 or bfloat16, one type a list. steps: float32 of
// one element, the steps done so far, to which one is added. All change their arguments in place,
// have no gradient and give the same bits every time. Bad arguments throw a std::runtime_error that
// names the operator and the argument.

/// AdamW; amsgrad with max_exp_avg_sqs.
inline void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList steps, double lr = 1e-3,
                   double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-8,
                   double weight_decay = 1e-2, const OptimOptions& options = {},
                   at::TensorList max_exp_avg_sqs = {}) {
  using List = at::TensorList;
  static const auto op =
      detail::optim_operator<List, List, List, double, double, double, double, double>(
          "fastkern::adamw_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lr,
                     beta1, beta2, eps, weight_decay);
}

/// Adam, weight decay in the gradient; amsgrad with max_exp_avg_sqs.
inline void adam_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                  at::TensorList exp_avg_sqs, at::TensorList steps, double lr = 1e-3,
                  double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-8,
                  double weight_decay = 0.0, const OptimOptions& options = {},
                  at::TensorList max_exp_avg_sqs = {}) {
  using List = at::TensorList;
  static const auto op =
      detail::optim_operator<List, List, List, double, double, double, double, double>(
          "fastkern::adam_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lr,
                     beta1, beta2, eps, weight_decay);
}

/// SGD; buffers and steps are wanted with a momentum.
inline void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers = {},
                 at::TensorList steps = {}, double lr = 1e-3, double momentum = 0.0,
                 double dampening = 0.0, double weight_decay = 0.0, bool nesterov = false,
                 const OptimOptions& options = {}) {
  static const auto op =
      detail::optim_operator<at::TensorList, double, double, double, double, bool>(
          "fastkern::sgd_");
  detail::optim_step(op, params, grads, steps, options, momentum_buffers, lr, momentum, dampening,
                     weight_decay, nesterov);
}

/// Lion; steps are wanted for stochastic rounding.
inline void lion_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                  at::TensorList steps = {}, double lr = 1e-4, double beta1 = 0.9,
                  double beta2 = 0.99, double weight_decay = 0.0,
                  const OptimOptions& options = {}) {
  static const auto op =
      detail::optim_operator<at::TensorList, double, double, double, double>("fastkern::lion_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, lr, beta1, beta2, weight_decay);
}

/// Adagrad.
inline void adagrad_(at::TensorList params, at::TensorList grads, at::TensorList state_sums,
                     at::TensorList steps, double lr = 1e-2, double lr_decay = 0.0,
                     double eps = 1e-10, double weight_decay = 0.0,
                     const OptimOptions& options = {}) {
  static const auto op =
      detail::optim_operator<at::TensorList, double, double, double, double>("fastkern::adagrad_");
  detail::optim_step(op, params, grads, steps, options, state_sums, lr, lr_decay, eps,
                     weight_decay);
}

/// RMSprop; centered with grad_avgs; buffers are wanted with a momentum.
inline void rmsprop_(at::TensorList params, at::TensorList grads, at::TensorList square_avgs,
                     at::TensorList steps, at::TensorList grad_avgs = {},
                     at::TensorList momentum_buffers = {}, double lr = 1e-2, double alpha = 0.99,
                     double eps = 1e-8, double momentum = 0.0, double weight_decay = 0.0,
                     const OptimOptions& options = {}) {
  using List = at::TensorList;
  static const auto op =
      detail::optim_operator<List, List, List, double, double, double, double, double>(
          "fastkern::rmsprop_");
  detail::optim_step(op, params, grads, steps, options, square_avgs, grad_avgs, momentum_buffers,
                     lr, alpha, eps, momentum, weight_decay);
}

/// NAdam; mu_products, like steps, have one element, and begin with 1.
inline void nadam_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList mu_products,
                   double lr = 2e-3, double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-8,
                   double momentum_decay = 4e-3, double weight_decay = 0.0, bool decoupled = false,
                   const OptimOptions& options = {}) {
  using List = at::TensorList;
  static const auto op = detail::optim_operator<List, List, List, double, double, double, double,
                                                double, double, bool>("fastkern::nadam_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, exp_avg_sqs, mu_products, lr,
                     beta1, beta2, eps, std::pow(0.96, momentum_decay), weight_decay, decoupled);
}

/// RAdam.
inline void radam_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList steps, double lr = 1e-3,
                   double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-8,
                   double weight_decay = 0.0, bool decoupled = false,
                   const OptimOptions& options = {}) {
  using List = at::TensorList;
  static const auto op =
      detail::optim_operator<List, List, double, double, double, double, double, bool>(
          "fastkern::radam_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, exp_avg_sqs, lr, beta1, beta2,
                     eps, weight_decay, decoupled);
}

/// LAMB, with a trust ratio for each parameter.
inline void lamb_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                  at::TensorList exp_avg_sqs, at::TensorList steps, double lr = 1e-3,
                  double beta1 = 0.9, double beta2 = 0.999, double eps = 1e-6,
                  double weight_decay = 1e-2, const OptimOptions& options = {}) {
  using List = at::TensorList;
  static const auto op =
      detail::optim_operator<List, List, double, double, double, double, double>("fastkern::lamb_");
  detail::optim_step(op, params, grads, steps, options, exp_avgs, exp_avg_sqs, lr, beta1, beta2,
                     eps, weight_decay);
}

}  // namespace fastkern
