// log N(x; mean, e^logvar) over one tile: what the likelihood kernels and the loss kernel share.
#pragma once

#include "elements.cuh"
#include "likelihood.h"
#include "math.cuh"
#include "place.cuh"
#include "reduce.cuh"

namespace fused_elbo {
namespace cuda {

// Blocks of a kernel that share a multiprocessor: 0 leaves that to the compiler.
template <typename T>
constexpr int kResidentLikelihood = kHasElements<T> ? kResidentGeneral<T> : 0;

// One gradient per segment from what its threads hold: in the team, in the block, or by the last block to arrive.
template <typename Acc>
__device__ inline void finish_segment(const LikelihoodParams& p, const Place& place, uint32_t tile, Acc value) {
  const Plan& plan = p.plan;
  const int64_t segment = place.outer * plan.segments + place.segment;
  if (plan.lanes != 0) {
    value = team_sum(value, plan.lanes);
    if (place.active && leads_team(plan)) store_any(p.segment_grad, segment, p.segment_grad_dtype, value);
    return;
  }
  double sum = block_sum(static_cast<double>(value));
  if (plan.chunks > 1) {
    if (threadIdx.x == 0) p.segment_parts.values[tile] = sum;
    if (!last_to_arrive(p.segment_parts.tickets + segment, static_cast<uint32_t>(plan.chunks))) return;
    sum = block_sum(share_of_parts(p.segment_parts.values + segment * plan.chunks, plan.chunks));
  }
  if (threadIdx.x == 0) store_any(p.segment_grad, segment, p.segment_grad_dtype, static_cast<Acc>(sum));
}

// The thread's share of a tile. Returns its part of the row's log-likelihood; writes the elementwise results.
template <typename T, Pass kPass, bool kFull, typename Acc = typename Traits<T>::Acc>
__device__ inline Acc likelihood_tile(const LikelihoodParams& p, const Place& place, uint32_t tile) {
  constexpr int kUnit = Traits<T>::kUnit;
  constexpr bool kVector = kIsVector<T>, kElements = kHasElements<T>;
  constexpr bool kValue = kPass != Pass::kBackward, kGrad = kPass != Pass::kForward;
  const Plan& plan = p.plan;

  const bool uniform = kVector ? !kFull : p.uniform;
  const View* const views[] = {&p.x,      &p.mean,        &p.logvar, &p.grad_ll, &p.grad_mean,
                               &p.grad_x, &p.grad_logvar, &p.ll,     &p.mask};
  enum { kX, kMean, kLogVar, kGradLl, kGradMean, kGradX, kGradLogVar, kLl, kMask, kViews };
  int64_t base[kViews] = {};
  Acc row_logvar = static_cast<Acc>(p.logvar_value), row_precision = 1, row_grad = static_cast<Acc>(p.grad_ll_scale);
  if (place.active) {
    segment_offsets(plan, place, views, base);
    if (uniform) {
      if (p.logvar.present()) row_logvar = load_any<Acc>(p.logvar.data, base[kLogVar], p.logvar.dtype);
      row_precision = math::exp(-row_logvar);
    }
    if (kGrad && p.grad_ll.present() && !p.grad_elementwise)
      row_grad *= static_cast<const Acc*>(p.grad_ll.data)[base[kGradLl]];
  }

  // Sums of the squared differences, weighted by precision (unless uniform) and upstream gradient (where elementwise);
  // of logvar; of weights.
  Acc squares = 0, logvars = 0, weighted_squares = 0, weights = 0;
  int64_t count = 0;
  for (uint32_t u = place.begin; u < place.end; u += plan.stride) {
    const Unit<kVector, kViews> unit(plan, place.first_unit + u, kUnit, views, base);
    Acc difference[kUnit], mean[kUnit], logvar[kUnit], weight[kUnit];
    load_unit<T>(p.x, unit.at[kX], unit.valid, difference);
    load_unit<T>(p.mean, unit.at[kMean], unit.valid, mean);
    if constexpr (kVector && kFull) load_unit<T>(p.logvar, unit.at[kLogVar], unit.valid, logvar);
    if constexpr (!kVector) {
      if (!uniform) {
        with_type(p.logvar.dtype, [&](auto type) {
          load_strided(static_cast<const decltype(type)*>(p.logvar.data) + unit.at[kLogVar], p.logvar.element,
                       unit.valid, logvar);
        });
      }
    }
    if constexpr (kGrad) {
      if (p.grad_elementwise) load_nats<T>(p.grad_ll, unit.at[kGradLl], unit.valid, weight);
    }
    Acc slope[kUnit];
    bool counts[kUnit];
    if constexpr (kElements) {
      if (!uniform) to_logvar(p.scale, logvar, slope);
      load_mask(p.mask, unit.at[kMask], unit.valid, counts);
    } else {
      count += unit.valid;
    }

    Acc value[kUnit], grad_mean[kUnit], grad_logvar[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (!kVector && !kElements && j >= unit.valid) continue;
      if constexpr (kElements) {
        value[j] = grad_mean[j] = grad_logvar[j] = 0;
        if (!counts[j]) continue;
        ++count;
      }
      difference[j] -= mean[j];
      Acc scaled = difference[j];  // by the precision, where that is not left for the end
      if constexpr (!kVector || kFull) {
        if (!uniform) {
          scaled *= math::exp(-logvar[j]);
          if (kValue) logvars += logvar[j];
        }
      }
      if constexpr (kValue) {
        squares = fma(scaled, difference[j], squares);
        value[j] = Acc(-0.5) *
                   fma(scaled * row_precision, difference[j], (uniform ? row_logvar : logvar[j]) + Acc(math::kLog2Pi));
      }
      if constexpr (kGrad) {
        const Acc upstream = p.grad_elementwise ? weight[j] * row_grad : row_grad;
        const Acc whole = scaled * row_precision;
        grad_mean[j] = upstream * whole;
        grad_logvar[j] = upstream * fma(Acc(0.5) * whole, difference[j], Acc(-0.5));
        weighted_squares = fma(upstream * scaled, difference[j], weighted_squares);
        weights += upstream;
        if constexpr (kElements) {
          if (!uniform) grad_logvar[j] = math::through(slope[j], grad_logvar[j]);
        }
      }
    }
    if constexpr (kValue) {
      if (p.ll.present()) store_nats<T>(p.ll, unit.at[kLl], unit.valid, value);
    }
    if constexpr (kGrad) {
      if (p.grad_mean.present()) store_unit<T>(p.grad_mean, unit.at[kGradMean], unit.valid, grad_mean);
      if constexpr (!kVector) {
        if (p.grad_logvar.present()) {
          with_type(p.grad_logvar.dtype, [&](auto type) {
            store_strided(static_cast<decltype(type)*>(p.grad_logvar.data) + unit.at[kGradLogVar],
                          p.grad_logvar.element, unit.valid, grad_logvar);
          });
        }
      } else if (kFull && p.grad_logvar.present()) {
        if (p.grad_logvar.dtype == Traits<T>::kDType) {
          store_unit<T>(p.grad_logvar, unit.at[kGradLogVar], unit.valid, grad_logvar);
        } else {
          store_nats<T>(p.grad_logvar, unit.at[kGradLogVar], unit.valid, grad_logvar);
        }
      }
      if (p.grad_x.present()) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) grad_mean[j] = -grad_mean[j];
        store_unit<T>(p.grad_x, unit.at[kGradX], unit.valid, grad_mean);
      }
    }
  }

  if constexpr (kGrad) {
    if (p.segment_grad != nullptr) {
      const Acc part = count == 0 ? Acc(0) : Acc(0.5) * fma(weighted_squares, row_precision, -weights);
      finish_segment(p, place, tile, part);
    }
  }
  if constexpr (kValue) {
    if (count == 0) return 0;
    const Acc n = static_cast<Acc>(count);
    const Acc constant = uniform ? n * (row_logvar + Acc(math::kLog2Pi)) : fma(n, Acc(math::kLog2Pi), logvars);
    return Acc(-0.5) * fma(squares, row_precision, constant);
  }
  return 0;
}

}  // namespace cuda
}  // namespace fused_elbo
