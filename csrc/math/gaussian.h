// The Gaussian formulas, one element at a time, in nats.
//   std = e^(logvar/2), phi(x) = e^x - 1 - x >= 0
//   KL(N(mean, std^2) || N(0, 1)) = 1/2 [mean^2 + phi(logvar)]
//   KL(q || p) = 1/2 [phi(logvar - prior_logvar) + (mean - prior_mean)^2 e^-prior_logvar]
//   log N(x; mean, e^logvar) = -1/2 [(x - mean)^2 e^-logvar + logvar + ln 2 pi]
// Branch-free: a loop over elements vectorizes. NaN stays NaN; beyond the range of the exponential the limits are
// selected.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace fused_elbo {
namespace math {

constexpr double kLog2Pi = 1.83787706640934548356;

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr int kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  // ln 2 in two parts, the first short enough that its product with the exponent is exact even without fma.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMax = 88.37f, kMin = -87.33f;  // e^h is finite and normal between
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr int kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kMax = 709.43, kMin = -708.39;
};

// h = n ln 2 + r, power = 2^(n + shift), p = e^r - 1 - r, q = e^r - 1. Both by explicit operations: left to contract r
// + p where p has no other use, the compiler would round the standard deviation differently with and without a KL.
template <typename T>
struct Reduced {
  T n, r, p, q, power;
};

// (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2.
FUSED_ELBO_HD inline float exp_tail(float r) {
  return poly(r, 0.5f, 0.166666672f, 0.0416664667f, 0.00833336078f, 0.00139336067f, 0.000198578025f);
}
FUSED_ELBO_HD inline double exp_tail(double r) {
  return poly(r, 0.5, 1.6666666666666666667e-01, 4.1666666666666666667e-02, 8.3333333333333333333e-03,
              1.3888888888888888889e-03, 1.9841269841269841270e-04, 2.4801587301587301587e-05,
              2.7557319223985890653e-06, 2.7557319223985890653e-07, 2.5052108385441718775e-08,
              2.0876756987868098979e-09, 1.6059043836821614599e-10, 1.1470745597729724714e-11);
}

template <typename T>
FUSED_ELBO_HD inline Reduced<T> reduce_exp(T h, int shift) {
  using C = ExpConstants<T>;
  using Bits = typename C::Bits;
  const T round = C::kRound + static_cast<T>(C::kBias + shift);
  const T shifted = fma(h, T(1.44269504088896340736), round);
  const T n = shifted - round;
  const T r = fma(n, -C::kLn2Low, fma(n, -C::kLn2High, h));
  const T square = r * r, tail = exp_tail(r);
  return {n, r, square * tail, fma(square, tail, r), from_bits(static_cast<Bits>(bits(shifted) << C::kMantissa))};
}

template <typename T>
FUSED_ELBO_HD inline T infinity() {
  return static_cast<T>(__builtin_inff());
}

// e^x, 1 ulp; 0 below the normal range.
template <typename T>
FUSED_ELBO_HD inline T exp(T x) {
  using C = ExpConstants<T>;
  // Half of 2^n and a doubling at the end: n = 1 + the largest exponent would overflow although the result does not.
  const Reduced<T> e = reduce_exp(x, -1);
  T value = fma(e.power, e.q, e.power);
  value = value + value;
  value = x < C::kMin + T(0.7) ? T(0) : value;
  return x > C::kMax + T(0.35) ? infinity<T>() : value;
}

// Which logvars a formula is for: any, or those between -88 and 88 (-709 and 709 in double), which saves a quarter of
// its operations. The formula for near ones tells by Far whether they were.
enum class Reach { kNear, kAny };

// Bits that say of one number, or of several after joining them by |, that one of them was not near.
template <typename T>
using Far = typename ExpConstants<T>::Bits;

// h = n ln 2 + r with |n| up to half of the exponents: the distance from the lowest of these n is beyond their count
// for any other h, and for NaN.
template <typename T>
FUSED_ELBO_HD inline Far<T> far_bits(T h) {
  using C = ExpConstants<T>;
  const T shifted = fma(h, T(1.44269504088896340736), C::kRound + static_cast<T>(C::kBias));
  return bits(shifted) - (bits(C::kRound) + static_cast<Far<T>>(C::kBias / 2));
}
template <typename T>
FUSED_ELBO_HD inline bool is_far(Far<T> bits) {
  return bits > static_cast<Far<T>>(ExpConstants<T>::kBias);
}

