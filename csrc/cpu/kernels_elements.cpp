// The passes of elements.h that are worth a function of their own.
#include "../math/scale.h"
#include "elements.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

template <typename T, class Terms>
void convert(const Terms& terms, const T* parameter, int64_t count, T* logvar, T* slope) {
  for (int64_t group = 0; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      const math::ScaleTerms<T> t = terms(parameter[i]);
      logvar[i] = t.logvar;
      slope[i] = t.slope;
    }
  }
}

template <typename T>
void convert_any(const Scale& scale, const T* parameter, int64_t count, T* logvar, T* slope) {
  math::with_scale<T>(scale, [&](const auto& terms) { convert(terms, parameter, count, logvar, slope); });
}

template <typename T>
void multiply_by_slope(const T* slope, int64_t count, T* grad) {
  for (int64_t group = 0; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      grad[i] = math::through(slope[i], grad[i]);
    }
  }
}

}  // namespace

void to_logvar(const Scale& scale, const float* parameter, int64_t count, float* logvar, float* slope) {
  convert_any(scale, parameter, count, logvar, slope);
}
void to_logvar(const Scale& scale, const double* parameter, int64_t count, double* logvar, double* slope) {
  convert_any(scale, parameter, count, logvar, slope);
}
void through_slope(const float* slope, int64_t count, float* grad) { multiply_by_slope(slope, count, grad); }
void through_slope(const double* slope, int64_t count, double* grad) { multiply_by_slope(slope, count, grad); }

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
