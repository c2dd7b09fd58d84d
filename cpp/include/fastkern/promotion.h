// SPDX-License-Identifier: Apache-2.0
// Type promotion by torch's rules, without torch: from the types of the operands and what kind each
// one is (a tensor, a tensor without dimensions, a number) the type in which a pointwise formula is
// computed and the type of its result.
//
// A type belongs to a category: bool < integer < float < complex. Tensors with dimensions decide;
// tensors without dimensions, and after them numbers, count only if they are of a higher category.
// A number has the type that torch gives it: bool, i64, and the default float32 and its complex.
#pragma once

#include <cstdint>
#include <span>

#include "fastkern/elementwise.h"

namespace fastkern {

enum class OperandKind : std::uint8_t { tensor, zero_dim, number };

struct OperandType {
  DType dtype = DType::f32;
  OperandKind kind = OperandKind::tensor;
};

/// The common type of some operands may be one that fastkern does not have: complex of f16.
struct CommonType {
  DType dtype = DType::f32;
  bool exists = true;
};

struct PromotedTypes {
  DType common = DType::f32;   // what the operands are converted to, as torch says it
  DType compute = DType::f32;  // what the formula is evaluated in
  DType result = DType::f32;
};

enum class TypeCategory : std::uint8_t { boolean, integer, floating, complex };

constexpr TypeCategory category_of(DType dtype) {
  switch (dtype) {
    case DType::boolean:
      return TypeCategory::boolean;
    case DType::u8:
    case DType::i8:
    case DType::i16:
    case DType::i32:
    case DType::i64:
      return TypeCategory::integer;
    case DType::c64:
    case DType::c128:
      return TypeCategory::complex;
    default:
      return TypeCategory::floating;
  }
}

/// Of a real floating type its complex; f16's is not one of fastkern's.
constexpr CommonType complex_of(DType dtype) {
  if (dtype == DType::f16) return {DType::c64, false};
  return {dtype == DType::f64 || dtype == DType::c128 ? DType::c128 : DType::c64};
}

constexpr DType real_of(DType dtype) {
  return dtype == DType::c64 ? DType::f32 : dtype == DType::c128 ? DType::f64 : dtype;
}

/// The smallest type that holds both, as torch.promote_types gives it.
constexpr DType promote(DType a, DType b) {
  if (a == b) return a;
  const TypeCategory ca = category_of(a), cb = category_of(b);
  if (ca == TypeCategory::complex || cb == TypeCategory::complex) {
    const bool wide = a == DType::c128 || b == DType::c128 || a == DType::f64 || b == DType::f64;
    return wide ? DType::c128 : DType::c64;
  }
  if (ca != cb) return ca < cb ? b : a;
  if (ca == TypeCategory::floating) {
    return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;  // f16 with bf16: f32
  }
  const std::int64_t wa = size_of(a), wb = size_of(b);
  if (wa != wb) return wa < wb ? b : a;
  return DType::i16;  // u8 with i8
}

namespace promotion_detail {

struct TypeOfKind {
  DType dtype = DType::boolean;
  bool any = false;
  constexpr void add(DType type) {
    dtype = any ? promote(dtype, type) : type;
    any = true;
  }
};

/// `low` counts against `high` only by its category.
constexpr CommonType combine(const TypeOfKind& high, const TypeOfKind& low) {
  if (!high.any) return {low.dtype};
  if (!low.any) return {high.dtype};
  const TypeCategory ch = category_of(high.dtype), cl = category_of(low.dtype);
  if (ch == TypeCategory::complex) return {high.dtype};
  if (ch == TypeCategory::floating) {
    return cl == TypeCategory::complex ? complex_of(high.dtype) : CommonType{high.dtype};
  }
  if (ch == TypeCategory::boolean || cl > TypeCategory::integer) {
    return {promote(high.dtype, low.dtype)};
  }
  return {high.dtype};
}

}  // namespace promotion_detail

/// torch.result_type of the operands, one at least.
constexpr CommonType common_type(std::span<const OperandType> operands) {
  promotion_detail::TypeOfKind kinds[3];
  for (const OperandType& o : operands) kinds[static_cast<int>(o.kind)].add(o.dtype);
  const CommonType low = promotion_detail::combine(kinds[1], kinds[2]);
  const promotion_detail::TypeOfKind rest{low.dtype, kinds[1].any || kinds[2].any};
  CommonType found = promotion_detail::combine(kinds[0], rest);
  found.exists = found.exists && (low.exists || kinds[0].any);
  return found;
}

constexpr PromotedTypes promoted(Promotion rule, DType common) {
  if (rule == Promotion::int_to_float && category_of(common) < TypeCategory::floating) {
    common = DType::f32;
  }
  if (rule == Promotion::bool_to_long && common == DType::boolean) common = DType::i64;
  DType result = common;
  if (rule == Promotion::always_bool) result = DType::boolean;
  if (rule == Promotion::complex_to_float) result = real_of(common);
  return {common, compute_type(common), result};
}

/// Whether torch stores a result of type `from` in an output of type `to`: not complex in real, not
/// float in integer, nothing but bool in bool.
constexpr bool can_cast(DType from, DType to) { return category_of(from) <= category_of(to); }

}  // namespace fastkern
