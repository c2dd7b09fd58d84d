// SPDX-License-Identifier: Apache-2.0
// From run-time values to template arguments. Each takes a templated lambda:
// dispatch(dtype, [&]<class T>() { ... }).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fastkern/core.h"

namespace fastkern::cuda {

template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f.template operator()<__half>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    default:
      return f.template operator()<float>();
  }
}

/// Calls f with the first of kValues that is at least `value`; the last one if none is.
template <int kFirst, int... kRest, class F>
decltype(auto) dispatch_ceil(int value, F&& f) {
  if constexpr (sizeof...(kRest) == 0) {
    return f.template operator()<kFirst>();
  } else {
    return value <= kFirst ? f.template operator()<kFirst>() : dispatch_ceil<kRest...>(value, f);
  }
}

template <class F>
decltype(auto) dispatch_bool(bool value, F&& f) {
  return value ? f.template operator()<true>() : f.template operator()<false>();
}

}  // namespace fastkern::cuda
