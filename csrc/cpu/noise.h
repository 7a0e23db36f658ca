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

// Normals of elements first .. first + count - 1 of a sample, at the returned place in buffer (64-byte aligned, of
// count + kNoisePadding elements).
const float* normals(const Noise& noise, uint32_t sample, uint64_t first, int64_t count, float* buffer);
const double* normals(const Noise& noise, uint32_t sample, uint64_t first, int64_t count, double* buffer);

void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out);

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
