// The instructions of csrc/cuda/intrinsics.cuh in plain C++. Approximate ones err as much as NVIDIA's PTX manual lets
// them, in a direction that depends on the argument: code that passes here does not rest on a particular chip being
// better than promised.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace fused_elbo {
namespace cuda {

// -1, or +1, by a hash of the argument's bits.
inline double emulated_sign(float x) {
  uint32_t h = __float_as_uint(x) * 0x9E3779B9u;
  return (h ^ (h >> 15)) & 0x100 ? 1.0 : -1.0;
}

constexpr bool kPaired = false;
inline float2 fma_pair(float2 a, float2 b, float2 c) { return {std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y)}; }
inline float2 mul_pair(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
inline float2 add_pair(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

inline float fma_saturate(float a, float b, float c) {
  const float d = std::fma(a, b, c);
  return d >= 1.0f ? 1.0f : d > 0.0f ? d : 0.0f;  // NaN: 0
}

inline float max_nan(float x, float bound) { return x < bound ? bound : x; }
inline float min_nan(float x, float bound) { return x > bound ? bound : x; }
inline double max_nan(double x, double bound) { return x < bound ? bound : x; }
inline double min_nan(double x, double bound) { return x > bound ? bound : x; }

// lg2.approx.ftz.f32: absolute error 2^-22 between 1/2 and 2, relative error 2^-22 elsewhere.
inline float log2_approx(float x) {
  const double exact = std::log2(static_cast<double>(x));
  const double error = x > 0.5f && x < 2.0f ? 0x1p-22 : 0x1p-22 * std::fabs(exact);
  return static_cast<float>(exact + 0.9 * error * emulated_sign(x));  // the last tenth is left for rounding
}

// sqrt.approx.ftz.f32: relative error 2^-23, rounding included: the outermost float that lies within. Denormals are 0.
inline float sqrt_approx(float x) {
  if (std::fabs(x) < std::numeric_limits<float>::min()) return x < 0 || std::signbit(x) ? -0.0f : 0.0f;
  const double exact = std::sqrt(static_cast<double>(x));
  const auto outermost = static_cast<float>(exact * (1.0 + 0x1p-23 * emulated_sign(x)));
  const bool outside = std::fabs(outermost - exact) > 0x1p-23 * exact;
  return outside ? std::nextafter(outermost, static_cast<float>(exact)) : outermost;
}

inline uint32_t keep(uint32_t x) { return x; }
inline uint32_t after(uint32_t x, float) { return x; }

inline uint32_t round_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline uint32_t round_float16(float x) {
  if (x != x) return 0x7fffu;
  const uint32_t sign = (__float_as_uint(x) >> 16) & 0x8000u;
  const double a = std::fabs(static_cast<double>(x));
  if (a >= 65520.0) return sign | 0x7c00u;
  if (a == 0) return sign;
  int exponent = 0;
  std::frexp(a, &exponent);  // a < 2^exponent
  const int shift = exponent < -13 ? 24 : 11 - exponent;
  const auto mantissa = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, shift)));
  // A subnormal's mantissa is its bits; else the leading bit adds 1 to the exponent field, and so does a carry.
  return sign | (exponent < -13 ? mantissa : (static_cast<uint32_t>(exponent + 13) << 10) + mantissa);
}

inline float widen_float16(uint32_t h) {
  const int exponent = static_cast<int>((h >> 10) & 31u);
  const uint32_t mantissa = h & 1023u;
  double value;
  if (exponent == 31) {
    value = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, -24);
  } else {
    value = std::ldexp(1024.0 + mantissa, exponent - 25);
  }
  return static_cast<float>(h & 0x8000u ? -value : value);
}

inline uint32_t pack_bfloat16(float low, float high) { return round_bfloat16(low) | round_bfloat16(high) << 16; }
inline uint32_t pack_float16(float low, float high) { return round_float16(low) | round_float16(high) << 16; }
inline void unpack_float16(uint32_t word, float& low, float& high) {
  low = widen_float16(word & 0xffffu);
  high = widen_float16(word >> 16);
}

}  // namespace cuda
}  // namespace fused_elbo
