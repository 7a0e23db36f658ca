// Host side of the likelihood kernels: segments of one logvar, which dimensions to merge, which path to take.
#include "likelihood.h"

namespace fused_elbo {
namespace cuda {
namespace {

// Elements in a run at the end of a row over which logvar does not change.
int64_t constant_run(const LikelihoodArgs& a) {
  if (a.logvar.data == nullptr) return a.shape.event;
  int64_t run = 1;
  for (int d = a.shape.event_dims - 1; d >= 0 && (a.logvar.stride[d] == 0 || a.shape.size[d] <= 1); --d)
    run *= a.shape.size[d];
  return run;
}

// Where no result belongs to a row, a dense batch is one long row.
void merge_rows(LikelihoodArgs& a, bool forward, bool backward, bool segments) {
  Shape& s = a.shape;
  const bool grad_per_row =
      backward && a.grad_ll.data != nullptr && a.reduction != Reduction::kNone && a.grad_ll.row_stride != 0;
  if (segments || grad_per_row || (forward && a.reduction == Reduction::kSample) || s.event_dims != 1 || s.rows <= 1)
    return;
  const bool elements = a.reduction == Reduction::kNone;
  const Operand* operands[] = {&a.x,
                               &a.mean,
                               &a.logvar,
                               elements && forward ? &a.ll : nullptr,
                               backward ? &a.grad_ll : nullptr,
                               &a.grad_mean,
                               &a.grad_x,
                               &a.grad_logvar,
                               &a.mask};
  for (const Operand* o : operands) {
    if (o != nullptr && o->data != nullptr && o->row_stride != s.event * o->stride[0]) return;
  }
  s.event *= s.rows;
  s.size[0] = s.event;
  s.rows = 1;
}

}  // namespace

PreparedLikelihood prepare_likelihood(const LikelihoodArgs& original, Pass pass, Workspace& workspace, bool strided) {
  const bool forward = pass != Pass::kBackward, backward = pass != Pass::kForward;
  LikelihoodArgs a = original;
  PreparedLikelihood r;
  LikelihoodParams& p = r.params;
  r.elements = changes_elements(a.scale, a.mask);
  strided = strided || r.elements;
  const int unit = strided ? kStridedUnit : unit_elements(a.dtype);

  const bool segment_grad = backward && a.grad_logvar.data != nullptr && a.logvar_inner > 1;
  const int64_t run = constant_run(a);
  const int64_t event = a.shape.event;
  // Without a gradient that asks for segments, they pay where logvar then needs no reading in the loop.
  const bool long_runs = run % unit == 0 && run >= 8 * unit;
  int64_t segment = segment_grad ? a.logvar_inner : event;
  if (!segment_grad && run < event && long_runs && !(backward && a.grad_logvar.data != nullptr)) segment = run;
  if (segment_grad && segment == 1) segment = event;
  p.uniform = run >= segment && a.scale.kind == ScaleKind::kPlain;
  if (pass != Pass::kBoth)
    merge_rows(a, forward, backward, segment_grad || segment != event || (a.logvar.data != nullptr && p.uniform));
  if (segment == event) segment = a.shape.event;

  Layout layout(a.shape, segment, unit, a.x);
  if (strided) layout.forbid_vector();
  p.x = layout.view(a.x);
  p.mean = layout.view(a.mean);
  bool full = false;
  if (!p.uniform && a.logvar.dtype == a.dtype) {
    Layout probe = layout;
    p.logvar = probe.view(a.logvar);
    full = probe.vector();
  } else {
    p.logvar = layout.view(a.logvar, true);
  }
  if (!p.uniform && !full) layout.forbid_vector();
  p.logvar_value = a.logvar_value;
  p.scale = a.scale;
  p.mask = layout.view(a.mask, true);
  if (forward && a.reduction == Reduction::kNone) p.ll = layout.view(a.ll);
  if (backward) {
    bool elementwise = false;
    for (int d = 0; d < a.shape.event_dims; ++d) elementwise = elementwise || a.grad_ll.stride[d] != 0;
    p.grad_elementwise = a.grad_ll.data != nullptr && elementwise;
    p.grad_ll = layout.view(a.grad_ll, !p.grad_elementwise);
    p.grad_ll_scale = a.grad_ll_scale;
    p.grad_mean = layout.view(a.grad_mean);
    p.grad_x = layout.view(a.grad_x);
    if (segment_grad) {
      p.segment_grad = a.grad_logvar.data;
      p.segment_grad_dtype = a.grad_logvar.dtype;
    } else {
      p.grad_logvar = layout.view(a.grad_logvar);
      // The vector path writes it in the dtype of x or of arithmetic, and only where every element has its own.
      const bool known = a.grad_logvar.dtype == a.dtype ||
                         a.grad_logvar.dtype == (a.dtype == DType::kFloat64 ? a.dtype : DType::kFloat32);
      if (p.grad_logvar.present() && (p.uniform || !known)) layout.forbid_vector();
    }
  }
  if (!layout.vector() && unit != kStridedUnit) return prepare_likelihood(original, pass, workspace, true);
  p.plan = layout.plan(true);
  r.access = !layout.vector() ? Access::kStrided : p.uniform ? Access::kUniform : Access::kFull;

  if (p.segment_grad != nullptr && p.plan.chunks > 1) {
    p.segment_parts.tickets = workspace.tickets(p.plan.outer_rows() * p.plan.segments);
    p.segment_parts.values = workspace.values(p.plan.tiles);
  }
  if (forward) {
    View out = layout.view(a.ll, true);
    p.result = workspace.result(p.plan, out, a.reduction, a.ll_scale);
  }
  return r;
}

int64_t likelihood_workspace_bytes(const LikelihoodArgs& args, Pass pass) {
  Workspace counted;
  prepare_likelihood(args, pass, counted);
  return counted.bytes();
}

void likelihood(const LikelihoodArgs& args, Pass pass, void* memory, const Context& context) {
  Workspace counted;
  prepare_likelihood(args, pass, counted);
  Workspace workspace(memory, counted);
  const PreparedLikelihood r = prepare_likelihood(args, pass, workspace);
  const LikelihoodParams& p = r.params;
  clear(memory, counted.ticket_bytes(), context.stream);
  if (pass == Pass::kBackward) {
    launch_likelihood_backward(r, args.dtype, context.stream);
    return;
  }
  const bool scalar = args.reduction == Reduction::kSum || args.reduction == Reduction::kBatchMean;
  if (scalar && p.plan.tiles == 0) {
    write_empty_sum(p.result.out.data, item_size(p.result.out.dtype), args.ll_scale, context.stream);
  }
  launch_likelihood_forward(r, args.dtype, context.stream);
}

}  // namespace cuda
}  // namespace fused_elbo
