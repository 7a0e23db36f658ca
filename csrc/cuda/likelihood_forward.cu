// log N(x; mean, exp(logvar)), per element, per row or summed.
//
// Bytes per element: read x and mean, 8 in float32, 4 in bfloat16 and float16, 16 in float64; half as much again where logvar has an entry
// per element. Elementwise results add 4 (8 in float64).
// Launch: 256 threads; a block takes 256 / lanes short rows or a chunk of a long one (plan.h), 16 bytes per thread and access.
#include "launch.cuh"
#include "likelihood.cuh"

namespace fused_elbo {
namespace cuda {
namespace {

template <typename T, Access kAccess>
__global__ void __launch_bounds__(kThreads) likelihood_forward(const __grid_constant__ LikelihoodParams p) {
  const Place place = find_place(p.plan, blockIdx.x);
  const auto value = likelihood_tile<T, Pass::kForward, kAccess>(p, place, blockIdx.x);
  if (p.result.reduction != Reduction::kNone) finish(p.plan, place, blockIdx.x, value, p.result);
}

template <typename T>
void launch_typed(const LikelihoodParams& p, Access access, void* stream) {
  void (*kernel)(LikelihoodParams) = access == Access::kUniform ? likelihood_forward<T, Access::kUniform>
                                     : access == Access::kFull  ? likelihood_forward<T, Access::kFull>
                                                                : likelihood_forward<T, Access::kStrided>;
  launch(kernel, p.plan.tiles, p, stream);
}

}  // namespace

void launch_likelihood_forward(const LikelihoodParams& p, DType dtype, LikelihoodPath path, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<float>(p, path.access, stream);
    case DType::kFloat64:
      return launch_typed<double>(p, path.access, stream);
    case DType::kBFloat16:
      return launch_typed<BFloat16>(p, path.access, stream);
    case DType::kFloat16:
      return launch_typed<Float16>(p, path.access, stream);
  }
}

}  // namespace cuda
}  // namespace fused_elbo
