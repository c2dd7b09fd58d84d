// SPDX-License-Identifier: Apache-2.0
// fastkern in a C++ program: the operator through torch's dispatcher, the typed function with
// gradients, and a small network trained with it. Runs on the GPU if there is one, prints what it
// compares, exits with 1 on a mismatch.
//
// Build and run, with torch and fastkern installed for `python`:
//   cmake -S examples/cpp -B build/example -DCMAKE_BUILD_TYPE=Release
//       -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//       -Dfastkern_DIR="$(python -c 'import fastkern; print(fastkern.get_cmake_dir())')"
//   cmake --build build/example && build/example/fastkern_example
// find_package(Torch) of a CUDA build of torch asks for a whole CUDA toolkit. Without one, name the
// libraries to g++: tests/test_cpp_example.py has the command line.
#include <ATen/core/dispatch/Dispatcher.h>
#include <fastkern/torch.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace {

constexpr double kEps = 1e-6;
bool all_good = true;

torch::Tensor plain_layer_norm(const torch::Tensor& x, const torch::Tensor& weight,
                               const torch::Tensor& bias) {
  const torch::Tensor centred = x.to(torch::kFloat) - x.to(torch::kFloat).mean(-1, true);
  const torch::Tensor rstd = (centred.square().mean(-1, true) + kEps).rsqrt();
  return (centred * rstd * weight.to(torch::kFloat) + bias.to(torch::kFloat)).to(x.scalar_type());
}

torch::Tensor plain_rms_norm(const torch::Tensor& x, const torch::Tensor& weight) {
  const torch::Tensor x32 = x.to(torch::kFloat);
  const torch::Tensor rstd = (x32.square().mean(-1, true) + kEps).rsqrt();
  return (x32 * rstd * weight.to(torch::kFloat)).to(x.scalar_type());
}

void report(const std::string& what, bool good, const std::string& detail = "") {
  std::printf("%-6s %s%s\n", good ? "ok" : "WRONG", what.c_str(), detail.c_str());
  all_good = all_good && good;
}

void compare(const std::string& what, const torch::Tensor& found, const torch::Tensor& expected,
             double tolerance) {
  const torch::Tensor difference = (found.to(torch::kDouble) - expected.to(torch::kDouble)).abs();
  const double largest = difference.max().item<double>(),
               scale = expected.abs().max().item<double>();
  report(what, largest <= tolerance * scale, ": largest difference " + std::to_string(largest));
}

/// The operator by its name: what code without our header can do. No gradient comes of it in a C++
/// program.
torch::Tensor rms_norm_by_dispatcher(const torch::Tensor& x, const torch::Tensor& weight) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("fastkern::rms_norm", "")
                      .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, double,
                                        const std::optional<at::Tensor>&, double,
                                        std::optional<at::ScalarType>)>();
  return op.call(x, weight, kEps, std::nullopt, 0.0, std::nullopt);
}

void check_values(torch::Device device, torch::Dtype dtype, double tolerance) {
  const std::string name = std::string(" (") + torch::toString(dtype) + ")";
  const auto options = torch::TensorOptions().device(device).dtype(dtype);
  const torch::Tensor x = torch::randn({3, 5, 640}, options), weight = torch::randn({640}, options);
  const torch::Tensor expected = plain_rms_norm(x, weight);
  compare("dispatcher, forward" + name, rms_norm_by_dispatcher(x, weight), expected, tolerance);
  compare("fastkern::rms_norm, forward" + name, fastkern::rms_norm(x, weight, kEps), expected,
          tolerance);
  compare("a slice of the columns" + name,
          fastkern::rms_norm(x.slice(-1, 3, 200), weight.slice(0, 3, 200), kEps),
          plain_rms_norm(x.slice(-1, 3, 200), weight.slice(0, 3, 200)), tolerance);
  compare("no weight" + name, fastkern::rms_norm(x), plain_rms_norm(x, torch::ones_like(weight)),
          tolerance);
}

