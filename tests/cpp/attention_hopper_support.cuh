// SPDX-License-Identifier: Apache-2.0
// What the tests of attention on Hopper share: NaN where nobody may look, and rates.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "attention_on_device.cuh"

namespace fastkern::test {

/// NaN wherever no query of a sequence may look.
inline void poison(AttentionProblem& p) {
  const AttentionCase& c = p.c;
  const std::int64_t entries = c.packed() ? 1 : c.batch;
  std::vector<bool> q(entries * c.queries), k(entries * c.keys);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const Entry e = attention_entry(c, b);
    for (std::int64_t i = 0; i < e.queries; ++i) q[e.first_q + i] = true;
    for (std::int64_t j = 0; j < e.keys; ++j) k[e.first_k + j] = true;
  }
  const auto spoil = [](Tensor& t, const std::vector<bool>& used) {
    const std::int64_t row = used.empty() ? 0 : t.numel() / static_cast<std::int64_t>(used.size());
    for (std::size_t r = 0; r < used.size(); ++r) {
      for (std::int64_t i = 0; !used[r] && i < row; ++i) t.set(r * row + i, std::nan(""));
    }
  };
  spoil(p.q, q), spoil(p.dout, q), spoil(p.k, k), spoil(p.v, k);
}

class HopperAttentionTest : public CudaTest, public testing::WithParamInterface<DType> {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped() && cuda::capability(0, "test") != 90) {
      GTEST_SKIP() << "no device of capability 9.0";
    }
  }
  /// The problem of a case, poisoned; says so, as a kernel that hangs cannot.
  AttentionProblem announced(const AttentionCase& c) {
    AttentionProblem p = make_attention(c, GetParam());
    poison(p);
    std::printf("  %s left %lld right %lld%s\n", p.text().c_str(), static_cast<long long>(c.left),
                static_cast<long long>(c.right), c.top_left ? " top left" : "");
    std::fflush(stdout);
    return p;
  }
};

static __global__ void fill_normal(__nv_bfloat16* to, std::int64_t count, unsigned seed) {
  for (std::int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
    unsigned x[2];
    for (int k = 0; k < 2; ++k) {
      unsigned h = static_cast<unsigned>(i) * 2654435761u + seed + k * 0x9e3779b9u;
      h = (h ^ h >> 16) * 0x85ebca6bu;
      h = (h ^ h >> 13) * 0xc2b2ae35u;
      x[k] = h ^ h >> 16;
    }
    const float r = sqrtf(-2.0f * logf((x[0] + 1.0f) * 0x1p-32f));
    to[i] = __float2bfloat16(r * cospif(x[1] * 0x1p-31f));
  }
}

/// Of 20 calls, after 4 more.
template <class Call>
double median_ms(const Call& call) {
  cudaEvent_t begin, end;
  cuda_ok(cudaEventCreate(&begin));
  cuda_ok(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 24; ++i) {
    cuda_ok(cudaEventRecord(begin));
    call();
    cuda_ok(cudaEventRecord(end));
    cuda_ok(cudaEventSynchronize(end));
    float ms = 0.0f;
    cuda_ok(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 4) times.push_back(ms);
  }
  cuda_ok(cudaEventDestroy(begin));
  cuda_ok(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// Runs the tests, or with `--bench` prints rates instead: of a head dimension, a number of
/// queries, whether the mask is causal, and whether the portable kernel is meant.
template <class Rate>
int tests_or_rates(int argc, char** argv, std::initializer_list<int> columns, const char* what,
                   const Rate& rate) {
  if (argc < 2 || std::string(argv[1]) != "--bench") {
    testing::InitGoogleTest(&argc, argv);
    return RUN_ALL_TESTS();
  }
  constexpr int kQueries[] = {512, 1024, 2048, 4096, 8192, 16384};
  std::printf("%-4s %-7s", "d", "mask");
  for (const int s : kQueries) std::printf(" %7d", s);
  std::printf("   TFLOP/s%s\n", what);
  for (const int d : columns) {
    for (const bool causal : {false, true}) {
      std::printf("%-4d %-7s", d, causal ? "causal" : "full");
      for (const int s : kQueries) {
        std::printf(" %7.1f", rate(d, s, causal, false));
        std::fflush(stdout);
      }
      std::printf("\n");
    }
  }
  std::printf("portable, d 128, full, 2048: %.1f\n", rate(128, 2048, false, true));
  return 0;
}

}  // namespace fastkern::test
