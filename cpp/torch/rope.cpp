// SPDX-License-Identifier: Apache-2.0
// Rotary embeddings for torch: schema, checks, allocation, launch. Fakes and autograd:
// python/fastkern/ops/rope.py.
#include "fastkern/rope.h"

#include <string>
#include <tuple>
#include <utility>

#include "rope_call.h"

namespace fastkern::torch_layer {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void launch(const RopeFwd& args, Device device) {
  if (!device.is_cuda) {
    cpu::rope(args);
  } else if constexpr (kHasCuda) {
    cuda::rope(args, current_stream(device));
  }
}

Pair rope(const Tensor& q, const OptionalTensor& k, const Tensor& cos, const Tensor& sin,
          const RopeOptions& options, bool inverse) {
  RopeFwd args;
  RopeCall call(args.op, q, k);
  call.tables(cos, sin, options);
  args.q = call.q(), args.k = call.k();
  call.make_heads(q, args.q);
  call.make_heads(k, args.k);
  call.make_readable(cos, sin, options);
  args.angles = call.angles();
  args.angles.inverse = inverse;
  Tensor q_out = call.new_heads(true, call.q(), args.q_out);
  Tensor k_out = call.new_heads(k.has_value(), call.k(), args.k_out);
  launch(args, call.device());
  return {std::move(q_out), std::move(k_out)};
}

std::tuple<> rope_(const Tensor& q, const OptionalTensor& k, const Tensor& cos, const Tensor& sin,
                   const RopeOptions& options, bool inverse) {
  RopeFwd args;
  args.op = "fastkern::rope_";
  RopeCall call(args.op, q, k);
  call.tables(cos, sin, options);
  call.check_writable(call.q(), "q");
  if (k) call.check_writable(call.k(), "k");
  FK_CHECK(!k || call.k().data != call.q().data || call.k().numel() * call.q().numel() == 0,
           args.op, ": k must not be the memory of q, each is turned once");
  args.q = args.q_out = RopeCall::four(call.q());
  args.k = args.k_out = RopeCall::four(call.k());
  call.make_readable(cos, sin, options);
  args.angles = call.angles();
  args.angles.inverse = inverse;
  launch(args, call.device());
  return {};
}

Pair qk_norm_rope(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
                  const OptionalTensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                  double weight_offset, const RopeOptions& options) {
  QkNormRopeFwd args;
  args.eps = eps, args.weight_offset = weight_offset;
  RopeCall call(args.op, q, k);
  call.check_norm(eps, weight_offset);
  args.q_weight = call.weight(q_weight, "q_weight");
  args.k_weight = call.weight(k_weight, "k_weight");
  call.tables(cos, sin, options);
  args.q = call.q(), args.k = call.k();
  call.make_heads(q, args.q);
  call.make_heads(k, args.k);
  call.make_dense(q_weight, args.q_weight);
  call.make_dense(k_weight, args.k_weight);
  call.make_readable(cos, sin, options);
  args.angles = call.angles();
  Tensor q_out = call.new_heads(true, call.q(), args.q_out);
  Tensor k_out = call.new_heads(k.has_value(), call.k(), args.k_out);
  if (!call.device().is_cuda) {
    cpu::qk_norm_rope(args);
  } else if constexpr (kHasCuda) {
    cuda::qk_norm_rope(args, current_stream(call.device()));
  }
  return {std::move(q_out), std::move(k_out)};
}

void check_needed(const char* op, bool needed, const OptionalTensor& t, const char* argument,
                  const char* operand) {
  FK_CHECK(t || !needed, op, ": ", argument, " must be False without a ", operand, ", got True");
}

Four qk_norm_rope_bwd(const Tensor& dq_out, const OptionalTensor& dk_out, const Tensor& q,
                      const OptionalTensor& k, const OptionalTensor& q_weight,
                      const OptionalTensor& k_weight, const Tensor& cos, const Tensor& sin,
                      double eps, double weight_offset, const RopeOptions& options, bool need_dq,
                      bool need_dk, bool need_dq_weight, bool need_dk_weight) {
  QkNormRopeBwd args;
  args.eps = eps, args.weight_offset = weight_offset;
  RopeCall call(args.op, q, k);
  call.check_norm(eps, weight_offset);
  args.q_weight = call.weight(q_weight, "q_weight");
  args.k_weight = call.weight(k_weight, "k_weight");
  call.tables(cos, sin, options);
  args.dq_out = call.heads_like(dq_out, call.q(), "dq_out");
  FK_CHECK(k.has_value() == dk_out.has_value(), args.op, ": dk_out must be ",
           k ? "given with k, got None" : "None without k, got a tensor");
  if (dk_out) args.dk_out = call.heads_like(*dk_out, call.k(), "dk_out");
  check_needed(args.op, need_dk, k, "need_dk", "k");
  check_needed(args.op, need_dq_weight, q_weight, "need_dq_weight", "q_weight");
  check_needed(args.op, need_dk_weight, k_weight, "need_dk_weight", "k_weight");
  args.q = call.q(), args.k = call.k();
  call.make_heads(q, args.q);
  call.make_heads(k, args.k);
  call.make_heads(dq_out, args.dq_out);
  call.make_heads(dk_out, args.dk_out);
  call.make_dense(q_weight, args.q_weight);
  call.make_dense(k_weight, args.k_weight);
  call.make_readable(cos, sin, options);
  args.angles = call.angles();
  Tensor dq = call.new_heads(need_dq, call.q(), args.dq);
  Tensor dk = call.new_heads(need_dk, call.k(), args.dk);
  Tensor dq_weight = call.new_weight(need_dq_weight, args.q_weight, args.dq_weight);
  Tensor dk_weight = call.new_weight(need_dk_weight, args.k_weight, args.dk_weight);
  if (!call.device().is_cuda) {
    cpu::qk_norm_rope_bwd(args);
  } else if constexpr (kHasCuda) {
    const Stream stream = current_stream(call.device());
    args.workspace_size = cuda::qk_norm_rope_bwd_workspace(args, stream.device);
    const OptionalTensor workspace =
        args.workspace_size ? OptionalTensor(new_bytes(args.workspace_size, call.device()))
                            : std::nullopt;
    if (workspace) args.workspace = data_of(*workspace);
    cuda::qk_norm_rope_bwd(args, stream);
  }
  return {std::move(dq), std::move(dk), std::move(dq_weight), std::move(dk_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastkern, m) {
  const auto define = [&](const std::string& name, const std::string& schema) {
    m.def((name + schema).c_str());
  };
  const std::string options =
      "Tensor? positions=None, bool interleaved=False, int? rotary_dim=None, Tensor? "
      "cu_seqlens=None";
  const std::string turned = "Tensor cos, Tensor sin, " + options + ", bool inverse=False) -> ";
  const std::string pair = "(Tensor q_out, Tensor k_out)";
  define("rope_", "(Tensor(a!) q, Tensor(b!)? k, " + turned + "()");
  for (const std::string end : {"", "_fwd"}) {
    define("rope" + end, "(Tensor q, Tensor? k, " + turned + pair);
    define("qk_norm_rope" + end,
           "(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
           "float eps=1e-06, float weight_offset=0.0, " +
               options + ") -> " + pair);
  }
  define("qk_norm_rope_bwd",
         "(Tensor dq_out, Tensor? dk_out, Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, "
         "Tensor cos, Tensor sin, float eps, float weight_offset, Tensor? positions, bool "
         "interleaved, int? rotary_dim, Tensor? cu_seqlens, bool need_dq, bool need_dk, bool "
         "need_dq_weight, bool need_dk_weight) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor "
         "dk_weight)");
}

FASTKERN_REGISTER(m) {
  m.impl("rope", box<&rope>);
  m.impl("rope_fwd", box<&rope>);
  m.impl("rope_", box<&rope_>);
  m.impl("qk_norm_rope", box<&qk_norm_rope>);
  m.impl("qk_norm_rope_fwd", box<&qk_norm_rope>);
  m.impl("qk_norm_rope_bwd", box<&qk_norm_rope_bwd>);
}

}  // namespace fastkern::torch_layer