void check_gradients(torch::Device device, torch::Dtype dtype, double tolerance) {
  const std::string name = std::string(" (") + torch::toString(dtype) + ")";
  const auto options = torch::TensorOptions().device(device).dtype(dtype);
  const torch::Tensor x = torch::randn({7, 320}, options).requires_grad_();
  const torch::Tensor weight = torch::randn({320}, options).requires_grad_(),
                      dy = torch::randn({7, 320}, options);
  const auto expected = torch::autograd::grad({plain_rms_norm(x, weight)}, {x, weight}, {dy});
  const auto found =
      torch::autograd::grad({fastkern::rms_norm(x, weight, kEps)}, {x, weight}, {dy});
  compare("gradient of x" + name, found[0], expected[0], tolerance);
  compare("gradient of weight" + name, found[1], expected[1], tolerance);
  const auto only_x =
      torch::autograd::grad({fastkern::rms_norm(x, weight.detach(), kEps)}, {x}, {dy});
  const auto only_weight =
      torch::autograd::grad({fastkern::rms_norm(x.detach(), weight, kEps)}, {weight}, {dy});
  report("each gradient alone" + name, only_x[0].equal(found[0]) && only_weight[0].equal(found[1]));
}

/// The softmax family against torch's own.
void check_softmax(torch::Device device, torch::Dtype dtype, double tolerance) {
  const std::string name = std::string(" (") + torch::toString(dtype) + ")";
  const auto options = torch::TensorOptions().device(device).dtype(dtype);
  const torch::Tensor x = torch::randn({2, 5, 320}, options).requires_grad_();
  const torch::Tensor dy = torch::randn({2, 5, 320}, options);
  const auto both = [&](const std::string& what, const torch::Tensor& found,
                        const torch::Tensor& expected) {
    const torch::Tensor of = dy.slice(-1, 0, found.size(-1)).expand_as(found);
    compare(what + name, found.detach(), expected.detach(), tolerance);
    compare(what + ", gradient" + name, torch::autograd::grad({found}, {x}, {of})[0],
            torch::autograd::grad({expected}, {x}, {of})[0], tolerance);
  };
  both("softmax", fastkern::softmax(x), torch::softmax(x, -1));
  both("log_softmax", fastkern::log_softmax(x, 1), torch::log_softmax(x, 1));
  both("logsumexp", fastkern::logsumexp(x, -1, true).expand_as(x),
       torch::logsumexp(x, -1, true).expand_as(x));
  const torch::Tensor keep = torch::ones({5, 320}, options).tril(315).to(torch::kBool);
  const auto masked = [&] { return torch::softmax((x * 0.5).masked_fill(~keep, -INFINITY), -1); };
  both("masked_softmax", fastkern::masked_softmax(x, keep, 0.5), masked());
  both("causal_softmax", fastkern::causal_softmax(x, 0.5), masked());
}

/// Rotary embeddings, alone and behind a norm of each head, against the formula.
void check_rope(torch::Device device) {
  const auto leaf = [&](at::IntArrayRef shape) {
    return torch::randn(shape, torch::TensorOptions().device(device)).requires_grad_();
  };
  const torch::Tensor q = leaf({2, 7, 6, 64}), k = leaf({2, 7, 2, 64}), weight = leaf({64});
  const torch::Tensor pairs = torch::arange(32, torch::TensorOptions().device(device));
  const torch::Tensor angles = torch::arange(7, pairs.options()).unsqueeze(1) *
                               torch::pow(1e4, pairs.to(torch::kFloat) / -32.0);
  const torch::Tensor cos = angles.cos(), sin = angles.sin();
  const auto turned = [&](const torch::Tensor& x) {
    const torch::Tensor a = x.slice(-1, 0, 32), b = x.slice(-1, 32);
    const torch::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1);
    return torch::cat({a * c - b * s, b * c + a * s}, -1);
  };
  const auto both = [&](const std::string& what, const torch::Tensor& found,
                        const torch::Tensor& expected, const std::vector<torch::Tensor>& wrt) {
    compare(what, found.detach(), expected.detach(), 1e-5);
    const torch::Tensor dy = torch::randn_like(found);
    const auto grads = torch::autograd::grad({found}, wrt, {dy});
    const auto truth = torch::autograd::grad({expected}, wrt, {dy});
    for (std::size_t i = 0; i < wrt.size(); ++i)
      compare(what + ", gradient " + std::to_string(i), grads[i], truth[i], 5e-5);
  };
  both("rope of q", std::get<0>(fastkern::rope(q, k, cos, sin)), turned(q), {q});
  both("rope of k", std::get<1>(fastkern::rope(q, k, cos, sin)), turned(k), {k});
  const auto [normed, none] =
      fastkern::qk_norm_rope(q, std::nullopt, weight, std::nullopt, cos, sin, kEps);
  both("qk_norm_rope", normed, turned(plain_rms_norm(q, weight)), {q, weight});
  report("no k", !none.defined());
}

