// SPDX-License-Identifier: Apache-2.0
// The softmax family on CUDA: which kernel a call takes. What is computed: softmax.h. The kernels:
// softmax_fwd.cuh, softmax_bwd.cuh (rows that stay on the multiprocessor), softmax_segments.cu (any
// row), softmax_middle.cu (another dimension than the last).
#include <initializer_list>

#include "dispatch.h"
#include "fastkern/rows.h"
#include "fastkern/softmax.h"
#include "launch.cuh"
#include "softmax/softmax_launch.h"
#include "tile/pack.cuh"

namespace fastkern::cuda {
namespace {

using namespace softmax_detail;  // NOLINT: all of it is about this

/// The element type of a call's kernel, and whether its operands keep their own.
struct Type {
  DType type;
  bool mixed;
};

Type type_of(std::initializer_list<const TensorRef*> operands) {
  const DType type = (*operands.begin())->dtype;
  for (const TensorRef* t : operands)
    if (t->dtype != type) return {DType::f32, true};
  return {type, false};
}

Type type_of(const SoftmaxFwd& a) {
  if (a.kind == SoftmaxKind::logsumexp) return type_of({&a.x});
  return type_of({&a.x, &a.y});
}
Type type_of(const SoftmaxBwd& a) { return type_of({&a.y, &a.dy, &a.dx}); }

/// Plan of a call; `resident` is false where a row has to be read twice. Clusters of 16 blocks are
/// for compute capability 9.x and 10.x.
Plan plan_of(Type type, std::int64_t n, int operands, int device, const char* op) {
  const int capability_of = capability(device, op);
  Plan plan = softmax_plan(n, type.type, operands, capability_of >= 90);
  if (plan.blocks_per_row > 8 && capability_of >= 110) plan.resident = false;
  return plan;
}

/// f<T>() with the element type.
template <class F>
void dispatch_type(Type type, F&& f) {
  if (type.mixed) return f.template operator()<tile::Mixed>();
  dispatch(type.type, f);
}

void check_kind(bool masked, SoftmaxKind kind, bool middle, const char* op) {
  FK_CHECK(!masked || (kind == SoftmaxKind::softmax && !middle), op,
           ": a mask is for softmax over the last dimension");
}

}  // namespace

void softmax(const SoftmaxFwd& args, Stream stream) {
  check_kind(args.masked, args.kind, args.middle, args.op);
  if (args.middle) return launch_fwd_middle(args, stream);
  const Rows x = rows_of(args.x, args.op, "x");
  if (x.count == 0) return;
  const Type type = type_of(args);
  const Plan plan = plan_of(type, x.length, 1, stream.device, args.op);
  if (!plan.resident) return launch_fwd_segments(args, stream);
  dispatch_type(type, [&]<class T>() { launch_fwd<T>(args, plan, stream); });
}

void softmax_bwd(const SoftmaxBwd& args, Stream stream) {
  check_kind(args.causal, args.kind, args.middle, args.op);
  if (args.middle) return launch_bwd_middle(args, stream);
  const Rows y = rows_of(args.y, args.op, "y");
  if (y.count * y.length == 0) return;
  if (args.kind == SoftmaxKind::logsumexp) return launch_logsumexp_bwd(args, stream);
  const Type type = type_of(args);
  const Plan plan = plan_of(type, y.length, 2, stream.device, args.op);
  if (!plan.resident) return launch_bwd_segments(args, stream);
  dispatch_type(type, [&]<class T>() { launch_bwd<T>(args, plan, stream); });
}

std::size_t softmax_workspace(const SoftmaxFwd& args, int device) {
  if (args.middle) return 0;
  const Rows x = rows_of(args.x, args.op, "x");
  const Plan plan = plan_of(type_of(args), x.length, 1, device, args.op);
  return plan.resident ? 0 : segments_bytes(x.count, x.length);
}

std::size_t softmax_bwd_workspace(const SoftmaxBwd& args, int device) {
  if (args.middle || args.kind == SoftmaxKind::logsumexp) return 0;
  const Rows y = rows_of(args.y, args.op, "y");
  const Plan plan = plan_of(type_of(args), y.length, 2, device, args.op);
  return plan.resident ? 0 : segments_bytes(y.count, y.length);
}

}  // namespace fastkern::cuda
