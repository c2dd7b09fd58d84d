// SPDX-License-Identifier: Apache-2.0
#include "attention_call.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace fastkern::torch_layer {
namespace {

using torch::headeronly::ScalarType;

bool has_type(const Tensor& t, ScalarType type) {
  return type_of(t) == static_cast<std::int32_t>(type);
}

/// "(2 or 1, 6 or 1, 9)": the first `broadcast` sizes may be 1.
std::string broadcast_text(const std::int64_t* sizes, int ndim, int broadcast) {
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) {
    text += std::to_string(sizes[d]);
    if (d < broadcast && sizes[d] != 1) text += " or 1";
    if (d + 1 < ndim) text += ", ";
  }
  return text + ")";
}

void check_broadcast(const TensorRef& t, const std::int64_t* sizes, int ndim, int broadcast,
                     const char* op, const char* argument) {
  bool fits = t.ndim == ndim;
  for (int d = 0; fits && d < ndim; ++d) {
    fits = t.sizes[d] == sizes[d] || (d < broadcast && t.sizes[d] == 1);
  }
  FK_CHECK(fits, op, ": ", argument, " must have shape ", broadcast_text(sizes, ndim, broadcast),
           ", got ", t.shape());
}

/// A view of a bool tensor, as i8.
TensorRef mask_of(const Tensor& t, const char* op, const char* argument) {
  TensorRef ref = view_of(t, op, argument);
  FK_CHECK(has_type(t, ScalarType::Bool), op, ": ", argument, " must be torch.bool, got ",
           type_text(type_of(t)));
  ref.dtype = DType::i8;
  return ref;
}

TensorRef bias_of(const Tensor& t, const char* op) {
  TensorRef ref = view_of(t, op, "bias");
  if (has_type(t, ScalarType::Bool)) {
    ref.dtype = DType::i8;
  } else {
    FK_CHECK(has_type(t, ScalarType::Float) || has_type(t, ScalarType::Half) ||
                 has_type(t, ScalarType::BFloat16),
             op, ": bias must be torch.float32, torch.float16, torch.bfloat16 or torch.bool, got ",
             type_text(type_of(t)));
    ref = ref_of(t, op, "bias");
  }
  return ref;
}

TensorRef shape_of(DType dtype, std::initializer_list<std::int64_t> sizes) {
  TensorRef shape;
  shape.dtype = dtype;
  shape.ndim = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), shape.sizes.begin());
  return shape;
}

template <class T>
T next_of(const StableIValue*& at) {
  return boxing::Parameter<T>::next(at);
}

}  // namespace

AttentionOptions boxing::Parameter<AttentionOptions>::next(const StableIValue*& at) {
  return {
      // braces: from left to right
      .causal = next_of<bool>(at),
      .window_left = next_of<std::int64_t>(at),
      .window_right = next_of<std::int64_t>(at),
      .scale = next_of<std::optional<double>>(at),
      .bias = next_of<OptionalTensor>(at),
      .alibi_slopes = next_of<OptionalTensor>(at),
      .softcap = next_of<double>(at),
      .sinks = next_of<OptionalTensor>(at),
      .dropout_p = next_of<double>(at),
      .seed = next_of<OptionalTensor>(at),
      .offset = next_of<OptionalTensor>(at),
      .top_left = next_of<bool>(at),
      .prefix = next_of<OptionalTensor>(at),
      .block_mask = next_of<OptionalTensor>(at),
      .block_size = next_of<std::int64_t>(at),
      .seqused_q = next_of<OptionalTensor>(at),
      .seqused_k = next_of<OptionalTensor>(at),
      .deterministic = next_of<bool>(at),
  };
}

TensorRef checked_like(const Tensor& t, const TensorRef& shape, Device device, const char* op,
                       const char* argument, const char* like) {
  const TensorRef ref = ref_of(t, op, argument);
  FK_CHECK(ref.dtype == shape.dtype, op, ": ", argument, " must be ", dtype_text(shape.dtype),
           ", got ", dtype_text(ref.dtype));
  check_shape(ref, shape.sizes.data(), shape.ndim, op, argument);
  check_device(t, device, op, argument, like);
  return ref;
}

OptionalTensor make_dense_last(const Tensor& t, TensorRef& ref) {
  const int last = ref.ndim - 1;
  if (ref.sizes[last] == 1) ref.strides[last] = 1;
  return ref.strides[last] == 1 ? OptionalTensor() : make_dense(t, ref);
}

AttentionDropout checked_dropout(const char* op, double p, MaybeTensor seed, MaybeTensor offset,
                                 Device device, const char* like) {
  FK_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p must be at least 0 and below 1, got ", p);
  AttentionDropout dropout{p, nullptr, nullptr};
  if (seed) dropout.seed = one_int64(*seed, device, op, "seed", like);
  if (offset) dropout.offset = one_int64(*offset, device, op, "offset", like);
  FK_CHECK(seed || p == 0.0, op, ": seed must be given with dropout_p > 0, got None");
  return dropout;
}

