// The Gaussian log-likelihood: from the tensors of a call to LikelihoodArgs.
#pragma once

#include <tuple>
#include <type_traits>

#include "device.h"
#include "tensors.h"

namespace fused_elbo {

// Sums the partial gradients of a broadcast logvar, [*batch, *event] with the constant trailing dimensions of size 1,
// to the shape of logvar.
inline Tensor reduce_to_logvar(const Tensor& partial, const Tensor& logvar) {
  const int64_t shift = partial.dim() - logvar.dim();
  std::vector<int64_t> summed;
  for (int64_t d = 0; d < partial.dim(); ++d) {
    if (partial.size(d) != 1 && (d < shift || logvar.size(d - shift) == 1)) summed.push_back(d);
  }
  Tensor result = partial;
  if (logvar.numel() == 1 && partial.is_cpu()) {
    // One value: torch's own full reduction would depend on the number of threads.
    result = empty_dense(partial, {1}, partial.scalar_type());
    const auto total = [&](auto* values, auto* out) {
      double sum = 0;
      for (int64_t i = 0; i < partial.numel(); ++i) sum += values[i];
      *out = static_cast<std::remove_reference_t<decltype(*out)>>(sum);
    };
    if (partial.scalar_type() == ScalarType::Double) {
      total(static_cast<const double*>(partial.data_ptr()), static_cast<double*>(result.data_ptr()));
    } else {
      total(static_cast<const float*>(partial.data_ptr()), static_cast<float*>(result.data_ptr()));
    }
  } else if (!summed.empty()) {
    result = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(summed.data(), summed.size()), true);
  }
  result = torch::stable::reshape(result, logvar.sizes());
  return result.scalar_type() == logvar.scalar_type() ? result : torch::stable::to(result, logvar.scalar_type());
}

// The likelihood half of a call, shared by gaussian_log_likelihood and the ELBO.
template <class Device>
class Likelihood {
 public:
  Likelihood(const Tensor& x, const Tensor& mean, const OptionalTensor& logvar, const OptionalTensor& mask,
             double logvar_value, int batch_dims, Reduction reduction, const Scale& scale)
      : full_(sizes_of(mean)),
        logvar_(logvar),
        batch_dims_(batch_dims),
        reduction_(reduction),
        x_(x),
        mean_(mean),
        mask_(View::of_mask(mask, full_)) {
    STD_TORCH_CHECK(scale.kind == ScaleKind::kPlain || (logvar && sizes_of(*logvar) == full_),
                    "fused_elbo: a scale other than logvar must have the shape of mean");
    args.scale = scale;
    STD_TORCH_CHECK(batch_dims == 1 || batch_dims == 2, "fused_elbo: batch_dims must be 1 or 2");
    STD_TORCH_CHECK(full_.size() >= static_cast<size_t>(batch_dims) && full_.size() <= kMaxDims && sizes_of(x) == full_,
                    "fused_elbo: x and mean must have one shape, with up to 25 dimensions");
    STD_TORCH_CHECK(!logvar || logvar->dim() <= mean.dim(), "fused_elbo: logvar must broadcast to mean");
    args.logvar_value = logvar_value;
    args.reduction = reduction;
    args.dtype = dtype_of(mean.scalar_type());
  }

  // Fills in args for the given outputs; false if no kernel reads these layouts in place.
  bool prepare(const OptionalTensor& nats, const OptionalTensor& upstream, bool want_mean, bool want_logvar) {
    const View x(x_, full_), mean(mean_, full_), logvar(logvar_, full_);
    const bool elementwise = reduction_ == Reduction::kNone;
    const View nats_view = elementwise && nats ? View(*nats, full_) : View();
    const View upstream_view = elementwise && upstream ? View(*upstream, full_) : View();
    grad_mean = want_mean ? empty_preserving(mean_) : nothing(mean_);
    const View grad_mean_view = want_mean ? View(grad_mean, full_) : View();

    const Strides* any = &mean.strides;
    Strides dense{};
    int64_t stride = 1;
    for (size_t d = full_.size(); d-- > 0;) {
      dense[d] = full_[d] == 1 ? 0 : stride;
      stride *= full_[d];
    }
    want_logvar = want_logvar && logvar_;
    const EventLayout layout(
        full_, batch_dims_,
        {any, &x.strides, logvar_ ? &logvar.strides : any, nats_view.data ? &nats_view.strides : any,
         upstream_view.data ? &upstream_view.strides : any, grad_mean_view.data ? &grad_mean_view.strides : any,
         want_logvar ? &dense : any, mask_.data ? &mask_.strides : any});
    if (!layout.fits()) return false;
    layout.describe(args.shape);
    args.x = x.operand(layout);
    args.mean = mean.operand(layout);
    args.logvar = logvar.operand(layout);
    args.mask = mask_.operand(layout);
    args.ll = nats_operand(nats, reduction_, layout, full_, batch_dims_);
    args.ll_scale = batch_scale(reduction_, args.shape.samples * args.shape.rows);
    args.grad_ll = nats_operand(upstream, reduction_, layout, full_, batch_dims_);
    args.grad_ll_scale = args.ll_scale;
    args.grad_mean = grad_mean_view.operand(layout);
    if (logvar_) args.logvar_inner = std::max<int64_t>(layout.constant_run(logvar.strides), 1);
    if (want_logvar) allocate_grad_logvar();
    return true;
  }

