// SPDX-License-Identifier: Apache-2.0
// Type promotion: the laws it must obey, over all types and kinds, and torch's answers where a law
// does not say which one it is. Compared with torch itself in tests/test_pointwise.py.
#include "fastkern/promotion.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <initializer_list>
#include <span>
#include <vector>

namespace fastkern {
namespace {

using enum DType;
using enum OperandKind;

const std::vector<DType> kTypes = {boolean, u8, i8, i16, i32, i64, f16, bf16, f32, f64, c64, c128};

CommonType of(std::initializer_list<OperandType> operands) {
  return common_type(std::span(operands.begin(), operands.size()));
}

TEST(Promotion, OfTypesIsALattice) {
  for (const DType a : kTypes) {
    EXPECT_EQ(promote(a, a), a);
    EXPECT_EQ(promote(a, boolean), a);
    for (const DType b : kTypes) {
      const DType ab = promote(a, b);
      EXPECT_EQ(ab, promote(b, a)) << name_of(a) << ' ' << name_of(b);
      EXPECT_EQ(promote(ab, a), ab) << name_of(a) << ' ' << name_of(b);
      EXPECT_EQ(category_of(ab), std::max(category_of(a), category_of(b)));
      EXPECT_TRUE(can_cast(a, ab));
    }
  }
}

TEST(Promotion, OfTypesAsTorch) {
  EXPECT_EQ(promote(u8, i8), i16);
  EXPECT_EQ(promote(u8, i16), i16);
  EXPECT_EQ(promote(i32, i64), i64);
  EXPECT_EQ(promote(f16, bf16), f32);
  EXPECT_EQ(promote(i64, f16), f16);
  EXPECT_EQ(promote(bf16, f64), f64);
  EXPECT_EQ(promote(c64, f64), c128);
  EXPECT_EQ(promote(c64, i64), c64);
  EXPECT_EQ(promote(c64, f16), c64);
}

TEST(Promotion, LowerKindsCountByCategoryAlone) {
  for (const DType a : kTypes) {
    for (const DType b : kTypes) {
      for (const OperandKind low : {zero_dim, number}) {
        const CommonType found = of({{a, tensor}, {b, low}});
        const TypeCategory ca = category_of(a), cb = category_of(b);
        EXPECT_EQ(category_of(found.dtype), std::max(ca, cb));
        if (ca >= cb) EXPECT_EQ(found.dtype, a);
        EXPECT_EQ(found.dtype, of({{b, low}, {a, tensor}}).dtype);
      }
      EXPECT_EQ(of({{a, tensor}, {b, tensor}}).dtype, promote(a, b));
      EXPECT_EQ(of({{a, zero_dim}, {b, zero_dim}}).dtype, promote(a, b));
    }
  }
}

TEST(Promotion, AsTorch) {
  EXPECT_EQ(of({{i32, tensor}, {f32, number}}).dtype, f32);
  EXPECT_EQ(of({{boolean, tensor}, {i64, number}}).dtype, i64);
  EXPECT_EQ(of({{boolean, tensor}, {u8, zero_dim}}).dtype, u8);
  EXPECT_EQ(of({{bf16, tensor}, {c64, number}}).dtype, c64);
  EXPECT_EQ(of({{f64, tensor}, {c64, number}}).dtype, c128);
  EXPECT_EQ(of({{f64, zero_dim}, {c64, number}}).dtype, c128);
  EXPECT_FALSE(of({{f16, tensor}, {c64, zero_dim}}).exists);
  EXPECT_FALSE(of({{f16, zero_dim}, {c64, number}}).exists);
  EXPECT_TRUE(of({{f16, tensor}, {c64, tensor}}).exists);
  EXPECT_EQ(of({{i16, tensor}, {f64, zero_dim}, {f32, number}}).dtype, f64);
  EXPECT_EQ(of({{i16, zero_dim}, {f32, number}}).dtype, f32);
  EXPECT_EQ(of({{u8, tensor}, {i8, tensor}, {f32, zero_dim}}).dtype, f32);
}

TEST(Promotion, Rules) {
  for (const DType a : kTypes) {
    const bool floats = category_of(a) >= TypeCategory::floating;
    const PromotedTypes common = promoted(Promotion::standard, a);
    EXPECT_EQ(common.common, a);
    EXPECT_EQ(common.result, a);
    EXPECT_EQ(promoted(Promotion::no_opmath, a).result, a);
    EXPECT_EQ(promoted(Promotion::int_to_float, a).result, floats ? a : f32);
    EXPECT_EQ(promoted(Promotion::always_bool, a).result, boolean);
    EXPECT_EQ(promoted(Promotion::complex_to_float, a).result, real_of(a));
    EXPECT_EQ(promoted(Promotion::bool_to_long, a).result, a == boolean ? i64 : a);
    EXPECT_EQ(promoted(Promotion::always_bool, a).compute, common.compute);
  }
  EXPECT_EQ(promoted(Promotion::standard, bf16).compute, f32);
  EXPECT_EQ(promoted(Promotion::standard, f64).compute, f64);
  EXPECT_EQ(promoted(Promotion::standard, i8).compute, i64);
  EXPECT_EQ(promoted(Promotion::standard, boolean).compute, boolean);
  EXPECT_EQ(promoted(Promotion::int_to_float, i64).compute, f32);
  EXPECT_EQ(promoted(Promotion::complex_to_float, c128).compute, c128);
}

TEST(Promotion, Casts) {
  EXPECT_TRUE(can_cast(i64, f16));
  EXPECT_TRUE(can_cast(f64, f16));
  EXPECT_TRUE(can_cast(i64, u8));
  EXPECT_FALSE(can_cast(f32, i64));
  EXPECT_FALSE(can_cast(i8, boolean));
  EXPECT_FALSE(can_cast(c64, f64));
}

}  // namespace
}  // namespace fastkern
