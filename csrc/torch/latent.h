// Sampling and KL: from the tensors of a call to LatentArgs.
#pragma once

#include <tuple>

#include "device.h"
#include "tensors.h"

namespace fused_elbo {

struct LatentCall {
  Sizes full;  // [B, *event]
  OptionalTensor seed;
  int64_t seed_value, stream, row_offset, num_samples, chunk_dim;
  Scale scale;
  View mask;
  Reduction reduction;

  LatentCall(const Tensor& mean, const OptionalTensor& logvar, const OptionalTensor& seed, const OptionalTensor& mask,
             int64_t seed_value, int64_t stream, int64_t row_offset, int64_t num_samples, int64_t chunk_dim,
             const Scale& scale, int64_t reduction)
      : full(sizes_of(mean)),
        seed(seed),
        seed_value(seed_value),
        stream(stream),
        row_offset(row_offset),
        num_samples(num_samples),
        chunk_dim(chunk_dim),
        scale(scale),
        reduction(static_cast<Reduction>(reduction)) {
    STD_TORCH_CHECK(!full.empty(), "fused_elbo: mean must have 1 to 25 dimensions");
    if (logvar) {
      STD_TORCH_CHECK(sizes_of(*logvar) == full, "fused_elbo: mean and logvar must have one shape");
    } else {
      STD_TORCH_CHECK(chunk_dim > 0 && chunk_dim < mean.dim() && full[chunk_dim] % 2 == 0,
                      "fused_elbo: chunk_dim must be an event dimension of even size");
      full[chunk_dim] /= 2;
    }
    this->mask = View::of_mask(mask, full);
  }

