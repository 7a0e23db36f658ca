// The gradients of z and KL(q || p) by mean, logvar and prior of a unit, with the nats for the ELBO's single pass.
#include "elements.h"
#include "latent_buffers.h"
#include "latent_loops.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Elements begin .. end - 1 of a unit's arrays. False: a number was not near, and what was written does not count.
template <typename T, class Scale, class Prior, Samples kSamples, bool kKl, bool kNats>
bool backward_loop(const LatentArrays<T>& arrays, int64_t begin, int64_t end) {
  const Scale scale = make_scale<T, Scale>(arrays);
  const T *const mean = arrays.mean, *const logvar = arrays.logvar, *const eps = arrays.eps;
  const T *const prior_mean = arrays.prior_mean, *const prior_logvar = arrays.prior_logvar;
  const T* const grad_z = kSamples == Samples::kSeveral ? arrays.grad_z_sum : arrays.grad_z;
  const T *const grad_z_eps = arrays.grad_z_eps, *const coefficients = arrays.coefficient;
  T *const grad_mean = arrays.grad_mean, *const grad_logvar = arrays.grad_logvar, *const nats = arrays.nats;
  T *const grad_prior_mean = arrays.grad_prior_mean, *const grad_prior_logvar = arrays.grad_prior_logvar;
  FarLanes<T> far;
  for (int64_t group = begin; group < end; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      [[maybe_unused]] const int64_t local = i - begin;
      const Prior prior = make_prior<T, Prior>(prior_mean, prior_logvar, i);
      const math::KlTerms<T> terms = prior.terms(mean[i], scale.logvar(logvar[i]));
      [[maybe_unused]] T coefficient = 0;
      T by_mean = 0, by_logvar = 0;
      if constexpr (kKl) {
        coefficient = coefficients[local];
        by_mean = coefficient * terms.by_mean;
        by_logvar = coefficient * terms.by_logvar;
        if constexpr (Prior::kLearned) {
          const math::PriorGradient<T> by_prior = prior.gradient(terms);
          grad_prior_mean[i] = coefficient * by_prior.by_mean;
          grad_prior_logvar[i] = coefficient * by_prior.by_logvar;
        }
      }
      if constexpr (kSamples != Samples::kNone) {
        const T sampled = kSamples == Samples::kOne ? grad_z[i] * eps[local] : grad_z_eps[i];
        by_mean = kKl ? math::fma(coefficient, terms.by_mean, grad_z[i]) : grad_z[i];
        by_logvar = kKl ? math::fma(T(0.5) * terms.std, sampled, by_logvar) : T(0.5) * terms.std * sampled;
      }
      grad_mean[i] = by_mean;
      grad_logvar[i] = scale.gradient(logvar[i], by_logvar);
      if constexpr (kNats) nats[i] = math::kl(terms);
      far.lane[lane] |= terms.far;
    }
  }
  return Prior::kReach == math::Reach::kAny || !far.any();
}

// Loops, by what is wanted. Without the KL the prior plays no part.

template <typename T, class Scale, class Prior>
LatentLoop<T> pick_with_kl(const LoopChoice& wanted) {
  switch (wanted.samples) {
    case Samples::kNone:
      return wanted.nats == Nats::kStored ? backward_loop<T, Scale, Prior, Samples::kNone, true, true>
                                          : backward_loop<T, Scale, Prior, Samples::kNone, true, false>;
    case Samples::kOne:
      return backward_loop<T, Scale, Prior, Samples::kOne, true, false>;
    case Samples::kSeveral:
      return backward_loop<T, Scale, Prior, Samples::kSeveral, true, false>;
  }
  __builtin_unreachable();
}

