// Standard normals by position, a block of counters at a time.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

struct Noise {
  uint64_t seed;
  uint32_t stream;
};

FUSED_ELBO_INLINE Noise make_noise(const NoiseKey& key) {
  return {static_cast<uint64_t>(key.seed ? *key.seed : key.seed_value), key.stream};
}

// Elements that a buffer for normals needs beyond the count asked for.
constexpr int64_t kNoisePadding = 4 + 4 * kLanes;

// One sample's noise. The round keys are vectors in memory: broadcasting them anew from general registers in every step
// costs a third of Philox.
struct NoiseGenerator {
  uint64_t seed;
  uint32_t sample, stream;
  WordVector key0[10], key1[10];
  NoiseGenerator(const Noise& noise, uint32_t sample);
};

// Normals of elements first .. first + count - 1, at the returned place in buffer: first % 4 elements from its start.
// buffer is 64-byte aligned and has room for count + kNoisePadding elements.
const float* normals(const NoiseGenerator& generator, uint64_t first, int64_t count, float* buffer);
const double* normals(const NoiseGenerator& generator, uint64_t first, int64_t count, double* buffer);

void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out);

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
