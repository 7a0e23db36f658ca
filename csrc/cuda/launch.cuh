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
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fused_elbo: ") + what + ": " + cudaGetErrorString(status));
}

template <typename Params>
inline void launch(void (*kernel)(Params), int64_t blocks, const Params& params, void* stream, int threads = kThreads) {
  if (blocks <= 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("fused_elbo: the tensor needs more blocks than a CUDA grid holds");
#if defined(FUSED_ELBO_EMULATED)
  emulation::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), params);
#else
  const auto grid = static_cast<unsigned>(blocks), block = static_cast<unsigned>(threads);
  // clang-format off
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  // clang-format on
  check(cudaGetLastError(), "kernel launch");
#endif
}

}  // namespace cuda
}  // namespace fused_elbo