/// Gated activations, bias_act and bias_dropout_add against torch's own operators.
void check_activations(torch::Device device, torch::Dtype dtype, double tolerance) {
  namespace F = torch::nn::functional;
  const std::string name = std::string(" (") + torch::toString(dtype) + ")";
  const auto options = torch::TensorOptions().device(device).dtype(dtype);
  const auto leaf = [&](at::IntArrayRef shape) {
    return torch::randn(shape, options).requires_grad_();
  };
  const torch::Tensor a = leaf({6, 320}), b = leaf({6, 320}), bias = leaf({320});
  const torch::Tensor dy = torch::randn({6, 320}, options);
  const auto both = [&](const std::string& what, const torch::Tensor& found,
                        const torch::Tensor& expected, const std::vector<torch::Tensor>& inputs) {
    compare(what + name, found.detach(), expected.detach(), tolerance);
    const auto ours = torch::autograd::grad({found}, inputs, {dy});
    const auto theirs = torch::autograd::grad({expected}, inputs, {dy});
    for (std::size_t i = 0; i < inputs.size(); ++i)
      compare(what + ", gradient " + std::to_string(i) + name, ours[i], theirs[i], tolerance);
  };
  both("swiglu", fastkern::swiglu(a, b), F::silu(a) * b, {a, b});
  both("swiglu, packed", fastkern::swiglu(torch::cat({a, b}, -1)), F::silu(a) * b, {a, b});
  both("geglu", fastkern::geglu(a, b), F::gelu(a) * b, {a, b});
  both("reglu", fastkern::reglu(a, b), torch::relu(a) * b, {a, b});
  both("glu", fastkern::glu(a, b), a * torch::sigmoid(b), {a, b});
  const torch::Tensor g = a.clamp_max(7.0), u = b.clamp(-7.0, 7.0) + 1.0;
  both("clamped_swiglu", fastkern::clamped_swiglu(a, b), g * torch::sigmoid(1.702 * g) * u, {a, b});
  both("bias_act", fastkern::bias_act(a, bias), F::gelu(a + bias), {a, bias});
  both("bias_dropout_add", fastkern::bias_dropout_add(a, bias, b), b + (a + bias), {a, bias, b});
  const torch::Tensor ones = torch::ones_like(a).detach().requires_grad_();
  const torch::Tensor kept = fastkern::dropout(ones, 0.5);
  const auto drawn_again = torch::autograd::grad({kept}, {ones}, {torch::ones_like(dy)})[0];
  report("dropout draws the same mask in backward" + name, drawn_again.equal(kept.detach()));
}

/// Layer norm, and both norms behind a residual add with dropout: all gradients against torch's
/// own.
void check_other_gradients(torch::Device device, torch::Dtype dtype, double tolerance) {
  const std::string name = std::string(" (") + torch::toString(dtype) + ")";
  const auto options = torch::TensorOptions().device(device).dtype(dtype);
  const auto leaf = [&](at::IntArrayRef shape) {
    return torch::randn(shape, options).requires_grad_();
  };
  const torch::Tensor x = leaf({7, 320}), residual = leaf({7, 320}), weight = leaf({320}),
                      bias = leaf({320});
  const torch::Tensor dy = torch::randn({7, 320}, options), dh = torch::randn({7, 320}, options);
  const auto gradients = [](const std::string& what, const std::vector<torch::Tensor>& found,
                            const std::vector<torch::Tensor>& expected, double within) {
    for (std::size_t i = 0; i < found.size(); ++i) {
      compare(what + ", gradient " + std::to_string(i), found[i], expected[i], within);
    }
  };
  gradients(
      "layer_norm" + name,
      torch::autograd::grad({fastkern::layer_norm(x, weight, bias, kEps)}, {x, weight, bias}, {dy}),
      torch::autograd::grad({plain_layer_norm(x, weight, bias)}, {x, weight, bias}, {dy}),
      tolerance);

  // What was dropped shows in h where there is no residual.
  fastkern::Branch branch;
  branch.dropout_p = 0.25;
  branch.seed = torch::full({1}, 123, options.dtype(torch::kLong));
  const torch::Tensor ones = torch::ones({7, 320}, options);
  const torch::Tensor mask =
      std::get<1>(fastkern::add_rms_norm(ones, std::nullopt, {}, kEps, {}, 0.0, branch)).detach();
  const torch::Tensor expected_h = residual + x * mask;
  const auto [y, h] = fastkern::add_rms_norm(x, residual, weight, kEps, {}, 0.0, branch);
  compare("add_rms_norm, h" + name, h, expected_h, tolerance);
  gradients("add_rms_norm" + name,
            torch::autograd::grad({y, h}, {x, residual, weight}, {dy, dh}, true),
            torch::autograd::grad({plain_rms_norm(expected_h, weight), expected_h},
                                  {x, residual, weight}, {dy, dh}, true),
            tolerance);
  const auto [y2, h2] = fastkern::add_layer_norm(x, residual, weight, bias, kEps, 0.0, branch);
  gradients("add_layer_norm" + name,
            torch::autograd::grad({y2, h2}, {x, residual, weight, bias}, {dy, dh}, true),
            torch::autograd::grad({plain_layer_norm(expected_h, weight, bias), expected_h},
                                  {x, residual, weight, bias}, {dy, dh}, true),
            tolerance);
  const auto h_alone = torch::autograd::grad({h2}, {x, residual}, {dh}, true);
  report("gradients through h alone" + name,
         h_alone[1].equal(dh) && (h_alone[0] - dh * mask).abs().max().item<double>() <= tolerance);
}