AttentionCall::AttentionCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             MaybeTensor start_q, MaybeTensor start_k,
                             const AttentionOptions& options, bool fp8)
    : op_(op),
      q_(q),
      k_(k),
      v_(v),
      start_q_(start_q),
      start_k_(start_k),
      options_(options),
      packed_(static_cast<bool>(start_q)),
      fp8_(fp8) {
  args_.op = op;
  check_operands(k, v);
  check_numbers();
  check_options();
}

// ---- checks -------------------------------------------------------------------------------------

TensorRef AttentionCall::operand(const Tensor& t, const char* argument) const {
  if (!fp8_) return ref_of(t, op_, argument);
  TensorRef ref = view_of(t, op_, argument);
  FK_CHECK(has_type(t, ScalarType::Float8_e4m3fn), op_, ": ", argument,
           " must be torch.float8_e4m3fn, got ", type_text(type_of(t)));
  ref.dtype = DType::f8e4m3;
  return ref;
}

void AttentionCall::check_operands(const Tensor& k, const Tensor& v) {
  TensorRef &rq = args_.q, &rk = args_.k, &rv = args_.v;
  rq = operand(q_, "q");
  device_ = device_of(q_);
  FK_CHECK(rq.ndim == (packed_ ? 3 : 4), op_, ": q must have ",
           packed_ ? "three dimensions (total, H, D)" : "four dimensions (B, S, H, D)",
           ", got shape ", rq.shape());
  const int head = rq.ndim - 2, dim = rq.ndim - 1;
  FK_CHECK(rq.sizes[dim] >= 1, op_, ": q must have a last dimension of at least 1, got shape ",
           rq.shape());
  const auto check_type = [&](const TensorRef& t, const char* argument) {
    FK_CHECK(t.dtype == rq.dtype, op_, ": ", argument, " must be ", dtype_text(rq.dtype),
             " like q, got ", dtype_text(t.dtype));
  };
  const std::string batch = packed_ ? "" : std::to_string(rq.sizes[0]) + ", ";

  rk = operand(k, "k");
  check_type(rk, "k");
  FK_CHECK(rk.ndim == rq.ndim && (packed_ || rk.sizes[0] == rq.sizes[0]) &&
               rk.sizes[dim] == rq.sizes[dim],
           op_, ": k must have shape (", batch, packed_ ? "total" : "T", ", G, ", rq.sizes[dim],
           "), got ", rk.shape());
  heads_ = rq.sizes[head];
  const std::int64_t groups = rk.sizes[head];
  FK_CHECK(groups > 0 ? heads_ % groups == 0 : heads_ == 0, op_,
           ": k must have a number of heads that divides the ", heads_, " heads of q, got ",
           groups);
  check_device(k, device_, op_, "k", "q");

  rv = operand(v, "v");
  check_type(rv, "v");
  FK_CHECK(rv.ndim == rq.ndim && std::equal(&rk.sizes[0], &rk.sizes[dim], &rv.sizes[0]), op_,
           ": v must have shape (", batch, rk.sizes[head - 1], ", ", groups, ", Dv), got ",
           rv.shape());
  FK_CHECK(rv.sizes[dim] >= 1, op_, ": v must have a last dimension of at least 1, got shape ",
           rv.shape());
  check_device(v, device_, op_, "v", "q");

  out_ = rq;
  out_.sizes[dim] = rv.sizes[dim];
  if (fp8_) out_.dtype = DType::bf16;
  batch_ = rq.sizes[0];
  if (!packed_) {
    lse_ = shape_of(DType::f32, {batch_, heads_, rq.sizes[1]});
    return;
  }
  lse_ = shape_of(DType::f32, {heads_, rq.sizes[0]});
  const TensorRef starts = view_of(*start_q_, op_, "cu_seqlens_q");
  FK_CHECK(starts.ndim == 1 && starts.sizes[0] >= 1, op_,
           ": cu_seqlens_q must have shape (B + 1,), got ", starts.shape());
  check_ints(start_q_, starts.sizes[0], "cu_seqlens_q");
  check_ints(start_k_, starts.sizes[0], "cu_seqlens_k");
  batch_ = starts.sizes[0] - 1;
}

void AttentionCall::check_numbers() const {
  const AttentionOptions& o = options_;
  FK_CHECK(o.window_left >= -1, op_, ": window_left must be at least -1, got ", o.window_left);
  FK_CHECK(o.window_right >= -1, op_, ": window_right must be at least -1, got ", o.window_right);
  if (o.scale) check_finite(*o.scale, op_, "scale");
  check_softcap(o.softcap, op_);
  FK_CHECK(o.block_size == 64 || o.block_size == 128, op_, ": block_size must be 64 or 128, got ",
           o.block_size);
}

