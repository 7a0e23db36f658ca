// Host side of the latent kernels: which dimensions to merge, which path to take, what the workspace holds.
#include "latent.h"

namespace fused_elbo {
namespace cuda {
namespace {

struct Prepared {
  LatentParams params;
  LatentPath path;
  Workspace workspace;
};

bool scalar_per_row(const Operand& o) {
  for (int d = 0; d < kMaxEventDims; ++d) {
    if (o.stride[d] != 0) return false;
  }
  return true;
}

// Where no result belongs to a row, a dense batch is one long row: no ragged row ends, and any N is read 16 bytes at a
// time.
void merge_rows(LatentArgs& a, bool backward) {
  const bool rows_matter =
      backward ? a.has_grad_kl && a.grad_kl.data != nullptr && scalar_per_row(a.grad_kl) && a.grad_kl.row_stride != 0
               : a.kl.data != nullptr && a.reduction == Reduction::kSample;
  Shape& s = a.shape;
  if (rows_matter || s.event_dims != 1 || s.rows <= 1) return;
  const bool kl_elements = a.reduction == Reduction::kNone;
  Operand* operands[] = {&a.mean,
                         &a.logvar,
                         &a.prior_mean,
                         &a.prior_logvar,
                         &a.z,
                         kl_elements ? &a.kl : nullptr,
                         &a.grad_z,
                         &a.grad_kl,
                         &a.grad_mean,
                         &a.grad_logvar,
                         &a.grad_prior_mean,
                         &a.grad_prior_logvar,
                         &a.mask};
  for (const Operand* o : operands) {
    if (o != nullptr && o->data != nullptr && o->row_stride != s.event * o->stride[0]) return;
  }
  s.event *= s.rows;
  s.size[0] = s.event;
  s.rows = 1;
}

Prepared prepare(const LatentArgs& original, Pass pass, const Workspace& memory, bool strided = false) {
  const bool backward = pass == Pass::kBackward;
  LatentArgs a = original;
  Prepared r;
  r.path.elements = changes_elements(a.scale, a.mask);
  LatentParams& p = r.params;
  p.first_index = static_cast<uint64_t>(a.key.row_offset) * static_cast<uint64_t>(a.shape.event);
  merge_rows(a, backward);

  const int unit = strided ? kStridedUnit : unit_elements(a.dtype);
  Layout layout(a.shape, a.shape.event, unit, a.mean);
  if (strided || p.first_index % 4 != 0) layout.forbid_vector();
  p.mean = layout.view(a.mean);
  p.logvar = layout.view(a.logvar);
  p.prior_mean = layout.view(a.prior_mean);
  p.prior_logvar = layout.view(a.prior_logvar);
  if (backward) {
    p.has_grad_kl = a.has_grad_kl;
    p.grad_z = layout.view(a.grad_z);
    p.grad_mean = layout.view(a.grad_mean);
    p.grad_logvar = layout.view(a.grad_logvar);
    p.grad_prior_mean = layout.view(a.grad_prior_mean);
    p.grad_prior_logvar = layout.view(a.grad_prior_logvar);
    if (a.has_grad_kl) {
      const bool uniform = scalar_per_row(a.grad_kl);
      p.grad_kl = layout.view(a.grad_kl, uniform);
      if (uniform && a.reduction == Reduction::kNone) a.reduction = Reduction::kSample;
    }
    p.grad_kl_scale = a.grad_kl_scale;
  } else {
    p.z = layout.view(a.z);
    if (a.reduction != Reduction::kOff) p.kl = layout.view(a.kl, a.reduction != Reduction::kNone);
  }
  if (!layout.vector() && unit != kStridedUnit) return prepare(original, pass, memory, true);
  p.index = layout.index();
  p.plan = layout.plan(false);
  p.samples = a.shape.samples;

  p.seed = a.key.seed;
  p.seed_value = a.key.seed_value;
  p.stream = a.key.stream;
  p.scale = a.scale;
  p.mask = layout.view(a.mask, true);
  p.clamp = a.clamp;
  p.clamp_min = a.clamp_min;
  p.clamp_max = a.clamp_max;
  p.clamp_min_float = static_cast<float>(a.clamp_min);
  p.clamp_max_float = static_cast<float>(a.clamp_max);

  r.workspace = memory;
  if (backward) {
    p.result.reduction = a.reduction;
  } else if (p.kl.present()) {
    p.result = r.workspace.result(p.plan, p.kl, a.reduction, a.kl_scale);
  }

  r.path.vector = layout.vector();
  const uint64_t last_index = p.first_index + static_cast<uint64_t>(a.shape.rows * a.shape.event);
  const bool one_high_word = (p.first_index >> 34) == (last_index >> 34);
  const bool whole = backward ? p.grad_z.present() && p.has_grad_kl && p.grad_mean.present() && p.grad_logvar.present()
                              : p.z.present() && p.kl.present();
  r.path.fast = r.path.vector && whole && one_high_word && a.shape.samples == 1 && !p.prior_mean.present() &&
                a.reduction != Reduction::kNone && a.dtype != DType::kFloat64 && !p.mask.present();
  if (r.path.elements && !r.path.fast && !strided) return prepare(original, pass, memory, true);
  return r;
}

}  // namespace

int64_t latent_workspace_bytes(const LatentArgs& args, Pass pass) {
  return prepare(args, pass, Workspace()).workspace.bytes();
}

void latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context) {
  const Workspace counted = prepare(args, pass, Workspace()).workspace;
  const Prepared r = prepare(args, pass, Workspace(workspace, counted));
  const LatentParams& p = r.params;
  if (pass == Pass::kBackward) {
    if (args.shape.event > 0) launch_latent_backward(p, args.dtype, r.path, context.stream);
    return;
  }
  const bool scalar = p.kl.present() && (args.reduction == Reduction::kSum || args.reduction == Reduction::kBatchMean);
  if (scalar && p.plan.tiles == 0) write_empty_sum(p.kl.data, item_size(p.kl.dtype), args.kl_scale, context.stream);
  clear(workspace, counted.ticket_bytes(), context.stream);
  launch_latent_forward(p, args.dtype, r.path, context.stream);
}

}  // namespace cuda
}  // namespace fused_elbo
