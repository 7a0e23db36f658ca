// The few scalar primitives that the formulas need, for float and double, on host and device.
// Everything is forced inline: the CPU kernels are compiled once per instruction-set level, and a function left out of
// line would be a weak symbol that the linker may take from a higher level than the machine has.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_ELBO_HD __host__ __device__ __attribute__((always_inline))
#else
#define FUSED_ELBO_HD __attribute__((always_inline))
#endif

namespace fused_elbo {
namespace math {

FUSED_ELBO_HD inline uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
FUSED_ELBO_HD inline uint64_t bits(double x) { return __builtin_bit_cast(uint64_t, x); }
FUSED_ELBO_HD inline float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }
FUSED_ELBO_HD inline double from_bits(uint64_t x) { return __builtin_bit_cast(double, x); }

// One rounding where the machine has it; without the instruction two roundings, because libm's fma would be a call.
FUSED_ELBO_HD inline float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
FUSED_ELBO_HD inline double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

FUSED_ELBO_HD inline float sqrt(float x) { return __builtin_sqrtf(x); }
FUSED_ELBO_HD inline double sqrt(double x) { return __builtin_sqrt(x); }

// Nearest float to a 32-bit word. Machines without an unsigned conversion join two exact halves with one rounding.
FUSED_ELBO_HD inline float to_float(uint32_t word) {
#if defined(__CUDA_ARCH__) || defined(__AVX512F__) || !defined(__x86_64__)
  return static_cast<float>(word);
#else
  const float high = static_cast<float>(static_cast<int32_t>(word >> 16));
  const float low = static_cast<float>(static_cast<int32_t>(word & 0xffffu));
  return fma(high, 65536.0f, low);
#endif
}

FUSED_ELBO_HD inline double to_double(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return static_cast<double>(word);
#else
  // 2^52 + word, read off the bits, minus 2^52: vectorizes on every level.
  return from_bits(uint64_t{0x4330000000000000} | word) - 4503599627370496.0;
#endif
}

// Polynomial c0 + c1 x + c2 x^2 + ... by Horner's rule.
template <typename T>
FUSED_ELBO_HD inline T poly(T, T c0) {
  return c0;
}
template <typename T, typename... Rest>
FUSED_ELBO_HD inline T poly(T x, T c0, T c1, Rest... rest) {
  return fma(x, poly(x, c1, static_cast<T>(rest)...), c0);
}

}  // namespace math
}  // namespace fused_elbo
