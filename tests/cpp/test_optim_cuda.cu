// SPDX-License-Identifier: Apache-2.0
// cuda::optim_step, cuda::optim_norm and cuda::optim_scale against cpu::, whose formulas are the
// same: bits are compared, but where a norm is in between.
#include <map>

#include "optim_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

/// A problem on the device.
class OptimOnDevice {
 public:
  explicit OptimOnDevice(OptimProblem& p)
      : steps(p.count(), 3.0f),
        products(p.count(), 0.5f),
        numbers(std::vector<float>{8.0f, 0.75f, p.c.found ? 1.0f : 0.0f}),
        workspace(1 << 16) {
    for (Tensor* t : p.all()) tensors_.emplace(t, *t);
    host = p.table([&](Tensor& t) { return tensors_.at(&t).ref().data; }, scalars());
    table = std::make_unique<DeviceArray<std::uint64_t>>(host.size());
    args = p.args(host, scalars());
    args.table = table->data();
  }
  OptimScalars scalars() {
    return {steps.data(),       products.data(),    numbers.data(),
            numbers.data() + 1, numbers.data() + 2, workspace.data()};
  }
  void write(Stream stream) {
    cuda::optim_write(table->data(), host.data(), static_cast<std::int64_t>(host.size() * 8),
                      "test", stream);
  }
  Tensor download(Tensor* t) { return tensors_.at(t).download(); }

 private:
  std::map<Tensor*, DeviceTensor> tensors_;

 public:
  DeviceArray<float> steps, products, numbers, workspace;
  std::vector<std::uint64_t> host;
  std::unique_ptr<DeviceArray<std::uint64_t>> table;
  OptimStep args;
};

class OptimCuda : public CudaTest {};

void expect_steps(const OptimCase& c, int steps) {
  SCOPED_TRACE(c.text());
  OptimProblem found(c), expected(c);
  OptimOnDevice device(found);
  OptimOnCpu host(expected);
  device.write({});
  for (int i = 0; i < steps; ++i) {
    cuda::optim_step(device.args, {});
    cpu::optim_step(host.args);
  }
  cuda_ok(cudaDeviceSynchronize());
  const auto ours = found.all(), theirs = expected.all();
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const Tensor result = device.download(ours[i]);
    EXPECT_TRUE(result.gaps_intact()) << "tensor " << i;
    if (c.kind != OptimKind::lamb) {
      EXPECT_TRUE(result.same_bits(*theirs[i])) << "tensor " << i;
    } else if (c.param == DType::f32) {
      const std::vector<double> value = theirs[i]->values();
      EXPECT_TRUE(close(result, {value, std::vector<double>(value.size(), 2.0)}));
    }
  }
  EXPECT_EQ(device.steps.download(), host.steps);
  EXPECT_EQ(device.products.download(), host.products);
  EXPECT_EQ(device.table->download()[0] & 0xffffffffu, 0u);  // the counter
}

TEST_F(OptimCuda, StepsAreThoseOfTheCpu) {
  for (const OptimCase& c : optim_cases()) expect_steps(c, 2);
}

/// More than fit the arguments of a launch, and one in the middle that has many chunks.
TEST_F(OptimCuda, ManyTensors) {
  OptimCase c;
  c.sizes.assign(kOptimInlineGrads + 600, 5);
  c.sizes[300] = 200000;
  c.skip = true;
  expect_steps(c, 2);
}

TEST_F(OptimCuda, ALargeTensor) {
  OptimCase c;
  c.sizes = {3, 20000003, 9};
  expect_steps(c, 1);
}

TEST_F(OptimCuda, LambIsRepeatable) {
  OptimCase c;
  c.kind = OptimKind::lamb;
  c.sizes = {100000, 7, 300000};
  std::vector<Tensor> results;
  for (int turn = 0; turn < 2; ++turn) {
    OptimProblem p(c);
    OptimOnDevice device(p);
    device.write({});
    for (int i = 0; i < 3; ++i) cuda::optim_step(device.args, {});
    for (Tensor& t : p.params) results.push_back(device.download(&t));
  }
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(results[i].same_bits(results[i + 3]));
}

TEST_F(OptimCuda, NormAndScale) {
  for (const DType dtype : kDTypes) {
    for (const bool largest : {false, true}) {
      OptimCase c;
      c.grad = dtype, c.shifted = largest, c.skip = !largest;
      OptimProblem found(c), expected(c);
      OptimOnDevice device(found);
      OptimOnCpu host(expected);
      device.write({});
      DeviceArray<float> partials(64), result(2);
      DeviceArray<double> sum(1);
      std::vector<float> host_partials(64);
      double host_sum = 0.0;
      float norm = 0.0f, factor = 0.0f;
      OptimNorm a;
      a.grad = dtype, a.tensors = found.count(), a.host = device.host.data();
      a.table = device.table->data();
      a.largest = largest, a.max_norm = 2.0, a.grad_scale = device.scalars().scale;
      a.partials = partials.data(), a.sum = sum.data();
      a.norm = result.data(), a.factor = result.data() + 1;
      cuda::optim_norm(a, {});
      OptimNorm b = a;
      b.host = host.host.data(), b.grad_scale = &host.scale;
      b.partials = host_partials.data(), b.sum = &host_sum, b.norm = &norm, b.factor = &factor;
      cpu::optim_norm(b);
      EXPECT_NEAR(result.download()[0], norm, 2e-6f * norm);
      EXPECT_NEAR(result.download()[1], factor, 2e-6f);
      OptimScale s;
      s.grad = dtype, s.tensors = found.count(), s.host = device.host.data();
      s.table = device.table->data(), s.factor = result.data() + 1;
      cuda::optim_scale(s, {});
      factor = result.download()[1];
      s.host = host.host.data(), s.factor = &factor;
      cpu::optim_scale(s);
      for (std::size_t i = 0; i < found.grads.size(); ++i) {
        const Tensor scaled = device.download(&found.grads[i]);
        EXPECT_TRUE(scaled.same_bits(expected.grads[i])) << "gradient " << i;
        EXPECT_TRUE(scaled.gaps_intact());
      }
    }
  }
}

}  // namespace
}  // namespace fastkern
