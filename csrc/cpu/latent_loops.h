// What the inner loops of the latent kernels share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/gaussian.h"
#include "latent.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

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

// Notes while a loop runs which lanes have met a number that is not near (math::Reach).
template <typename T>
struct FarLanes {
  alignas(64) math::Far<T> lane[kLanes] = {};
  FUSED_ELBO_INLINE bool any() const {
    math::Far<T> all = 0;
    for (int i = 0; i < kLanes; ++i) all |= lane[i];
    return math::is_far<T>(all);
  }
};

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
