// The latent kernels' work, cut into units that any thread may run; the ELBO runs it beside the likelihood's.
#pragma once

#include <cstdint>

#include "noise.h"
#include "unit.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// What the inner loops read and write: arrays of whole groups of kLanes elements, one per element of the unit; eps and
// coefficient start at the loop's first element.
template <typename T>
struct LatentArrays {
  const T *mean, *logvar, *prior_mean, *prior_logvar;
  const T *eps, *grad_z;             // one sample
  const T *grad_z_sum, *grad_z_eps;  // sums over several samples of grad_z and grad_z * eps
  const T* coefficient;              // of the KL's gradient
  T *z, *std, *nats;
  T *grad_mean, *grad_logvar, *grad_prior_mean, *grad_prior_logvar;
  T clamp_min, clamp_max;
};

template <typename T>
struct LatentBuffers;

template <typename T>
class LatentWork {
 public:
  // totals: total() will be asked for.
  LatentWork(const LatentArgs& args, Pass pass, double* partials, bool totals);

  // Doubles that the constructor's partials must have room for.
  static int64_t partials_needed(const LatentArgs& args, Pass pass, bool totals);

  int64_t units() const { return units_.count(); }
  void run(int64_t begin, int64_t end) const;
  // After all units, on one thread: what is left of the KL's reduction.
  void finish() const;
  double total(int64_t row) const;

 private:
  using Loop = void (*)(const LatentArrays<T>&, int64_t begin, int64_t end);

  Loop choose_loop() const;
  void forward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const;
  void backward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const;
  void add_inputs(const Range& range, LatentBuffers<T>& buffers, LatentArrays<T>& arrays) const;
  void finish_gradients(const LatentArrays<T>& arrays, int64_t count, const LatentBuffers<T>& buffers) const;
  const T* noise(const NoiseGenerator& generator, const Range& range, LatentBuffers<T>& buffers) const;
  void run_loop(const NoiseGenerator& generator, const Range& range, LatentArrays<T>& arrays,
                LatentBuffers<T>& buffers) const;
  bool repeats_coefficients(const Range& range) const;
  uint64_t noise_index(const Range& range) const;
  const T* coefficients(const Range& range, bool repeated, LatentBuffers<T>& buffers) const;
  void reduce_nats(const Range& range, LatentBuffers<T>& buffers) const;

  const LatentArgs& args_;
  Pass pass_;
  Units units_;
  bool channels_last_;  // the event is walked through in memory order (hw, channel), not in logical order
  double* partials_;    // [rows, segments], or null where units write their rows' results themselves
  Noise noise_;
  Loop loop_;
  View mean_, logvar_, prior_mean_, prior_logvar_, mask_, z_, kl_, grad_z_, grad_kl_;
  View grad_mean_, grad_logvar_, grad_prior_mean_, grad_prior_logvar_;
};

void latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context);
int64_t latent_workspace_bytes(const LatentArgs& args, Pass pass);

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