void AttentionCall::check_options() {
  const AttentionOptions& o = options_;
  for (const auto& [t, argument] :
       {std::pair<const OptionalTensor&, const char*>{o.bias, "bias"},
        std::pair<const OptionalTensor&, const char*>{o.block_mask, "block_mask"}}) {
    FK_CHECK(!packed_ || !t, op_, ": ", argument,
             " must be None, packed sequences take none, got a tensor of shape ",
             view_of(*t, op_, argument).shape());
  }
  if (o.bias) {
    args_.bias = bias_of(*o.bias, op_);
    const std::int64_t sizes[] = {batch_, heads_, args_.q.sizes[1], args_.k.sizes[1]};
    check_broadcast(args_.bias, sizes, 4, 3, op_, "bias");
    check_device(*o.bias, device_, op_, "bias", "q");
  }
  if (o.alibi_slopes) {
    TensorRef& slopes = args_.slopes;
    slopes = view_of(*o.alibi_slopes, op_, "alibi_slopes");
    FK_CHECK(has_type(*o.alibi_slopes, ScalarType::Float), op_,
             ": alibi_slopes must be torch.float32, got ", type_text(type_of(*o.alibi_slopes)));
    const bool own = slopes.ndim == 2 && slopes.sizes[0] == batch_ && slopes.sizes[1] == heads_;
    FK_CHECK(own || (slopes.ndim == 1 && slopes.sizes[0] == heads_), op_,
             ": alibi_slopes must have shape (", heads_, ",) or (", batch_, ", ", heads_, "), got ",
             slopes.shape());
    check_device(*o.alibi_slopes, device_, op_, "alibi_slopes", "q");
  }
  if (o.sinks) {
    args_.sinks = ref_of(*o.sinks, op_, "sinks");
    check_shape(args_.sinks, &heads_, 1, op_, "sinks");
    check_device(*o.sinks, device_, op_, "sinks", "q");
  }
  args_.dropout = checked_dropout(op_, o.dropout_p, o.seed, o.offset, device_, "q");
  check_ints(o.prefix, batch_, "prefix");
  if (o.block_mask) {
    TensorRef& blocks = args_.mask.blocks;
    blocks = mask_of(*o.block_mask, op_, "block_mask");
    const auto count = [&](std::int64_t n) { return (n + o.block_size - 1) / o.block_size; };
    const std::int64_t sizes[] = {heads_, count(args_.q.sizes[1]), count(args_.k.sizes[1])};
    check_broadcast(blocks, sizes, 3, 1, op_, "block_mask");
    check_device(*o.block_mask, device_, op_, "block_mask", "q");
  }
  check_ints(o.seqused_q, batch_, "seqused_q");
  check_ints(o.seqused_k, batch_, "seqused_k");
}

void AttentionCall::check_ints(MaybeTensor t, std::int64_t count, const char* argument) const {
  if (!t) return;
  const TensorRef ref = view_of(*t, op_, argument);
  FK_CHECK(has_type(*t, ScalarType::Int), op_, ": ", argument, " must be torch.int32, got ",
           type_text(type_of(*t)));
  check_shape(ref, &count, 1, op_, argument);
  check_device(*t, device_, op_, argument, "q");
}

TensorRef AttentionCall::same(const Tensor& t, const TensorRef& like, const char* argument) const {
  return checked_like(t, like, device_, op_, argument, "q");
}

void AttentionCall::check_needed(bool need_dbias, bool need_dsinks) const {
  FK_CHECK(!need_dbias || options_.bias, op_, ": need_dbias must be False without bias, got True");
  FK_CHECK(!need_dbias || is_float(args_.bias.dtype), op_,
           ": need_dbias must be False with a bias of torch.bool, got True");
  FK_CHECK(!need_dsinks || options_.sinks, op_,
           ": need_dsinks must be False without sinks, got True");
}

// ---- operands -----------------------------------------------------------------------------------

const std::int32_t* AttentionCall::ints(MaybeTensor t, const char* argument) {
  if (!t) return nullptr;
  TensorRef ref = view_of(*t, op_, argument);
  make_dense(t, ref);
  return static_cast<const std::int32_t*>(ref.data);
}

AttentionFwd AttentionCall::readable() {
  const AttentionOptions& o = options_;
  AttentionFwd& a = args_;
  make_dense_last(q_, a.q);
  make_dense_last(k_, a.k);
  make_dense_last(v_, a.v);
  make_dense(o.alibi_slopes, a.slopes);
  make_dense(o.sinks, a.sinks);
  a.scale = o.scale.value_or(1.0 / std::sqrt(static_cast<double>(a.q.sizes[a.q.ndim - 1])));
  a.softcap = o.softcap;
  a.mask.left = o.window_left;
  a.mask.right = o.causal ? 0 : o.window_right;
  a.mask.top_left = o.top_left;
  a.mask.prefix = ints(o.prefix, "prefix");
  a.mask.block_size = o.block_mask ? o.block_size : 0;
  a.lengths.batch = batch_;
  a.lengths.start_q = ints(start_q_, "cu_seqlens_q");
  a.lengths.start_k = ints(start_k_, "cu_seqlens_k");
  a.lengths.used_q = ints(o.seqused_q, "seqused_q");
  a.lengths.used_k = ints(o.seqused_k, "seqused_k");
  if (a.dropout.p > 0.0 && !a.dropout.offset) {
    copies_.push_back(new_zero(device_));
    a.dropout.offset = static_cast<const std::int64_t*>(data_of(copies_.back()));
  }
  return a;
}

}  // namespace fastkern::torch_layer
