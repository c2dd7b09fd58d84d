// SPDX-License-Identifier: Apache-2.0
// Errors, tensor references, build facts, and what the library exports without a GPU.
#include "fastkern/core.h"

#include <cstring>

#include "fastkern/norm.h"
#include "support.h"

namespace fastkern {
namespace {

TEST(Error, CheckJoinsItsParts) {
  const auto call = [] { FK_CHECK(1 + 1 == 3, "fastkern::op: ", "x must be ", 3, ", got ", 2.5); };
  EXPECT_EQ(test::error_of(call), "fastkern::op: x must be 3, got 2.5");
}

TEST(Error, CheckThatHoldsEvaluatesNoMessage) {
  int evaluated = 0;
  FK_CHECK(true, "never ", ++evaluated);
  EXPECT_EQ(evaluated, 0);
}

TEST(Error, CheckIsOneStatement) {
  bool otherwise = false;
  if (false)
    FK_CHECK(false, "not reached");
  else
    otherwise = true;
  EXPECT_TRUE(otherwise);
}

TEST(Error, CrossesTheLibraryBoundary) {
  const NormFwd scalar_input{};
  const std::string message = test::error_of([&] { cpu::norm(scalar_input); });
  EXPECT_TRUE(test::contains(message, "fastkern::norm: x must")) << message;
  EXPECT_THROW(cpu::norm(scalar_input), std::runtime_error);
}

TEST(TensorRef, DenseIsRowMajor) {
  float data[24];
  const TensorRef ref = dense(data, DType::f32, 2, 3, 4);
  EXPECT_EQ(ref.data, data);
  EXPECT_EQ(ref.ndim, 3);
  EXPECT_EQ(ref.numel(), 24);
  EXPECT_EQ(ref.strides[0], 12);
  EXPECT_EQ(ref.strides[1], 4);
  EXPECT_EQ(ref.strides[2], 1);
  EXPECT_TRUE(ref.given());
}

TEST(TensorRef, DefaultMeansNotGiven) {
  const TensorRef none;
  EXPECT_FALSE(none.given());
  EXPECT_EQ(none.data, nullptr);
}

TEST(TensorRef, EmptyTensorsAreGiven) {
  const TensorRef ref = dense(nullptr, DType::bf16, 3, 0);
  EXPECT_TRUE(ref.given());
  EXPECT_EQ(ref.numel(), 0);
}

TEST(TensorRef, ShapeReadsLikePython) {
  EXPECT_EQ(TensorRef{}.shape(), "()");
  EXPECT_EQ(dense(nullptr, DType::f32, 5).shape(), "(5,)");
  EXPECT_EQ(dense(nullptr, DType::f32, 2, 0, 7).shape(), "(2, 0, 7)");
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::f32), 4);
  EXPECT_EQ(size_of(DType::f16), 2);
  EXPECT_EQ(size_of(DType::bf16), 2);
  EXPECT_STREQ(name_of(DType::f32), "f32");
  EXPECT_STREQ(name_of(DType::f16), "f16");
  EXPECT_STREQ(name_of(DType::bf16), "bf16");
}

TEST(BuildInfo, SaysWhatWasBuilt) {
  const BuildInfo& info = build_info();
  EXPECT_STRNE(info.version, "");
  EXPECT_STRNE(info.commit, "");
  EXPECT_STRNE(info.compiler, "");
  EXPECT_EQ(info.cuda, FASTKERN_HAS_CUDA != 0);
  EXPECT_EQ(std::strlen(info.cuda_version) > 0, info.cuda);
  EXPECT_EQ(std::strlen(info.cuda_archs) > 0, info.cuda);
}

TEST(Devices, AreCountedWithoutThrowing) {
  const int count = cuda::device_count();
  EXPECT_GE(count, 0);
  EXPECT_GE(cuda::driver_version(), 0);
  for (int device = 0; device < count; ++device) {
    EXPECT_NE(cuda::device_info(device).name, "");
    EXPECT_GT(cuda::device_info(device).multiprocessors, 0);
  }
  const std::string message = test::error_of([&] { cuda::device_info(count); });
  EXPECT_TRUE(test::contains(message, "fastkern")) << message;
}

}  // namespace
}  // namespace fastkern
