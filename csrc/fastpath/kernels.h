// The raw operations of the extension as C++ functions. kernels/fused_elbo/schemas.py says what the arguments mean.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <limits>
#include <tuple>

#include "../torch/direct.h"
#include "plain.h"

namespace fused_elbo::fastpath {

using Optional = std::optional<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kOff = -1, kNone = 0, kSample = 1, kSum = 2, kBatchmean = 3;

// Words of 64 bits alone, which a graph of compiled autograd carries as a tensor. each calls visit with every field in
// the order of Python's NamedTuple.

// Python's ScaleParams.
struct Scale {
  int64_t code = 0;
  double floor = 0, clamp_min = -kInfinity, clamp_max = kInfinity;

  template <class Visit>
  void each(Visit&& visit) {
    visit(code), visit(floor), visit(clamp_min), visit(clamp_max);
  }
};
// Python's LatentParams and LikelihoodParams.
struct LatentParams {
  int64_t seed_value = 0, stream = 0, row_offset = 0, num_samples = 0, chunk_dim = -1;
  Scale scale;
  int64_t want_z = true;
  int64_t reduction = kSample;

  template <class Visit>
  void each(Visit&& visit) {
    visit(seed_value), visit(stream), visit(row_offset), visit(num_samples), visit(chunk_dim);
    scale.each(visit);
    visit(want_z), visit(reduction);
  }
};
struct LikelihoodParams {
  double logvar_value = 0;
  int64_t batch_dims = 1, reduction = kSample;
  Scale scale;

  template <class Visit>
  void each(Visit&& visit) {
    visit(logvar_value), visit(batch_dims), visit(reduction);
    scale.each(visit);
  }
};
// Python's ELBOParams, whose scale is a tuple of its own.
struct ElboParams {
  double recon_logvar_value = 0, beta_value = 1;
  int64_t reduction = kBatchmean;
  Scale scale;

  template <class Visit>
  void each(Visit&& visit) {
    visit(recon_logvar_value), visit(beta_value), visit(reduction), visit(scale);
  }
};

// On the CPU the operations are called directly, and appear in torch.profiler by their names all the same.

// Off in tests, where it makes a CPU tensor take the way of a GPU's.
inline bool& direct_calls() {
  static bool on = true;
  return on;
}
inline bool is_direct(const Tensor& t) { return t.is_cpu() && direct_calls(); }

using Stable = torch::stable::Tensor;

inline Stable to_stable(const Tensor& t) { return Stable(torch::aot_inductor::new_tensor_handle(Tensor(t))); }
inline std::optional<Stable> to_optional(const Tensor& t) {
  return t.defined() ? std::optional<Stable>(to_stable(t)) : std::nullopt;
}
inline Tensor from_stable(const Stable& t) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get()); }
inline Tensor from_stable(const std::optional<Stable>& t) { return t ? from_stable(*t) : Tensor(); }

template <size_t kCount>
std::vector<c10::IValue> recorded(const std::array<Tensor, kCount>& tensors) {
  return std::vector<c10::IValue>(tensors.begin(), tensors.end());
}

// On a GPU the dispatcher finds them.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// mean, logvar, prior_mean, prior_logvar, seed, mask
using LatentTensors = std::array<Tensor, 6>;

inline std::tuple<Tensor, Tensor> latent_forward(const LatentTensors& t, const LatentParams& p) {
  if (is_direct(t[0])) {
    RECORD_FUNCTION("fused_elbo::latent_forward", recorded(t));
    const auto [z, kl] = fused_elbo_direct_operations.latent_forward(
        to_stable(t[0]), to_optional(t[1]), to_optional(t[2]), to_optional(t[3]), to_optional(t[4]), to_optional(t[5]),
        p.seed_value, p.stream, p.row_offset, p.num_samples, p.chunk_dim, p.scale.code, p.scale.floor,
        p.scale.clamp_min, p.scale.clamp_max, p.want_z, p.reduction);
    return {from_stable(z), from_stable(kl)};
  }
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
  if (is_direct(t[0])) {
    RECORD_FUNCTION("fused_elbo::latent_backward", recorded(t));
    const auto [mean, logvar, prior_mean, prior_logvar] = fused_elbo_direct_operations.latent_gradients(
        to_stable(t[0]), to_optional(t[1]), to_optional(t[2]), to_optional(t[3]),
        p.want_z ? to_optional(grad_z) : std::nullopt, p.reduction != kOff ? to_optional(grad_kl) : std::nullopt,
        to_optional(t[4]), to_optional(t[5]), p.seed_value, p.stream, p.row_offset, p.num_samples, p.chunk_dim,
        p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max, p.reduction, want_prior);
    return {from_stable(mean), from_stable(logvar), from_stable(prior_mean), from_stable(prior_logvar)};
  }
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
  if (is_direct(t[1])) {
    RECORD_FUNCTION("fused_elbo::likelihood_forward", recorded(t));
    return from_stable(fused_elbo_direct_operations.likelihood_forward(
        to_stable(t[0]), to_stable(t[1]), to_optional(t[2]), to_optional(t[3]), p.logvar_value, p.batch_dims,
        p.reduction, p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max));
  }
  using Signature = Tensor(const Tensor&, const Tensor&, const Optional&, const Optional&, double, int64_t, int64_t,
                           int64_t, double, double, double);
  static const auto operation = find<Signature>("fused_elbo::likelihood_forward");
  return operation.call(t[0], t[1], optional(t[2]), optional(t[3]), p.logvar_value, p.batch_dims, p.reduction,
                        p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
}

inline std::tuple<Tensor, Tensor> likelihood_backward(const LikelihoodTensors& t, const Tensor& grad, bool want_mean,
                                                      bool want_logvar, const LikelihoodParams& p) {
  if (is_direct(t[1])) {
    RECORD_FUNCTION("fused_elbo::likelihood_backward", recorded(t));
    const auto [grad_mean, grad_logvar] = fused_elbo_direct_operations.likelihood_backward(
        to_stable(t[0]), to_stable(t[1]), to_optional(t[2]), to_stable(grad), want_mean, want_logvar, to_optional(t[3]),
        p.logvar_value, p.batch_dims, p.reduction, p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
    return {from_stable(grad_mean), from_stable(grad_logvar)};
  }
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
  if (is_direct(t[0])) {
    RECORD_FUNCTION("fused_elbo::elbo_forward", recorded(t));
    return std::apply(
        [](const auto&... outputs) { return ElboResult(from_stable(outputs)...); },
        fused_elbo_direct_operations.elbo_forward(
            to_stable(t[0]), to_stable(t[1]), to_optional(t[2]), p.recon_logvar_value, to_optional(t[3]),
            to_optional(t[4]), to_optional(t[5]), to_optional(t[6]), p.beta_value, p.reduction, want_grads,
            to_optional(t[7]), p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max));
  }
  using Signature = ElboResult(const Tensor&, const Tensor&, const Optional&, double, const Optional&, const Optional&,
                               const Optional&, const Optional&, double, int64_t, bool, const Optional&, int64_t,
                               double, double, double);
  static const auto operation = find<Signature>("fused_elbo::elbo_forward");
  return operation.call(t[0], t[1], optional(t[2]), p.recon_logvar_value, optional(t[3]), optional(t[4]),
                        optional(t[5]), optional(t[6]), p.beta_value, p.reduction, want_grads, optional(t[7]),
                        p.scale.code, p.scale.floor, p.scale.clamp_min, p.scale.clamp_max);
}

}  // namespace fused_elbo::fastpath
