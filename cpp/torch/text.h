// SPDX-License-Identifier: Apache-2.0
// Arguments of schema types str and str?.
#pragma once

#include <optional>
#include <string>

#include "box.h"

namespace fastkern::torch_layer {

/// Owned by the call. torch's own conversion to std::string (2.10 to 2.13) leaks one string a call.
struct Text {
  std::string value;
};
using OptionalText = std::optional<Text>;

template <>
inline Text boxing::take<Text>(StableIValue value) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  const char* data = nullptr;
  std::size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  Text text{std::string(data, length)};
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

template <>
inline OptionalText boxing::take<OptionalText>(StableIValue value) {
  const auto handle = torch::stable::detail::to<std::optional<StringHandle>>(value);
  if (!handle) return std::nullopt;
  return take<Text>(torch::stable::detail::from(*handle));
}

}  // namespace fastkern::torch_layer
