// Formulations for the GPU of what csrc/math defines: fewer instructions, the same error bounds.
//   Normals in float: lg2.approx and sqrt.approx where they are accurate enough, a polynomial near u = 1 where not.
//   Terms of logvar in float: range reduction with one saturating fma, so that no value of logvar needs a select.
// double takes the formulas of csrc/math as they are. Every sum of products is an explicit fma: the compiler has
// nothing left to contract, so two kernels that share a formula round alike.
#pragma once

#include "../math/gaussian.h"
#include "../math/normal.h"
#include "../math/philox.h"
#include "intrinsics.cuh"

namespace fused_elbo {
namespace cuda {

using math::fma;
using math::poly;

// sqrt(-log2 u). Below 0.9 the 2^-22.6 of lg2.approx costs the radius 2.4e-7; above, the error would grow as 1/radius,
// and log2(1 + t) = t P(t) takes over, relative error 1.4e-7. u = 1 gives 0.
__device__ inline float radius_approx(float u) {
  const float t = u - 1.0f;
  const float near_one = t * poly(t, 1.44269476f, -0.72143543f, 0.47662027f, -0.42615031f);
  return sqrt_approx(-(u > 0.9f ? near_one : log2_approx(u)));
}

// kScale times the normals of two words; sqrt(2 ln 2) of the radius and kScale sit in the coefficients. Errors weighted
// by what the noise contract allows, 1e-7 for the cosine (degree 8) and 4e-9 for the sine (degree 9).
template <int kHalve>
__device__ inline void box_muller(uint32_t even_word, uint32_t odd_word, float& even, float& odd) {
  constexpr float k = kHalve ? 0.5f : 1.0f;
  const float r = radius_approx(math::uniform(even_word, 0.0f));
  const float half_turns = fma(static_cast<float>(odd_word), 0x1p-31f, 0x1p-32f);
  const float shifted = half_turns + 12582912.0f;
  const float y = half_turns - (shifted - 12582912.0f);
  const float z = y * y;
  const float signed_r = __uint_as_float(__float_as_uint(r) ^ (__float_as_uint(shifted) << 31));
  const float cos = poly(z, k * 1.17740989f, k * -1.10062573f, k * 0.37573835f, k * -0.06415316f);
  const float sin = poly(z, k * 3.69894264f, k * -6.08451214f, k * 3.00246316f, k * -0.7043007f, k * 0.09118847f);
  even = (signed_r * fma(z, -4.0f, 1.0f)) * cos;
  odd = (signed_r * y) * sin;
}

template <int kHalve>
__device__ inline void box_muller(uint32_t even_word, uint32_t odd_word, double& even, double& odd) {
  math::box_muller(even_word, odd_word, even, odd);
  if constexpr (kHalve) {
    even *= 0.5;
    odd *= 0.5;
  }
}

// Philox with the key schedule worked out once per thread: 20 additions less per counter. Counter words 1 to 3 are the
// same for every counter of a thread, so that the compiler moves what depends on them alone (a product of the second
// round) out of the loop.
// kWorkedOut: rounds whose keys may be worked out again at every counter. With all 20 kept, a kernel of 64 registers
// spills.
template <int kWorkedOut>
class Philox {
 public:
  __device__ Philox(uint64_t seed, uint32_t counter_high, uint32_t sample, uint32_t stream)
      : high_(counter_high), sample_(sample), stream_(stream) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < math::kPhiloxRounds; ++round) {
      key0_[round] = round < kWorkedOut ? key0 : keep(key0);
      key1_[round] = round < kWorkedOut ? key1 : keep(key1);
      key0 += math::kPhiloxWeyl0;
      key1 += math::kPhiloxWeyl1;
    }
  }

  __device__ math::PhiloxWords operator()(uint32_t counter_low) const {
    math::PhiloxWords c{counter_low, high_, sample_, stream_};
#pragma unroll
    for (int round = 0; round < math::kPhiloxRounds; ++round) {
      const uint64_t product0 = static_cast<uint64_t>(c.w0) * math::kPhiloxMultiplier0;
      const uint64_t product1 = static_cast<uint64_t>(c.w2) * math::kPhiloxMultiplier1;
      c = {static_cast<uint32_t>(product1 >> 32) ^ c.w1 ^ key0_[round], static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ key1_[round], static_cast<uint32_t>(product0)};
    }
    return c;
  }

