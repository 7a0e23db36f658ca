// Standard normals from Philox words: Box-Muller, two words to two normals.
//   u(w) = fma(float(w), 2^-32, 2^-33), rounded to nearest; r = sqrt(-2 ln u(even));
//   normals r cos(2 pi u(odd)), r sin(2 pi u(odd)).
// Within 4e-7 (1 + |eps|) of the formula in float; to about 1e-15 in double, where u = w 2^-32 + 2^-33 is exact.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace fused_elbo {
namespace math {

// (0, 1] in float, where words of 2^32 - 128 and above round to 1; (0, 1) in double.
FUSED_ELBO_HD inline float uniform(uint32_t word, float) { return fma(to_float(word), 0x1p-32f, 0x1p-33f); }
FUSED_ELBO_HD inline double uniform(uint32_t word, double) { return fma(to_double(word), 0x1p-32, 0x1p-33); }

// sqrt(-ln u); the missing factor sqrt 2 sits in the coefficients of cos_sin below.
FUSED_ELBO_HD inline float radius(float u) {
  // Minimax fit of Q for the error that the noise contract bounds, d eps / (1 + |eps|): 3e-8.
  // u = 2^k (1 + t) with 1 + t in [sqrt 1/2, sqrt 2): ln u = k ln 2 + t + t^2 Q(t), with t exact, so that u near 1
  // loses nothing.
  const uint32_t offset = (bits(u) - 0x3f3504f3u) & 0xff800000u;
  const float t = from_bits(bits(u) - offset) - 1.0f;
  const float exponent = static_cast<float>(static_cast<int32_t>(offset));
  float q = poly(t, -0.5000029f, 0.33335733f, -0.24971515f, 0.19879687f, -0.17222314f, 0.16364677f, -0.10344147f);
  q = fma(t * t, q, t);
  return sqrt(-fma(exponent, 0x1.62e430p-24f, q));  // ln 2 * 2^-23: the exponent arrives unshifted
}

FUSED_ELBO_HD inline double radius(double u) {
  // ln u = k ln 2 + 2 atanh(s), s = t / (2 + t), |s| < 0.1716.
  const uint64_t offset = (bits(u) - 0x3fe6a09e667f3bcdu) & 0xfff0000000000000u;
  const double t = from_bits(bits(u) - offset) - 1.0;
  // u <= 1, so the exponent is -33..0: it fits the low half of a word and needs no 64-bit conversion.
  const double exponent = static_cast<double>(static_cast<int32_t>(static_cast<uint32_t>(offset >> 32)) >> 20);
  const double s = t / (2.0 + t);
  const double s2 = s * s;
  const double series = poly(s2, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19,
                             2.0 / 21, 2.0 / 23);
  // 2 atanh(s) = t - s (t - s^2 series): the leading term stays exact.
  const double log1p_t = t - s * (t - s2 * series);
  return sqrt(-fma(exponent, 0.69314718055994530942, log1p_t));
}

template <typename T>
struct CosSin {
  T cos, sin;
};

// sqrt(2) (cos, sin)(2 pi u(word)) up to a common sign, which goes into sign_bit: in half turns y in [-1/2, 1/2] no
// swap of sine and cosine is needed.
FUSED_ELBO_HD inline CosSin<float> cos_sin(uint32_t word, uint32_t& sign_bit) {
  const float half_turns = fma(to_float(word), 0x1p-31f, 0x1p-32f);
  const float shifted = half_turns + 12582912.0f;
  const float y = half_turns - (shifted - 12582912.0f);
  const float z = y * y;
  sign_bit = bits(shifted) << 31;
  constexpr double kSqrt2 = 1.41421356237309504880;
  // Fits for the same error at the largest radius: 4e-9 for the sine, 1e-7 for the cosine.
  const float sin = y * poly(z, float(3.14159274 * kSqrt2), float(-5.16770983 * kSqrt2), float(2.55006981 * kSqrt2),
                             float(-0.598242104 * kSqrt2), float(0.0775603876 * kSqrt2));
  const float cos = fma(z, -4.0f, 1.0f) * poly(z, float(0.999999884 * kSqrt2), float(-0.934785392 * kSqrt2),
                                               float(0.319122276 * kSqrt2), float(-0.0544850127 * kSqrt2));
  return {cos, sin};
}

FUSED_ELBO_HD inline CosSin<double> cos_sin(uint32_t word, uint64_t& sign_bit) {
  const double half_turns = fma(to_double(word), 0x1p-31, 0x1p-32);
  const double shifted = half_turns + 6755399441055744.0;
  const double y = half_turns - (shifted - 6755399441055744.0);
  sign_bit = bits(shifted) << 63;
  // Taylor series in the angle; sqrt 2 goes into the angle's factor and the cosine's end.
  constexpr double kSqrt2 = 1.41421356237309504880;
  const double angle = y * 3.14159265358979323846;
  const double z = angle * angle;
  const double sin =
      poly(z, 1.0, -1.6666666666666666667e-01, 8.3333333333333333333e-03, -1.9841269841269841270e-04,
           2.7557319223985890653e-06, -2.5052108385441718775e-08, 1.6059043836821614599e-10, -7.6471637318198164759e-13,
           2.8114572543455207632e-15, -8.2206352466243297170e-18, 1.9572941063391261231e-20);
  const double cos =
      poly(z, 1.0, -0.5, 4.1666666666666666667e-02, -1.3888888888888888889e-03, 2.4801587301587301587e-05,
           -2.7557319223985890653e-07, 2.0876756987868098979e-09, -1.1470745597729724714e-11, 4.7794773323873852974e-14,
           -1.5619206968586226462e-16, 4.1103176233121648585e-19, -8.8967913924505732867e-22);
  return {cos * kSqrt2, angle * sin * kSqrt2};
}

// Words (even, odd) of a Philox block to its normals (even, odd).
FUSED_ELBO_HD inline void box_muller(uint32_t word_even, uint32_t word_odd, float& even, float& odd) {
  uint32_t sign_bit;
  const CosSin<float> direction = cos_sin(word_odd, sign_bit);
  const float r = from_bits(bits(radius(uniform(word_even, float{}))) ^ sign_bit);
  even = r * direction.cos;
  odd = r * direction.sin;
}

FUSED_ELBO_HD inline void box_muller(uint32_t word_even, uint32_t word_odd, double& even, double& odd) {
  uint64_t sign_bit;
  const CosSin<double> direction = cos_sin(word_odd, sign_bit);
  const double r = from_bits(bits(radius(uniform(word_even, double{}))) ^ sign_bit);
  even = r * direction.cos;
  odd = r * direction.sin;
}

}  // namespace math
}  // namespace fused_elbo
