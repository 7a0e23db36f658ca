// The inner loops of the likelihood kernels. Where a row has one logvar, only squared differences are summed per
// element and the rest is done once per row, in double; otherwise everything is done per element.
#pragma once

#include <cstdint>

#include "../math/gaussian.h"
#include "unit.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

template <typename T>
struct ConstantArrays {
  const T *x, *mean, *factor;  // factor: upstream times precision, per element
  T scalar;                    // or one for all
  T *squares, *grad_mean;
};

// What becomes of the squared differences.
enum class Squares { kNone, kStored, kSummed };

template <typename T, Squares kSquares, bool kGradMean, bool kScalar>
__attribute__((noinline)) double constant_loop(const ConstantArrays<T>& arrays, int64_t count) {
  const T *const x = arrays.x, *const mean = arrays.mean, *const factor = arrays.factor;
  T *const squares = arrays.squares, *const grad_mean = arrays.grad_mean;
  const T scalar = arrays.scalar;
  const auto element = [=](int64_t i) __attribute__((always_inline)) {
    const T difference = x[i] - mean[i];
    if constexpr (kGradMean) grad_mean[i] = (kScalar ? scalar : factor[i]) * difference;
    return difference * difference;
  };
  if constexpr (kSquares == Squares::kSummed) {
    return sum_terms<T>(count, element);
  } else {
    for (int64_t group = 0; group < count; group += kLanes) {
      FUSED_ELBO_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) {
        const T square = element(group + lane);
        if constexpr (kSquares == Squares::kStored) squares[group + lane] = square;
      }
    }
    return 0;
  }
}

template <typename T, bool kGradMean, bool kScalar>
double pick_constant_loop(const ConstantArrays<T>& arrays, int64_t count, Squares squares) {
  switch (squares) {
    case Squares::kNone:
      return kGradMean ? constant_loop<T, Squares::kNone, kGradMean, kScalar>(arrays, count) : 0;
    case Squares::kStored:
      return constant_loop<T, Squares::kStored, kGradMean, kScalar>(arrays, count);
    case Squares::kSummed:
      return constant_loop<T, Squares::kSummed, kGradMean, kScalar>(arrays, count);
  }
  __builtin_unreachable();
}

template <typename T>
double run_constant_loop(const ConstantArrays<T>& arrays, int64_t count, Squares squares, bool grad_mean) {
  if (!grad_mean) return pick_constant_loop<T, false, true>(arrays, count, squares);
  return arrays.factor ? pick_constant_loop<T, true, false>(arrays, count, squares)
                       : pick_constant_loop<T, true, true>(arrays, count, squares);
}

template <typename T>
struct ElementwiseArrays {
  const T *x, *mean, *logvar, *upstream;
  T *value, *grad_mean, *grad_logvar;
  int64_t count;  // without the padding
};

// What becomes of the values.
enum class Values { kNone, kStored, kSummed };

template <typename T, Values kValues, bool kGradMean, bool kGradLogvar>
__attribute__((noinline)) double elementwise_loop(const ElementwiseArrays<T>& arrays, int64_t count) {
  const T *const x = arrays.x, *const mean = arrays.mean, *const logvar = arrays.logvar;
  const T* const upstream = arrays.upstream;
  T *const value = arrays.value, *const grad_mean = arrays.grad_mean, *const grad_logvar = arrays.grad_logvar;
  const auto element = [=](int64_t i) __attribute__((always_inline)) {
    const math::LikelihoodTerms<T> terms = math::likelihood_terms(x[i], mean[i], logvar[i], math::exp(-logvar[i]));
    if constexpr (kGradMean) grad_mean[i] = upstream[i] * terms.by_mean;
    if constexpr (kGradLogvar) grad_logvar[i] = upstream[i] * terms.by_logvar;
    return terms.value;
  };
  // What is past the end of a ragged range must not be summed: its group is stored.
  const int64_t summed = kValues == Values::kSummed ? arrays.count / kLanes * kLanes : 0;
  const double total = kValues == Values::kSummed ? sum_terms<T>(summed, element) : 0;
  for (int64_t group = summed; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const T each = element(group + lane);
      if constexpr (kValues != Values::kNone) value[group + lane] = each;
    }
  }
  double rest = 0;
  if constexpr (kValues == Values::kSummed) {
    for (int64_t i = summed; i < arrays.count; ++i) rest += value[i];
  }
  return total + rest;
}

template <typename T, Values kValues>
double pick_elementwise_loop(const ElementwiseArrays<T>& arrays, int64_t count, bool grad_mean, bool grad_logvar) {
  if (grad_mean && grad_logvar) return elementwise_loop<T, kValues, true, true>(arrays, count);
  if (grad_mean) return elementwise_loop<T, kValues, true, false>(arrays, count);
  if (grad_logvar) return elementwise_loop<T, kValues, false, true>(arrays, count);
  return kValues == Values::kNone ? 0 : elementwise_loop<T, kValues, false, false>(arrays, count);
}

template <typename T>
double run_elementwise_loop(const ElementwiseArrays<T>& arrays, int64_t count, Values values, bool grad_mean,
                            bool grad_logvar) {
  switch (values) {
    case Values::kNone:
      return pick_elementwise_loop<T, Values::kNone>(arrays, count, grad_mean, grad_logvar);
    case Values::kStored:
      return pick_elementwise_loop<T, Values::kStored>(arrays, count, grad_mean, grad_logvar);
    case Values::kSummed:
      return pick_elementwise_loop<T, Values::kSummed>(arrays, count, grad_mean, grad_logvar);
  }
  __builtin_unreachable();
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
