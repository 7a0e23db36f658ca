// What differs between devices: which kernels run, and the stream or threads they run on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "args.h"

// Weak: CPU-only builds of torch do not define it, and a strong reference would keep the extension from loading there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_elbo {

using torch::stable::Tensor;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* user) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { body(user, from, to); });
}

struct HostGuard {
  explicit HostGuard(const Tensor&) {}
};

struct CpuDevice {
  using Guard = HostGuard;
  static Context context(const Tensor&) {
    Context context;
    context.parallel_for = parallel_for;
    return context;
  }
  static constexpr auto latent_workspace = cpu::latent_workspace_bytes;
  static constexpr auto likelihood_workspace = cpu::likelihood_workspace_bytes;
  static constexpr auto elbo_workspace = cpu::elbo_workspace_bytes;
  static constexpr auto latent = cpu::latent;
  static constexpr auto likelihood = cpu::likelihood;
  static constexpr auto elbo = cpu::elbo;
  static constexpr auto fold_seed = cpu::fold_seed;
  static constexpr auto noise_words = cpu::noise_words;
};

#if defined(FUSED_ELBO_WITH_CUDA) || defined(FUSED_ELBO_EMULATED)
struct CudaDevice {
#if defined(FUSED_ELBO_EMULATED)
  using Guard = HostGuard;
  static Context context(const Tensor&) { return {}; }
#else
  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };
  static Context context(const Tensor& t) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fused_elbo: this torch is built without CUDA");
    Context context;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &context.stream));
    return context;
  }
#endif
  static constexpr auto latent_workspace = cuda::latent_workspace_bytes;
  static constexpr auto likelihood_workspace = cuda::likelihood_workspace_bytes;
  static constexpr auto elbo_workspace = cuda::elbo_workspace_bytes;
  static constexpr auto latent = cuda::latent;
  static constexpr auto likelihood = cuda::likelihood;
  static constexpr auto elbo = cuda::elbo;
  static constexpr auto fold_seed = cuda::fold_seed;
  static constexpr auto noise_words = cuda::noise_words;
};
#endif

}  // namespace fused_elbo
