// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11) and the key
// derivation.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace fused_elbo {
namespace math {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85;

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// Counter words of the noise contract: (index / 4) low, (index / 4) high, sample, stream.
FUSED_ELBO_HD inline PhiloxWords philox4x32(uint64_t counter, uint32_t sample, uint32_t stream, uint64_t seed) {
  PhiloxWords c{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), sample, stream};
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c.w0) * kPhiloxMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(c.w2) * kPhiloxMultiplier1;
    c = {static_cast<uint32_t>(product1 >> 32) ^ c.w1 ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

// The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA'14).
FUSED_ELBO_HD inline uint64_t mix64(uint64_t v) {
  v ^= v >> 30;
  v *= 0xBF58476D1CE4E5B9;
  v ^= v >> 27;
  v *= 0x94D049BB133111EB;
  v ^= v >> 31;
  return v;
}

// The seed of an independent key; not symmetric in its arguments, so that folding in a then b differs from b then a.
FUSED_ELBO_HD inline uint64_t fold_seed(uint64_t seed, uint64_t data) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
  return mix64(mix64(seed + kGolden) + data * kGolden);
}

}  // namespace math
}  // namespace fused_elbo
