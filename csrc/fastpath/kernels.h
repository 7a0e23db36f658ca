// The raw operations of the extension as C++ functions. kernels/fused_elbo/schemas.py says what the arguments mean.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>
#include <tuple>

#include "plain.h"

namespace fused_elbo::fastpath {

using Optional = std::optional<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kOff = -1, kNone = 0, kSample = 1, kSum = 2, kBatchmean = 3;

// Python's ScaleParams.
struct Scale {
  int64_t code = 0;
  double floor = 0, clamp_min = -kInfinity, clamp_max = kInfinity;
};
// Python's LatentParams and LikelihoodParams.
struct LatentParams {
  int64_t seed_value = 0, stream = 0, row_offset = 0, num_samples = 0, chunk_dim = -1;
  Scale scale;
  bool want_z = true;
  int64_t reduction = kSample;
};
struct LikelihoodParams {
  double logvar_value = 0;
  int64_t batch_dims = 1, reduction = kSample;
  Scale scale;
};
// Python's ELBOParams.
struct ElboParams {
  double recon_logvar_value = 0, beta_value = 1;
  int64_t reduction = kBatchmean;
  Scale scale;
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// mean, logvar, prior_mean, prior_logvar, seed, mask
using LatentTensors = std::array<Tensor, 6>;

inline std::tuple<Tensor, Tensor> latent_forward(const LatentTensors& t, const LatentParams& p) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Optional&,
                                               const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t,
                                               int64_t, int64_t, double, double, double, bool, int64_t);
  static const auto operation = find<Signature>("fused_elbo::latent_forward");
  return operation.call(t[0], optional(t[1]), optional(t[2]), optional(t[3]), optional(t[4]), optional(t[5]),
                        p.seed_value, p.stream, p.row_offset, p.num_samples, p.chunk_dim, p.scale.code, p.scale.floor,
                        p.scale.clamp_min, p.scale.clamp_max, p.want_z, p.reduction);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> latent_backward(const LatentTensors& t, const Tensor& grad_z,
                                                                  const Tensor& grad_kl, const LatentParams& p,
                                                                  bool want_prior) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, const Optional&,
      const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double,
      int64_t, bool);
  static const auto operation = find<Signature>("fused_elbo::latent_backward");
  return operation.call(t[0], optional(t[1]), optional(t[2]), optional(t[3]),
                        p.want_z ? optional(grad_z) : std::nullopt,
                        p.reduction != kOff ? optional(grad_kl) : std::nullopt, optional(t[4]), optional(t[5]),
                        p.seed_value, p.stream, p.row_offset, p.num_samples, p.chunk_dim, p.scale.code, p.scale.floor,
                        p.scale.clamp_min, p.scale.clamp_max, p.reduction, want_prior);
}

// x, mean, logvar, mask
using LikelihoodTensors = std::array<Tensor, 4>;

inline Tensor likelihood_forward(const LikelihoodTensors& t, const LikelihoodParams& p) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Optional&, const Optional&, double, int64_t, int64_t,
                           int64_t, double, double, double);
  static const auto operation = find<Signature>("fused_elbo::likelihood_forward");
  return operation.call(t[0], t[1], optional(t[2]), optional(t[3]), p.logvar_value, p.batch_dims, p.reduction,
                        p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
}

inline std::tuple<Tensor, Tensor> likelihood_backward(const LikelihoodTensors& t, const Tensor& grad, bool want_mean,
                                                      bool want_logvar, const LikelihoodParams& p) {
  using Signature =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&, const Tensor&, bool, bool,
                                 const Optional&, double, int64_t, int64_t, int64_t, double, double, double);
  static const auto operation = find<Signature>("fused_elbo::likelihood_backward");
  return operation.call(t[0], t[1], optional(t[2]), grad, want_mean, want_logvar, optional(t[3]), p.logvar_value,
                        p.batch_dims, p.reduction, p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
}

// recon_x, x, recon_logvar, mean, logvar, kl, beta, mask: Python's ELBOInputs
using ElboTensors = std::array<Tensor, 8>;
// loss, log_likelihood, kl, and the gradients of recon_x, recon_logvar, mean and logvar
using ElboResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline ElboResult elbo_forward(const ElboTensors& t, const ElboParams& p, bool want_grads) {
  using Signature =
      ElboResult(const Tensor&, const Tensor&, const Optional&, double, const Optional&, const Optional&,
                 const Optional&, const Optional&, double, int64_t, bool, const Optional&, int64_t, double, double,
                 double);
  static const auto operation = find<Signature>("fused_elbo::elbo_forward");
  return operation.call(t[0], t[1], optional(t[2]), p.recon_logvar_value, optional(t[3]), optional(t[4]),
                        optional(t[5]), optional(t[6]), p.beta_value, p.reduction, want_grads, optional(t[7]),
                        p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
}

}  // namespace fused_elbo::fastpath
