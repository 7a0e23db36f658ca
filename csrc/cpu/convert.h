// bfloat16 and float16 as bits, and their conversions: to nearest even, NaN kept. Branch-free, so that loops vectorize.
#pragma once

#include <cstdint>

#include "../math/scalar.h"
#include "simd.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that arithmetic on To is done in: a value on its way between memory and a kernel passes through it.
FUSED_ELBO_INLINE float widen(float x) { return x; }
FUSED_ELBO_INLINE double widen(double x) { return x; }
FUSED_ELBO_INLINE float widen(BFloat16 x) { return math::from_bits(static_cast<uint32_t>(x.bits) << 16); }

FUSED_ELBO_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Scaling by 2^112 moves the exponent's bias and normalizes subnormals; infinity and NaN need their exponent filled.
  const uint32_t scaled = math::bits(math::from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return math::from_bits(scaled | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

FUSED_ELBO_INLINE void narrow(float x, float& to) { to = x; }
FUSED_ELBO_INLINE void narrow(double x, double& to) { to = x; }
FUSED_ELBO_INLINE void narrow(double x, float& to) { to = static_cast<float>(x); }
FUSED_ELBO_INLINE void narrow(float x, double& to) { to = x; }

FUSED_ELBO_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = math::bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  to.bits = static_cast<uint16_t>((x == x ? rounded : quiet_nan) >> 16);
}

FUSED_ELBO_INLINE void narrow(float x, Float16& to) {
  const uint32_t bits = math::bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded to nearest even by the addition.
  const uint32_t subnormal = math::bits(math::from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

// A double on its way to a half type is rounded twice; only scalars of a float32 kernel take this way.
FUSED_ELBO_INLINE void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
FUSED_ELBO_INLINE void narrow(double x, Float16& to) { narrow(static_cast<float>(x), to); }

template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
};

// Contiguous runs.
template <typename To, typename From>
FUSED_ELBO_INLINE void widen_run(const From* from, int64_t count, To* to) {
  FUSED_ELBO_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(widen(from[i]));
}
template <typename From, typename To>
FUSED_ELBO_INLINE void narrow_run(const From* from, int64_t count, To* to) {
  FUSED_ELBO_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

#if defined(__F16C__)
// The processor's own conversions are exact and six times as fast; g++ does not use them in loops.
FUSED_ELBO_INLINE void widen_run(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i].bits);
}
FUSED_ELBO_INLINE void narrow_run(const float* from, int64_t count, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
