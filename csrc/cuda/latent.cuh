// The latent kernels' parameters and what forward and backward share.
#pragma once

#include "math.cuh"
#include "place.cuh"
#include "reduce.cuh"

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
};

// fast: all operands in units of 16 bytes, one sample, N(0, I), counters aligned with the units and of one high word.
struct LatentPath {
  bool vector = false;
  bool fast = false;
};

void launch_latent_forward(const LatentParams&, DType, LatentPath, void* stream);
void launch_latent_backward(const LatentParams&, DType, LatentPath, void* stream);

template <typename Acc>
struct Bounds {
  Acc min, max;
};
__device__ inline Bounds<float> clamp_bounds(const LatentParams& p, float) { return {p.clamp_min_float, p.clamp_max_float}; }
__device__ inline Bounds<double> clamp_bounds(const LatentParams& p, double) { return {p.clamp_min, p.clamp_max}; }

__device__ inline uint64_t load_seed(const LatentParams& p) {
  return static_cast<uint64_t>(p.seed != nullptr ? *p.seed : p.seed_value);
}

// The normals of the unit whose first element has noise index `index`, times 1/2 if kHalve. kAligned: index is a multiple of 4.
template <bool kAligned, int kHalve, typename Acc, int kUnit>
__device__ inline void unit_normals(uint64_t index, uint32_t sample, uint32_t stream, uint64_t seed, Acc (&eps)[kUnit]) {
  const uint64_t counter = index >> 2;
#pragma unroll
  for (int g = 0; g < kUnit; g += 4) normals<kHalve>(math::philox4x32(counter + g / 4, sample, stream, seed), eps + g);
  if constexpr (!kAligned) {
    const uint32_t shift = static_cast<uint32_t>(index) & 3u;
    if (shift != 0) {
      Acc next[4];
      normals<kHalve>(math::philox4x32(counter + kUnit / 4, sample, stream, seed), next);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        Acc value = eps[i];
#pragma unroll
        for (int s = 1; s < 4; ++s) {
          if (shift == static_cast<uint32_t>(s)) value = i + s < kUnit ? eps[i + s < kUnit ? i + s : 0] : next[(i + s) & 3];
        }
        eps[i] = value;
      }
    }
  }
}

}  // namespace cuda
}  // namespace fused_elbo
