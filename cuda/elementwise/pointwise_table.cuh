// SPDX-License-Identifier: Apache-2.0
// A part of the table as a switch over launchers.
#pragma once

#include "pointwise_launch.h"
#include "pointwise_packs.cuh"

namespace fastkern::pointwise_detail {

/// What pointwise_simplified() makes something else.
template <class F>
inline constexpr bool kNeverAsked =
    std::is_same_v<F, functor::rsub> || std::is_same_v<F, functor::gt> ||
    std::is_same_v<F, functor::ge> || std::is_same_v<F, functor::clamp_min> ||
    std::is_same_v<F, functor::clamp_max>;

template <class F, class T, unsigned kKind>
Launcher launcher_of() {
  if constexpr ((F::kTypes & kKind) != 0 && !kNeverAsked<F>) {
    return launch_function<F, T>;
  } else {
    return nullptr;
  }
}

}  // namespace fastkern::pointwise_detail

#define FASTKERN_CASE(name, inputs, promotion, types, ...) \
  case Pointwise::name:                                    \
    return launcher_of<functor::name, FASTKERN_TYPE, FASTKERN_KIND>();
