// SPDX-License-Identifier: Apache-2.0
// Attention for torch: schemas, allocation, launch; checks: attention_call.cpp. Fakes and autograd:
// python/fastkern/ops/_attention.py.
#include "fastkern/attention.h"

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "attention_call.h"

namespace fastkern::torch_layer {
namespace {

using OutLse = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dbias, dsinks

/// A new tensor and, in `ref`, its view.
Tensor new_result(const TensorRef& like, Device device, TensorRef& ref) {
  Tensor t = new_like(like, device);
  ref = dense_ref(t, like);
  return t;
}

/// on_cuda() for operands on a CUDA device, else on_cpu().
template <class OnCpu, class OnCuda>
void launch(Device device, const OnCpu& on_cpu, const OnCuda& on_cuda) {
  if constexpr (kHasCuda) {
    if (device.is_cuda) return on_cuda(current_stream(device));
  }
  on_cpu();
}

// ---- forward ------------------------------------------------------------------------------------

OutLse forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               MaybeTensor start_q, MaybeTensor start_k, const AttentionOptions& options) {
  AttentionCall call(op, q, k, v, start_q, start_k, options);
  AttentionFwd args = call.readable();
  Tensor out = new_result(call.out_shape(), call.device(), args.out);
  Tensor lse = new_result(call.lse_shape(), call.device(), args.lse);
  launch(
      call.device(), [&] { cpu::attention(args); },
      [&](Stream stream) {
        args.workspace_size = cuda::attention_workspace(args, stream);
        std::optional<Tensor> workspace;
        if (args.workspace_size > 0) {
          workspace = new_bytes(args.workspace_size, call.device());
          args.workspace = data_of(*workspace);
        }
        cuda::attention(args, stream);
      });
  return {std::move(out), std::move(lse)};
}

OutLse flash_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                  const AttentionOptions& options) {
  return forward("fastkern::flash_attn", q, k, v, {}, {}, options);
}

OutLse flash_attn_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                         const AttentionOptions& options) {
  return forward("fastkern::flash_attn_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, options);
}

// ---- backward -----------------------------------------------------------------------------------

/// The last arguments of the backward operators.
struct Needs {
  bool dq, dk, dv, dbias, dsinks;
  static constexpr const char* kSchema =
      "bool need_dq=True, bool need_dk=True, bool need_dv=True, bool need_dbias=False, bool "
      "need_dsinks=False";
};

Gradients backward(const char* op, const Tensor& dout, MaybeTensor dlse, const Tensor& q,
                   const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                   MaybeTensor start_q, MaybeTensor start_k, const AttentionOptions& options,
                   const Needs& needs) {
  AttentionCall call(op, q, k, v, start_q, start_k, options);
  AttentionBwd args;
  args.dout = call.same(dout, call.out_shape(), "dout");
  if (dlse) args.dlse = call.same(*dlse, call.lse_shape(), "dlse");
  TensorRef out_ref = call.same(out, call.out_shape(), "out");
  TensorRef lse_ref = call.same(lse, call.lse_shape(), "lse");
  call.check_needed(needs.dbias, needs.dsinks);

  args.fwd = call.readable();
  call.make_dense_last(dout, args.dout);
  call.make_dense(dlse, args.dlse);
  call.make_dense(out, out_ref);
  call.make_dense(lse, lse_ref);
  args.fwd.out = out_ref;
  args.fwd.lse = lse_ref;
  const auto gradient = [&](bool needed, const TensorRef& like, TensorRef& ref) {
    if (!needed) {
      const bool own = like.given() && is_float(like.dtype);
      return no_output(own ? like.dtype : args.fwd.q.dtype, call.device());
    }
    return new_result(like, call.device(), ref);
  };
  Tensor dq = gradient(needs.dq, args.fwd.q, args.dq);
  Tensor dk = gradient(needs.dk, args.fwd.k, args.dk);
  Tensor dv = gradient(needs.dv, args.fwd.v, args.dv);
  Tensor dbias = gradient(needs.dbias, args.fwd.bias, args.dbias);
  Tensor dsinks = gradient(needs.dsinks, args.fwd.sinks, args.dsinks);
  const bool any = needs.dq || needs.dk || needs.dv || needs.dbias || needs.dsinks;
  if (any) {
    launch(
        call.device(), [&] { cpu::attention_bwd(args); },
        [&](Stream stream) {
          args.workspace_size = cuda::attention_bwd_workspace(args, stream);
          const Tensor workspace = new_bytes(args.workspace_size, call.device());
          args.workspace = data_of(workspace);
          cuda::attention_bwd(args, stream);
        });
  }
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dbias), std::move(dsinks)};
}

