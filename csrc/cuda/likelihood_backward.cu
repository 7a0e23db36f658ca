// Gradients of log N(x; mean, exp(logvar)), with d = x - mean, s = d exp(-logvar) and g the upstream gradient:
//   g s for mean (its negative for x), g 1/2 (s d - 1) for logvar, summed where one logvar serves a segment.
//
// Bytes per element: read x and mean, write grad_mean: 12 in float32, 6 in bfloat16 and float16, 24 in float64; a
// logvar per element adds its own reading and a gradient of 4 bytes (8 in float64). Launch: as the forward pass
// (likelihood_forward.cu).
#include "launch.cuh"
#include "likelihood.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

template <typename T, bool kFull>
__global__ void __launch_bounds__(kThreads, kResidentLikelihood<T>)
    likelihood_backward(const __grid_constant__ LikelihoodParams p) {
  const Place place = find_place(p.plan, blockIdx.x);
  likelihood_tile<T, Pass::kBackward, kFull>(p, place, blockIdx.x);
}

template <bool kElements>
void launch_strided(const LikelihoodParams& p, DType dtype, void* stream) {
  launch(dtype == DType::kFloat64 ? likelihood_backward<Any<double, true>, false>
                                  : likelihood_backward<Any<float, kElements>, false>,
         p.plan.tiles, p, stream);
}

template <typename T>
void launch_vector(const LikelihoodParams& p, bool full, void* stream) {
  launch(full ? likelihood_backward<T, true> : likelihood_backward<T, false>, p.plan.tiles, p, stream);
}

}  // namespace

void launch_likelihood_backward(const PreparedLikelihood& call, DType dtype, void* stream) {
  const LikelihoodParams& p = call.params;
  if (call.elements) return launch_strided<true>(p, dtype, stream);
  if (call.access == Access::kStrided) return launch_strided<false>(p, dtype, stream);
  const bool full = call.access == Access::kFull;
  switch (dtype) {
    case DType::kFloat32:
      return launch_vector<float>(p, full, stream);
    case DType::kFloat64:
      return launch_vector<double>(p, full, stream);
    case DType::kBFloat16:
      return launch_vector<BFloat16>(p, full, stream);
    case DType::kFloat16:
      return launch_vector<Float16>(p, full, stream);
  }
}

}  // namespace cuda
}  // namespace fused_elbo
