// What a thread works in while it runs the likelihood's units.
#pragma once

#include "likelihood.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

template <typename T>
struct LikelihoodBuffers {
  alignas(64) T x[kBuffer];
  alignas(64) T mean[kBuffer];
  alignas(64) T logvar[kBuffer];
  alignas(64) T upstream[kBuffer];
  alignas(64) T value[kBuffer];
  alignas(64) T grad_mean[kBuffer];
  alignas(64) T grad_x[kBuffer];
  alignas(64) T grad_logvar[kBuffer];
  alignas(64) T keep[kBuffer];
  alignas(64) T slope[kBuffer];
  // Per row of the unit.
  alignas(64) double row_upstream[kUnit];
  alignas(64) double row_logvar[kUnit];
  alignas(64) double row_precision[kUnit];
  alignas(64) double row_factor[kUnit];
  alignas(64) double row_value[kUnit];
  alignas(64) double row_grad_logvar[kUnit];
};

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
