// loss = scale sum_b (beta KL_b - log N(x_b; recon_x_b, exp(logvar_b))), both terms per row, and every gradient for an
// upstream gradient of 1: one reading of every tensor.
//
// Bytes per element: reconstruction as likelihood_forward.cu, with gradients likelihood_backward.cu: 8 or 12 in
// float32. Latent: read mean and logvar, with gradients write both: 8 or 16 in float32; half of all that in bfloat16
// and float16. Launch: one grid, first the tiles of the reconstruction, then those of the latent (plan.h); 256 threads,
// 16 bytes per thread and access.
#include <type_traits>

#include "elbo.h"
#include "launch.cuh"
#include "likelihood.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

// KL(q || N(0, I)) of the thread's share of a latent tile, and its gradients. Units have kUnit elements, those of the
// reconstruction.
template <typename T, int kUnit, typename Acc = typename Traits<T>::Acc>
__device__ inline Acc kl_tile(const ElboParams& p, const Place& place) {
  const View* const views[] = {&p.mean, &p.logvar, &p.grad_mean, &p.grad_logvar};
  enum { kMean, kLogVar, kGradMean, kGradLogVar, kViews };
  int64_t base[kViews];
  segment_offsets(p.latent_plan, place, views, base);
  const Acc scale = static_cast<Acc>(p.grad_kl_scale);
  const Acc grad = p.grad_kl != nullptr ? *static_cast<const Acc*>(p.grad_kl) * scale : scale;
  const bool want_grads = p.grad_mean.present();

  KlSum<Acc> kl;
  for (uint32_t u = place.begin; u < place.end; u += p.latent_plan.stride) {
    const Unit<kIsVector<T>, kViews> unit(p.latent_plan, place.first_unit + u, kUnit, views, base);
    Acc mean[kUnit], logvar[kUnit];
    load_unit<T>(p.mean, unit.at[kMean], unit.valid, mean);
    load_unit<T>(p.logvar, unit.at[kLogVar], unit.valid, logvar);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const LogVar<Acc> v = logvar_terms(logvar[j]);
      kl.add(mean[j], v);  // elements that do not exist read as 0 and add 0
      mean[j] *= grad;
      logvar[j] = Acc(0.5) * grad * v.expm1();
    }
    if (!want_grads) continue;
    store_unit<T>(p.grad_mean, unit.at[kGradMean], unit.valid, mean);
    store_unit<T>(p.grad_logvar, unit.at[kGradLogVar], unit.valid, logvar);
  }
  return kl.value();
}

template <typename T, bool kFull>
__global__ void __launch_bounds__(kThreads,
                                  kIsVector<T> && sizeof(typename Traits<T>::Acc) < 8 ? 3 : kResidentGeneral<T>)
    elbo_kernel(const __grid_constant__ ElboParams p) {
  using Acc = typename Traits<T>::Acc;
  const Plan& reconstruction = p.reconstruction.plan;
  const bool is_latent = blockIdx.x >= reconstruction.tiles;
  const uint32_t tile = is_latent ? blockIdx.x - static_cast<uint32_t>(reconstruction.tiles) : blockIdx.x;
  const Plan& plan = is_latent ? p.latent_plan : reconstruction;
  const Place place = find_place(plan, tile);
  Acc value;
  if (!is_latent) {
    value = likelihood_tile<T, Pass::kBoth, kFull>(p.reconstruction, place, tile);
  } else if (kIsVector<T> && p.latent_in_acc) {
    // A decoder in half precision over a posterior in float32, as autocast leaves them.
    using L = std::conditional_t<kIsVector<T>, Acc, T>;
    value = kl_tile<L, Traits<T>::kUnit>(p, place);
  } else {
    value = kl_tile<T, Traits<T>::kUnit>(p, place);
  }

  const double beta = p.beta != nullptr ? static_cast<double>(*static_cast<const Acc*>(p.beta)) : p.beta_value;
  Acc* log_likelihood = static_cast<Acc*>(p.log_likelihood.data);
  Acc* kl = static_cast<Acc*>(p.kl.data);
  Acc* loss = static_cast<Acc*>(p.loss);
  const bool pairs = p.loss_per_row && p.latent_plan.tiles > 0;

  double total;
  Tree tree = p.tree;
  tree.rows = is_latent ? p.latent_rows : p.reconstruction.result.tree.rows;
  const bool complete = climb(
      plan, tile, value, tree, !p.loss_per_row, is_latent ? item_count(reconstruction) : 0, p.items, total,
      [&](int64_t row, Acc sum) {
        double contribution;
        if (is_latent) {
          kl[row * p.kl.row] = sum;
          contribution = beta * static_cast<double>(sum);
        } else {
          log_likelihood[row * p.log_likelihood.row] = sum;
          contribution = -static_cast<double>(sum);
          if (p.kl_given.present()) {
            const Acc given = load_any<Acc>(p.kl_given.data, row * p.kl_given.row, p.kl_given.dtype);
            contribution += beta * static_cast<double>(given);
            if (p.kl.present()) kl[row * p.kl.row] = given;
          }
        }
        if (p.loss_per_row) {
          bool whole = true;
          if (pairs) {
            __threadfence();
            whole = atomicAdd(p.row_pairs + row, 1u) == 1;
            __threadfence();
            if (whole) {
              const volatile Acc* other = is_latent ? log_likelihood + row * p.log_likelihood.row : kl + row * p.kl.row;
              contribution += (is_latent ? -1.0 : beta) * static_cast<double>(*other);
            }
          }
          if (whole) loss[row * p.loss_stride] = static_cast<Acc>(contribution * p.loss_scale);
        }
        return contribution;
      });
  if (complete && threadIdx.x == 0) *loss = static_cast<Acc>(total * p.loss_scale);
}

}  // namespace

void launch_elbo(const ElboParams& p, DType dtype, Access access, bool elements, void* stream) {
  const auto run = [&](void (*kernel)(ElboParams)) {
    launch(kernel, p.reconstruction.plan.tiles + p.latent_plan.tiles, p, stream);
  };
  if (access == Access::kStrided) {
    return run(dtype == DType::kFloat64 ? elbo_kernel<Any<double, true>, false>
               : elements               ? elbo_kernel<Any<float, true>, false>
                                        : elbo_kernel<Any<float>, false>);
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    run(access == Access::kFull ? elbo_kernel<T, true> : elbo_kernel<T, false>);
  });
}

}  // namespace cuda
}  // namespace fused_elbo
