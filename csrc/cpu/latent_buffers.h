// Where a unit of the latent kernels keeps what is not in place: one row of arrays per thread, in the nearest cache.
#pragma once

#include "noise.h"
#include "unit.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// Elements of a run of consecutive noise indices of one channel, for channels_last.
constexpr int64_t kRun = kUnit / 2 + 80;
static_assert(kBuffer >= kUnit + kNoisePadding && kRun >= kUnit / 2 + kNoisePadding, "normals writes whole groups");

template <typename T>
struct LatentBuffers {
  alignas(64) T mean[kBuffer];
  alignas(64) T logvar[kBuffer];
  alignas(64) T noise[kBuffer];
  alignas(64) T grad_z[kBuffer];
  alignas(64) T coefficient[kBuffer];
  alignas(64) T first[kBuffer];   // z, or grad_mean
  alignas(64) T second[kBuffer];  // standard deviation, or grad_logvar
  alignas(64) T nats[kBuffer];
  alignas(64) T prior_mean[kBuffer];
  alignas(64) T prior_logvar[kBuffer];
  alignas(64) T grad_prior_mean[kBuffer];
  alignas(64) T grad_prior_logvar[kBuffer];
  alignas(64) T grad_z_sum[kBuffer];
  alignas(64) T grad_z_eps[kBuffer];
  alignas(64) T runs[4 * kRun];
  alignas(64) T interleaved[kBuffer];
  alignas(64) T keep[kBuffer];
  alignas(64) T slope[kBuffer];
  alignas(64) T prior_slope[kBuffer];
  alignas(64) double nats_lanes[kLanes];
  alignas(64) double rows[kUnit];
};

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
