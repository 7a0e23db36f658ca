// The loss kernel's parameters.
#pragma once

#include "likelihood.h"

namespace fused_elbo {
namespace cuda {

struct ElboParams {
  LikelihoodParams reconstruction;

  Plan latent_plan;            // no tiles: the KL is given
  bool latent_in_acc = false;  // its dtype is arithmetic's, not that of the reconstruction
  View mean, logvar, grad_mean, grad_logvar;
  const void* grad_kl = nullptr;  // one number on the device
  double grad_kl_scale = 1;
  Parts latent_rows;

  View log_likelihood, kl, kl_given;  // per row
  const void* beta = nullptr;
  double beta_value = 1;
  void* loss = nullptr;
  int64_t loss_stride = 0;  // 0: one number
  bool loss_per_row = false;
  double loss_scale = 1;
  uint32_t* row_pairs = nullptr;  // loss per row: which of its two terms came first
  Tree tree;                      // both terms' items: reconstruction first
  int64_t items = 0;
};

// access, elements: those of the reconstruction.
void launch_elbo(const ElboParams&, DType, Access, bool elements, void* stream);

}  // namespace cuda
}  // namespace fused_elbo
