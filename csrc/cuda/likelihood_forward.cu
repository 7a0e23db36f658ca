// log N(x; mean, exp(logvar)), per element, per row or summed.
//
// Bytes per element: read x and mean, 8 in float32, 4 in bfloat16 and float16, 16 in float64; half as much again where
// logvar has an entry per element. Elementwise results add 4 (8 in float64). Launch: 256 threads; a block takes 256 /
// lanes short rows or a chunk of a long one (plan.h), 16 bytes per thread and access.
#include "launch.cuh"
#include "likelihood.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

template <typename T, bool kFull>
__global__ void __launch_bounds__(kThreads, kResidentLikelihood<T>)
    likelihood_forward(const __grid_constant__ LikelihoodParams p) {
  const Place place = find_place(p.plan, blockIdx.x);
  const auto value = likelihood_tile<T, Pass::kForward, kFull>(p, place, blockIdx.x);
  if (p.result.reduction != Reduction::kNone) finish(p.plan, blockIdx.x, value, p.result);
}

}  // namespace

void launch_likelihood_forward(const PreparedLikelihood& call, DType dtype, void* stream) {
  const auto run = [&](void (*kernel)(LikelihoodParams)) {
    launch(kernel, call.params.plan.tiles, call.params, stream);
  };
  if (call.access == Access::kStrided) {
    return run(dtype == DType::kFloat64 ? likelihood_forward<Any<double, true>, false>
               : call.elements          ? likelihood_forward<Any<float, true>, false>
                                        : likelihood_forward<Any<float>, false>);
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    run(call.access == Access::kFull ? likelihood_forward<T, true> : likelihood_forward<T, false>);
  });
}

}  // namespace cuda
}  // namespace fused_elbo
