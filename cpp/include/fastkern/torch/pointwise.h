// SPDX-License-Identifier: Apache-2.0
// The pointwise operators on at::Tensor; to be included through fastkern/torch.h, which says how it
// is linked. Operands that may be numbers are at::Scalar. Where a gradient is wanted the call is
// torch's own function, which has one.
#pragma once

#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_not.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/div.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/isinf.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/le.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/where.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "fastkern/torch/common.h"

namespace fastkern {
namespace detail {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_overload(const char* name, const char* overload) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, overload});
  TORCH_CHECK(
      found.has_value(), name,
      " is not registered: libfastkern_torch.so is not loaded (link fastkern::torch or dlopen it)");
  return found->typed<Signature>();
}

inline bool wants(const at::Tensor& a) { return at::GradMode::is_enabled() && a.requires_grad(); }
inline bool wants(const at::Tensor& a, const at::Tensor& b) { return wants(a) || wants(b); }

}  // namespace detail

#define FASTKERN_TORCH_UNARY(name)                                                    \
  inline at::Tensor name(const at::Tensor& input) {                                   \
    if (detail::wants(input)) return at::name(input);                                 \
    static const auto op =                                                            \
        detail::find_overload<at::Tensor(const at::Tensor&)>("fastkern::" #name, ""); \
    const at::AutoDispatchBelowADInplaceOrView below_autograd;                        \
    return op.call(input);                                                            \
  }
#define FASTKERN_TORCH_BINARY(name)                                              \
  inline at::Tensor name(const at::Tensor& input, const at::Tensor& other) {     \
    if (detail::wants(input, other)) return at::name(input, other);              \
    static const auto op =                                                       \
        detail::find_overload<at::Tensor(const at::Tensor&, const at::Tensor&)>( \
            "fastkern::" #name, "");                                             \
    const at::AutoDispatchBelowADInplaceOrView below_autograd;                   \
    return op.call(input, other);                                                \
  }
/// The same with a number; complex ones are torch's.
#define FASTKERN_TORCH_NUMBER(name)                                                                \
  inline at::Tensor name(const at::Tensor& input, const at::Scalar& other) {                       \
    if (detail::wants(input) || other.isComplex() || other.isBoolean()) {                          \
      return at::name(input, other);                                                               \
    }                                                                                              \
    static const auto integer =                                                                    \
        detail::find_overload<at::Tensor(const at::Tensor&, std::int64_t)>("fastkern::" #name,     \
                                                                           "int");                 \
    static const auto floating =                                                                   \
        detail::find_overload<at::Tensor(const at::Tensor&, double)>("fastkern::" #name, "float"); \
    const at::AutoDispatchBelowADInplaceOrView below_autograd;                                     \
    return other.isIntegral(false) ? integer.call(input, other.toLong())                           \
                                   : floating.call(input, other.toDouble());                       \
  }
/// input + alpha * other, input - alpha * other
#define FASTKERN_TORCH_SCALED(name)                                                      \
  inline at::Tensor name(const at::Tensor& input, const at::Tensor& other,               \
                         const at::Scalar& alpha = 1) {                                  \
    if (detail::wants(input, other) || alpha.isComplex()) {                              \
      return at::name(input, other, alpha);                                              \
    }                                                                                    \
    static const auto op =                                                               \
        detail::find_overload<at::Tensor(const at::Tensor&, const at::Tensor&, double)>( \
            "fastkern::" #name, "");                                                     \
    const at::AutoDispatchBelowADInplaceOrView below_autograd;                           \
    return op.call(input, other, alpha.toDouble());                                      \
  }

FASTKERN_TORCH_UNARY(abs)
FASTKERN_TORCH_UNARY(neg)
FASTKERN_TORCH_UNARY(reciprocal)
FASTKERN_TORCH_UNARY(sqrt)
FASTKERN_TORCH_UNARY(rsqrt)
FASTKERN_TORCH_UNARY(exp)
FASTKERN_TORCH_UNARY(sin)
FASTKERN_TORCH_UNARY(cos)
FASTKERN_TORCH_UNARY(tanh)
FASTKERN_TORCH_UNARY(sigmoid)
FASTKERN_TORCH_UNARY(silu)
FASTKERN_TORCH_UNARY(relu)
FASTKERN_TORCH_UNARY(bitwise_not)
FASTKERN_TORCH_UNARY(logical_not)
FASTKERN_TORCH_UNARY(isnan)
FASTKERN_TORCH_UNARY(isinf)
FASTKERN_TORCH_SCALED(add)
FASTKERN_TORCH_SCALED(sub)
FASTKERN_TORCH_BINARY(mul)
FASTKERN_TORCH_BINARY(pow)
FASTKERN_TORCH_BINARY(maximum)
FASTKERN_TORCH_BINARY(minimum)
FASTKERN_TORCH_BINARY(bitwise_and)
FASTKERN_TORCH_BINARY(bitwise_or)
FASTKERN_TORCH_BINARY(logical_and)
FASTKERN_TORCH_BINARY(logical_or)
FASTKERN_TORCH_BINARY(eq)
FASTKERN_TORCH_BINARY(ne)
FASTKERN_TORCH_BINARY(lt)
FASTKERN_TORCH_BINARY(le)
FASTKERN_TORCH_BINARY(gt)
FASTKERN_TORCH_BINARY(ge)
FASTKERN_TORCH_NUMBER(mul)
FASTKERN_TORCH_NUMBER(pow)
FASTKERN_TORCH_NUMBER(eq)
FASTKERN_TORCH_NUMBER(ne)
FASTKERN_TORCH_NUMBER(lt)
FASTKERN_TORCH_NUMBER(le)
FASTKERN_TORCH_NUMBER(gt)
FASTKERN_TORCH_NUMBER(ge)

#undef FASTKERN_TORCH_UNARY
#undef FASTKERN_TORCH_BINARY
#undef FASTKERN_TORCH_NUMBER
#undef FASTKERN_TORCH_SCALED

/// input / other; rounding_mode "trunc" or "floor" rounds the quotient to an integer.
inline at::Tensor div(const at::Tensor& input, const at::Tensor& other,
                      std::optional<std::string> rounding_mode = std::nullopt) {
  if (detail::wants(input, other)) return at::div(input, other, rounding_mode);
  static const auto op = detail::find_overload<at::Tensor(
      const at::Tensor&, const at::Tensor&, std::optional<std::string>)>("fastkern::div", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, other, std::move(rounding_mode));
}

/// approximate is "none" or "tanh".
inline at::Tensor gelu(const at::Tensor& input, const std::string& approximate = "none") {
  if (detail::wants(input)) return at::gelu(input, approximate);
  static const auto op =
      detail::find_overload<at::Tensor(const at::Tensor&, std::string)>("fastkern::gelu", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, approximate);
}

/// input between min and max, of which one may be missing.
inline at::Tensor clamp(const at::Tensor& input, const MaybeTensor& min,
                        const MaybeTensor& max = std::nullopt) {
  if (detail::want_gradient(MaybeTensor(input), min, max)) return at::clamp(input, min, max);
  static const auto op =
      detail::find_overload<at::Tensor(const at::Tensor&, const MaybeTensor&, const MaybeTensor&)>(
          "fastkern::clamp", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, min, max);
}

inline at::Tensor where(const at::Tensor& condition, const at::Tensor& input,
                        const at::Tensor& other) {
  if (detail::wants(input, other)) return at::where(condition, input, other);
  static const auto op =
      detail::find_overload<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
          "fastkern::where", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(condition, input, other);
}

/// The upper triangle of each matrix, 0 below diagonal number `diagonal`.
inline at::Tensor triu(const at::Tensor& input, std::int64_t diagonal = 0) {
  if (detail::wants(input)) return at::triu(input, diagonal);
  static const auto op =
      detail::find_overload<at::Tensor(const at::Tensor&, std::int64_t)>("fastkern::triu", "");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, diagonal);
}

}  // namespace fastkern
