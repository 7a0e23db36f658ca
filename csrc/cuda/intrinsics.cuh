// The machine instructions that the kernels use beyond plain C++, one function each.
// Under the emulation of the test suite the same names come from its header, with the error bounds that the PTX manual
// states.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(FUSED_ELBO_EMULATED)
#include <emulated_intrinsics.h>
#else

namespace fused_elbo {
namespace cuda {

// Both halves of a and b at once: one instruction on compute capability 10 (12 has it in PTX, and two in its machine
// code).
#if __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kPaired = true;
__device__ inline float2 fma_pair(float2 a, float2 b, float2 c) { return __ffma2_rn(a, b, c); }
__device__ inline float2 mul_pair(float2 a, float2 b) { return __fmul2_rn(a, b); }
__device__ inline float2 add_pair(float2 a, float2 b) { return __fadd2_rn(a, b); }
#else
constexpr bool kPaired = false;
__device__ inline float2 fma_pair(float2 a, float2 b, float2 c) {
  return make_float2(__fmaf_rn(a.x, b.x, c.x), __fmaf_rn(a.y, b.y, c.y));
}
__device__ inline float2 mul_pair(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
__device__ inline float2 add_pair(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
#endif

// a * b + c, cut to [0, 1]; NaN becomes 0.
__device__ inline float fma_saturate(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// The larger and the smaller of x and a bound; NaN where x is NaN. (The bound never is.)
__device__ inline float max_nan(float x, float bound) {
#if __CUDA_ARCH__ >= 800
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(x), "f"(bound));
  return d;
#else
  return x < bound ? bound : x;
#endif
}

__device__ inline float min_nan(float x, float bound) {
#if __CUDA_ARCH__ >= 800
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(x), "f"(bound));
  return d;
#else
  return x > bound ? bound : x;
#endif
}

__device__ inline double max_nan(double x, double bound) { return x < bound ? bound : x; }
__device__ inline double min_nan(double x, double bound) { return x > bound ? bound : x; }

__device__ inline float log2_approx(float x) {
  float d;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

__device__ inline float sqrt_approx(float x) {
  float d;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// The value, in a register from here on: the compiler may not compute it again where it is used.
__device__ inline uint32_t keep(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

// x, not before `ready` is known: keeps the compiler from working on both at once.
__device__ inline uint32_t after(uint32_t x, float ready) {
  asm("" : "+r"(x) : "f"(ready));
  return x;
}

// Two values rounded to nearest even, the first in the low half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t d;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  const uint32_t a = __float_as_uint(low), b = __float_as_uint(high);
  const uint32_t ra = low != low ? 0x7fffu : (a + 0x7fffu + ((a >> 16) & 1u)) >> 16;
  const uint32_t rb = high != high ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  d = ra | (rb << 16);
#endif
  return d;
}

__device__ inline uint32_t pack_float16(float low, float high) {
  uint32_t d;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(d)
      : "f"(low), "f"(high));
#endif
  return d;
}

__device__ inline void unpack_float16(uint32_t word, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

}  // namespace cuda
}  // namespace fused_elbo

#endif