/// q * scale is the norm within half a step.
void check_quantised(torch::Device device) {
  const torch::Tensor x = torch::randn({5, 640}, device), weight = torch::rand({640}, device);
  const torch::Tensor expected = plain_rms_norm(x, weight);
  const auto [q, scale] = fastkern::rms_norm_dynamic_quant(x, weight, kEps, {}, 0.0, torch::kChar);
  const torch::Tensor steps = ((q.to(torch::kFloat) * scale - expected) / scale).abs();
  report("rms_norm_dynamic_quant to int8", steps.max().item<double>() <= 0.501);
  const auto [q8, scale8, h] = fastkern::add_rms_norm_dynamic_quant(x, x, weight, kEps);
  compare("add_rms_norm_dynamic_quant to float8", q8.to(torch::kFloat) * scale8,
          plain_rms_norm(2 * x, weight), 1.0 / 16);
  report("its residual stream", h.equal(2 * x));
}

/// What is not supported says so.
void check_second_derivative(torch::Device device) {
  const torch::Tensor x = torch::randn({4, 32}, device).requires_grad_();
  const torch::Tensor dx =
      torch::autograd::grad({fastkern::rms_norm(x).square().sum()}, {x}, {}, true, true)[0];
  std::string message;
  try {
    dx.square().sum().backward();
  } catch (const std::exception& error) {
    message = error.what();
  }
  const std::string expected =
      "fastkern::rms_norm: the C++ function can be differentiated once only";
  report("a second derivative is refused", message.find(expected) != std::string::npos);
}

