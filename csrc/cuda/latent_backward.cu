// Gradients of z = mean + exp(logvar / 2) eps and of KL(q || p), the noise made anew from its counters:
//   grad_mean = grad_z + g mean
//   grad_logvar = 1/2 grad_z exp(logvar / 2) eps + g 1/2 (exp(logvar) - 1),  g the upstream gradient of the row's KL
// and for a learned prior with d = mean - prior_mean, s = d exp(-prior_logvar), e = 1/2 (exp(logvar - prior_logvar) -
// 1):
//   g s, g e for mean and logvar; -g s, -g (e + 1/2 s d) for prior_mean and prior_logvar.
//
// Bytes per element: read mean, logvar, grad_z, write grad_mean, grad_logvar: 20 in float32, 10 in bfloat16 and
// float16, 40 in float64; four more tensors with a learned prior. Nothing is kept from the forward pass. Launch: as the
// forward pass (latent_forward.cu); no reductions.
#include "latent.cuh"
#include "launch.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

template <typename T>
struct Pointers {
  const T *mean, *logvar, *grad_z;
  T *grad_mean, *grad_logvar;
};

template <typename T, bool kClamp, bool kParameters, int kUnits, typename Acc = typename Traits<T>::Acc>
__device__ inline void backward_units(const Pointers<T>& p, const Philox& philox, uint32_t counter,
                                      const Bounds<Acc>& bounds, const Scale& scale, Acc grad_kl, uint32_t unit,
                                      uint32_t stride) {
  constexpr int kUnit = Traits<T>::kUnit;
  Acc m[kUnits][kUnit], lv[kUnits][kUnit], gz[kUnits][kUnit];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const uint64_t at = static_cast<uint64_t>(unit + i * stride) * kUnit;
    load_vector(p.mean + at, m[i]);
    load_vector(p.logvar + at, lv[i]);
    load_vector(p.grad_z + at, gz[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    Acc half_eps[kUnit];
#pragma unroll
    for (int g = 0; g < kUnit / 4; ++g) {
      normals<true>(philox(counter + (unit + i * stride) * (kUnit / 4) + g), half_eps + 4 * g);
    }
    [[maybe_unused]] Acc slope[kUnit];
    if constexpr (kParameters) to_logvar(scale, lv[i], slope);
    const Acc half_grad_kl = Acc(0.5) * grad_kl;
    Acc grad_mean[kUnit], grad_logvar[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; j += 2) {
      const Pair mean(m[i][j], m[i][j + 1]), logvar(lv[i][j], lv[i][j + 1]), grad_z(gz[i][j], gz[i][j + 1]);
      const LogVar<Pair> v = logvar_terms(kClamp ? clamp(logvar, bounds.min, bounds.max) : logvar);
      const Pair by_mean = fma(Pair(grad_kl), mean, grad_z);
      const Pair by_logvar = fma(grad_z * v.std, Pair(half_eps[j], half_eps[j + 1]), Pair(half_grad_kl) * v.expm1());
      grad_mean[j] = by_mean.v.x;
      grad_mean[j + 1] = by_mean.v.y;
      grad_logvar[j] = by_logvar.v.x;
      grad_logvar[j + 1] = by_logvar.v.y;
    }
    if constexpr (kClamp) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        grad_logvar[j] = lv[i][j] < bounds.min || lv[i][j] > bounds.max ? Acc(0) : grad_logvar[j];
      }
    }
    if constexpr (kParameters) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) grad_logvar[j] = math::through(slope[j], grad_logvar[j]);
    }
    const uint64_t at = static_cast<uint64_t>(unit + i * stride) * kUnit;
    store_vector(p.grad_mean + at, grad_mean);
    store_vector(p.grad_logvar + at, grad_logvar);
  }
}

template <typename Acc>
__device__ inline Acc row_grad_kl(const LatentParams& p, int64_t row) {
  const Acc scale = static_cast<Acc>(p.grad_kl_scale);
  return p.grad_kl.present() ? static_cast<const Acc*>(p.grad_kl.data)[row * p.grad_kl.row] * scale : scale;
}

