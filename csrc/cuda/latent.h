// The latent kernels' parameters.
#pragma once

#include "workspace.h"

namespace fused_elbo {
namespace cuda {

struct LatentParams {
  Plan plan;
  View index;  // logical position of an element, for the noise
  View mean, logvar, prior_mean, prior_logvar;
  View z, kl;
  View grad_z, grad_kl, grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar;
  int64_t samples = 1;

  const int64_t* seed = nullptr;
  int64_t seed_value = 0;
  uint64_t first_index = 0;  // noise index of the first element
  uint32_t stream = 0;

  bool clamp = false;
  double clamp_min = 0, clamp_max = 0;
  float clamp_min_float = 0, clamp_max_float = 0;
  Result result;  // of the KL
  double grad_kl_scale = 1;
  bool has_grad_kl = false;

  Scale scale;
  View mask;
};

// fast: all operands in units of 16 bytes, one sample, N(0, I), no mask, counters aligned with the units and of one
// high word. elements: a scale parameter or a mask (elements.cuh); in units of 16 bytes only where fast.
struct LatentPath {
  bool vector = false;
  bool fast = false;
  bool elements = false;
};

void launch_latent_forward(const LatentParams&, DType, LatentPath, void* stream);
void launch_latent_backward(const LatentParams&, DType, LatentPath, void* stream);

}  // namespace cuda
}  // namespace fused_elbo
