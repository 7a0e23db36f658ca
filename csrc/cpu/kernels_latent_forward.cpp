// z = mean + exp(logvar/2) * eps and KL(q || p) of a unit.
#include "elements.h"
#include "latent_buffers.h"
#include "latent_loops.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Elements begin .. end - 1 of a unit's arrays. False: a number was not near, and what was written does not count.
template <typename T, class Scale, class Prior, Samples kSamples, Nats kNats>
bool forward_loop(const LatentArrays<T>& arrays, int64_t begin, int64_t end) {
  const Scale scale = make_scale<T, Scale>(arrays);
  const T *const mean = arrays.mean, *const logvar = arrays.logvar, *const eps = arrays.eps;
  const T *const prior_mean = arrays.prior_mean, *const prior_logvar = arrays.prior_logvar;
  T *const z = arrays.z, *const std = arrays.std, *const nats = arrays.nats;
  FarLanes<T> far;
  const auto element = [=, &far](int64_t i, int lane) __attribute__((always_inline)) {
    const math::KlTerms<T> terms =
        make_prior<T, Prior>(prior_mean, prior_logvar, i).terms(mean[i], scale.logvar(logvar[i]));
    if constexpr (kSamples == Samples::kOne) z[i] = math::sample(mean[i], terms.std, eps[i - begin]);
    if constexpr (kSamples == Samples::kSeveral) std[i] = terms.std;
    if constexpr (kNats == Nats::kStored) nats[i] = math::kl(terms);
    far.lane[lane] |= terms.far;
    return terms;
  };
  // Nats of four groups are added in their own type before they are widened. Written out where it matters: the loop
  // below does the same in half the code, but passes its sums through memory.
  // The sums go on from block to block, so that their order does not depend on how a unit is cut into blocks.
  alignas(64) double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = kNats == Nats::kSummed ? arrays.nats_lanes[lane] : 0;
  int64_t four = begin;
  if constexpr (kNats == Nats::kSummed && Prior::kReach == math::Reach::kNear && sizeof(T) == 4) {
    for (; four + 4 * kLanes <= end; four += 4 * kLanes) {
      FUSED_ELBO_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t i = four + lane;
        math::KlSum<T> sum(element(i, lane));
        sum.add(element(i + kLanes, lane));
        sum.add(element(i + 2 * kLanes, lane));
        sum.add(element(i + 3 * kLanes, lane));
        lanes[lane] += static_cast<double>(sum.value());
      }
    }
  }
  for (; four < end; four += 4 * kLanes) {
    const int64_t stop = four + 4 * kLanes < end ? four + 4 * kLanes : end;
    alignas(64) T squares[kLanes] = {}, rest[kLanes] = {};
    for (int64_t group = four; group < stop; group += kLanes) {
      FUSED_ELBO_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) {
        const math::KlTerms<T> terms = element(group + lane, lane);
        if constexpr (kNats == Nats::kSummed) {
          math::KlSum<T> sum{squares[lane], rest[lane]};
          sum.add(terms);
          squares[lane] = sum.squares;
          rest[lane] = sum.rest;
        }
      }
    }
    if constexpr (kNats == Nats::kSummed) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(math::KlSum<T>{squares[lane], rest[lane]}.value());
      }
    }
  }
  if (Prior::kReach == math::Reach::kNear && far.any()) return false;
  if constexpr (kNats == Nats::kSummed) {
    for (int lane = 0; lane < kLanes; ++lane) arrays.nats_lanes[lane] = lanes[lane];
  }
  return true;
}

// Loops, by what is wanted. Without the KL the prior plays no part.

template <typename T, class Scale, class Prior, Nats kNats>
LatentLoop<T> pick(Samples samples) {
  switch (samples) {
    case Samples::kNone:
      return forward_loop<T, Scale, Prior, Samples::kNone, kNats>;
    case Samples::kOne:
      return forward_loop<T, Scale, Prior, Samples::kOne, kNats>;
    case Samples::kSeveral:
      return forward_loop<T, Scale, Prior, Samples::kSeveral, kNats>;
  }
  __builtin_unreachable();
}