 private:
  uint32_t high_, sample_, stream_;
  uint32_t key0_[math::kPhiloxRounds], key1_[math::kPhiloxRounds];
};

// The four normals of one counter's words; kHalve gives eps / 2, which is what the gradient by logvar wants.
template <int kHalve, typename Acc>
__device__ inline void normals(const math::PhiloxWords& w, Acc* eps) {
  box_muller<kHalve>(w.w0, w.w1, eps[0], eps[1]);
  box_muller<kHalve>(w.w2, w.w3, eps[2], eps[3]);
}

// What one exponential gives of a logvar x: std = e^(x/2), w = e^(x/2) - 1, phi_half = e^(x/2) - 1 - x/2. Then
// phi(x) = w^2 + 2 phi_half and e^x - 1 = w (w + 2), neither with cancellation.
template <typename Acc>
struct LogVar {
  Acc std, w, phi_half;
  __device__ Acc phi() const { return fma(w, w, phi_half + phi_half); }
  __device__ Acc expm1() const { return fma(w, w, w + w); }
};

__device__ inline LogVar<float> logvar_terms(float x) {
  const float h = 0.5f * x;
  // n = rint(h / ln 2) held to [-127, 127] by the saturation (NaN: -127); power = 2^n, 0 at -127. At n = 127 the
  // remainder r may grow: up to ln 2 the polynomial still serves, beyond it everything overflows to infinity, as it
  // should.
  const float unit = fma_saturate(h, 1.44269504f / 254.0f, 0.5f);
  const float shifted = fma(unit, 254.0f, 12582912.0f);
  const float n = shifted - (12582912.0f + 127.0f);
  const float power = __uint_as_float(__float_as_uint(shifted) << 23);
  const float r = fma(n, 1.90465421e-9f, fma(n, -0.693147182f, h));
  // At n = -127, r has no lower bound and power is 0: keep 0 * p finite. NaN stays NaN.
  const float bounded = max_nan(r, -1.0f);
  const float p = (bounded * bounded) *
                  poly(bounded, 0.5f, 0.166666672f, 0.0416664667f, 0.00833336078f, 0.00139336067f, 0.000198578025f);
  const float em = power - 1.0f;
  const float q = bounded + p;
  LogVar<float> terms;
  terms.std = fma(power, q, power);
  terms.w = fma(power, q, em);
  terms.phi_half = fma(power, p, fma(em, r, fma(n, -0.693147182f, em)));
  return terms;
}

__device__ inline LogVar<double> logvar_terms(double x) {
  using C = math::ExpConstants<double>;
  const math::Reduced<double> e = math::reduce_exp(0.5 * x, 0);
  const double em = e.power - 1.0;
  LogVar<double> terms{fma(e.power, e.q, e.power), fma(e.power, e.q, em),
                       fma(e.power, e.p, fma(em, e.r, fma(e.n, -0.693147180559945309417, em)))};
  if (x < 2 * C::kMin) terms = {0.0, -1.0, -1.0 - 0.5 * x};
  if (x > 2 * C::kMax) terms = {math::infinity<double>(), math::infinity<double>(), math::infinity<double>()};
  return terms;
}

// As torch.clamp: NaN passes through.
template <typename Acc>
__device__ inline Acc clamp(Acc x, Acc min, Acc max) {
  return min_nan(max_nan(x, min), max);
}

// KL in two sums, squares and the rest, because that saves an instruction per element: kl = squares / 2 + linear.
template <typename Acc>
struct KlSum {
  Acc squares = 0, linear = 0;
  __device__ void add(Acc mean, const LogVar<Acc>& v) {
    squares = fma(mean, mean, squares);
    squares = fma(v.w, v.w, squares);
    linear += v.phi_half;
  }
  __device__ Acc value() const { return fma(Acc(0.5), squares, linear); }
};

}  // namespace cuda
}  // namespace fused_elbo
