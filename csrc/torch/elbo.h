// The ELBO: likelihood, KL, loss and gradients in one call.
#pragma once

#include <tuple>

#include "likelihood.h"

namespace fused_elbo {

using ElboOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
ElboOutput elbo_forward(Tensor recon_x, Tensor x, OptionalTensor recon_logvar, double recon_logvar_value,
                        OptionalTensor mean, OptionalTensor logvar, OptionalTensor kl, OptionalTensor beta,
                        double beta_value, int64_t reduction_code, bool want_grads, OptionalTensor mask, int64_t scale,
                        double floor, double clamp_min, double clamp_max) {
  typename Device::Guard guard(recon_x);
  const auto reduction = static_cast<Reduction>(reduction_code);
  STD_TORCH_CHECK(kl.has_value() != (mean && logvar), "fused_elbo: give mean and logvar, or kl");
  Likelihood<Device> call(x, recon_x, recon_logvar, mask, recon_logvar_value, 1, Reduction::kSample,
                          make_scale(scale, floor, clamp_min, clamp_max));
  const std::vector<int64_t> batch = {recon_x.size(0)};
  const ScalarType nats = accumulate_type(recon_x);
  Tensor ll = empty_dense(recon_x, batch, nats), kl_out = empty_dense(recon_x, batch, nats);
  Tensor loss = empty_dense(recon_x, reduction == Reduction::kSample ? batch : std::vector<int64_t>{}, nats);

  bool fits = call.prepare(ll, std::nullopt, want_grads, want_grads);
  ElboArgs args;
  args.beta = beta ? beta->data_ptr() : nullptr;
  args.beta_value = beta_value;
  args.loss_per_row = reduction == Reduction::kSample;
  args.loss.data = loss.data_ptr();
  args.loss.dtype = dtype_of(nats);
  args.loss.row_stride = args.loss_per_row ? 1 : 0;

  Tensor grad_mean = nothing(recon_x), grad_logvar = nothing(recon_x);
  if (mean) {
    const std::vector<int64_t> full = sizes_of(*mean);
    const Halves in(*mean, logvar, -1, full);
    if (want_grads) {
      grad_mean = empty_preserving(*mean);
      grad_logvar = empty_preserving(*logvar);
    }
    const Halves out = want_grads ? Halves(grad_mean, grad_logvar, -1, full) : in;
    const EventLayout layout(full, 1, {&in.mean.strides, &in.logvar.strides, &out.mean.strides, &out.logvar.strides});
    fits = fits && layout.fits();
    if (fits) {
      LatentArgs& latent = args.latent;
      layout.describe(latent.shape);
      STD_TORCH_CHECK(latent.shape.rows == batch[0], "fused_elbo: recon_x and mean must have one batch size");
      latent.dtype = dtype_of(mean->scalar_type());
      latent.reduction = Reduction::kSample;
      latent.mean = in.mean.operand(layout);
      latent.logvar = in.logvar.operand(layout);
      latent.kl = nats_operand(kl_out, Reduction::kSample, layout, full, 1);
      latent.has_grad_kl = want_grads;
      if (want_grads) {
        latent.grad_mean = out.mean.operand(layout);
        latent.grad_logvar = out.logvar.operand(layout);
      }
    }
  } else {
    args.kl_given.data = kl->data_ptr();
    args.kl_given.dtype = dtype_of(kl->scalar_type());
    args.kl_given.row_stride = batch[0] == 1 ? 0 : kl->stride(0);
    args.latent.kl.data = kl_out.data_ptr();
    args.latent.kl.dtype = dtype_of(nats);
    args.latent.kl.row_stride = 1;
  }
  if (!fits) {
    auto [loss_, ll_, kl_, grad_recon, grad_recon_logvar, dm, dl] =
        elbo_forward<Device>(torch::stable::contiguous(recon_x), torch::stable::contiguous(x), contiguous(recon_logvar),
                             recon_logvar_value, contiguous(mean), contiguous(logvar), kl, beta, beta_value,
                             reduction_code, want_grads, contiguous(mask), scale, floor, clamp_min, clamp_max);
    if (want_grads) grad_recon = with_layout_of(recon_x, grad_recon);
    if (want_grads && mean) {
      dm = with_layout_of(*mean, dm);
      dl = with_layout_of(*logvar, dl);
    }
    return {loss_, ll_, kl_, grad_recon, grad_recon_logvar, dm, dl};
  }

  args.loss_scale = batch_scale(reduction, call.args.shape.rows);
  args.reconstruction = call.args;
  args.reconstruction.ll_scale = 1;
  args.reconstruction.grad_ll_scale = -args.loss_scale;
  args.latent.grad_kl_scale = args.loss_scale * (beta ? 1.0 : beta_value);
  if (beta) {
    args.latent.grad_kl.data = beta->data_ptr();
    args.latent.grad_kl.dtype = dtype_of(beta->scalar_type());
  }
  const Pass pass = want_grads ? Pass::kBoth : Pass::kForward;
  const Workspace scratch(recon_x, Device::elbo_workspace(args, pass));
  Device::elbo(args, pass, scratch.data(), Device::context(recon_x));
  return {loss,      ll,         kl_out, call.grad_mean, want_grads ? call.finish_grad_logvar() : nothing(recon_x),
          grad_mean, grad_logvar};
}

}  // namespace fused_elbo
