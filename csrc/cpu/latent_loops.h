// The inner loops of the latent kernels: one template over precision, scale parametrization, prior and what is wanted.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/gaussian.h"
#include "latent.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// What a loop does with samples. Forward: nothing, write z, or write the standard deviation for several z. Backward:
// nothing, one sample's gradient, or sums over samples.
enum class Samples { kNone, kOne, kSeveral };

// How an element's parameters become a logvar and a prior, and what its nats weigh.
template <typename T, class Scale>
FUSED_ELBO_INLINE Scale make_scale(const LatentArrays<T>& arrays) {
  if constexpr (std::is_same_v<Scale, math::ClampedLogVarScale<T>>) {
    return Scale{arrays.clamp_min, arrays.clamp_max};
  } else {
    return Scale{};
  }
}

template <typename T, class Prior>
FUSED_ELBO_INLINE Prior make_prior(const T* mean, const T* logvar, int64_t i) {
  if constexpr (Prior::kLearned) {
    return Prior{mean[i], logvar[i]};
  } else {
    return Prior{};
  }
}

// Elements begin .. end - 1 of a unit's arrays.
template <typename T, class Scale, class Prior, Samples kSamples, bool kNats>
void forward_loop(const LatentArrays<T>& arrays, int64_t begin, int64_t end) {
  const Scale scale = make_scale<T, Scale>(arrays);
  const T *const mean = arrays.mean, *const logvar = arrays.logvar, *const eps = arrays.eps;
  const T *const prior_mean = arrays.prior_mean, *const prior_logvar = arrays.prior_logvar;
  T *const z = arrays.z, *const std = arrays.std, *const nats = arrays.nats;
  for (int64_t group = begin; group < end; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      [[maybe_unused]] const int64_t local = i - begin;
      const math::KlTerms<T> kl =
          make_prior<T, Prior>(prior_mean, prior_logvar, i).terms(mean[i], scale.logvar(logvar[i]));
      if constexpr (kSamples == Samples::kOne) z[i] = math::sample(mean[i], kl.std, eps[local]);
      if constexpr (kSamples == Samples::kSeveral) std[i] = kl.std;
      if constexpr (kNats) nats[i] = kl.kl;
    }
  }
}

template <typename T, class Scale, class Prior, Samples kSamples, bool kKl, bool kNats>
void backward_loop(const LatentArrays<T>& arrays, int64_t begin, int64_t end) {
  const Scale scale = make_scale<T, Scale>(arrays);
  const T *const mean = arrays.mean, *const logvar = arrays.logvar, *const eps = arrays.eps;
  const T *const prior_mean = arrays.prior_mean, *const prior_logvar = arrays.prior_logvar;
  const T* const grad_z = kSamples == Samples::kSeveral ? arrays.grad_z_sum : arrays.grad_z;
  const T *const grad_z_eps = arrays.grad_z_eps, *const coefficients = arrays.coefficient;
  T *const grad_mean = arrays.grad_mean, *const grad_logvar = arrays.grad_logvar, *const nats = arrays.nats;
  T *const grad_prior_mean = arrays.grad_prior_mean, *const grad_prior_logvar = arrays.grad_prior_logvar;
  for (int64_t group = begin; group < end; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      [[maybe_unused]] const int64_t local = i - begin;
      const Prior prior = make_prior<T, Prior>(prior_mean, prior_logvar, i);
      const math::KlTerms<T> kl = prior.terms(mean[i], scale.logvar(logvar[i]));
      T by_mean = 0, by_logvar = 0;
      if constexpr (kKl) {
        const T coefficient = coefficients[local];
        by_mean = coefficient * kl.by_mean;
        by_logvar = coefficient * kl.by_logvar;
        if constexpr (Prior::kLearned) {
          const math::PriorGradient<T> by_prior = prior.gradient(mean[i], kl);
          grad_prior_mean[i] = coefficient * by_prior.by_mean;
          grad_prior_logvar[i] = coefficient * by_prior.by_logvar;
        }
      }
      if constexpr (kSamples != Samples::kNone) {
        const T sampled = kSamples == Samples::kOne ? grad_z[i] * eps[local] : grad_z_eps[i];
        by_mean = kKl ? by_mean + grad_z[i] : grad_z[i];
        by_logvar = kKl ? math::fma(T(0.5) * kl.std, sampled, by_logvar) : T(0.5) * kl.std * sampled;
      }
      grad_mean[i] = by_mean;
      grad_logvar[i] = scale.gradient(logvar[i], by_logvar);
      if constexpr (kNats) nats[i] = kl.kl;
    }
  }
}