Gradients flash_attn_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                         const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                         const AttentionOptions& options, const Needs& needs) {
  return backward("fastkern::flash_attn_bwd", dout, dlse, q, k, v, out, lse, {}, {}, options,
                  needs);
}

Gradients flash_attn_varlen_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                const Tensor& k, const Tensor& v, const Tensor& out,
                                const Tensor& lse, const Tensor& cu_seqlens_q,
                                const Tensor& cu_seqlens_k, const AttentionOptions& options,
                                const Needs& needs) {
  return backward("fastkern::flash_attn_varlen_bwd", dout, dlse, q, k, v, out, lse, cu_seqlens_q,
                  cu_seqlens_k, options, needs);
}

// ---- parts put together, the dropout mask -------------------------------------------------------

/// Checked views of outs and lses, rows of outs dense, perhaps in `copy`.
struct Parts {
  Parts(const char* op, const Tensor& outs_in, const Tensor& lses_in)
      : outs(ref_of(outs_in, op, "outs")), lses(ref_of(lses_in, op, "lses")) {
    const auto& at = outs.sizes;
    FK_CHECK(outs.ndim == 5 && at[0] >= 1, op,
             ": outs must have shape (K, B, S, H, Dv) with K at least 1, got ", outs.shape());
    FK_CHECK(lses.dtype == DType::f32, op, ": lses must be torch.float32, got ",
             dtype_text(lses.dtype));
    const std::int64_t sizes[] = {at[0], at[1], at[3], at[2]};
    check_shape(lses, sizes, 4, op, "lses");
    device = device_of(outs_in);
    check_device(lses_in, device, op, "lses", "outs");
    out = dense(nullptr, outs.dtype, at[1], at[2], at[3], at[4]);
    lse = dense(nullptr, DType::f32, at[1], at[3], at[2]);
    copy = make_dense_last(outs_in, outs);
  }

  TensorRef outs, lses, out, lse;  // out, lse: shapes of what they make
  Device device;
  OptionalTensor copy;
};

OutLse merge_attention(const Tensor& outs, const Tensor& lses) {
  MergeFwd args;
  const Parts parts(args.op, outs, lses);
  args.outs = parts.outs, args.lses = parts.lses;
  Tensor out = new_result(parts.out, parts.device, args.out);
  Tensor lse = new_result(parts.lse, parts.device, args.lse);
  launch(
      parts.device, [&] { cpu::merge_attention(args); },
      [&](Stream stream) { cuda::merge_attention(args, stream); });
  return {std::move(out), std::move(lse)};
}

OutLse merge_attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& outs,
                           const Tensor& lses, bool need_douts, bool need_dlses) {
  MergeBwd args;
  const Parts parts(args.op, outs, lses);
  args.outs = parts.outs, args.lses = parts.lses;
  args.dout = checked_like(dout, parts.out, parts.device, args.op, "dout", "outs");
  if (dlse) args.dlse = checked_like(*dlse, parts.lse, parts.device, args.op, "dlse", "outs");
  const OptionalTensor copy = make_dense_last(dout, args.dout);
  const auto gradient = [&](bool needed, const TensorRef& shape, TensorRef& ref) {
    return needed ? new_result(shape, parts.device, ref) : no_output(shape.dtype, parts.device);
  };
  Tensor douts = gradient(need_douts, parts.outs, args.douts);
  Tensor dlses = gradient(need_dlses, parts.lses, args.dlses);
  if (need_douts || need_dlses) {
    launch(
        parts.device, [&] { cpu::merge_attention_bwd(args); },
        [&](Stream stream) { cuda::merge_attention_bwd(args, stream); });
  }
  return {std::move(douts), std::move(dlses)};
}

