// SPDX-License-Identifier: Apache-2.0
#include "rope_call.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

bool has_type(const Tensor& t, ScalarType type) {
  return type_of(t) == static_cast<std::int32_t>(type);
}

/// "2 or 1", or "1".
std::string or_one(std::int64_t size) { return size == 1 ? "1" : std::to_string(size) + " or 1"; }

/// " or (2 or 1, 5" and `end`: what q with a batch allows besides.
std::string or_batched(const TensorRef& q, const char* end) {
  std::string text;
  if (q.ndim == 4) {
    text.append(" or (").append(or_one(q.sizes[0])).append(", ");
    text.append(std::to_string(q.sizes[1])).append(end);
  }
  return text;
}

/// A stride of 0 where there is one entry for all.
std::int64_t batch_stride(const TensorRef& t) { return t.sizes[0] == 1 ? 0 : t.strides[0]; }

}  // namespace

RopeOptions boxing::Parameter<RopeOptions>::next(const StableIValue*& at) {
  return {
      // braces: from left to right
      .positions = Parameter<OptionalTensor>::next(at),
      .interleaved = Parameter<bool>::next(at),
      .rotary_dim = Parameter<std::optional<std::int64_t>>::next(at),
      .cu_seqlens = Parameter<OptionalTensor>::next(at),
  };
}

RopeCall::RopeCall(const char* op, const Tensor& q, const OptionalTensor& k)
    : op_(op), q_(ref_of(q, op, "q")), device_(device_of(q)) {
  FK_CHECK(q_.ndim == 4 || q_.ndim == 3, op,
           ": q must have four dimensions (B, S, H, D) or three (total, H, D), got shape ",
           q_.shape());
  if (!k) return;
  k_ = ref_of(*k, op, "k");
  FK_CHECK(k_.dtype == q_.dtype, op, ": k must be ", dtype_text(q_.dtype), " like q, got ",
           dtype_text(k_.dtype));
  bool fits = k_.ndim == q_.ndim;
  for (int d = 0; fits && d < q_.ndim; ++d) {
    fits = k_.sizes[d] == q_.sizes[d] || d == q_.ndim - 2;
  }
  FK_CHECK(fits, op, ": k must have shape (",
           q_.ndim == 4 ? std::to_string(q_.sizes[0]).append(", ") : "", tokens(), ", G, ",
           q_.sizes[q_.ndim - 1], "), got ", k_.shape());
  check_device(*k, device_, op, "k", "q");
}

TensorRef RopeCall::heads_like(const Tensor& t, const TensorRef& like, const char* argument) const {
  const TensorRef ref = ref_of(t, op_, argument);
  FK_CHECK(ref.dtype == like.dtype, op_, ": ", argument, " must be ", dtype_text(like.dtype),
           " like q, got ", dtype_text(ref.dtype));
  check_shape(ref, like.sizes.data(), like.ndim, op_, argument);
  check_device(t, device_, op_, argument, "q");
  return ref;
}

TensorRef RopeCall::weight(const OptionalTensor& t, const char* argument) const {
  if (!t) return {};
  const TensorRef ref = ref_of(*t, op_, argument);
  check_shape(ref, &q_.sizes[q_.ndim - 1], 1, op_, argument);
  check_device(*t, device_, op_, argument, "q");
  return ref;
}

void RopeCall::check_norm(double eps, double weight_offset) {
  normed_ = true;
  FK_CHECK(q_.sizes[q_.ndim - 1] <= kQkNormMost, op_, ": q must have a head dimension of at most ",
           kQkNormMost, ", got shape ", q_.shape());
  FK_CHECK(std::isfinite(eps) && eps >= 0.0, op_, ": eps must be finite and >= 0, got ", eps);
  check_finite(weight_offset, op_, "weight_offset");
}

void RopeCall::tables(const Tensor& cos, const Tensor& sin, const RopeOptions& options) {
  RopeAngles& a = angles_;
  const std::int64_t n = q_.sizes[q_.ndim - 1];
  a.interleaved = options.interleaved;
  a.rotary_dim = options.rotary_dim.value_or(n);
  FK_CHECK(a.rotary_dim >= 2 && a.rotary_dim <= n && a.rotary_dim % 2 == 0, op_,
           ": rotary_dim must be even, at least 2 and at most the head dimension of q, ", n,
           ", got ", a.rotary_dim);

  FK_CHECK(!normed_ || n <= kQkNormMost - 16 || a.rotary_dim % 16 == 0, op_,
           ": rotary_dim must be a multiple of 16 in heads of ", n, " columns, got ", a.rotary_dim);

  a.cos = ref_of(cos, op_, "cos");
  const bool per_token = a.cos.ndim == 3 && q_.ndim == 4;
  bool fits = a.cos.ndim == 2 || per_token;
  if (fits) {
    const std::int64_t width = a.cos.sizes[a.cos.ndim - 1];
    fits = width == a.rotary_dim || 2 * width == a.rotary_dim;
  }
  if (per_token) {
    fits = fits && (a.cos.sizes[0] == q_.sizes[0] || a.cos.sizes[0] == 1) &&
           a.cos.sizes[1] == tokens();
  }
  FK_CHECK(fits, op_, ": cos must have shape (T, W)", or_batched(q_, ", W)"), " with W ",
           a.rotary_dim / 2, " or ", a.rotary_dim, ", got ", a.cos.shape());
  check_device(cos, device_, op_, "cos", "q");
  a.sin = ref_of(sin, op_, "sin");
  FK_CHECK(a.sin.dtype == a.cos.dtype, op_, ": sin must be ", dtype_text(a.cos.dtype),
           " like cos, got ", dtype_text(a.sin.dtype));
  check_shape(a.sin, a.cos.sizes.data(), a.cos.ndim, op_, "sin");
  check_device(sin, device_, op_, "sin", "q");

  if (options.positions) positions(options.positions);
  if (options.cu_seqlens) cu_seqlens(options.cu_seqlens, options.positions.has_value());
  if (per_token || options.positions || options.cu_seqlens) return;
  FK_CHECK(a.cos.sizes[0] >= tokens(), op_, ": cos must have a row for each of ", tokens(),
           " positions, got shape ", a.cos.shape());
}

