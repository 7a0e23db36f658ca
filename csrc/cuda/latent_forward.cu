// z = mean + exp(logvar / 2) eps and KL(q || p): one reading of the parameters gives samples and divergence.
//
// Bytes per element: read mean and logvar, write z: 12 in float32, 6 in bfloat16 and float16, 24 in float64; two more
// inputs with a learned prior; the per-row results are negligible. The noise is made from counters and never stored.
// Launch: 256 threads; a block takes 256 / lanes short rows or a chunk of a long one (plan.h). Each thread moves 16
// bytes per access: 4 float32 or 8 bfloat16 elements from each input, 8 elements per turn of the main loop.
#include "latent.cuh"
#include "launch.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

// As many round keys as fit 64 registers without a spill.
template <typename T>
using Keys = Philox<sizeof(T) == 4 ? 1 : 6>;

// kUnits units of a thread, `stride` apart: loads first, then arithmetic, then stores.
template <typename T, bool kClamp, int kUnits, typename Acc = typename Traits<T>::Acc>
__device__ inline void forward_units(const T* mean, const T* logvar, T* z, const Keys<T>& philox, uint32_t counter,
                                     const Bounds<Acc>& bounds, uint32_t unit, uint32_t stride, KlSum<Acc>& kl) {
  constexpr int kUnit = Traits<T>::kUnit;
  Acc m[kUnits][kUnit], lv[kUnits][kUnit];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    load_vector(mean + static_cast<uint64_t>(unit + i * stride) * kUnit, m[i]);
    load_vector(logvar + static_cast<uint64_t>(unit + i * stride) * kUnit, lv[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    Acc eps[kUnit];
#pragma unroll
    for (int g = 0; g < kUnit / 4; ++g) {
      normals<false>(philox(counter + (unit + i * stride) * (kUnit / 4) + g), eps + 4 * g);
    }
    Acc out[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const LogVar<Acc> v = logvar_terms(kClamp ? clamp(lv[i][j], bounds.min, bounds.max) : lv[i][j]);
      kl.add(m[i][j], v);
      out[j] = math::sample(m[i][j], v.std, eps[j]);
    }
    store_vector(z + static_cast<uint64_t>(unit + i * stride) * kUnit, out);
  }
}

template <typename T, bool kClamp>
__global__ void __launch_bounds__(kThreads, 4) latent_forward_fast(const __grid_constant__ LatentParams p) {
  using Acc = typename Traits<T>::Acc;
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr int kUnits = 8 / kUnit;
  const Place place = find_place(p.plan, blockIdx.x);
  const int64_t first = place.first_unit * kUnit;
  const T* mean = static_cast<const T*>(p.mean.data) + place.row * p.mean.row + first;
  const T* logvar = static_cast<const T*>(p.logvar.data) + place.row * p.logvar.row + first;
  T* z = static_cast<T*>(p.z.data) + place.row * p.z.row + first;
  const uint64_t counter = (p.first_index + static_cast<uint64_t>(place.row * p.index.row + first)) >> 2;
  const Keys<T> philox(load_seed(p), static_cast<uint32_t>(counter >> 32), 0, p.stream);
  const Bounds<Acc> bounds = clamp_bounds(p, Acc());

  KlSum<Acc> kl;
  uint32_t unit = place.begin;
  for (; unit + (kUnits - 1) * place.stride < place.end; unit += kUnits * place.stride) {
    forward_units<T, kClamp, kUnits>(mean, logvar, z, philox, static_cast<uint32_t>(counter), bounds, unit,
                                     place.stride, kl);
  }
  if constexpr (kUnits > 1) {
    if (unit < place.end) {
      forward_units<T, kClamp, 1>(mean, logvar, z, philox, static_cast<uint32_t>(counter), bounds, unit, place.stride,
                                  kl);
    }
  }
  finish(p.plan, place, blockIdx.x, kl.value(), p.result);
}

// Everything else: any strides, any number of samples, learned prior, elementwise KL, one half of the work.
template <typename T>
__global__ void __launch_bounds__(kThreads) latent_forward_general(const __grid_constant__ LatentParams p) {
  using Acc = typename Traits<T>::Acc;
  constexpr int kUnit = Traits<T>::kUnit;
  const Place place = find_place(p.plan, blockIdx.x);
  const uint64_t seed = load_seed(p);
  const Bounds<Acc> bounds = clamp_bounds(p, Acc());
  const bool want_z = p.z.present(), want_kl = p.kl.present(), learned = p.prior_mean.present();

  const View* const views[] = {&p.mean, &p.logvar, &p.prior_mean, &p.prior_logvar, &p.z, &p.kl, &p.index};
  enum { kMean, kLogVar, kPriorMean, kPriorLogVar, kZ, kKl, kIndex, kViews };
  int64_t base[kViews];
  segment_offsets(p.plan, place, views, base);

  KlSum<Acc> sum;
  for (uint32_t u = place.begin; u < place.end; u += place.stride) {
    const Unit<kIsVector<T>, kViews> unit(p.plan, place.first_unit + u, kUnit, views, base);
    Acc mean[kUnit], std[kUnit];
    load_unit<T>(p.mean, unit.at[kMean], unit.valid, mean);
    load_unit<T>(p.logvar, unit.at[kLogVar], unit.valid, std);
    Acc kl[kUnit];
    Acc prior_mean[kUnit], prior_logvar[kUnit];
    if (learned) {
      load_unit<T>(p.prior_mean, unit.at[kPriorMean], unit.valid, prior_mean);
      load_unit<T>(p.prior_logvar, unit.at[kPriorLogVar], unit.valid, prior_logvar);
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const Acc logvar = p.clamp ? clamp(std[j], bounds.min, bounds.max) : std[j];
      const LogVar<Acc> own = logvar_terms(logvar);
      std[j] = own.std;
      if (!want_kl || j >= unit.valid) continue;
      if (learned) {
        const Acc difference = mean[j] - prior_mean[j];
        const Acc scaled = difference * math::exp(-prior_logvar[j]);
        const LogVar<Acc> ratio = logvar_terms(logvar - prior_logvar[j]);
        sum.squares = fma(scaled, difference, sum.squares);
        sum.add(Acc(0), ratio);
        kl[j] = Acc(0.5) * fma(scaled, difference, ratio.phi());
      } else {
        sum.add(mean[j], own);
        kl[j] = Acc(0.5) * fma(mean[j], mean[j], own.phi());
      }
    }
    if (want_kl && p.result.reduction == Reduction::kNone) store_nats<T>(p.kl, unit.at[kKl], unit.valid, kl);
    if (!want_z) continue;
    const uint64_t index = p.first_index + static_cast<uint64_t>(unit.at[kIndex]);
    for (int64_t k = 0; k < p.samples; ++k) {
      Acc eps[kUnit];
      unit_normals<kIsVector<T>, false>(index, static_cast<uint32_t>(k), p.stream, seed, eps);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) eps[j] = math::sample(mean[j], std[j], eps[j]);
      store_unit<T>(p.z, unit.at[kZ] + k * p.z.sample, unit.valid, eps);
    }
  }
  if (want_kl && p.result.reduction != Reduction::kNone) finish(p.plan, place, blockIdx.x, sum.value(), p.result);
}

template <typename T>
void launch_vector(const LatentParams& p, LatentPath path, void* stream) {
  if constexpr (sizeof(T) < 8) {
    if (path.fast)
      return launch(p.clamp ? latent_forward_fast<T, true> : latent_forward_fast<T, false>, p.plan.tiles, p, stream);
  }
  launch(latent_forward_general<T>, p.plan.tiles, p, stream);
}

}  // namespace

void launch_latent_forward(const LatentParams& p, DType dtype, LatentPath path, void* stream) {
  if (!path.vector) {
    return launch(dtype == DType::kFloat64 ? latent_forward_general<Any<double>> : latent_forward_general<Any<float>>,
                  p.plan.tiles, p, stream);
  }
  switch (dtype) {
    case DType::kFloat32:
      return launch_vector<float>(p, path, stream);
    case DType::kFloat64:
      return launch_vector<double>(p, path, stream);
    case DType::kBFloat16:
      return launch_vector<BFloat16>(p, path, stream);
    case DType::kFloat16:
      return launch_vector<Float16>(p, path, stream);
  }
}

}  // namespace cuda
}  // namespace fused_elbo
