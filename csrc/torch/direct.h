// The operations on CPU tensors as plain functions. The fast path (csrc/fastpath), which is built together with the
// extension, calls them without the dispatcher, whose boxes cost as much as the kernel of a small latent.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fused_elbo {

struct DirectOperations {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;

  std::tuple<Tensor, Tensor> (*latent_forward)(Tensor mean, Optional logvar, Optional prior_mean, Optional prior_logvar,
                                               Optional seed, Optional mask, int64_t seed_value, int64_t stream,
                                               int64_t row_offset, int64_t num_samples, int64_t chunk_dim,
                                               int64_t scale, double floor, double clamp_min, double clamp_max,
                                               bool want_z, int64_t reduction);
  std::tuple<Tensor, Optional, Optional, Optional> (*latent_gradients)(
      Tensor mean, Optional logvar, Optional prior_mean, Optional prior_logvar, Optional grad_z, Optional grad_kl,
      Optional seed, Optional mask, int64_t seed_value, int64_t stream, int64_t row_offset, int64_t num_samples,
      int64_t chunk_dim, int64_t scale, double floor, double clamp_min, double clamp_max, int64_t reduction,
      bool want_prior);
  Tensor (*likelihood_forward)(Tensor x, Tensor mean, Optional logvar, Optional mask, double logvar_value,
                               int64_t batch_dims, int64_t reduction, int64_t scale, double floor, double clamp_min,
                               double clamp_max);
  std::tuple<Tensor, Tensor> (*likelihood_backward)(Tensor x, Tensor mean, Optional logvar, Tensor grad, bool want_mean,
                                                    bool want_logvar, Optional mask, double logvar_value,
                                                    int64_t batch_dims, int64_t reduction, int64_t scale, double floor,
                                                    double clamp_min, double clamp_max);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> (*elbo_forward)(
      Tensor recon_x, Tensor x, Optional recon_logvar, double recon_logvar_value, Optional mean, Optional logvar,
      Optional kl, Optional beta, double beta_value, int64_t reduction, bool want_grads, Optional mask, int64_t scale,
      double floor, double clamp_min, double clamp_max);
};

}  // namespace fused_elbo

extern "C" __attribute__((visibility("default"))) const fused_elbo::DirectOperations fused_elbo_direct_operations;
