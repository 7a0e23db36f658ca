// From a scale parameter to the logvar it stands for, and back with the gradient. See parametrization.py for what the
// four kinds mean. Every kernel reads parameters through here and then computes in logvar: the Gaussian formulas exist
// once, and a parametrization costs a kernel no memory traffic.
// Branch-free, NaN kept.
#pragma once

#include "../args.h"
#include "gaussian.h"

namespace fused_elbo {
namespace math {

// log(1 + t) for 1/sqrt(2) <= 1 + t <= sqrt(2). With s = t / (2 + t), log(1 + t) = 2 atanh(s), and 2s = t - s t leaves
// the leading term exact.
FUSED_ELBO_HD inline float log1p_near(float t) {
  const float s = t / (2.0f + t), z = s * s;
  return t - s * (t - z * poly(z, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9, 2.0f / 11));
}
FUSED_ELBO_HD inline double log1p_near(double t) {
  const double s = t / (2.0 + t), z = s * s;
  return t - s * (t - z * poly(z, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19,
                               2.0 / 21, 2.0 / 23));
}

template <typename T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  static constexpr float kTiny = 0x1p-126f, kScale = 0x1p25f, kScaleBits = 25;
};
template <>
struct LogConstants<double> {
  static constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  static constexpr double kTiny = 0x1p-1022, kScale = 0x1p55, kScaleBits = 55;
};

// The natural logarithm of v >= 0, to a relative error of 2 ulp also near 1.
template <typename T>
FUSED_ELBO_HD inline T log(T v) {
  using C = LogConstants<T>;
  using E = ExpConstants<T>;
  using Bits = typename E::Bits;
  const bool subnormal = v < C::kTiny;
  const Bits raw = bits(subnormal ? v * C::kScale : v);
  const Bits shifted = raw - C::kSqrtHalf;
  // Arithmetic shift: the exponent of v / sqrt(1/2), rounded down.
  constexpr int kSign = static_cast<int>(sizeof(T)) * 8 - 1;
  const Bits sign = Bits(0) - (shifted >> kSign);
  const Bits exponent_bits = (shifted >> E::kMantissa) | (sign << (kSign + 1 - E::kMantissa));
  // An integer below 2^11 in two's complement to floating point, by way of the mantissa's low bits.
  constexpr T kBig = E::kRound;
  T exponent = from_bits(bits(kBig) + exponent_bits) - kBig;
  exponent = subnormal ? exponent - C::kScaleBits : exponent;
  const T mantissa = from_bits(raw - (exponent_bits << E::kMantissa));
  T value = fma(exponent, E::kLn2High, fma(exponent, E::kLn2Low, log1p_near(mantissa - T(1))));
  value = v == T(0) ? -infinity<T>() : value;
  return v < infinity<T>() ? value : v;  // infinity and NaN
}

// log(1 + y) for 0 <= y <= 1.
template <typename T>
FUSED_ELBO_HD inline T log1p(T y) {
  const bool upper = y > T(0.4142);
  const T near = log1p_near(upper ? T(0.5) * (y - T(1)) : y);
  return upper ? near + T(0.693147180559945309417) : near;
}

template <typename T>
struct ScaleNumbers {
  T floor, clamp_min, clamp_max;
};

template <typename T>
FUSED_ELBO_HD inline ScaleNumbers<T> scale_numbers(const Scale& scale) {
  return {static_cast<T>(scale.floor), static_cast<T>(scale.clamp_min), static_cast<T>(scale.clamp_max)};
}

template <typename T>
struct ScaleTerms {
  T logvar;
  T slope;  // d logvar / d parameter
};

// No gradient, not even of an infinity, where the slope is 0.
template <typename T>
FUSED_ELBO_HD inline T through(T slope, T grad_logvar) {
  return slope == T(0) ? T(0) : slope * grad_logvar;
}

// A parameter within its clamp, and the clamp's slope there.
template <typename T>
struct Clamped {
  T parameter, slope;
};

// The clamp that bends.
template <typename T>
FUSED_ELBO_HD inline Clamped<T> soft_clamp(T p, const ScaleNumbers<T>& numbers) {
  const T half = T(0.5) * (numbers.clamp_max - numbers.clamp_min);
  const T middle = T(0.5) * (numbers.clamp_min + numbers.clamp_max);
  const T y = (p - middle) / half;
  const T magnitude = y < T(0) ? -y : y;
  const T grown = expm1_from(logvar_terms<Reach::kNear>(magnitude > T(20) ? T(40) : T(2) * magnitude).w);  // e^2|y| - 1
  const T tanh = grown / (grown + T(2));
  const T slope = T(4) * (grown + T(1)) / ((grown + T(2)) * (grown + T(2)));  // 1 - tanh^2, without cancellation
  return {fma(half, y < T(0) ? -tanh : tanh, middle), slope};
}

// The clamp that cuts; infinite bounds stand for none.
template <typename T>
FUSED_ELBO_HD inline Clamped<T> hard_clamp(T p, const ScaleNumbers<T>& numbers) {
  const T slope = p >= numbers.clamp_min && p <= numbers.clamp_max ? T(1) : T(0);
  p = p < numbers.clamp_min ? numbers.clamp_min : p;
  p = p > numbers.clamp_max ? numbers.clamp_max : p;
  return {p, slope};
}

// kFloor: floor > 0.
template <typename T, ScaleKind kKind, bool kFloor>
FUSED_ELBO_HD inline ScaleTerms<T> scale_terms_within(const Clamped<T>& clamped, T floor) {
  const T p = clamped.parameter, inner = clamped.slope;
  if constexpr (kKind == ScaleKind::kVar) {
    const T var = p < floor ? floor : p;
    return {log(var), inner / var};
  } else if constexpr (kKind == ScaleKind::kSoftplusStd) {
    const T e = exp(p < T(0) ? p : -p);
    const T std = (p > T(0) ? p : p != p ? p : T(0)) + log1p(e) + (kFloor ? floor : T(0));
    const T sigmoid = (p < T(0) ? e : T(1)) / (T(1) + e);
    T log_std = log(std), slope = sigmoid / std;
    if constexpr (!kFloor) {
      // softplus becomes e^p, which underflows where its logarithm does not: log log(1 + e) = p - e/2 + ...
      constexpr T kFar = sizeof(T) == 4 ? T(-9) : T(-18);
      log_std = p < kFar ? fma(T(-0.5), e, p) : log_std;
      slope = p < kFar ? fma(T(-0.5), e, T(1)) : slope;
    }
    return {T(2) * log_std, T(2) * inner * slope};
  } else {
    constexpr T factor = kKind == ScaleKind::kLogStd ? T(2) : T(1);
    if constexpr (!kFloor) {
      return {factor * p, factor * inner};
    } else {
      const T e = exp(p), sum = e + floor;
      const T slope = sum < infinity<T>() ? e / sum : T(1);
      return {factor * (sum < infinity<T>() ? log(sum) : p), factor * inner * slope};
    }
  }
}

template <typename T, ScaleKind kKind, bool kSoft, bool kFloor>
FUSED_ELBO_HD inline ScaleTerms<T> scale_terms(T p, const ScaleNumbers<T>& numbers) {
  return scale_terms_within<T, kKind, kFloor>(kSoft ? soft_clamp(p, numbers) : hard_clamp(p, numbers), numbers.floor);
}

// Calls f with a function object that is scale_terms of the given kind: a template parameter where f is.
template <typename T, ScaleKind kKind, bool kSoft, bool kFloor>
struct ScaleTermsOf {
  ScaleNumbers<T> numbers;
  FUSED_ELBO_HD inline ScaleTerms<T> operator()(T p) const { return scale_terms<T, kKind, kSoft, kFloor>(p, numbers); }
};

template <typename T, ScaleKind kKind, class F>
FUSED_ELBO_HD inline void with_scale_kind(const Scale& scale, const F& f) {
  const ScaleNumbers<T> numbers = scale_numbers<T>(scale);
  const bool floor = scale.floor > 0;
  if (scale.soft_clamp) {
    floor ? f(ScaleTermsOf<T, kKind, true, true>{numbers}) : f(ScaleTermsOf<T, kKind, true, false>{numbers});
  } else {
    floor ? f(ScaleTermsOf<T, kKind, false, true>{numbers}) : f(ScaleTermsOf<T, kKind, false, false>{numbers});
  }
}

template <typename T, class F>
FUSED_ELBO_HD inline void with_scale(const Scale& scale, const F& f) {
  switch (scale.kind) {
    case ScaleKind::kPlain:
    case ScaleKind::kLogVar:
      return with_scale_kind<T, ScaleKind::kLogVar>(scale, f);
    case ScaleKind::kLogStd:
      return with_scale_kind<T, ScaleKind::kLogStd>(scale, f);
    case ScaleKind::kSoftplusStd:
      return with_scale_kind<T, ScaleKind::kSoftplusStd>(scale, f);
    case ScaleKind::kVar:
      return with_scale_kind<T, ScaleKind::kVar>(scale, f);
  }
}

}  // namespace math
}  // namespace fused_elbo