template <typename T, bool kClamp, bool kParameters>
__device__ inline void backward_tile(const LatentParams& p) {
  using Acc = typename Traits<T>::Acc;
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr int kUnits = 8 / kUnit;
  const Place place = find_place(p.plan, blockIdx.x);
  if (!place.active) return;
  const int64_t first = place.first_unit * kUnit;
  const int64_t row = place.row;
  const Pointers<T> pointers{static_cast<const T*>(p.mean.data) + row * p.mean.row + first,
                             static_cast<const T*>(p.logvar.data) + row * p.logvar.row + first,
                             static_cast<const T*>(p.grad_z.data) + row * p.grad_z.row + first,
                             static_cast<T*>(p.grad_mean.data) + row * p.grad_mean.row + first,
                             static_cast<T*>(p.grad_logvar.data) + row * p.grad_logvar.row + first};
  const uint64_t counter = (p.first_index + static_cast<uint64_t>(row * p.index.row + first)) >> 2;
  const Philox philox(load_seed(p), static_cast<uint32_t>(counter >> 32), 0, p.stream);
  const Bounds<Acc> bounds = clamp_bounds(p, Acc());
  const Acc grad_kl = row_grad_kl<Acc>(p, row);

  uint32_t unit = place.begin;
  for (; unit + (kUnits - 1) * p.plan.stride < place.end; unit += kUnits * p.plan.stride) {
    backward_units<T, kClamp, kParameters, kUnits>(pointers, philox, static_cast<uint32_t>(counter), bounds, p.scale,
                                                   grad_kl, unit, p.plan.stride);
  }
  if constexpr (kUnits > 1) {
    if (unit < place.end) {
      backward_units<T, kClamp, kParameters, 1>(pointers, philox, static_cast<uint32_t>(counter), bounds, p.scale,
                                                grad_kl, unit, p.plan.stride);
    }
  }
}

