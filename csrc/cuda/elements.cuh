// What may stand between an operand and the formulas: a scale parameter in the place of logvar, and a mask of the
// elements that count. The kernels of Any<Acc, true> take both.
#pragma once

#include <type_traits>

#include "../math/scale.h"
#include "place.cuh"

namespace fused_elbo {
namespace cuda {

// scale_terms of a kind that is known at run time: the same for all threads, so that they branch together. The clamp
// and the rest branch one after the other, which takes a third of the code of all their combinations.
template <typename Acc>
__device__ inline math::ScaleTerms<Acc> scale_terms(const Scale& scale, const math::ScaleNumbers<Acc>& numbers,
                                                    Acc parameter) {
  const math::Clamped<Acc> clamped =
      scale.soft_clamp ? math::soft_clamp(parameter, numbers) : math::hard_clamp(parameter, numbers);
  const auto of = [&](auto kind) {
    return numbers.floor > Acc(0) ? math::scale_terms_within<Acc, kind.value, true>(clamped, numbers.floor)
                                  : math::scale_terms_within<Acc, kind.value, false>(clamped, numbers.floor);
  };
  switch (scale.kind) {
    case ScaleKind::kLogStd:
      return of(std::integral_constant<ScaleKind, ScaleKind::kLogStd>());
    case ScaleKind::kSoftplusStd:
      return of(std::integral_constant<ScaleKind, ScaleKind::kSoftplusStd>());
    case ScaleKind::kVar:
      return math::scale_terms_within<Acc, ScaleKind::kVar, true>(clamped, numbers.floor);
    default:
      return of(std::integral_constant<ScaleKind, ScaleKind::kLogVar>());
  }
}

// A unit of parameters becomes logvars, where there is a parametrization; slope: d logvar / d parameter. One copy of
// the code serves all elements, which pass through the first place of the arrays: indices stay constants, and the
// arrays in registers.
template <typename Acc, int kUnit>
__device__ inline void to_logvar(const Scale& scale, Acc (&parameter)[kUnit], Acc (&slope)[kUnit]) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) slope[j] = 1;
  if (scale.kind == ScaleKind::kPlain) return;
  const math::ScaleNumbers<Acc> numbers = math::scale_numbers<Acc>(scale);
#pragma unroll 1
  for (int turn = 0; turn < kUnit; ++turn) {
    const math::ScaleTerms<Acc> terms = scale_terms(scale, numbers, parameter[0]);
#pragma unroll
    for (int j = 0; j + 1 < kUnit; ++j) {
      parameter[j] = parameter[j + 1];
      slope[j] = slope[j + 1];
    }
    parameter[kUnit - 1] = terms.logvar;
    slope[kUnit - 1] = terms.slope;
  }
}

// Which elements of a unit exist and count.
template <int kUnit>
__device__ inline void load_mask(const View& mask, int64_t at, int valid, bool (&counts)[kUnit]) {
  const uint8_t* bytes = static_cast<const uint8_t*>(mask.data) + at;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) counts[j] = j < valid && (!mask.present() || bytes[j * mask.element] != 0);
}

// Gradients by logvar become gradients by the parameter, and 0 where the element does not count, whatever they hold.
template <typename Acc, int kUnit>
__device__ inline void finish_gradients(const bool (&counts)[kUnit], const Acc (&slope)[kUnit], Acc (&grad_mean)[kUnit],
                                        Acc (&grad_logvar)[kUnit]) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    grad_mean[j] = counts[j] ? grad_mean[j] : Acc(0);
    grad_logvar[j] = counts[j] ? math::through(slope[j], grad_logvar[j]) : Acc(0);
  }
}

}  // namespace cuda
}  // namespace fused_elbo