// Loops, by what is wanted. Without the KL the prior plays no part.

template <typename T, class Scale>
auto pick_forward(bool learned_prior, bool nats, Samples samples)
    -> void (*)(const LatentArrays<T>&, int64_t, int64_t) {
  using Standard = math::StandardPrior<T>;
  using Learned = math::GaussianPrior<T>;
  if (!nats) {
    return samples == Samples::kOne ? forward_loop<T, Scale, Standard, Samples::kOne, false>
                                    : forward_loop<T, Scale, Standard, Samples::kSeveral, false>;
  }
  switch (samples) {
    case Samples::kNone:
      return learned_prior ? forward_loop<T, Scale, Learned, Samples::kNone, true>
                           : forward_loop<T, Scale, Standard, Samples::kNone, true>;
    case Samples::kOne:
      return learned_prior ? forward_loop<T, Scale, Learned, Samples::kOne, true>
                           : forward_loop<T, Scale, Standard, Samples::kOne, true>;
    case Samples::kSeveral:
      return learned_prior ? forward_loop<T, Scale, Learned, Samples::kSeveral, true>
                           : forward_loop<T, Scale, Standard, Samples::kSeveral, true>;
  }
  __builtin_unreachable();
}

template <typename T, class Scale>
auto pick_backward(bool learned_prior, bool kl, bool nats, Samples samples)
    -> void (*)(const LatentArrays<T>&, int64_t, int64_t) {
  using Standard = math::StandardPrior<T>;
  using Learned = math::GaussianPrior<T>;
  if (!kl) {
    return samples == Samples::kOne ? backward_loop<T, Scale, Standard, Samples::kOne, false, false>
                                    : backward_loop<T, Scale, Standard, Samples::kSeveral, false, false>;
  }
  switch (samples) {
    case Samples::kNone:
      if (nats) {
        return learned_prior ? backward_loop<T, Scale, Learned, Samples::kNone, true, true>
                             : backward_loop<T, Scale, Standard, Samples::kNone, true, true>;
      }
      return learned_prior ? backward_loop<T, Scale, Learned, Samples::kNone, true, false>
                           : backward_loop<T, Scale, Standard, Samples::kNone, true, false>;
    case Samples::kOne:
      return learned_prior ? backward_loop<T, Scale, Learned, Samples::kOne, true, false>
                           : backward_loop<T, Scale, Standard, Samples::kOne, true, false>;
    case Samples::kSeveral:
      return learned_prior ? backward_loop<T, Scale, Learned, Samples::kSeveral, true, false>
                           : backward_loop<T, Scale, Standard, Samples::kSeveral, true, false>;
  }
  __builtin_unreachable();
}

// For channels_last: to[j * step + k] = runs[k][j] for four runs.
template <typename T>
FUSED_ELBO_INLINE void interleave_four(const T* const* runs, int64_t count, int64_t step, T* to) {
  const T *const r0 = runs[0], *const r1 = runs[1], *const r2 = runs[2], *const r3 = runs[3];
  int64_t j = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    for (; j + 4 <= count; j += 4) {
      __m128 a = _mm_loadu_ps(r0 + j), b = _mm_loadu_ps(r1 + j), c = _mm_loadu_ps(r2 + j), d = _mm_loadu_ps(r3 + j);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + j * step, a);
      _mm_storeu_ps(to + (j + 1) * step, b);
      _mm_storeu_ps(to + (j + 2) * step, c);
      _mm_storeu_ps(to + (j + 3) * step, d);
    }
  }
#endif
  for (; j < count; ++j) {
    to[j * step] = r0[j];
    to[j * step + 1] = r1[j];
    to[j * step + 2] = r2[j];
    to[j * step + 3] = r3[j];
  }
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
