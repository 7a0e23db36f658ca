// The operations as torch sees them: schemas, tensors in and out, and the choice of the device's kernels.
// This file and csrc/torch/ are all that sees torch headers (the stable ABI alone). Arguments are checked in Python;
// what is checked here guards direct callers of torch.ops against reading out of bounds.
//
// FUSED_ELBO_EMULATED builds the same operations over the CUDA kernels compiled for the CPU, in a namespace of their
// own.

#include <torch/csrc/stable/library.h>

#include "torch/device.h"
#include "torch/direct.h"
#include "torch/elbo.h"
#include "torch/latent.h"
#include "torch/likelihood.h"

namespace fused_elbo {

template <class Device>
Tensor fold_seed(Tensor seed, int64_t data) {
  typename Device::Guard guard(seed);
  Tensor out = empty_dense(seed, {}, ScalarType::Long);
  Device::fold_seed(static_cast<const int64_t*>(seed.data_ptr()), data, static_cast<int64_t*>(out.data_ptr()),
                    Device::context(seed));
  return out;
}

template <class Device>
Tensor noise_words(Tensor seed, int64_t stream, int64_t sample, int64_t first, int64_t count) {
  typename Device::Guard guard(seed);
  Tensor out = empty_dense(seed, {count, 4}, ScalarType::Long);
  NoiseKey key;
  key.seed = static_cast<const int64_t*>(seed.data_ptr());
  key.stream = static_cast<uint32_t>(stream);
  Device::noise_words(key, sample, first, count, static_cast<int64_t*>(out.data_ptr()), Device::context(seed));
  return out;
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("latent_forward", TORCH_BOX(&latent_forward<Device>));
  m.impl("latent_backward", TORCH_BOX(&latent_backward<Device>));
  m.impl("likelihood_forward", TORCH_BOX(&likelihood_forward<Device>));
  m.impl("likelihood_backward", TORCH_BOX(&likelihood_backward<Device>));
  m.impl("elbo_forward", TORCH_BOX(&elbo_forward<Device>));
  m.impl("fold_seed", TORCH_BOX(&fold_seed<Device>));
  m.impl("noise_words", TORCH_BOX(&noise_words<Device>));
}

}  // namespace fused_elbo

#define FUSED_ELBO_LATENT_INPUTS "Tensor mean, Tensor? logvar, Tensor? prior_mean, Tensor? prior_logvar"
#define FUSED_ELBO_SCALE "int scale=0, float floor=0.0, float clamp_min=-1e300, float clamp_max=1e300"
#define FUSED_ELBO_LATENT_PARAMS                                                                      \
  "Tensor? mask=None, SymInt seed_value=0, int stream=0, SymInt row_offset=0, SymInt num_samples=0, " \
  "int chunk_dim=-1, " FUSED_ELBO_SCALE
#define FUSED_ELBO_LIKELIHOOD_PARAMS \
  "Tensor? mask=None, float logvar_value=0.0, int batch_dims=1, int reduction=1, " FUSED_ELBO_SCALE

// torch 2.10 takes the namespace as it is written, and expands no macro in it.
#if defined(FUSED_ELBO_EMULATED)
#define FUSED_ELBO_LIBRARY(m) STABLE_TORCH_LIBRARY(fused_elbo_emulated, m)
#else
#define FUSED_ELBO_LIBRARY(m) STABLE_TORCH_LIBRARY(fused_elbo, m)
#endif

// The same as SCHEMAS in kernels/fused_elbo/schemas.py, which says what the arguments mean.
FUSED_ELBO_LIBRARY(m) {
  m.def("latent_forward(" FUSED_ELBO_LATENT_INPUTS ", Tensor? seed, " FUSED_ELBO_LATENT_PARAMS
        ", bool want_z=True, int reduction=1) -> (Tensor z, Tensor kl)");
  m.def("latent_backward(" FUSED_ELBO_LATENT_INPUTS
        ", Tensor? grad_z, Tensor? grad_kl, Tensor? seed, " FUSED_ELBO_LATENT_PARAMS
        ", int reduction=1, bool want_prior=False) -> (Tensor grad_mean, Tensor grad_logvar, Tensor grad_prior_mean, "
        "Tensor grad_prior_logvar)");
  m.def("likelihood_forward(Tensor x, Tensor mean, Tensor? logvar, " FUSED_ELBO_LIKELIHOOD_PARAMS ") -> Tensor");
  m.def(
      "likelihood_backward(Tensor x, Tensor mean, Tensor? logvar, Tensor grad, bool want_mean, bool "
      "want_logvar, " FUSED_ELBO_LIKELIHOOD_PARAMS ") -> (Tensor grad_mean, Tensor grad_logvar)");
  m.def(
      "elbo_forward(Tensor recon_x, Tensor x, Tensor? recon_logvar, float recon_logvar_value, Tensor? mean, "
      "Tensor? logvar, Tensor? kl, Tensor? beta, float beta_value, int reduction, bool want_grads, Tensor? "
      "mask=None, " FUSED_ELBO_SCALE
      ") -> (Tensor loss, Tensor log_likelihood, Tensor kl_out, Tensor grad_recon, Tensor grad_recon_logvar, Tensor "
      "grad_mean, "
      "Tensor grad_logvar)");
  m.def("fold_seed(Tensor seed, SymInt data) -> Tensor");
  m.def("noise_words(Tensor seed, int stream, int sample, int first, int count) -> Tensor");
}

#if defined(FUSED_ELBO_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(fused_elbo_emulated, CPU, m) { fused_elbo::implement<fused_elbo::CudaDevice>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fused_elbo, CPU, m) { fused_elbo::implement<fused_elbo::CpuDevice>(m); }

const fused_elbo::DirectOperations fused_elbo_direct_operations = {
    fused_elbo::latent_forward<fused_elbo::CpuDevice>,     fused_elbo::latent_gradients<fused_elbo::CpuDevice>,
    fused_elbo::likelihood_forward<fused_elbo::CpuDevice>, fused_elbo::likelihood_backward<fused_elbo::CpuDevice>,
    fused_elbo::elbo_forward<fused_elbo::CpuDevice>,
};
#if defined(FUSED_ELBO_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fused_elbo, CUDA, m) { fused_elbo::implement<fused_elbo::CudaDevice>(m); }
#endif
#endif
