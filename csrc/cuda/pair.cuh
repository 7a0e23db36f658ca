// Two float32 elements side by side. On compute capability 10 one instruction serves both, which halves the issue slots
// of the formulas; elsewhere it is two instructions with the same results.
#pragma once

#include "../math/scalar.h"
#include "intrinsics.cuh"

namespace fused_elbo {
namespace cuda {

struct Pair {
  float2 v;
  Pair() = default;
  __device__ Pair(float both) : v(make_float2(both, both)) {}
  __device__ Pair(float x, float y) : v(make_float2(x, y)) {}
  __device__ explicit Pair(float2 value) : v(value) {}
};

__device__ inline Pair fma(Pair a, Pair b, Pair c) { return Pair(fma_pair(a.v, b.v, c.v)); }
__device__ inline Pair operator*(Pair a, Pair b) { return Pair(mul_pair(a.v, b.v)); }
__device__ inline Pair operator+(Pair a, Pair b) { return Pair(add_pair(a.v, b.v)); }
__device__ inline Pair operator-(Pair a) { return Pair(-a.v.x, -a.v.y); }
__device__ inline Pair operator-(Pair a, Pair b) { return a + -b; }

// What has no paired form: f(x), f(y).
template <typename F>
__device__ inline Pair each(Pair a, const F& f) {
  return Pair(f(a.v.x), f(a.v.y));
}

__device__ inline Pair fma_saturate(Pair a, float b, float c) {
  return each(a, [&](float x) { return fma_saturate(x, b, c); });
}
__device__ inline Pair max_nan(Pair a, float bound) {
  return each(a, [&](float x) { return max_nan(x, bound); });
}
__device__ inline Pair min_nan(Pair a, float bound) {
  return each(a, [&](float x) { return min_nan(x, bound); });
}

// The bits of x, shifted left: the sign or the exponent of a new number.
__device__ inline float shift_left(float x, int bits) { return __uint_as_float(__float_as_uint(x) << bits); }
__device__ inline Pair shift_left(Pair a, int bits) {
  return each(a, [&](float x) { return shift_left(x, bits); });
}

__device__ inline float sum(float x) { return x; }
__device__ inline double sum(double x) { return x; }
__device__ inline float sum(Pair a) { return a.v.x + a.v.y; }

}  // namespace cuda
}  // namespace fused_elbo
