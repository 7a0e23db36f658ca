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

}  // namespace

void launch_likelihood_backward(const PreparedLikelihood& call, DType dtype, void* stream) {
  const auto run = [&](void (*kernel)(LikelihoodParams)) {
    launch(kernel, call.params.plan.tiles, call.params, stream);
  };
  if (call.access == Access::kStrided) {
    return run(dtype == DType::kFloat64 ? likelihood_backward<Any<double, true>, false>
               : call.elements          ? likelihood_backward<Any<float, true>, false>
                                        : likelihood_backward<Any<float>, false>);
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    run(call.access == Access::kFull ? likelihood_backward<T, true> : likelihood_backward<T, false>);
  });
}

}  // namespace cuda
}  // namespace fused_elbo
