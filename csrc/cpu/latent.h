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
  double* nats_lanes;  // kLanes partial sums of the nats
  T *grad_mean, *grad_logvar, *grad_prior_mean, *grad_prior_logvar;
  T clamp_min, clamp_max;
};

// What a loop does with samples. Forward: nothing, write z, or write the standard deviation for several z. Backward:
// nothing, one sample's gradient, or sums over samples.
enum class Samples { kNone, kOne, kSeveral };
// What becomes of the nats: nothing, one value per element, or sums.
enum class Nats { kNone, kStored, kSummed };

struct LoopChoice {
  bool clamp, learned_prior, grad_kl;
  Samples samples;
  Nats nats;
};

// The inner loop over elements begin .. end - 1; whether its results count.
template <typename T>
using LatentLoop = bool (*)(const LatentArrays<T>&, int64_t begin, int64_t end);

// One loop for logvars near 0 and one for any, with the same results where both may be used: nearly always the first
// will do, and it leaves out what only extreme numbers need.
template <typename T>
struct LatentLoops {
  LatentLoop<T> near = nullptr, any = nullptr;
  explicit operator bool() const { return near != nullptr; }
  FUSED_ELBO_INLINE void run(const LatentArrays<T>& arrays, int64_t begin, int64_t end) const {
    if (!near(arrays, begin, end)) any(arrays, begin, end);
  }
};

template <typename T>
LatentLoops<T> forward_loops(const LoopChoice& wanted);
template <typename T>
LatentLoops<T> backward_loops(const LoopChoice& wanted);

FUSED_ELBO_INLINE bool wants_nats(const LatentArgs& args, Pass pass) {
  return pass != Pass::kBackward && args.kl.data != nullptr;
}

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
  LatentLoops<T> choose_loops() const;
  void forward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const;
  void backward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const;
  void add_inputs(const Range& range, LatentBuffers<T>& buffers, LatentArrays<T>& arrays) const;
  void finish_gradients(const LatentArrays<T>& arrays, int64_t count, const LatentBuffers<T>& buffers) const;
  const T* noise(const NoiseGenerator& generator, const Range& range, LatentBuffers<T>& buffers) const;
  void run_loop(const NoiseGenerator& generator, const Range& range, LatentArrays<T>& arrays,
                LatentBuffers<T>& buffers) const;
  bool sums_nats() const;
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
  LatentLoops<T> loops_;
  View mean_, logvar_, prior_mean_, prior_logvar_, mask_, z_, kl_, grad_z_, grad_kl_;
  View grad_mean_, grad_logvar_, grad_prior_mean_, grad_prior_logvar_;
};

void latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context);
int64_t latent_workspace_bytes(const LatentArgs& args, Pass pass);

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