template <typename T, class Scale, math::Reach kReach>
LatentLoop<T> pick(const LoopChoice& wanted) {
  using Standard = math::StandardPrior<T, kReach>;
  using Learned = math::GaussianPrior<T, kReach>;
  if (!wanted.grad_kl) {
    return wanted.samples == Samples::kOne ? backward_loop<T, Scale, Standard, Samples::kOne, false, false>
                                           : backward_loop<T, Scale, Standard, Samples::kSeveral, false, false>;
  }
  return wanted.learned_prior ? pick_with_kl<T, Scale, Learned>(wanted) : pick_with_kl<T, Scale, Standard>(wanted);
}

template <typename T, math::Reach kReach>
LatentLoop<T> pick(const LoopChoice& wanted) {
  return wanted.clamp ? pick<T, math::ClampedLogVarScale<T>, kReach>(wanted)
                      : pick<T, math::LogVarScale<T>, kReach>(wanted);
}

}  // namespace

template <typename T>
LatentLoops<T> backward_loops(const LoopChoice& wanted) {
  return {pick<T, math::Reach::kNear>(wanted), pick<T, math::Reach::kAny>(wanted)};
}
template LatentLoops<float> backward_loops(const LoopChoice&);
template LatentLoops<double> backward_loops(const LoopChoice&);

template <typename T>
void LatentWork<T>::backward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  LatentArrays<T> arrays;
  arrays.grad_mean = output(grad_mean_, range, buffers.first);
  arrays.grad_logvar = output(grad_logvar_, range, buffers.second);
  arrays.grad_prior_mean = output(grad_prior_mean_, range, buffers.grad_prior_mean);
  arrays.grad_prior_logvar = output(grad_prior_logvar_, range, buffers.grad_prior_logvar);
  arrays.nats = buffers.nats;
  if (loops_) {
    add_inputs(range, buffers, arrays);
    if (grad_z_ && args_.shape.samples == 1) {
      arrays.grad_z = input(grad_z_, range, buffers.grad_z);
      run_loop(first, range, arrays, buffers);
    } else if (grad_z_) {
      T *const total = buffers.grad_z_sum, *const total_eps = buffers.grad_z_eps;
      for (int64_t i = 0; i < count; ++i) total[i] = total_eps[i] = 0;
      for (int64_t k = 0; k < args_.shape.samples; ++k) {
        Range one = range;
        one.sample = k;
        const T* const grad_z = input(grad_z_, one, buffers.grad_z);
        const T* const eps = noise(NoiseGenerator(noise_, static_cast<uint32_t>(k)), range, buffers);
        for (int64_t group = 0; group < count; group += kLanes) {
          FUSED_ELBO_INDEPENDENT
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = group + lane;
            total[i] += grad_z[i];
            total_eps[i] = math::fma(grad_z[i], eps[i], total_eps[i]);
          }
        }
      }
      arrays.grad_z_sum = total;
      arrays.grad_z_eps = total_eps;
    }
    if (!grad_z_ || args_.shape.samples > 1) {
      if (args_.has_grad_kl) arrays.coefficient = coefficients(range, false, buffers);
      loops_.run(arrays, 0, count);
    }
    finish_gradients(arrays, count, buffers);
  } else {
    for (int64_t i = 0; i < count; ++i) arrays.grad_mean[i] = arrays.grad_logvar[i] = 0;
  }
  if (!args_.has_grad_kl && grad_prior_mean_) {
    for (int64_t i = 0; i < count; ++i) arrays.grad_prior_mean[i] = arrays.grad_prior_logvar[i] = 0;
  }
  store_output(grad_mean_, range, arrays.grad_mean, buffers.first);
  store_output(grad_logvar_, range, arrays.grad_logvar, buffers.second);
  store_output(grad_prior_mean_, range, arrays.grad_prior_mean, buffers.grad_prior_mean);
  store_output(grad_prior_logvar_, range, arrays.grad_prior_logvar, buffers.grad_prior_logvar);
  if (wants_nats(args_, pass_)) reduce_nats(range, buffers);
}

template void LatentWork<float>::backward_unit(const NoiseGenerator&, const Range&, LatentBuffers<float>&) const;
template void LatentWork<double>::backward_unit(const NoiseGenerator&, const Range&, LatentBuffers<double>&) const;

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