  Tensor finish_grad_logvar() const {
    return grad_logvar_ ? reduce_to_logvar(*grad_logvar_, *logvar_) : nothing(mean_);
  }

  LikelihoodArgs args;
  Tensor grad_mean = Tensor(nullptr);

 private:
  void allocate_grad_logvar() {
    std::vector<int64_t> sizes = full_;
    int64_t run = 1;
    for (size_t d = sizes.size(); d-- > static_cast<size_t>(batch_dims_) && run < args.logvar_inner;) {
      run *= sizes[d];
      sizes[d] = 1;
    }
    const bool final = sizes_of(*logvar_) == sizes;  // nothing left to sum: written in logvar's own dtype
    grad_logvar_ = empty_dense(mean_, sizes, final ? logvar_->scalar_type() : accumulate_type(mean_));
    args.grad_logvar.data = grad_logvar_->data_ptr();
    args.grad_logvar.dtype = dtype_of(grad_logvar_->scalar_type());
    const int64_t per_row = args.shape.event / args.logvar_inner;
    args.grad_logvar.row_stride = per_row;
    args.grad_logvar.sample_stride = per_row * args.shape.rows;
    int64_t stride = 1;
    for (int d = args.shape.event_dims; d-- > 0;) {
      args.grad_logvar.stride[d] = stride;
      stride *= args.shape.size[d];
    }
  }

  std::vector<int64_t> full_;
  OptionalTensor logvar_, grad_logvar_;
  int batch_dims_;
  Reduction reduction_;
  Tensor x_, mean_;
  View mask_;
};

template <class Device>
Tensor likelihood_forward(Tensor x, Tensor mean, OptionalTensor logvar, OptionalTensor mask, double logvar_value,
                          int64_t batch_dims, int64_t reduction, int64_t scale, double floor, double clamp_min,
                          double clamp_max) {
  typename Device::Guard guard(mean);
  Likelihood<Device> call(x, mean, logvar, mask, logvar_value, static_cast<int>(batch_dims),
                          static_cast<Reduction>(reduction), make_scale(scale, floor, clamp_min, clamp_max));
  Tensor ll = nats_like(mean, sizes_of(mean), static_cast<int>(batch_dims), static_cast<Reduction>(reduction));
  if (!call.prepare(ll, std::nullopt, false, false)) {
    return likelihood_forward<Device>(torch::stable::contiguous(x), torch::stable::contiguous(mean), contiguous(logvar),
                                      contiguous(mask), logvar_value, batch_dims, reduction, scale, floor, clamp_min,
                                      clamp_max);
  }
  const Workspace scratch(mean, Device::likelihood_workspace(call.args, Pass::kForward));
  Device::likelihood(call.args, Pass::kForward, scratch.data(), Device::context(mean));
  return ll;
}

template <class Device>
std::tuple<Tensor, Tensor> likelihood_backward(Tensor x, Tensor mean, OptionalTensor logvar, Tensor grad,
                                               bool want_mean, bool want_logvar, OptionalTensor mask,
                                               double logvar_value, int64_t batch_dims, int64_t reduction,
                                               int64_t scale, double floor, double clamp_min, double clamp_max) {
  typename Device::Guard guard(mean);
  Likelihood<Device> call(x, mean, logvar, mask, logvar_value, static_cast<int>(batch_dims),
                          static_cast<Reduction>(reduction), make_scale(scale, floor, clamp_min, clamp_max));
  if (!call.prepare(std::nullopt, grad, want_mean, want_logvar)) {
    const bool elementwise = static_cast<Reduction>(reduction) == Reduction::kNone;
    auto [grad_mean, grad_logvar] = likelihood_backward<Device>(
        torch::stable::contiguous(x), torch::stable::contiguous(mean), contiguous(logvar),
        elementwise ? torch::stable::contiguous(grad) : grad, want_mean, want_logvar, contiguous(mask), logvar_value,
        batch_dims, reduction, scale, floor, clamp_min, clamp_max);
    if (want_mean) grad_mean = with_layout_of(mean, grad_mean);
    return {grad_mean, grad_logvar};
  }
  const Workspace scratch(mean, Device::likelihood_workspace(call.args, Pass::kBackward));
  Device::likelihood(call.args, Pass::kBackward, scratch.data(), Device::context(mean));
  return {call.grad_mean, call.finish_grad_logvar()};
}

}  // namespace fused_elbo
