// Host side of the loss kernel: two index spaces in one grid, one workspace.
#include "elbo.h"

namespace fused_elbo {
namespace cuda {
namespace {

struct Prepared {
  ElboParams params;
  Access access;
  bool elements;
};

// Whether 16-byte accesses serve the latent, in units of the reconstruction.
bool lay_out_latent(ElboParams& p, const LatentArgs& a, DType reconstruction, bool strided) {
  Layout layout(a.shape, a.shape.event, strided ? kStridedUnit : unit_elements(reconstruction), a.mean);
  p.mean = layout.view(a.mean);
  p.logvar = layout.view(a.logvar);
  p.grad_mean = layout.view(a.grad_mean);
  p.grad_logvar = layout.view(a.grad_logvar);
  p.latent_plan = layout.plan(false);
  p.latent_in_acc = a.dtype != reconstruction;
  const DType acc = reconstruction == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return layout.vector() && (a.dtype == reconstruction || a.dtype == acc);
}

Prepared prepare(const ElboArgs& a, Pass pass, Workspace& workspace) {
  Prepared r;
  ElboParams& p = r.params;
  const bool own_kl = a.kl_given.data == nullptr;  // not mean: an empty tensor has no memory
  LatentArgs latent_args = a.latent;
  LikelihoodArgs reconstruction_args = a.reconstruction;
  if (pass == Pass::kForward) {
    latent_args.grad_mean.data = latent_args.grad_logvar.data = nullptr;
    reconstruction_args.grad_mean.data = reconstruction_args.grad_x.data = reconstruction_args.grad_logvar.data =
        nullptr;
  }
  const DType dtype = reconstruction_args.dtype;
  const bool strided = own_kl && !lay_out_latent(p, latent_args, dtype, false);
  const PreparedLikelihood reconstruction = prepare_likelihood(reconstruction_args, Pass::kBoth, workspace, strided);
  if (own_kl && reconstruction.access == Access::kStrided) lay_out_latent(p, latent_args, dtype, true);
  p.reconstruction = reconstruction.params;
  r.access = reconstruction.access;
  r.elements = reconstruction.elements;

  p.grad_kl = a.latent.grad_kl.data;
  p.grad_kl_scale = a.latent.grad_kl_scale;
  if (own_kl) p.latent_rows = workspace.row_parts(p.latent_plan);

  auto per_row = [](const Operand& o) {
    View v;
    v.data = o.data;
    v.row = o.row_stride;
    v.dtype = o.dtype;
    return v;
  };
  p.log_likelihood = per_row(a.reconstruction.ll);
  p.kl = per_row(a.latent.kl);
  if (!own_kl) p.kl_given = per_row(a.kl_given);
  p.beta = a.beta;
  p.beta_value = a.beta_value;
  p.loss = a.loss.data;
  p.loss_stride = a.loss.row_stride;
  p.loss_per_row = a.loss_per_row;
  p.loss_scale = a.loss_scale;
  p.items = item_count(p.reconstruction.plan) + (own_kl ? item_count(p.latent_plan) : 0);
  if (!a.loss_per_row) {
    workspace.scalar_parts(p.tree, p.items);
  } else if (own_kl) {
    p.row_pairs = workspace.tickets(a.reconstruction.shape.rows);
  }
  return r;
}

}  // namespace

int64_t elbo_workspace_bytes(const ElboArgs& args, Pass pass) {
  Workspace counted;
  prepare(args, pass, counted);
  return counted.bytes();
}

void elbo(const ElboArgs& args, Pass pass, void* memory, const Context& context) {
  Workspace counted;
  prepare(args, pass, counted);
  Workspace workspace(memory, counted);
  const Prepared r = prepare(args, pass, workspace);
  clear(memory, counted.ticket_bytes(), context.stream);
  if (r.params.items == 0 && !args.loss_per_row) {
    write_empty_sum(args.loss.data, item_size(args.loss.dtype), args.loss_scale, context.stream);
  }
  launch_elbo(r.params, args.reconstruction.dtype, r.access, r.elements, context.stream);
}

}  // namespace cuda
}  // namespace fused_elbo
