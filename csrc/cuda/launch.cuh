// The one place where kernels are launched, so that the emulation of the test suite replaces one function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace fused_elbo {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("fused_elbo: ") + what + ": " + cudaGetErrorString(status));
}

template <typename Params>
inline void launch(void (*kernel)(Params), int64_t blocks, const Params& params, void* stream, int threads = kThreads) {
  if (blocks <= 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("fused_elbo: the tensor needs more blocks than a CUDA grid holds");
#if defined(FUSED_ELBO_EMULATED)
  emulation::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), params);
#else
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "kernel launch");
#endif
}

inline void clear(void* data, int64_t bytes, void* stream) {
  if (bytes > 0) check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "clearing memory");
}

// Writes the sum of nothing, times a scale: 0, or NaN where the scale is 1 / 0 (a mean over no rows). All bits set are a NaN.
inline void write_empty_sum(void* data, int64_t bytes, double scale, void* stream) {
  const bool nan = !(0.0 * scale == 0.0);
  check(cudaMemsetAsync(data, nan ? 0xff : 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "clearing memory");
}

}  // namespace cuda
}  // namespace fused_elbo