  void fill(LatentArgs& args, const Tensor& mean, const EventLayout& layout) const {
    layout.describe(args.shape);
    args.shape.samples = std::max<int64_t>(num_samples, 1);
    args.dtype = dtype_of(mean.scalar_type());
    if (seed) args.key.seed = static_cast<const int64_t*>(seed->data_ptr());
    args.key.seed_value = seed_value;
    args.key.stream = static_cast<uint32_t>(stream);
    args.key.row_offset = row_offset;
    args.scale = scale;
    args.clamp = scale.kind == ScaleKind::kPlain && (scale.clamp_min > -kNoClamp || scale.clamp_max < kNoClamp);
    args.clamp_min = scale.clamp_min;
    args.clamp_max = scale.clamp_max;
    args.mask = mask.operand(layout);
    args.reduction = reduction;
  }
};

// z or its gradient: [B, *event] like the other operands, or with a leading sample dimension.
inline Operand sample_operand(const Tensor& z, const LatentCall& call, const View& view, const EventLayout& layout) {
  Operand result = view.operand(layout);
  if (call.num_samples > 0) result.sample_stride = z.stride(0);
  return result;
}

inline View sample_view(const Tensor& z, const LatentCall& call) {
  if (call.num_samples == 0) return View(z, call.full);
  View view;
  view.data = z.data_ptr();
  view.dtype = dtype_of(z.scalar_type());
  for (size_t d = 0; d < call.full.size(); ++d) view.strides[d] = call.full[d] == 1 ? 0 : z.stride(d + 1);
  return view;
}

template <class Device>
std::tuple<Tensor, Tensor> latent_forward(Tensor mean, OptionalTensor logvar, OptionalTensor prior_mean,
                                          OptionalTensor prior_logvar, OptionalTensor seed, OptionalTensor mask,
                                          int64_t seed_value, int64_t stream, int64_t row_offset, int64_t num_samples,
                                          int64_t chunk_dim, int64_t scale, double floor, double clamp_min,
                                          double clamp_max, bool want_z, int64_t reduction) {
  typename Device::Guard guard(mean);
  const LatentCall call(mean, logvar, seed, mask, seed_value, stream, row_offset, num_samples, chunk_dim,
                        make_scale(scale, floor, clamp_min, clamp_max), reduction);
  const Halves in(mean, logvar, chunk_dim, call.full);
  const View prior_m(prior_mean, call.full), prior_l(prior_logvar, call.full);

  const auto half = [&] { return logvar ? mean : torch::stable::narrow(mean, chunk_dim, 0, call.full[chunk_dim]); };
  Tensor z = nothing(mean);
  if (want_z && num_samples > 0) {
    Sizes sizes = call.full;
    sizes.push_front(num_samples);
    z = empty_dense(mean, sizes, mean.scalar_type());
  } else if (want_z) {
    z = mean.is_contiguous() ? empty_dense(mean, call.full, mean.scalar_type()) : torch::stable::empty_like(half());
  }
  Tensor kl = nats_like(mean, call.full, 1, call.reduction);
  const View z_view = want_z ? sample_view(z, call) : View();
  const View kl_view = call.reduction == Reduction::kNone ? View(kl, call.full) : View();

  const EventLayout layout(
      call.full, 1,
      {&in.mean.strides, &in.logvar.strides, prior_m.data ? &prior_m.strides : &in.mean.strides,
       prior_l.data ? &prior_l.strides : &in.mean.strides, want_z ? &z_view.strides : &in.mean.strides,
       call.reduction == Reduction::kNone ? &kl_view.strides : &in.mean.strides,
       mask ? &call.mask.strides : &in.mean.strides});
  if (!layout.fits()) {
    auto [dense_z, dense_kl] =
        latent_forward<Device>(torch::stable::contiguous(mean), contiguous(logvar), contiguous(prior_mean),
                               contiguous(prior_logvar), seed, contiguous(mask), seed_value, stream, row_offset,
                               num_samples, chunk_dim, scale, floor, clamp_min, clamp_max, want_z, reduction);
    if (want_z && num_samples == 0) dense_z = with_layout_of(half(), dense_z);
    return {dense_z, dense_kl};
  }

  LatentArgs args;
  call.fill(args, mean, layout);
  args.mean = in.mean.operand(layout);
  args.logvar = in.logvar.operand(layout);
  args.prior_mean = prior_m.operand(layout);
  args.prior_logvar = prior_l.operand(layout);
  if (want_z) args.z = sample_operand(z, call, z_view, layout);
  args.kl = nats_operand(kl, call.reduction, layout, call.full, 1);
  args.kl_scale = batch_scale(call.reduction, args.shape.rows);
  const Workspace scratch(mean, Device::latent_workspace(args, Pass::kForward));
  Device::latent(args, Pass::kForward, scratch.data(), Device::context(mean));
  return {z, kl};
}

// The gradients of mean, logvar (absent where mean holds both) and, if wanted, of the prior.
using LatentGradients = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

template <class Device>
LatentGradients latent_gradients(Tensor mean, OptionalTensor logvar, OptionalTensor prior_mean,
                                 OptionalTensor prior_logvar, OptionalTensor grad_z, OptionalTensor grad_kl,
                                 OptionalTensor seed, OptionalTensor mask, int64_t seed_value, int64_t stream,
                                 int64_t row_offset, int64_t num_samples, int64_t chunk_dim, int64_t scale,
                                 double floor, double clamp_min, double clamp_max, int64_t reduction, bool want_prior) {
  typename Device::Guard guard(mean);
  const LatentCall call(mean, logvar, seed, mask, seed_value, stream, row_offset, num_samples, chunk_dim,
                        make_scale(scale, floor, clamp_min, clamp_max), reduction);
  want_prior = want_prior && prior_mean;
  const Halves in(mean, logvar, chunk_dim, call.full);
  const View prior_m(prior_mean, call.full), prior_l(prior_logvar, call.full);
  const View grad_z_view = grad_z ? sample_view(*grad_z, call) : View();
  const bool elementwise = grad_kl && call.reduction == Reduction::kNone;
  const View grad_kl_view = elementwise ? View(*grad_kl, call.full) : View();

  Tensor grad_mean = empty_preserving(mean);
  OptionalTensor grad_logvar, grad_prior_mean, grad_prior_logvar;
  if (logvar) grad_logvar = empty_preserving(*logvar);
  if (want_prior) {
    grad_prior_mean = empty_dense(mean, call.full, mean.scalar_type());
    grad_prior_logvar = empty_dense(mean, call.full, mean.scalar_type());
  }
  const Halves out(grad_mean, grad_logvar, chunk_dim, call.full);
  const View out_prior(grad_prior_mean, call.full), out_prior_logvar(grad_prior_logvar, call.full);

  const Strides* any = &in.mean.strides;
  const EventLayout layout(call.full, 1,
                           {any, &in.logvar.strides, &out.mean.strides, &out.logvar.strides,
                            prior_m.data ? &prior_m.strides : any, prior_l.data ? &prior_l.strides : any,
                            grad_z ? &grad_z_view.strides : any, elementwise ? &grad_kl_view.strides : any,
                            want_prior ? &out_prior.strides : any, mask ? &call.mask.strides : any});
  if (!layout.fits()) {
    auto [dm, dl, dpm, dpl] = latent_gradients<Device>(
        torch::stable::contiguous(mean), contiguous(logvar), contiguous(prior_mean), contiguous(prior_logvar),
        contiguous(grad_z), elementwise ? contiguous(grad_kl) : grad_kl, seed, contiguous(mask), seed_value, stream,
        row_offset, num_samples, chunk_dim, scale, floor, clamp_min, clamp_max, reduction, want_prior);
    dm = with_layout_of(mean, dm);
    if (logvar) dl = with_layout_of(*logvar, *dl);
    return {dm, dl, dpm, dpl};
  }

  LatentArgs args;
  call.fill(args, mean, layout);
  args.mean = in.mean.operand(layout);
  args.logvar = in.logvar.operand(layout);
  args.prior_mean = prior_m.operand(layout);
  args.prior_logvar = prior_l.operand(layout);
  if (grad_z) args.grad_z = sample_operand(*grad_z, call, grad_z_view, layout);
  args.has_grad_kl = grad_kl.has_value();
  args.grad_kl = nats_operand(grad_kl, call.reduction, layout, call.full, 1);
  args.grad_kl_scale = batch_scale(call.reduction, args.shape.rows);
  args.grad_mean = out.mean.operand(layout);
  args.grad_logvar = out.logvar.operand(layout);
  if (want_prior) {
    args.grad_prior_mean = out_prior.operand(layout);
    args.grad_prior_logvar = out_prior_logvar.operand(layout);
  }
  const Workspace scratch(mean, Device::latent_workspace(args, Pass::kBackward));
  Device::latent(args, Pass::kBackward, scratch.data(), Device::context(mean));
  return {grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> latent_backward(
    Tensor mean, OptionalTensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar, OptionalTensor grad_z,
    OptionalTensor grad_kl, OptionalTensor seed, OptionalTensor mask, int64_t seed_value, int64_t stream,
    int64_t row_offset, int64_t num_samples, int64_t chunk_dim, int64_t scale, double floor, double clamp_min,
    double clamp_max, int64_t reduction, bool want_prior) {
  const auto [grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar] = latent_gradients<Device>(
      mean, logvar, prior_mean, prior_logvar, grad_z, grad_kl, seed, mask, seed_value, stream, row_offset, num_samples,
      chunk_dim, scale, floor, clamp_min, clamp_max, reduction, want_prior);
  const auto present = [&](const OptionalTensor& grad) { return grad ? *grad : nothing(mean); };
  return {grad_mean, present(grad_logvar), present(grad_prior_mean), present(grad_prior_logvar)};
}

}  // namespace fused_elbo
