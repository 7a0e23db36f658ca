// Formulations for the GPU of what csrc/math defines: fewer instructions, the same error bounds.
//   Normals in float: lg2.approx and sqrt.approx where they are accurate enough, a polynomial near u = 1 where not.
//   Terms of logvar in float: range reduction with one saturating fma, so that no value of logvar needs a select.
// double takes the formulas of csrc/math as they are. Every sum of products is an explicit fma: the compiler has
// nothing left to contract, so two kernels that share a formula round alike.
#pragma once

#include "../math/gaussian.h"
#include "../math/normal.h"
#include "../math/philox.h"
#include "pair.cuh"

namespace fused_elbo {
namespace cuda {

using math::fma;
using math::poly;

// sqrt(-log2 u). Below 0.9 the 2^-22.6 of lg2.approx costs the radius 2.4e-7; above, the error would grow as 1/radius,
// and log2(1 + t) = t P(t) takes over, relative error 1.4e-7. u = 1 gives 0.
__device__ inline Pair radius_approx(Pair u) {
  const Pair t = u - Pair(1.0f);
  const Pair near_one = t * poly(t, Pair(1.44269476f), Pair(-0.72143543f), 0.47662027f, -0.42615031f);
  const auto radius = [](float u, float near_one) { return sqrt_approx(-(u > 0.9f ? near_one : log2_approx(u))); };
  return Pair(radius(u.v.x, near_one.v.x), radius(u.v.y, near_one.v.y));
}

// The four normals of one counter's words; kHalve gives eps / 2, which is what the gradient by logvar wants.
// sqrt(2 ln 2) of the radius and the 1/2 sit in the coefficients. Errors weighted by what the noise contract allows,
// 1e-7 for the cosine (degree 8) and 4e-9 for the sine (degree 9).
template <int kHalve>
__device__ inline void normals(const math::PhiloxWords& w, float* eps) {
  constexpr float k = kHalve ? 0.5f : 1.0f;
  const Pair even(static_cast<float>(w.w0), static_cast<float>(w.w2));
  const Pair odd(static_cast<float>(w.w1), static_cast<float>(w.w3));
  const Pair r = radius_approx(fma(even, 0x1p-32f, 0x1p-33f));
  const Pair half_turns = fma(odd, 0x1p-31f, 0x1p-32f);
  const Pair shifted = half_turns + Pair(12582912.0f);
  const Pair y = half_turns - (shifted - Pair(12582912.0f));
  const Pair z = y * y;
  const auto signed_by = [](float r, float shifted) {
    return __uint_as_float(__float_as_uint(r) ^ (__float_as_uint(shifted) << 31));
  };
  const Pair signed_r(signed_by(r.v.x, shifted.v.x), signed_by(r.v.y, shifted.v.y));
  const Pair cos = poly(z, Pair(k * 1.17740989f), Pair(k * -1.10062573f), k * 0.37573835f, k * -0.06415316f);
  const Pair sin =
      poly(z, Pair(k * 3.69894264f), Pair(k * -6.08451214f), k * 3.00246316f, k * -0.7043007f, k * 0.09118847f);
  const Pair c = signed_r * fma(z, -4.0f, 1.0f);
  const Pair s = signed_r * y;
  // One by one: the elements' own pairs lie across these.
  eps[0] = c.v.x * cos.v.x;
  eps[1] = s.v.x * sin.v.x;
  eps[2] = c.v.y * cos.v.y;
  eps[3] = s.v.y * sin.v.y;
}

template <int kHalve>
__device__ inline void normals(const math::PhiloxWords& w, double* eps) {
  math::box_muller(w.w0, w.w1, eps[0], eps[1]);
  math::box_muller(w.w2, w.w3, eps[2], eps[3]);
  if constexpr (kHalve) {
#pragma unroll
    for (int i = 0; i < 4; ++i) eps[i] *= 0.5;
  }
}

// Philox with the key schedule worked out once per thread: 20 additions less per counter. Counter words 1 to 3 are the
// same for every counter of a thread, so that the compiler moves what depends on them alone (a product of the second
// round) out of the loop.
class Philox {
 public:
  __device__ Philox(uint64_t seed, uint32_t counter_high, uint32_t sample, uint32_t stream)
      : high_(counter_high), sample_(sample), stream_(stream) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < math::kPhiloxRounds; ++round) {
      key0_[round] = keep(key0);
      key1_[round] = keep(key1);
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

// What one exponential gives of a logvar x: std = e^(x/2), w = e^(x/2) - 1, phi_half = e^(x/2) - 1 - x/2. Then
// phi(x) = w^2 + 2 phi_half and e^x - 1 = w (w + 2), neither with cancellation.
template <typename Acc>
struct LogVar {
  Acc std, w, phi_half;
  __device__ Acc phi() const { return fma(w, w, phi_half + phi_half); }
  __device__ Acc expm1() const { return fma(w, w, w + w); }
};

// V: float or Pair.
template <typename V>
__device__ inline LogVar<V> logvar_terms(V x) {
  const V h = V(0.5f) * x;
  // n = rint(h / ln 2) held to [-127, 127] by the saturation (NaN: -127); power = 2^n, 0 at -127. At n = 127 the
  // remainder r may grow: up to ln 2 the polynomial still serves, beyond it everything overflows to infinity, as it
  // should.
  const V unit = fma_saturate(h, 1.44269504f / 254.0f, 0.5f);
  const V shifted = fma(unit, V(254.0f), V(12582912.0f));
  const V n = shifted - V(12582912.0f + 127.0f);
  const V power = shift_left(shifted, 23);
  const V r = fma(n, V(1.90465421e-9f), fma(n, V(-0.693147182f), h));
  // At n = -127, r has no lower bound and power is 0: keep 0 * p finite. NaN stays NaN.
  const V bounded = max_nan(r, -1.0f);
  const V p = (bounded * bounded) *
              poly(bounded, V(0.5f), V(0.166666672f), 0.0416664667f, 0.00833336078f, 0.00139336067f, 0.000198578025f);
  const V em = power - V(1.0f);
  const V q = bounded + p;
  LogVar<V> terms;
  terms.std = fma(power, q, power);
  terms.w = fma(power, q, em);
  terms.phi_half = fma(power, p, fma(em, r, fma(n, V(-0.693147182f), em)));
  return terms;
}

template <>
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
template <typename V, typename Acc>
__device__ inline V clamp(V x, Acc min, Acc max) {
  return min_nan(max_nan(x, min), max);
}

// KL in two sums, squares and the rest, because that saves an instruction per element: kl = squares / 2 + linear.
// V: Acc, or Pair for a sum in two halves.
template <typename V>
struct KlSum {
  V squares = V(0.0f), linear = V(0.0f);
  __device__ void add(V mean, const LogVar<V>& v) {
    squares = fma(mean, mean, squares);
    squares = fma(v.w, v.w, squares);
    linear = linear + v.phi_half;
  }
  __device__ void add_pair(Pair mean, const LogVar<Pair>& v) {
    if constexpr (sizeof(V) == sizeof(Pair)) {
      add(mean, v);
    } else {
      add(mean.v.x, {v.std.v.x, v.w.v.x, v.phi_half.v.x});
      add(mean.v.y, {v.std.v.y, v.w.v.y, v.phi_half.v.y});
    }
  }
  __device__ auto value() const { return sum(fma(V(0.5f), squares, linear)); }
};

}  // namespace cuda
}  // namespace fused_elbo