template <typename T, class Scale, math::Reach kReach>
LatentLoop<T> pick(const LoopChoice& wanted) {
  using Standard = math::StandardPrior<T, kReach>;
  using Learned = math::GaussianPrior<T, kReach>;
  switch (wanted.nats) {
    case Nats::kNone:
      return pick<T, Scale, Standard, Nats::kNone>(wanted.samples);
    case Nats::kStored:
      return wanted.learned_prior ? pick<T, Scale, Learned, Nats::kStored>(wanted.samples)
                                  : pick<T, Scale, Standard, Nats::kStored>(wanted.samples);
    case Nats::kSummed:
      return wanted.learned_prior ? pick<T, Scale, Learned, Nats::kSummed>(wanted.samples)
                                  : pick<T, Scale, Standard, Nats::kSummed>(wanted.samples);
  }
  __builtin_unreachable();
}

template <typename T, math::Reach kReach>
LatentLoop<T> pick(const LoopChoice& wanted) {
  return wanted.clamp ? pick<T, math::ClampedLogVarScale<T>, kReach>(wanted)
                      : pick<T, math::LogVarScale<T>, kReach>(wanted);
}

}  // namespace

template <typename T>
LatentLoops<T> forward_loops(const LoopChoice& wanted) {
  return {pick<T, math::Reach::kNear>(wanted), pick<T, math::Reach::kAny>(wanted)};
}
template LatentLoops<float> forward_loops(const LoopChoice&);
template LatentLoops<double> forward_loops(const LoopChoice&);

template <typename T>
void LatentWork<T>::forward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  const bool nats = wants_nats(args_, pass_);
  const bool elementwise = nats && args_.reduction == Reduction::kNone;
  LatentArrays<T> arrays;
  add_inputs(range, buffers, arrays);
  arrays.nats = elementwise ? output(kl_, range, buffers.nats) : buffers.nats;
  arrays.std = buffers.second;
  arrays.nats_lanes = buffers.nats_lanes;
  for (double& lane : buffers.nats_lanes) lane = 0;
  const int64_t samples = z_ ? args_.shape.samples : 0;
  if (samples == 1) {
    arrays.z = output(z_, range, buffers.first);
    run_loop(first, range, arrays, buffers);
    if (mask_) keep_counted(buffers.keep, arrays.z, count, arrays.z);
    store_output(z_, range, arrays.z, buffers.first);
  } else {
    loops_.run(arrays, 0, count);
    for (int64_t k = 0; k < samples; ++k) {
      Range one = range;
      one.sample = k;
      const T* const eps = noise(NoiseGenerator(noise_, static_cast<uint32_t>(k)), range, buffers);
      T* const z = output(z_, one, buffers.first);
      for (int64_t group = 0; group < count; group += kLanes) {
        FUSED_ELBO_INDEPENDENT
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t i = group + lane;
          z[i] = math::sample(arrays.mean[i], buffers.second[i], eps[i]);
        }
      }
      if (mask_) keep_counted(buffers.keep, z, count, z);
      store_output(z_, one, z, buffers.first);
    }
  }
  // A clamp may leave other nats than 0 of a logvar of 0.
  if (mask_ && nats && args_.clamp) keep_counted(buffers.keep, arrays.nats, count, arrays.nats);
  if (elementwise) {
    store_output(kl_, range, arrays.nats, buffers.nats);
  } else if (nats) {
    reduce_nats(range, buffers);
  }
}

template void LatentWork<float>::forward_unit(const NoiseGenerator&, const Range&, LatentBuffers<float>&) const;
template void LatentWork<double>::forward_unit(const NoiseGenerator&, const Range&, LatentBuffers<double>&) const;

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
