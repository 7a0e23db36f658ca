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

// kUnits units of a thread, `step` counters apart: loads first, then arithmetic, then stores. The pointers are those of
// counter 0.
template <typename T, bool kClamp, bool kParameters, int kUnits>
__device__ inline void forward_units(const T* mean, const T* logvar, T* z, const Philox& philox,
                                     const Bounds<float>& bounds, const Scale& scale, uint32_t counter, uint32_t step,
                                     KlSum<KlHalves<T>>& kl) {
  constexpr int kUnit = Traits<T>::kUnit;
  Packed<T> m[kUnits], lv[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    m[i].load(mean + static_cast<uint64_t>(counter + i * step) * 4);
    lv[i].load(logvar + static_cast<uint64_t>(counter + i * step) * 4);
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    float eps[kUnit], out[kUnit];
#pragma unroll
    for (int g = 0; g < kUnit / 4; ++g) {
      const uint32_t next = counter + i * step + g;
      normals<false>(philox(g == 0 ? next : after(next, eps[4 * g - 1])), eps + 4 * g);
    }
    [[maybe_unused]] float converted[kUnit], slope[kUnit];
    if constexpr (kParameters) {
      unpack_pairs(lv[i], converted);
      to_logvar(scale, converted, slope);
    }
#pragma unroll
    for (int j = 0; j < kUnit; j += 2) {
      const Pair mean = m[i].pair(j), logvar = kParameters ? Pair(converted[j], converted[j + 1]) : lv[i].pair(j);
      const LogVar<Pair> v = logvar_terms(kClamp ? clamp(logvar, bounds.min, bounds.max) : logvar);
      kl.add_pair(mean, v);
      const Pair z = math::sample(mean, v.std, Pair(eps[j], eps[j + 1]));
      out[j] = z.v.x;
      out[j + 1] = z.v.y;
    }
    store_vector(z + static_cast<uint64_t>(counter + i * step) * 4, out);
  }
}

template <typename T, bool kClamp, bool kParameters>
__device__ inline void forward_tile(const LatentParams& p) {
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr int kUnits = 8 / kUnit;
  const Place place = find_place(p.plan, blockIdx.x);
  const int64_t first = place.first_unit * kUnit;
  const uint64_t counter = (p.first_index + static_cast<uint64_t>(place.row * p.index.row + first)) >> 2;
  const int64_t start = first - 4 * static_cast<int64_t>(static_cast<uint32_t>(counter));
  const T* mean = static_cast<const T*>(p.mean.data) + (place.row * p.mean.row + start);
  const T* logvar = static_cast<const T*>(p.logvar.data) + (place.row * p.logvar.row + start);
  T* z = static_cast<T*>(p.z.data) + (place.row * p.z.row + start);
  const Philox philox(load_seed(p), static_cast<uint32_t>(counter >> 32), 0, p.stream);
  const Bounds<float> bounds = clamp_bounds(p, 0.0f);

  KlSum<KlHalves<T>> kl;
  const uint32_t end = static_cast<uint32_t>(counter) + place.end * (kUnit / 4);
  uint32_t at = static_cast<uint32_t>(counter) + place.begin * (kUnit / 4);
  const uint32_t step = p.plan.stride * (kUnit / 4);
  for (; static_cast<int32_t>(end - at) > static_cast<int32_t>((kUnits - 1) * step); at += kUnits * step) {
    forward_units<T, kClamp, kParameters, kUnits>(mean, logvar, z, philox, bounds, p.scale, at, step, kl);
  }
  if constexpr (kUnits > 1) {
    if (static_cast<int32_t>(end - at) > 0)
      forward_units<T, kClamp, kParameters, 1>(mean, logvar, z, philox, bounds, p.scale, at, step, kl);
  }
  finish(p.plan, blockIdx.x, kl.value(), p.result);
}

template <typename T, bool kClamp>
__global__ void __launch_bounds__(kThreads, kResident<T>) latent_forward_fast(const __grid_constant__ LatentParams p) {
  forward_tile<T, kClamp, false>(p);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentGeneral<T>)
    latent_forward_parameters(const __grid_constant__ LatentParams p) {
  forward_tile<T, false, true>(p);
}

// Everything else: any strides, any number of samples, learned prior, elementwise KL, one half of the work.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentGeneral<T>)
    latent_forward_general(const __grid_constant__ LatentParams p) {
  using Acc = typename Traits<T>::Acc;
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr bool kElements = kHasElements<T>;
  const Place place = find_place(p.plan, blockIdx.x);
  const uint64_t seed = load_seed(p);
  const Bounds<Acc> bounds = clamp_bounds(p, Acc());
  const bool want_z = p.z.present(), want_kl = p.kl.present(), learned = p.prior_mean.present();

  const View* const views[] = {&p.mean, &p.logvar, &p.prior_mean, &p.prior_logvar, &p.z, &p.kl, &p.index, &p.mask};
  enum { kMean, kLogVar, kPriorMean, kPriorLogVar, kZ, kKl, kIndex, kMask, kViews };
  int64_t base[kViews];
  segment_offsets(p.plan, place, views, base);

  KlSum<Acc> sum;
  for (uint32_t u = place.begin; u < place.end; u += p.plan.stride) {
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
    bool counts[kUnit];
    if constexpr (kElements) {
      Acc slope[kUnit];
      to_logvar(p.scale, std, slope);
      if (learned) to_logvar(p.scale, prior_logvar, slope);
      load_mask(p.mask, unit.at[kMask], unit.valid, counts);
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const Acc logvar = p.clamp ? clamp(std[j], bounds.min, bounds.max) : std[j];
      const LogVar<Acc> own = logvar_terms(logvar);
      std[j] = own.std;
      if constexpr (kElements) kl[j] = 0;
      if (!want_kl || (kElements ? !counts[j] : j >= unit.valid)) continue;
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
      for (int j = 0; j < kUnit; ++j) {
        const Acc z = math::sample(mean[j], std[j], eps[j]);
        eps[j] = kElements && !counts[j] ? Acc(0) : z;
      }
      store_unit<T>(p.z, unit.at[kZ] + k * p.z.sample, unit.valid, eps);
    }
  }
  if (want_kl && p.result.reduction != Reduction::kNone) finish(p.plan, blockIdx.x, sum.value(), p.result);
}

}  // namespace

void launch_latent_forward(const LatentParams& p, DType dtype, LatentPath path, void* stream) {
  const auto run = [&](void (*kernel)(LatentParams)) { launch(kernel, p.plan.tiles, p, stream); };
  if (!path.vector) {
    return run(dtype == DType::kFloat64 ? latent_forward_general<Any<double, true>>
               : path.elements          ? latent_forward_general<Any<float, true>>
                                        : latent_forward_general<Any<float>>);
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8) {
      if (path.fast && path.elements) return run(latent_forward_parameters<T>);
      if (path.fast) return run(p.clamp ? latent_forward_fast<T, true> : latent_forward_fast<T, false>);
    }
    run(latent_forward_general<T>);
  });
}

}  // namespace cuda
}  // namespace fused_elbo