// Everything the Gaussian needs of one logvar x, from one exponential.
template <typename T>
struct LogVarTerms {
  T std;       // e^(x/2)
  T w;         // e^(x/2) - 1
  T phi_half;  // e^(x/2) - 1 - x/2
};

// e^x - 1 - x, without cancellation and never negative.
template <typename T>
FUSED_ELBO_HD inline T phi_from(T w, T phi_half) {
  return fma(w, w, phi_half + phi_half);
}
// e^x - 1, and half of it.
template <typename T>
FUSED_ELBO_HD inline T expm1_from(T w) {
  return fma(w, w, w + w);
}
template <typename T>
FUSED_ELBO_HD inline T half_expm1_from(T w) {
  return fma(T(0.5) * w, w, w);
}

template <Reach kReach, typename T>
FUSED_ELBO_HD inline LogVarTerms<T> logvar_terms(T x) {
  using C = ExpConstants<T>;
  constexpr T kLn2 = static_cast<T>(0.693147180559945309417);
  const Reduced<T> e = reduce_exp(T(0.5) * x, 0);
  const T em = e.power - T(1);
  LogVarTerms<T> terms;
  terms.std = fma(e.power, e.q, e.power);
  terms.w = fma(e.power, e.q, em);
  // From small terms; this order of sums keeps phi within 4 ulp.
  terms.phi_half = fma(em, e.r, fma(e.n, -kLn2, em));
  if constexpr (sizeof(T) == 8) {
    // The rounding of ln 2 itself is 1.7 ulp of phi in double (0.3 in float): it joins the small terms first.
    terms.phi_half += fma(e.power, e.p, e.n * T(-2.319046813846299558e-17));
  } else {
    terms.phi_half = fma(e.power, e.p, terms.phi_half);
  }
  if constexpr (kReach == Reach::kAny) {
    const bool below = x < 2 * C::kMin;
    const bool above = x > 2 * C::kMax;
    terms.std = below ? T(0) : terms.std;
    terms.w = below ? T(-1) : terms.w;
    terms.phi_half = below ? fma(T(-0.5), x, T(-1)) : terms.phi_half;
    terms.std = above ? infinity<T>() : terms.std;
    terms.w = above ? infinity<T>() : terms.w;
    terms.phi_half = above ? infinity<T>() : terms.phi_half;
  }
  return terms;
}

// How a scale parameter stands for logvar. A parametrization gives logvar and carries a gradient back through it.
template <typename T>
struct LogVarScale {
  FUSED_ELBO_HD inline T logvar(T parameter) const { return parameter; }
  FUSED_ELBO_HD inline T gradient(T, T grad_logvar) const { return grad_logvar; }
};

// As torch.clamp: NaN passes through, no gradient outside [min, max].
template <typename T>
struct ClampedLogVarScale {
  T min, max;
  FUSED_ELBO_HD inline T logvar(T parameter) const {
    const T low = parameter < min ? min : parameter;
    return low > max ? max : low;
  }
  FUSED_ELBO_HD inline T gradient(T parameter, T grad_logvar) const {
    const bool inside = (parameter >= min) & (parameter <= max);
    return inside ? grad_logvar : T(0);
  }
};

// e^(-x/2), 2 ulp; beyond the normal range 0 and infinite. The precision of a prior is taken as its square, one factor
// on either side of the difference of the means: cheaper than e^-x, and overflows later.
template <Reach kReach>
FUSED_ELBO_HD inline float inverse_std(float x) {
  using C = ExpConstants<float>;
  const float h = -0.5f * x;
  constexpr float kShift = C::kRound + static_cast<float>(C::kBias);
  const float shifted = fma(h, 1.44269504f, kShift);
  const float r = fma(shifted - kShift, -0.693147182f, h);
  float value = from_bits(bits(shifted) << C::kMantissa) *
                poly(r, 1.0f, 1.0f, 0.49999994f, 0.166664317f, 0.0416680016f, 0.00837416109f, 0.0013843647f);
  if constexpr (kReach == Reach::kAny) {
    value = h < C::kMin ? 0.0f : value;
    value = h > C::kMax ? infinity<float>() : value;
  }
  return value;
}
template <Reach kReach>
FUSED_ELBO_HD inline double inverse_std(double x) {
  return exp(-0.5 * x);
}

