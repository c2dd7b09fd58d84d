// SPDX-License-Identifier: Apache-2.0
// What the attention operators share: their options, the checks of all operands, before anything is
// allocated, and the copies that some strides need. The fakes say the same in
// python/fastkern/ops/_attention_check.py.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "fastkern/attention.h"
#include "tensor.h"

namespace fastkern::torch_layer {

/// What is said of an attention beside q, k and v. The order is that of the schema, which has them
/// as positional arguments: torch gives no gradient to keyword-only ones.
struct AttentionOptions {
  bool causal = false;
  std::int64_t window_left = -1, window_right = -1;
  std::optional<double> scale;
  OptionalTensor bias, alibi_slopes;
  double softcap = 0.0;
  OptionalTensor sinks;
  double dropout_p = 0.0;
  OptionalTensor seed, offset;
  bool top_left = false;
  OptionalTensor prefix, block_mask;
  std::int64_t block_size = 128;
  OptionalTensor seqused_q, seqused_k;
  bool deterministic = true;  // what the kernels are in any case

  static constexpr const char* kSchema =
      "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, Tensor? "
      "bias=None, Tensor? alibi_slopes=None, float softcap=0.0, Tensor? sinks=None, float "
      "dropout_p=0.0, Tensor? seed=None, Tensor? offset=None, bool top_left=False, Tensor? "
      "prefix=None, Tensor? block_mask=None, int block_size=128, Tensor? seqused_q=None, Tensor? "
      "seqused_k=None, bool deterministic=True";
};

template <>
struct boxing::Parameter<AttentionOptions> {
  static constexpr std::size_t kArguments = 18;
  static AttentionOptions next(const StableIValue*& at);
};

/// A view of `t`; fail() unless it has the dtype and sizes of `shape` and is on `device`, the one
/// of the argument `like`.
TensorRef checked_like(const Tensor& t, const TensorRef& shape, Device device, const char* op,
                       const char* argument, const char* like);

/// make_dense() where the last dimension is not dense.
OptionalTensor make_dense_last(const Tensor& t, TensorRef& ref);

/// A call that is being put together: q sets the device and the dtype of everything else.
class AttentionCall {
 public:
  /// Checks everything. With `start_q` and `start_k` the tensors are packed. With `fp8` they are of
  /// f8e4m3, and what is made of them is bf16.
  AttentionCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                MaybeTensor start_q, MaybeTensor start_k, const AttentionOptions& options,
                bool fp8 = false);

  Device device() const { return device_; }
  /// Sizes and dtype of these; no data.
  const TensorRef& out_shape() const { return out_; }
  const TensorRef& lse_shape() const { return lse_; }
  /// Entries of the batch; of packed tensors, sequences.
  std::int64_t batch() const { return batch_; }

  /// A checked view of what has the shape and dtype of `like`.
  TensorRef same(const Tensor& t, const TensorRef& like, const char* argument) const;
  /// fail() if a gradient is asked for of an operand that has none.
  void check_needed(bool need_dbias, bool need_dsinks) const;

  /// After all checks: the operands as kernels read them.
  AttentionFwd readable();
  /// The same for others: `ref`, a view of `t`, with a dense last dimension, or dense altogether.
  void make_dense_last(const Tensor& t, TensorRef& ref) {
    keep(torch_layer::make_dense_last(t, ref));
  }
  void make_dense(MaybeTensor t, TensorRef& ref) { keep(torch_layer::make_dense(t, ref)); }

 private:
  void check_operands(const Tensor& k, const Tensor& v);
  TensorRef operand(const Tensor& t, const char* argument) const;
  void check_numbers() const;
  void check_options();
  void check_ints(MaybeTensor t, std::int64_t count, const char* argument) const;
  const std::int32_t* ints(MaybeTensor t, const char* argument);
  void keep(OptionalTensor&& copy) {
    if (copy) copies_.push_back(std::move(*copy));
  }

  const char* op_;
  const Tensor &q_, &k_, &v_;
  MaybeTensor start_q_, start_k_;
  const AttentionOptions& options_;
  bool packed_, fp8_;
  Device device_;
  AttentionFwd args_;
  TensorRef out_, lse_;
  std::int64_t batch_ = 0, heads_ = 0;
  std::vector<Tensor> copies_;  // for as long as the launch takes; seldom any
};

/// p in [0, 1), seed and offset on the device of the argument `like`.
AttentionDropout checked_dropout(const char* op, double p, MaybeTensor seed, MaybeTensor offset,
                                 Device device, const char* like);

}  // namespace fastkern::torch_layer
