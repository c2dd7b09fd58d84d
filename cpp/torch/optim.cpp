// SPDX-License-Identifier: Apache-2.0
// The steps of optimizers on lists of tensors.
#include "optim_call.h"

namespace fastkern::torch_layer {

/// The lists that every step has beside its states.
struct StepLists {
  TensorList params, grads, steps, extras, scales;
};

/// The arguments that every step ends with.
struct StepTail {
  bool maximize;
  std::int64_t rounding, seed;
  OptionalTensor lr_tensor, grad_scale, found_inf, grad_factor;
};

namespace boxing {

template <>
struct Parameter<StepLists> {
  static constexpr std::size_t kArguments = 5;
  static StepLists next(const StableIValue*& at) {
    at += kArguments;
    return {take<TensorList>(at[-5]), take<TensorList>(at[-4]), take<TensorList>(at[-3]),
            take<TensorList>(at[-2]), take<TensorList>(at[-1])};
  }
};

template <>
struct Parameter<StepTail> {
  static constexpr std::size_t kArguments = 7;
  static StepTail next(const StableIValue*& at) {
    at += kArguments;
    return {take<bool>(at[-7]),           take<std::int64_t>(at[-6]),
            take<std::int64_t>(at[-5]),   take<OptionalTensor>(at[-4]),
            take<OptionalTensor>(at[-3]), take<OptionalTensor>(at[-2]),
            take<OptionalTensor>(at[-1])};
  }
};

}  // namespace boxing

namespace {

std::tuple<> run(const char* op, OptimKind kind, OptimGroup group, const StepLists& lists,
                 const std::vector<StepList>& states, const StepTail& tail,
                 const TensorList& products = {}) {
  OptimStep step;
  step.op = op;
  step.kind = kind;
  step.seed = static_cast<std::uint64_t>(tail.seed);
  group.maximize = tail.maximize;
  run_step(step, group, lists.params, lists.grads, states, lists.steps, products, lists.extras,
           lists.scales, tail.rounding,
           {tail.lr_tensor, tail.grad_scale, tail.found_inf, tail.grad_factor});
  return {};
}

template <bool kDecoupled>
std::tuple<> adam_(const StepLists& lists, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, double lr,
                   double beta1, double beta2, double eps, double weight_decay,
                   const StepTail& tail) {
  return run(kDecoupled ? "fastkern::adamw_" : "fastkern::adam_",
             max_exp_avg_sqs.empty() ? OptimKind::adam : OptimKind::amsgrad,
             {.lr = lr,
              .beta1 = beta1,
              .beta2 = beta2,
              .eps = eps,
              .weight_decay = weight_decay,
              .decoupled = kDecoupled},
             lists,
             {{exp_avgs, "exp_avgs"},
              {exp_avg_sqs, "exp_avg_sqs"},
              {max_exp_avg_sqs, "max_exp_avg_sqs", true}},
             tail);
}

std::tuple<> sgd_(const StepLists& lists, const TensorList& buffers, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, const StepTail& tail) {
  const bool without = momentum == 0.0;
  FK_CHECK(without || lists.params.empty() || !buffers.empty(),
           "fastkern::sgd_: momentum_buffers must be given with a momentum, got none");
  return run("fastkern::sgd_", OptimKind::sgd,
             {.lr = lr,
              .beta1 = momentum,
              .beta2 = dampening,
              .weight_decay = weight_decay,
              .nesterov = nesterov},
             lists, {{buffers, "momentum_buffers", without}}, tail);
}

std::tuple<> lion_(const StepLists& lists, const TensorList& exp_avgs, double lr, double beta1,
                   double beta2, double weight_decay, const StepTail& tail) {
  return run("fastkern::lion_", OptimKind::lion,
             {.lr = lr, .beta1 = beta1, .beta2 = beta2, .weight_decay = weight_decay}, lists,
             {{exp_avgs, "exp_avgs"}}, tail);
}

std::tuple<> adagrad_(const StepLists& lists, const TensorList& sums, double lr, double lr_decay,
                      double eps, double weight_decay, const StepTail& tail) {
  return run("fastkern::adagrad_", OptimKind::adagrad,
             {.lr = lr, .beta1 = lr_decay, .eps = eps, .weight_decay = weight_decay}, lists,
             {{sums, "state_sums"}}, tail);
}

std::tuple<> rmsprop_(const StepLists& lists, const TensorList& square_avgs,
                      const TensorList& grad_avgs, const TensorList& buffers, double lr,
                      double alpha, double eps, double momentum, double weight_decay,
                      const StepTail& tail) {
  FK_CHECK(momentum == 0.0 || lists.params.empty() || !buffers.empty(),
           "fastkern::rmsprop_: momentum_buffers must be given with a momentum, got none");
  return run(
      "fastkern::rmsprop_", OptimKind::rmsprop,
      {.lr = lr, .beta1 = momentum, .beta2 = alpha, .eps = eps, .weight_decay = weight_decay},
      lists,
      {{square_avgs, "square_avgs"},
       {grad_avgs, "grad_avgs", true},
       {buffers, "momentum_buffers", true}},
      tail);
}

std::tuple<> nadam_(const StepLists& lists, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& products, double lr,
                    double beta1, double beta2, double eps, double decay_base, double weight_decay,
                    bool decoupled, const StepTail& tail) {
  return run("fastkern::nadam_", OptimKind::nadam,
             {.lr = lr,
              .beta1 = beta1,
              .beta2 = beta2,
              .eps = eps,
              .weight_decay = weight_decay,
              .decay_base = decay_base,
              .decoupled = decoupled},
             lists, {{exp_avgs, "exp_avgs"}, {exp_avg_sqs, "exp_avg_sqs"}}, tail, products);
}

std::tuple<> radam_(const StepLists& lists, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, double lr, double beta1, double beta2,
                    double eps, double weight_decay, bool decoupled, const StepTail& tail) {
  return run("fastkern::radam_", OptimKind::radam,
             {.lr = lr,
              .beta1 = beta1,
              .beta2 = beta2,
              .eps = eps,
              .weight_decay = weight_decay,
              .decoupled = decoupled},
             lists, {{exp_avgs, "exp_avgs"}, {exp_avg_sqs, "exp_avg_sqs"}}, tail);
}

std::tuple<> lamb_(const StepLists& lists, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                   double weight_decay, const StepTail& tail) {
  return run("fastkern::lamb_", OptimKind::lamb,
             {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay},
             lists, {{exp_avgs, "exp_avgs"}, {exp_avg_sqs, "exp_avg_sqs"}}, tail);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const char* name, const std::string& states, const std::string& numbers) {
    m.def((std::string(name) +
           "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!)[] extras, "
           "Tensor(g!)[] scales, " +
           states + "float lr, " + numbers +
           "bool maximize, int rounding, int seed, Tensor? lr_tensor, Tensor? grad_scale, Tensor? "
           "found_inf, Tensor? grad_factor) -> ()")
              .c_str());
  };
  const std::string averages = "Tensor(d!)[] exp_avgs, Tensor(e!)[] exp_avg_sqs, ";
  const std::string betas = "float beta1, float beta2, ", decay = "float weight_decay, ";
  define("adamw_", averages + "Tensor(f!)[] max_exp_avg_sqs, ", betas + "float eps, " + decay);
  define("adam_", averages + "Tensor(f!)[] max_exp_avg_sqs, ", betas + "float eps, " + decay);
  define("sgd_", "Tensor(d!)[] momentum_buffers, ",
         "float momentum, float dampening, " + decay + "bool nesterov, ");
  define("lion_", "Tensor(d!)[] exp_avgs, ", betas + decay);
  define("adagrad_", "Tensor(d!)[] state_sums, ", "float lr_decay, float eps, " + decay);
  define("rmsprop_",
         "Tensor(d!)[] square_avgs, Tensor(e!)[] grad_avgs, Tensor(f!)[] momentum_buffers, ",
         "float alpha, float eps, float momentum, " + decay);
  define("nadam_", averages + "Tensor(f!)[] mu_products, ",
         betas + "float eps, float decay_base, " + decay + "bool decoupled, ");
  define("radam_", averages, betas + "float eps, " + decay + "bool decoupled, ");
  define("lamb_", averages, betas + "float eps, " + decay);
}

FASTKERN_REGISTER(m) {
  m.impl("adamw_", box<&adam_<true>>);
  m.impl("adam_", box<&adam_<false>>);
  m.impl("sgd_", box<&sgd_>);
  m.impl("lion_", box<&lion_>);
  m.impl("adagrad_", box<&adagrad_>);
  m.impl("rmsprop_", box<&rmsprop_>);
  m.impl("nadam_", box<&nadam_>);
  m.impl("radam_", box<&radam_>);
  m.impl("lamb_", box<&lamb_>);
}

}  // namespace fastkern::torch_layer