// What the latent kernels compute per element: std for the sample; the distance of the means in standard deviations of
// the prior, and the terms of the ratio of the variances, which make up the kl; its derivatives by mean and logvar.
template <typename T>
struct KlTerms {
  T std, distance, w, phi_half, by_mean, by_logvar;
  Far<T> far;
};

template <typename T>
FUSED_ELBO_HD inline T kl(const KlTerms<T>& terms) {
  return T(0.5) * fma(terms.distance, terms.distance, phi_from(terms.w, terms.phi_half));
}

// A sum of kl over elements, in two parts: an operation less for each element. To begin with one element, or to add it
// to nothing, gives the same bits.
template <typename T>
struct KlSum {
  T squares, rest;
  FUSED_ELBO_HD inline KlSum(T squares, T rest) : squares(squares), rest(rest) {}
  FUSED_ELBO_HD inline explicit KlSum(const KlTerms<T>& terms)
      : squares(fma(terms.w, terms.w, terms.distance * terms.distance)), rest(terms.phi_half) {}
  FUSED_ELBO_HD inline void add(const KlTerms<T>& terms) {
    squares = fma(terms.distance, terms.distance, squares);
    squares = fma(terms.w, terms.w, squares);
    rest = rest + terms.phi_half;
  }
  FUSED_ELBO_HD inline T value() const { return fma(T(0.5), squares, rest); }
};

template <typename T>
struct PriorGradient {
  T by_mean, by_logvar;
};

// p = N(0, 1).
template <typename T, Reach kReachable>
struct StandardPrior {
  static constexpr bool kLearned = false;
  static constexpr Reach kReach = kReachable;
  FUSED_ELBO_HD inline KlTerms<T> terms(T mean, T logvar) const {
    const LogVarTerms<T> e = logvar_terms<kReach>(logvar);
    return {e.std, mean, e.w, e.phi_half, mean, half_expm1_from(e.w), far_bits(T(0.5) * logvar)};
  }
};

// p = N(mean, e^logvar).
template <typename T, Reach kReachable>
struct GaussianPrior {
  static constexpr bool kLearned = true;
  static constexpr Reach kReach = kReachable;
  T mean, logvar;
  FUSED_ELBO_HD inline KlTerms<T> terms(T q_mean, T q_logvar) const {
    const T difference = q_logvar - logvar;
    const LogVarTerms<T> ratio = logvar_terms<kReach>(difference);
    const T inverse = inverse_std<kReach>(logvar);
    const T distance = (q_mean - mean) * inverse;
    const Far<T> far = far_bits(T(0.5) * difference) | far_bits(T(0.5) * q_logvar) | far_bits(T(-0.5) * logvar);
    return {logvar_terms<kReach>(q_logvar).std, distance, ratio.w, ratio.phi_half, distance * inverse,
            half_expm1_from(ratio.w),           far};
  }
  FUSED_ELBO_HD inline PriorGradient<T> gradient(const KlTerms<T>& terms) const {
    return {-terms.by_mean, -fma(T(0.5) * terms.distance, terms.distance, terms.by_logvar)};
  }
};

template <typename T>
FUSED_ELBO_HD inline T sample(T mean, T std, T eps) {
  return fma(std, eps, mean);
}

// log N(x; mean, e^logvar) and its derivatives by mean (that by x is its negative) and logvar.
template <typename T>
struct LikelihoodTerms {
  T value, by_mean, by_logvar;
};

template <typename T>
FUSED_ELBO_HD inline LikelihoodTerms<T> likelihood_terms(T x, T mean, T logvar, T precision) {
  const T difference = x - mean;
  const T scaled = difference * precision;
  const T quadratic = difference * scaled;
  return {T(-0.5) * (quadratic + (logvar + T(kLog2Pi))), scaled, fma(T(0.5), quadratic, T(-0.5))};
}

}  // namespace math
}  // namespace fused_elbo
