// What may stand between an operand and the inner loops: a scale parameter in the place of logvar, and a mask of the
// elements that count. Both are passes over a unit's buffers in the nearest cache, so that the loops know neither.
#pragma once

#include <cstdint>

#include "simd.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// The logvar that each parameter stands for, and its slope. parameter and logvar may be the same array; count is a
// multiple of kLanes.
void to_logvar(const Scale& scale, const float* parameter, int64_t count, float* logvar, float* slope);
void to_logvar(const Scale& scale, const double* parameter, int64_t count, double* logvar, double* slope);

// Gradients by logvar become gradients by the parameter.
void through_slope(const float* slope, int64_t count, float* grad);
void through_slope(const double* slope, int64_t count, double* grad);

// 1 for every element of a range that counts, 0 for the others.
void load_mask(const View& mask, const Range& range, float* keep);
void load_mask(const View& mask, const Range& range, double* keep);

// to[i] = from[i] where the element counts, else 0, whatever from holds. from and to may be the same array.
template <typename T>
FUSED_ELBO_INLINE void keep_counted(const T* keep, const T* from, int64_t count, T* to) {
  for (int64_t group = 0; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      to[i] = keep[i] != T(0) ? from[i] : T(0);
    }
  }
}

// The same of an input of a loop, which then reads the buffer.
template <typename T>
FUSED_ELBO_INLINE void read_counted(const T* keep, const T*& array, int64_t count, T* buffer) {
  keep_counted(keep, array, count, buffer);
  array = buffer;
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
