// What the latent kernels share on the device: clamping and the noise of a unit.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "latent.h"
#include "math.cuh"
#include "place.cuh"
#include "reduce.cuh"

namespace fused_elbo {
namespace cuda {

// Blocks of a fast kernel that share a multiprocessor: four, which means 64 registers. Operands of paired instructions
// lie in adjacent registers, which costs 2-byte dtypes a few more: three blocks then, and no spill.
template <typename T>
constexpr int kResident = kPaired && sizeof(T) == 2 ? 3 : 4;

// What a fast kernel sums the KL in: two halves where that saves instructions and there are registers for it.
template <typename T>
using KlHalves = std::conditional_t<kPaired && sizeof(T) == 4, Pair, float>;

template <typename Acc>
struct Bounds {
  Acc min, max;
};
__device__ inline Bounds<float> clamp_bounds(const LatentParams& p, float) {
  return {p.clamp_min_float, p.clamp_max_float};
}
__device__ inline Bounds<double> clamp_bounds(const LatentParams& p, double) { return {p.clamp_min, p.clamp_max}; }

__device__ inline uint64_t load_seed(const LatentParams& p) {
  return static_cast<uint64_t>(p.seed != nullptr ? *p.seed : p.seed_value);
}

// The normals of the unit whose first element has noise index `index`, times 1/2 if kHalve. kAligned: index is a
// multiple of 4.
template <bool kAligned, int kHalve, typename Acc, int kUnit>
__device__ inline void unit_normals(uint64_t index, uint32_t sample, uint32_t stream, uint64_t seed,
                                    Acc (&eps)[kUnit]) {
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
          if (shift == static_cast<uint32_t>(s))
            value = i + s < kUnit ? eps[i + s < kUnit ? i + s : 0] : next[(i + s) & 3];
        }
        eps[i] = value;
      }
    }
  }
}

}  // namespace cuda
}  // namespace fused_elbo