template <typename T, bool kClamp>
__global__ void __launch_bounds__(kThreads, kResident<T>) latent_backward_fast(const __grid_constant__ LatentParams p) {
  backward_tile<T, kClamp, false>(p);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentGeneral<T>)
    latent_backward_parameters(const __grid_constant__ LatentParams p) {
  backward_tile<T, false, true>(p);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentGeneral<T>)
    latent_backward_general(const __grid_constant__ LatentParams p) {
  using Acc = typename Traits<T>::Acc;
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr bool kElements = kHasElements<T>;
  const Place place = find_place(p.plan, blockIdx.x);
  const int64_t row = place.row;
  const uint64_t seed = load_seed(p);
  const Bounds<Acc> bounds = clamp_bounds(p, Acc());
  const bool learned = p.prior_mean.present();
  const bool elementwise = p.result.reduction == Reduction::kNone && p.grad_kl.present();
  const Acc scale = static_cast<Acc>(p.grad_kl_scale);
  const Acc row_grad = !p.has_grad_kl || elementwise || !place.active ? Acc(0) : row_grad_kl<Acc>(p, row);

  const View* const views[] = {&p.mean,    &p.logvar,    &p.prior_mean,  &p.prior_logvar,    &p.grad_z,
                               &p.grad_kl, &p.grad_mean, &p.grad_logvar, &p.grad_prior_mean, &p.grad_prior_logvar,
                               &p.index,   &p.mask};
  enum {
    kMean,
    kLogVar,
    kPriorMean,
    kPriorLogVar,
    kGradZ,
    kGradKl,
    kGradMean,
    kGradLogVar,
    kGradPriorMean,
    kGradPriorLogVar,
    kIndex,
    kMask,
    kViews
  };
  int64_t base[kViews];
  segment_offsets(p.plan, place, views, base);

  for (uint32_t u = place.begin; u < place.end; u += p.plan.stride) {
    const Unit<kIsVector<T>, kViews> unit(p.plan, place.first_unit + u, kUnit, views, base);
    Acc logvar[kUnit];
    load_unit<T>(p.logvar, unit.at[kLogVar], unit.valid, logvar);
    Acc slope[kUnit], prior_slope[kUnit] = {};
    if constexpr (kElements) to_logvar(p.scale, logvar, slope);

    // Sums over samples: of grad_z, and of grad_z eps / 2.
    Acc grad_mean[kUnit] = {}, grad_logvar[kUnit] = {};
    if (p.grad_z.present()) {
      const uint64_t index = p.first_index + static_cast<uint64_t>(unit.at[kIndex]);
      for (int64_t k = 0; k < p.samples; ++k) {
        Acc grad_z[kUnit], half_eps[kUnit];
        load_unit<T>(p.grad_z, unit.at[kGradZ] + k * p.grad_z.sample, unit.valid, grad_z);
        unit_normals<kIsVector<T>, true>(index, static_cast<uint32_t>(k), p.stream, seed, half_eps);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          grad_mean[j] += grad_z[j];
          grad_logvar[j] = fma(grad_z[j], half_eps[j], grad_logvar[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const Acc clamped = p.clamp ? clamp(logvar[j], bounds.min, bounds.max) : logvar[j];
        grad_logvar[j] *= logvar_terms(clamped).std;
      }
    }

    Acc prior_mean[kUnit] = {}, prior_logvar[kUnit] = {};  // first the values, then the gradients
    if (p.has_grad_kl) {
      Acc mean[kUnit], grad_kl[kUnit];
      load_unit<T>(p.mean, unit.at[kMean], unit.valid, mean);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) grad_kl[j] = row_grad;
      if (elementwise) {
        load_nats<T>(p.grad_kl, unit.at[kGradKl], unit.valid, grad_kl);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) grad_kl[j] *= scale;
      }
      if (learned) {
        load_unit<T>(p.prior_mean, unit.at[kPriorMean], unit.valid, prior_mean);
        load_unit<T>(p.prior_logvar, unit.at[kPriorLogVar], unit.valid, prior_logvar);
        if constexpr (kElements) to_logvar(p.scale, prior_logvar, prior_slope);
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const Acc clamped = p.clamp ? clamp(logvar[j], bounds.min, bounds.max) : logvar[j];
        const Acc half_grad = Acc(0.5) * grad_kl[j];
        if (learned) {
          const Acc difference = mean[j] - prior_mean[j];
          const Acc by_mean = difference * math::exp(-prior_logvar[j]);
          const Acc expm1 = logvar_terms(clamped - prior_logvar[j]).expm1();
          grad_mean[j] = fma(grad_kl[j], by_mean, grad_mean[j]);
          grad_logvar[j] = fma(half_grad, expm1, grad_logvar[j]);
          prior_mean[j] = -grad_kl[j] * by_mean;
          prior_logvar[j] = -half_grad * fma(by_mean, difference, expm1);
        } else {
          grad_mean[j] = fma(grad_kl[j], mean[j], grad_mean[j]);
          grad_logvar[j] = fma(half_grad, logvar_terms(clamped).expm1(), grad_logvar[j]);
        }
      }
    }

    if (p.clamp) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        grad_logvar[j] = logvar[j] < bounds.min || logvar[j] > bounds.max ? Acc(0) : grad_logvar[j];
      }
    }
    if constexpr (kElements) {
      bool counts[kUnit];
      load_mask(p.mask, unit.at[kMask], unit.valid, counts);
      finish_gradients(counts, slope, grad_mean, grad_logvar);
      finish_gradients(counts, prior_slope, prior_mean, prior_logvar);
    }
    if (p.grad_prior_mean.present()) store_unit<T>(p.grad_prior_mean, unit.at[kGradPriorMean], unit.valid, prior_mean);
    if (p.grad_prior_logvar.present())
      store_unit<T>(p.grad_prior_logvar, unit.at[kGradPriorLogVar], unit.valid, prior_logvar);
    if (p.grad_mean.present()) store_unit<T>(p.grad_mean, unit.at[kGradMean], unit.valid, grad_mean);
    if (p.grad_logvar.present()) store_unit<T>(p.grad_logvar, unit.at[kGradLogVar], unit.valid, grad_logvar);
  }
}

}  // namespace

void launch_latent_backward(const LatentParams& p, DType dtype, LatentPath path, void* stream) {
  const auto run = [&](void (*kernel)(LatentParams)) { launch(kernel, p.plan.tiles, p, stream); };
  if (!path.vector) {
    return run(dtype == DType::kFloat64 ? latent_backward_general<Any<double, true>>
               : path.elements          ? latent_backward_general<Any<float, true>>
                                        : latent_backward_general<Any<float>>);
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8) {
      if (path.fast && path.elements) return run(latent_backward_parameters<T>);
      if (path.fast) return run(p.clamp ? latent_backward_fast<T, true> : latent_backward_fast<T, false>);
    }
    run(latent_backward_general<T>);
  });
}

}  // namespace cuda
}  // namespace fused_elbo
