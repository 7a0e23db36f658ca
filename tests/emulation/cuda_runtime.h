// Stands in for CUDA's <cuda_runtime.h>, so that the kernels of csrc/cuda compile unmodified with a C++ compiler and
// run on the CPU.
//
// What it gives: the qualifiers and vector types, threadIdx and blockIdx, __shared__, __syncthreads, __shfl_xor_sync,
// atomicAdd, memory fences, cudaMemsetAsync, and emulation::launch in the place of <<<>>>. Blocks run one after the
// other, their threads as fibers that give way at barriers and shuffles (fibers.h), in an order that
// emulation::set_order chooses: kernels that lack a barrier give other results in another order. With
// FUSED_ELBO_EMULATED_THREADS every CUDA thread is a std::thread, for ThreadSanitizer.
//
// What it does not give: weak memory. A missing __threadfence cannot be seen here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time in an OS thread, so a static is the block's own; with a thread per CUDA thread it must be
// shared by all.
#if defined(FUSED_ELBO_EMULATED_THREADS)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <typename T>
inline void __stwb(T* p, T value) {
  *p = value;
}

inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }

struct EmulatedIndex {
  uint32_t x, y, z;
};
#define threadIdx (EmulatedIndex{emulation::current().thread, 0, 0})
#define blockIdx (EmulatedIndex{emulation::current().block, 0, 0})
#define blockDim (EmulatedIndex{emulation::current().threads, 1, 1})
#define gridDim (EmulatedIndex{emulation::current().blocks, 1, 1})

inline void __syncthreads() { emulation::block_barrier(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }

template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle_xor(mask, bits, static_cast<uint32_t>(lane_mask));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