Tensor attn_dropout_mask(std::int64_t B, std::int64_t H, std::int64_t S, std::int64_t T,
                         double dropout_p, const Tensor& seed, const OptionalTensor& offset) {
  constexpr const char* kOp = "fastkern::attn_dropout_mask";
  const std::int64_t sizes[] = {B, H, S, T};
  for (int d = 0; d < 4; ++d) {
    FK_CHECK(sizes[d] >= 0, kOp, ": ", "BHST"[d], " must be >= 0, got ", sizes[d]);
  }
  view_of(seed, kOp, "seed");  // fails if it is None
  const Device device = device_of(seed);
  AttentionDropout dropout = checked_dropout(kOp, dropout_p, seed, offset, device, "seed");
  OptionalTensor zero;
  if (!offset) {
    zero = new_zero(device);
    dropout.offset = static_cast<const std::int64_t*>(data_of(*zero));
  }
  Tensor mask =
      new_dense(sizes, 4, static_cast<std::int32_t>(torch::headeronly::ScalarType::Bool), device);
  const TensorRef ref = dense(data_of(mask), DType::i8, B, H, S, T);
  launch(
      device, [&] { cpu::attention_dropout_mask(ref, dropout, kOp); },
      [&](Stream stream) { cuda::attention_dropout_mask(ref, dropout, kOp, stream); });
  return mask;
}

}  // namespace

template <>
struct boxing::Parameter<Needs> {
  static constexpr std::size_t kArguments = 5;
  static Needs next(const StableIValue*& at) {
    const auto flag = [&] { return Parameter<bool>::next(at); };
    return {flag(), flag(), flag(), flag(), flag()};
  }
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const std::string& name, const std::string& schema) {
    m.def((name + schema).c_str());
  };
  const std::string options = AttentionOptions::kSchema, needs = Needs::kSchema;
  const std::string out_lse = ") -> (Tensor out, Tensor lse)";
  const std::string starts = ", Tensor cu_seqlens_q, Tensor cu_seqlens_k, ";
  for (const std::string end : {"", "_fwd"}) {
    define("flash_attn" + end, "(Tensor q, Tensor k, Tensor v, " + options + out_lse);
    define("flash_attn_varlen" + end, "(Tensor q, Tensor k, Tensor v" + starts + options + out_lse);
    define("merge_attention" + end, "(Tensor outs, Tensor lses" + out_lse);
  }
  const std::string saved =
      "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse";
  const std::string gradients =
      needs + ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)";
  define("flash_attn_bwd", saved + ", " + options + ", " + gradients);
  define("flash_attn_varlen_bwd", saved + starts + options + ", " + gradients);
  define("merge_attention_bwd",
         "(Tensor dout, Tensor? dlse, Tensor outs, Tensor lses, bool need_douts=True, bool "
         "need_dlses=True) -> (Tensor douts, Tensor dlses)");
  define("attn_dropout_mask",
         "(int B, int H, int S, int T, float dropout_p, Tensor seed, Tensor? offset=None) -> "
         "Tensor");
}

FASTKERN_REGISTER(m) {
  m.impl("flash_attn", box<&flash_attn>);
  m.impl("flash_attn_fwd", box<&flash_attn>);
  m.impl("flash_attn_bwd", box<&flash_attn_bwd>);
  m.impl("flash_attn_varlen", box<&flash_attn_varlen>);
  m.impl("flash_attn_varlen_fwd", box<&flash_attn_varlen>);
  m.impl("flash_attn_varlen_bwd", box<&flash_attn_varlen_bwd>);
  m.impl("merge_attention", box<&merge_attention>);
  m.impl("merge_attention_fwd", box<&merge_attention>);
  m.impl("merge_attention_bwd", box<&merge_attention_bwd>);
  m.impl("attn_dropout_mask", box<&attn_dropout_mask>);
}

}  // namespace fastkern::torch_layer
