// SPDX-License-Identifier: Apache-2.0
// cuda::gated, cuda::bias_act, cuda::dropout, cuda::bias_dropout_add and their gradients against
// plain double loops, in guarded memory, dense and strided.
#include "activation_support.h"
#include "support.cuh"

namespace fastkern {
namespace {

using namespace test;  // NOLINT: all of it is about this

class ActivationCuda : public CudaTest {};

/// Device copies of host tensors; results come back on demand.
class Devices {
 public:
  TensorRef operator()(Tensor& host) {
    if (!host.given()) return {};
    for (const auto& [known, device] : pairs_) {
      if (known == &host) return device->ref();
    }
    pairs_.emplace_back(&host, std::make_unique<DeviceTensor>(host));
    return pairs_.back().second->ref();
  }
  void download() {
    cuda_ok(cudaDeviceSynchronize());
    for (auto& [host, device] : pairs_) *host = device->download();
  }

 private:
  std::vector<std::pair<Tensor*, std::unique_ptr<DeviceTensor>>> pairs_;
};

void gated_on_gpu(const GatedProblem& p, GatedTensors& t, Stream stream = {}) {
  Devices devices;
  const auto ref = [&](Tensor& tensor) { return devices(tensor); };
  cuda::gated(gated_fwd(p, ref, t), stream);
  cuda::gated_bwd(gated_bwd(p, ref, t), stream);
  devices.download();
}

void bias_on_gpu(const BiasProblem& p, BiasTensors& t, Stream stream = {}) {
  Devices ref;
  const DeviceArray<std::int64_t> random(std::vector<std::int64_t>{kTestSeed, kTestOffset});
  const Dropout dropout{std::max(p.p, 0.0), random.data(), random.data() + 1};
  const std::size_t bytes = cuda::column_sums_workspace(t.dy.ref(), t.dbias.ref());
  Tensor workspace(DType::f32, Sizes{static_cast<std::int64_t>(bytes / 4)});
  const DeviceTensor sums(workspace);
  if (p.drops()) {
    cuda::bias_dropout_add({.x = ref(t.x),
                            .bias = ref(t.bias),
                            .residual = ref(t.residual),
                            .y = ref(t.y),
                            .dropout = dropout},
                           stream);
    cuda::bias_dropout_add_bwd({.dy = ref(t.dy),
                                .dx = ref(t.dx),
                                .dbias = ref(t.dbias),
                                .dropout = dropout,
                                .workspace = sums.ref().data,
                                .workspace_size = bytes},
                               stream);
  } else {
    cuda::bias_act({.kind = p.kind, .x = ref(t.x), .bias = ref(t.bias), .y = ref(t.y)}, stream);
    cuda::bias_act_bwd({.kind = p.kind,
                        .dy = ref(t.dy),
                        .x = ref(t.x),
                        .bias = ref(t.bias),
                        .dx = ref(t.dx),
                        .dbias = ref(t.dbias),
                        .workspace = sums.ref().data,
                        .workspace_size = bytes},
                       stream);
  }
  ref.download();
  EXPECT_TRUE(sums.download().gaps_intact()) << "workspace";
}

const std::pair<std::int64_t, std::int64_t> kSizes[] = {
    {1, 1},    {3, 2},    {77, 3},    {7, 8},    {5, 9},     {33, 64},   {9, 129},
    {3, 255},  {65, 256}, {17, 264},  {5, 513},  {3, 1000},  {2, 2048},  {2, 4104},
    {3, 8192}, {2, 9001}, {1, 70007}, {1500, 8}, {2000, 72}, {1031, 257}};

TEST_F(ActivationCuda, GatedMatches) {
  for (const auto& [rows, n] : kSizes) {
    for (const GatedProblem& p : gated_problems(rows, n)) {
      GatedTensors dense(p), strided(p, 1, 3), aligned(p, 16 / size_of(p.dtype), 16);
      gated_on_gpu(p, dense);
      expect_gated(p, dense);
      for (GatedTensors* t : {&strided, &aligned}) {
        gated_on_gpu(p, *t);
        SCOPED_TRACE(p.text());
        EXPECT_TRUE(t->y.same_bits(dense.y));
        EXPECT_TRUE(t->da.same_bits(dense.da));
        EXPECT_TRUE(p.packed() || t->db.same_bits(dense.db));
        EXPECT_TRUE(t->y.gaps_intact() && t->da.gaps_intact());
      }
      if (HasFailure()) return;
    }
  }
}

TEST_F(ActivationCuda, BiasMatches) {
  for (const auto& [rows, n] : kSizes) {
    for (const BiasProblem& p : bias_problems(rows, n)) {
      BiasTensors dense(p), strided(p, 1, 3);
      bias_on_gpu(p, dense);
      expect_bias(p, dense);
      bias_on_gpu(p, strided);
      SCOPED_TRACE(p.text());
      EXPECT_TRUE(strided.y.same_bits(dense.y));
      EXPECT_TRUE(strided.dx.same_bits(dense.dx));
      EXPECT_TRUE(strided.dbias.same_bits(dense.dbias));
      EXPECT_TRUE(strided.y.gaps_intact() && strided.dx.gaps_intact());
      if (HasFailure()) return;
    }
  }
}

TEST_F(ActivationCuda, DropoutIsTheSameAsOnTheCpu) {
  const DeviceArray<std::int64_t> random(std::vector<std::int64_t>{kTestSeed, kTestOffset});
  for (const DType dtype : kDTypes) {
    for (const std::int64_t n : {1, 3, 9, 1000, 2049, 70007}) {
      for (const std::int64_t offset : {0, 1}) {
        const Layout layout = dense_layout({3, n}, offset);
        Tensor x(dtype, layout), expected(dtype, layout);
        x.fill(1);
        cpu::dropout(
            {.x = x.ref(), .y = expected.ref(), .dropout = {0.3, &kTestSeed, &kTestOffset}});
        Tensor y(dtype, layout);
        Devices ref;
        cuda::dropout(
            {.x = ref(x), .y = ref(y), .dropout = {0.3, random.data(), random.data() + 1}}, {});
        ref.download();
        EXPECT_TRUE(y.same_bits(expected)) << n << ' ' << offset;
        EXPECT_TRUE(y.gaps_intact());
      }
    }
  }
}

TEST_F(ActivationCuda, QuantisedIsNearTheCpu) {
  float scale = 0.01f;
  const DeviceArray<float> device_scale(std::vector<float>{scale});
  for (const DType quant : {DType::f8e4m3, DType::i8}) {
    for (GatedProblem p : gated_problems(3, 1001)) {
      GatedTensors t(p);
      Tensor q(quant, Sizes{3, 1001}), expected(quant, Sizes{3, 1001});
      GatedFwd args = gated_fwd(p, [](Tensor& host) { return host.ref(); }, t);
      args.y = expected.ref(), args.scale = dense(&scale, DType::f32, 1);
      cpu::gated(args);
      Devices devices;
      args = gated_fwd(p, [&](Tensor& host) { return devices(host); }, t);
      args.y = devices(q), args.scale = dense(device_scale.data(), DType::f32, 1);
      cuda::gated(args, {});
      devices.download();
      SCOPED_TRACE(p.text());
      int off = 0;
      for (std::int64_t i = 0; i < q.numel(); ++i) {
        const double a = q.get(i), b = expected.get(i);
        off += a != b;
        ASSERT_LE(std::abs(a - b), std::max(1.0, std::abs(b) / 7)) << i;
      }
      EXPECT_LE(off, 100);
      EXPECT_TRUE(q.gaps_intact());
    }
  }
}

TEST_F(ActivationCuda, RepeatsOnASideStream) {
  const SideStream side;
  const BiasProblem p{.dtype = DType::bf16, .other = DType::bf16, .rows = 3000, .n = 1024};
  BiasTensors first(p);
  bias_on_gpu(p, first);
  for (int i = 0; i < 20; ++i) {
    BiasTensors again(p);
    bias_on_gpu(p, again, side.stream());
    ASSERT_TRUE(again.dx.same_bits(first.dx));
    ASSERT_TRUE(again.dbias.same_bits(first.dbias));
  }
}

TEST_F(ActivationCuda, RefusesAWorkspaceTooSmall) {
  float none = 0.0f;
  BiasActBwd args{.dy = dense(&none, DType::f32, 64, 8),
                  .x = dense(&none, DType::f32, 64, 8),
                  .bias = {},
                  .dx = {},
                  .dbias = dense(&none, DType::f32, 8)};
  EXPECT_TRUE(
      contains(error_of([&] { cuda::bias_act_bwd(args, {}); }), "workspace must be at least"));
}

}  // namespace
}  // namespace fastkern