void RopeCall::positions(const OptionalTensor& t) {
  const TensorRef ref = view_of(*t, op_, "positions");
  angles_.narrow = has_type(*t, ScalarType::Int);
  FK_CHECK(angles_.narrow || has_type(*t, ScalarType::Long), op_,
           ": positions must be torch.int64 or torch.int32, got ", type_text(type_of(*t)));
  FK_CHECK(angles_.cos.ndim == 2, op_,
           ": positions must be None where cos has a row for each token, got shape ", ref.shape());
  const bool batched = ref.ndim == 2 && q_.ndim == 4;
  const bool fits =
      (ref.ndim == 1 && ref.sizes[0] == tokens()) ||
      (batched && (ref.sizes[0] == q_.sizes[0] || ref.sizes[0] == 1) && ref.sizes[1] == tokens());
  FK_CHECK(fits, op_, ": positions must have shape (", tokens(), ",)", or_batched(q_, ")"),
           ", got ", ref.shape());
  check_device(*t, device_, op_, "positions", "q");
  angles_.positions = ref.data;
  angles_.positions_stride = ref.strides[ref.ndim - 1];
  angles_.positions_batch_stride = batched ? batch_stride(ref) : 0;
}

void RopeCall::cu_seqlens(const OptionalTensor& t, bool with_positions) {
  const TensorRef ref = view_of(*t, op_, "cu_seqlens");
  FK_CHECK(has_type(*t, ScalarType::Int), op_, ": cu_seqlens must be torch.int32, got ",
           type_text(type_of(*t)));
  FK_CHECK(q_.ndim == 3 && !with_positions, op_, ": cu_seqlens must be None ",
           with_positions ? "beside positions" : "unless q is (total, H, D)", ", got shape ",
           ref.shape());
  FK_CHECK(ref.ndim == 1 && ref.sizes[0] >= 1, op_, ": cu_seqlens must have shape (B + 1,), got ",
           ref.shape());
  check_device(*t, device_, op_, "cu_seqlens", "q");
  cu_seqlens_ = ref;
  angles_.sequences = ref.sizes[0] - 1;
}

void RopeCall::check_writable(const TensorRef& t, const char* argument) const {
  std::array<std::pair<std::int64_t, std::int64_t>, 4> levels{};  // stride, size
  int count = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] <= 1) continue;
    int at = count++;  // the nearest first
    for (; at > 0 && levels[at - 1].first > t.strides[d]; --at) levels[at] = levels[at - 1];
    levels[at] = {t.strides[d], t.sizes[d]};
  }
  std::int64_t span = 1;
  bool apart = t.sizes[t.ndim - 1] <= 1 || t.strides[t.ndim - 1] == 1;
  for (int i = 0; i < count; ++i) {
    apart = apart && levels[i].first >= span;
    span += levels[i].first * (levels[i].second - 1);
  }
  FK_CHECK(apart || t.numel() == 0, op_, ": ", argument,
           " must be writable in place: a dense last dimension and no element twice; got shape ",
           t.shape(), " with strides ", shape_text(t.strides.data(), t.ndim));
}

void RopeCall::make_heads(MaybeTensor t, TensorRef& ref) {
  if (t && ref.sizes[ref.ndim - 1] > 1 && ref.strides[ref.ndim - 1] != 1) make_dense(t, ref);
  ref = four(ref);
}

void RopeCall::make_readable(const Tensor& cos, const Tensor& sin, const RopeOptions& options) {
  RopeAngles& a = angles_;
  const int last = a.cos.ndim - 1;
  if (a.cos.sizes[last] > 1 && a.cos.strides[last] != 1) make_dense(cos, a.cos);
  if (a.sin.sizes[last] > 1 && a.sin.strides[last] != 1) make_dense(sin, a.sin);
  if (!options.cu_seqlens) return;
  make_dense(options.cu_seqlens, cu_seqlens_);
  a.cu_seqlens = static_cast<const std::int32_t*>(cu_seqlens_.data);
}

Tensor RopeCall::new_heads(bool wanted, const TensorRef& like, TensorRef& out) const {
  if (!wanted) return no_output(q_.dtype, device_);
  Tensor result = new_like(like, device_);
  out = four(dense_ref(result, like));
  return result;
}

Tensor RopeCall::new_weight(bool wanted, const TensorRef& like, TensorRef& out) const {
  if (!wanted) return no_output(like.given() ? like.dtype : q_.dtype, device_);
  Tensor result = new_like(like, device_);
  out = dense_ref(result, like);
  return result;
}

TensorRef RopeCall::four(const TensorRef& t) {
  if (t.ndim != 3) return t;
  TensorRef out = t;
  out.ndim = 4;
  out.sizes[0] = 1, out.strides[0] = 0;
  for (int d = 0; d < 3; ++d) out.sizes[d + 1] = t.sizes[d], out.strides[d + 1] = t.strides[d];
  return out;
}

}  // namespace fastkern::torch_layer
