// SPDX-License-Identifier: Apache-2.0
// Attention of 8-bit operands for torch: schema, checks of the scales, allocation, launch; the
// other checks: attention_call.cpp. Fake: python/fastkern/ops/attention_fp8.py.
#include "fastkern/attention_fp8.h"

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_call.h"

namespace fastkern::torch_layer {
namespace {

struct Fp8Options {
  AttentionOptions said;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  static constexpr const char* kSchema =
      "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, Tensor? "
      "sinks=None, bool top_left=False, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "Tensor? seqused_q=None, Tensor? seqused_k=None";
};

constexpr const char* kOp = "fastkern::flash_attn_fp8";

/// (B, G), (G) or one number, as (B, G).
TensorRef scale_of(const OptionalTensor& t, std::int64_t batch, std::int64_t heads, Device device,
                   const char* argument) {
  if (!t) return {};
  TensorRef ref = view_of(*t, kOp, argument);
  FK_CHECK(type_of(*t) == torch_type(DType::f32), kOp, ": ", argument,
           " must be torch.float32, got ", type_text(type_of(*t)));
  const bool one = ref.ndim == 0;
  const bool of_heads = ref.ndim == 1 && ref.sizes[0] == heads;
  const bool of_entries = ref.ndim == 2 && ref.sizes[0] == batch && ref.sizes[1] == heads;
  FK_CHECK(one || of_heads || of_entries, kOp, ": ", argument, " must have shape (", batch, ", ",
           heads, "), (", heads, ",) or (), got ", ref.shape());
  check_device(*t, device, kOp, argument, "q");
  ref.dtype = DType::f32;
  if (!of_entries) {
    ref.strides = {0, of_heads ? ref.strides[0] : 0};
    ref.ndim = 2;
    ref.sizes = {batch, heads};
  }
  return ref;
}

/// Whether the copy engine can read it: in 16 bytes, and not expanded. Strides that nobody takes a
/// step along become 0.
bool in_boxes(TensorRef& t) {
  bool fits = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d + 1 < t.ndim; ++d) {
    if (t.sizes[d] <= 1) t.strides[d] = 0;
    fits = fits && t.strides[d] % 16 == 0 && (t.strides[d] > 0 || t.sizes[d] <= 1);
  }
  return fits;
}

/// A dense copy, for as long as the launch takes.
Tensor copied(const Tensor& t, TensorRef& ref, Device device) {
  Tensor copy = new_like(ref, device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
  ref = dense_ref(copy, ref);
  return copy;
}

std::tuple<Tensor, Tensor> flash_attn_fp8(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const OptionalTensor& q_scale,
                                          const OptionalTensor& k_scale,
                                          const OptionalTensor& v_scale,
                                          const Fp8Options& options) {
  const auto& [said, starts_q, starts_k] = options;
  FK_CHECK(static_cast<bool>(starts_q) == static_cast<bool>(starts_k), kOp,
           ": cu_seqlens_k must be given if and only if cu_seqlens_q is, got ",
           starts_k ? "a tensor" : "None");
  AttentionCall call(kOp, q, k, v, starts_q, starts_k, said, /*fp8=*/true);
  const Device device = call.device();
  AttentionFp8Fwd args;
  const std::int64_t heads = view_of(k, kOp, "k").sizes[starts_q ? 1 : 2];
  args.q_scale = scale_of(q_scale, call.batch(), heads, device, "q_scale");
  args.k_scale = scale_of(k_scale, call.batch(), heads, device, "k_scale");
  args.v_scale = scale_of(v_scale, call.batch(), heads, device, "v_scale");

  AttentionFwd& fwd = args.fwd;
  fwd = call.readable();
  std::vector<Tensor> copies;
  if (device.is_cuda) {
    for (const auto& [t, ref] :
         {std::pair{&q, &fwd.q}, std::pair{&k, &fwd.k}, std::pair{&v, &fwd.v}}) {
      if (!in_boxes(*ref)) copies.push_back(copied(*t, *ref, device));
    }
  }
  Tensor out = new_like(call.out_shape(), device);
  Tensor lse = new_like(call.lse_shape(), device);
  fwd.out = dense_ref(out, call.out_shape());
  fwd.lse = dense_ref(lse, call.lse_shape());
  if constexpr (kHasCuda) {
    if (device.is_cuda) {
      args.workspace_size = cuda::attention_fp8_workspace(args);
      const Tensor workspace = new_bytes(args.workspace_size, device);
      args.workspace = data_of(workspace);
      cuda::attention_fp8(args, current_stream(device));
      return {std::move(out), std::move(lse)};
    }
  }
  cpu::attention_fp8(args);
  return {std::move(out), std::move(lse)};
}

}  // namespace

template <>
struct boxing::Parameter<Fp8Options> {
  static constexpr std::size_t kArguments = 10;
  static Fp8Options next(const StableIValue*& at) {
    Fp8Options o;
    o.said.causal = Parameter<bool>::next(at);
    o.said.window_left = Parameter<std::int64_t>::next(at);
    o.said.window_right = Parameter<std::int64_t>::next(at);
    o.said.scale = Parameter<std::optional<double>>::next(at);
    o.said.sinks = Parameter<OptionalTensor>::next(at);
    o.said.top_left = Parameter<bool>::next(at);
    o.cu_seqlens_q = Parameter<OptionalTensor>::next(at);
    o.cu_seqlens_k = Parameter<OptionalTensor>::next(at);
    o.said.seqused_q = Parameter<OptionalTensor>::next(at);
    o.said.seqused_k = Parameter<OptionalTensor>::next(at);
    return o;
  }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const std::string tensors =
      "flash_attn_fp8(Tensor q, Tensor k, Tensor v, Tensor? q_scale=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None, ";
  m.def((tensors + Fp8Options::kSchema + ") -> (Tensor out, Tensor lse)").c_str());
}

FASTKERN_REGISTER(m) { m.impl("flash_attn_fp8", box<&flash_attn_fp8>); }

}  // namespace fastkern::torch_layer