/// AdamW against torch's, every other optimizer a step down a parabola.
void check_optimizers(torch::Device device) {
  const auto make = [&] {
    torch::manual_seed(3);
    return std::vector<torch::Tensor>{torch::randn({40, 30}, device), torch::randn({7}, device)};
  };
  const auto zeros = [](const std::vector<torch::Tensor>& like) {
    std::vector<torch::Tensor> made;
    for (const torch::Tensor& t : like) made.push_back(torch::zeros_like(t));
    return made;
  };
  const auto scalars = [&](double value) { return torch::full({2}, value, device).unbind(); };
  std::vector<torch::Tensor> p = make(), q = make();
  for (torch::Tensor& t : q) t.requires_grad_();
  torch::optim::AdamW theirs(q, torch::optim::AdamWOptions(1e-2));
  std::vector<torch::Tensor> m = zeros(p), v = zeros(p), t = scalars(0.0);
  for (int step = 0; step < 5; ++step) {
    fastkern::adamw_(p, make(), m, v, t, 1e-2);
    for (std::size_t i = 0; i < q.size(); ++i) q[i].mutable_grad() = make()[i];
    theirs.step();
  }
  for (std::size_t i = 0; i < q.size(); ++i) compare("adamw_", p[i], q[i].detach(), 1e-5);
  report("adamw_ counts its steps", t[1].item<double>() == 5.0);

  const auto falls = [&](const char* what, const auto& step) {
    const std::vector<torch::Tensor> x = make();
    step(x, make(), zeros(x), zeros(x), scalars(0.0));
    report(what, x[0].norm().item<double>() < make()[0].norm().item<double>());
  };
  using Lists = const std::vector<torch::Tensor>&;
  falls("adam_",
        [](Lists x, Lists g, Lists a, Lists b, Lists n) { fastkern::adam_(x, g, a, b, n); });
  falls("sgd_", [](Lists x, Lists g, Lists a, Lists, Lists n) {
    fastkern::sgd_(x, g, a, n, 1e-3, 0.9, 0.0, 0.0, true);
  });
  falls("lion_", [](Lists x, Lists g, Lists a, Lists, Lists) { fastkern::lion_(x, g, a); });
  falls("adagrad_",
        [](Lists x, Lists g, Lists a, Lists, Lists n) { fastkern::adagrad_(x, g, a, n); });
  falls("rmsprop_", [](Lists x, Lists g, Lists a, Lists b, Lists n) {
    fastkern::rmsprop_(x, g, a, n, b, {}, 1e-3);
  });
  falls("nadam_", [&](Lists x, Lists g, Lists a, Lists b, Lists n) {
    fastkern::nadam_(x, g, a, b, n, scalars(1.0));
  });
  falls("radam_",
        [](Lists x, Lists g, Lists a, Lists b, Lists n) { fastkern::radam_(x, g, a, b, n); });
  falls("lamb_",
        [](Lists x, Lists g, Lists a, Lists b, Lists n) { fastkern::lamb_(x, g, a, b, n); });
}

struct Network : torch::nn::Module {
  Network(int inputs, int hidden) {
    in = register_module("in", torch::nn::Linear(inputs, hidden));
    middle = register_module("middle", torch::nn::Linear(hidden, hidden));
    out = register_module("out", torch::nn::Linear(hidden, 1));
    norm_in = register_parameter("norm_in", torch::ones(hidden));
    norm_middle = register_parameter("norm_middle", torch::ones(hidden));
  }
  torch::Tensor forward(torch::Tensor x) {
    x = torch::gelu(fastkern::rms_norm(in(x), norm_in));
    x = x + torch::gelu(fastkern::rms_norm(middle(x), norm_middle));
    return out(x);
  }
  torch::nn::Linear in = nullptr, middle = nullptr, out = nullptr;
  torch::Tensor norm_in, norm_middle;
};

void check_training(torch::Device device) {
  constexpr int kInputs = 8, kSteps = 60;
  Network network(kInputs, 64);
  network.to(device);
  const torch::Tensor x = torch::randn({256, kInputs}, device);
  const torch::Tensor target = (x.slice(1, 0, 4) * x.slice(1, 4, 8)).sum(1, true).sin();
  torch::optim::AdamW optimizer(network.parameters(), torch::optim::AdamWOptions(1e-2));
  double first = 0.0, last = 0.0;
  for (int step = 0; step < kSteps; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::mse_loss(network.forward(x), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
    if (step % 10 == 0 || step == kSteps - 1) std::printf("step %2d  loss %.4f\n", step, last);
  }
  report("the loss falls to a quarter", last < first / 4);
}

}  // namespace

int main() {
  torch::manual_seed(0);
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);
  std::printf("fastkern operators with torch %s on %s\n", TORCH_VERSION, device.str().c_str());
  check_values(device, torch::kFloat, 1e-5);
  check_values(device, torch::kHalf, 2e-3);
  check_values(device, torch::kBFloat16, 1.6e-2);
  check_gradients(device, torch::kFloat, 1e-5);
  check_gradients(device, torch::kBFloat16, 1.6e-2);
  check_softmax(device, torch::kFloat, 2e-5);
  check_softmax(device, torch::kBFloat16, 3.2e-2);
  check_rope(device);
  check_activations(device, torch::kFloat, 2e-5);
  check_activations(device, torch::kBFloat16, 3.2e-2);
  check_other_gradients(device, torch::kFloat, 2e-5);
  check_other_gradients(device, torch::kBFloat16, 3.2e-2);
  check_quantised(device);
  check_second_derivative(device);
  check_optimizers(device);
  check_training(device);
  std::printf("%s\n", all_good ? "all good" : "MISMATCH");
  return all_good ? 0 : 1;
}
