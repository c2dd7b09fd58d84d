// SPDX-License-Identifier: Apache-2.0
// Which tensors are rows under at most two strides, and where their rows start.
#include "fastkern/rows.h"

#include <optional>

#include "support.h"

namespace fastkern {
namespace {

using test::Sizes;

TensorRef strided(const Sizes& sizes, const Sizes& strides) {
  TensorRef ref{nullptr, DType::f32, static_cast<int>(sizes.size()), {}, {}};
  std::copy(sizes.begin(), sizes.end(), ref.sizes.begin());
  std::copy(strides.begin(), strides.end(), ref.strides.begin());
  return ref;
}

std::optional<Rows> rows(const Sizes& sizes, const Sizes& strides) {
  Rows found;
  return as_rows(strided(sizes, strides), found) ? std::optional(found) : std::nullopt;
}

/// Row starts by definition: the leading indices times their strides, in row-major order.
Sizes starts_of(const Sizes& sizes, const Sizes& strides) {
  Sizes starts{0};
  for (std::size_t d = 0; d + 1 < sizes.size(); ++d) {
    Sizes longer;
    for (const std::int64_t start : starts) {
      for (std::int64_t i = 0; i < sizes[d]; ++i) longer.push_back(start + i * strides[d]);
    }
    starts = longer;
  }
  return starts;
}

/// Whether some (inner, outer stride, inner stride) describes these starts; found by trying all.
bool two_strides_suffice(const Sizes& starts) {
  const std::int64_t count = static_cast<std::int64_t>(starts.size());
  for (std::int64_t inner = 1; inner <= count; ++inner) {
    if (count % inner != 0) continue;
    const std::int64_t inner_stride = inner > 1 ? starts[1] : 0;
    const std::int64_t outer_stride = inner < count ? starts[inner] : 0;
    bool fits = true;
    for (std::int64_t r = 0; r < count && fits; ++r) {
      fits = starts[r] == r / inner * outer_stride + r % inner * inner_stride;
    }
    if (fits) return true;
  }
  return false;
}

void expect_starts(const Sizes& sizes, const Sizes& strides) {
  const auto found = rows(sizes, strides);
  ASSERT_TRUE(found);
  const Sizes starts = starts_of(sizes, strides);
  ASSERT_EQ(found->count, static_cast<std::int64_t>(starts.size()));
  ASSERT_EQ(found->length, sizes.back());
  for (std::int64_t r = 0; r < found->count; ++r)
    ASSERT_EQ(found->start(r), starts[r]) << "row " << r;
}

TEST(Rows, DenseTensorsMergeIntoOneStride) {
  for (const Sizes& sizes : {Sizes{7}, Sizes{4, 7}, Sizes{2, 3, 7}, Sizes{2, 3, 4, 5, 7}}) {
    const auto found = rows(sizes, test::dense_strides(sizes));
    ASSERT_TRUE(found);
    EXPECT_EQ(found->inner, found->count);
    EXPECT_EQ(found->inner_stride, found->count > 1 ? 7 : 0);
    expect_starts(sizes, test::dense_strides(sizes));
  }
}

TEST(Rows, PaddedRowsAreOneStride) {
  const auto found = rows({2, 3, 7}, {30, 10, 1});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->count, 6);
  EXPECT_EQ(found->inner, 6);
  EXPECT_EQ(found->inner_stride, 10);
}

TEST(Rows, HeadSliceOfAFusedProjectionIsTwoStrides) {
  const auto found = rows({2, 5, 4, 8}, {480, 96, 8, 1});  // (B, S, 3 · H, D)[:, :, :H]
  ASSERT_TRUE(found);
  EXPECT_EQ(found->count, 40);
  EXPECT_EQ(found->inner, 4);
  EXPECT_EQ(found->inner_stride, 8);
  EXPECT_EQ(found->outer_stride, 96);
  expect_starts({2, 5, 4, 8}, {480, 96, 8, 1});
}

TEST(Rows, SwappedLeadingDimensionsAreTwoStrides) { expect_starts({3, 4, 5}, {5, 15, 1}); }

TEST(Rows, ThreeStridesAreRefused) {
  EXPECT_FALSE(rows({2, 3, 4, 5}, {5, 10, 30, 1}));
  EXPECT_FALSE(rows({2, 3, 4, 5}, {1000, 100, 10, 1}));
}

TEST(Rows, LastDimensionMustBeDense) {
  EXPECT_FALSE(rows({3, 4}, {1, 3}));
  EXPECT_FALSE(rows({3, 4}, {8, 2}));
  EXPECT_FALSE(rows({3, 4}, {1, 0}));
  EXPECT_FALSE(rows({4}, {2}));
}

TEST(Rows, StrideOfASingleElementDoesNotMatter) {
  expect_starts({1}, {99});
  expect_starts({3, 1}, {5, 99});
  expect_starts({1, 3, 1, 4, 1, 8}, {77, 96, 55, 8, 33, 1});
  const auto found = rows({1, 3, 1, 4, 1, 8}, {77, 32, 55, 8, 33, 1});
  ASSERT_TRUE(found);
  EXPECT_EQ(found->inner, 12);
}

TEST(Rows, ExpandedDimensionsHaveStrideZero) {
  expect_starts({6, 8}, {0, 1});
  expect_starts({3, 4, 8}, {0, 8, 1});
  expect_starts({3, 4, 8}, {8, 0, 1});
  EXPECT_FALSE(rows({2, 3, 4, 8}, {8, 0, 16, 1}));
}

TEST(Rows, NegativeStridesWalkBackwards) { expect_starts({3, 4, 8}, {32, -8, 1}); }

TEST(Rows, EmptyTensors) {
  for (const Sizes& sizes :
       {Sizes{0}, Sizes{0, 5}, Sizes{3, 0}, Sizes{2, 0, 3, 5}, Sizes{2, 3, 0}}) {
    const auto found = rows(sizes, Sizes(sizes.size(), 1));
    ASSERT_TRUE(found);
    EXPECT_EQ(found->length, sizes.back());
    EXPECT_EQ(found->count * found->length, 0);
    EXPECT_GE(found->inner, 1);  // start() divides by it
  }
  EXPECT_EQ(rows({2, 3, 0}, {0, 0, 1})->count, 6);
}

TEST(Rows, ScalarsAreRefused) { EXPECT_FALSE(rows({}, {})); }

TEST(Rows, AsManyDimensionsAsThereAre) {
  Sizes sizes(kMaxDims, 2);
  expect_starts(sizes, test::dense_strides(sizes));
}

TEST(Rows, AnyStridesAgreeWithTheDefinition) {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<std::int64_t>(random() % n); };
  int accepted = 0, refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    Sizes sizes(1 + below(5)), order(sizes.size() - 1);
    for (std::int64_t& size : sizes) size = 1 + below(4);
    for (std::size_t d = 0; d < order.size(); ++d) order[d] = static_cast<std::int64_t>(d);
    std::shuffle(order.begin(), order.end(), random);
    Sizes strides(sizes.size(),
                  1);  // leading dimensions in any order, padded or expanded here and there
    std::int64_t stride = sizes.back();
    for (const std::int64_t d : order) {
      if (below(4) == 0) stride += below(5);
      strides[d] = below(6) == 0 ? 0 : stride;
      stride *= sizes[d];
    }
    if (two_strides_suffice(starts_of(sizes, strides))) {
      ++accepted;
      ASSERT_NO_FATAL_FAILURE(expect_starts(sizes, strides)) << "round " << round;
    } else {
      ++refused;
      ASSERT_FALSE(rows(sizes, strides)) << "round " << round;
    }
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(Rows, RowsOfNamesOpArgumentAndShape) {
  EXPECT_EQ(rows_of(strided({3, 4}, {4, 1}), "fastkern::op", "x").count, 3);
  const std::string message =
      test::error_of([] { rows_of(strided({3, 4}, {1, 3}), "fastkern::op", "x"); });
  EXPECT_TRUE(test::contains(message, "fastkern::op: x must")) << message;
  EXPECT_TRUE(test::contains(message, "(3, 4)")) << message;
}

}  // namespace
}  // namespace fastkern
