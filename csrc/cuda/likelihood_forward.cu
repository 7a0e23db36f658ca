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

template <bool kElements>
void launch_strided(const LikelihoodParams& p, DType dtype, void* stream) {
  launch(dtype == DType::kFloat64 ? likelihood_forward<Any<double, true>, false>
                                  : likelihood_forward<Any<float, kElements>, false>,
         p.plan.tiles, p, stream);
}

template <typename T>
void launch_vector(const LikelihoodParams& p, bool full, void* stream) {
  launch(full ? likelihood_forward<T, true> : likelihood_forward<T, false>, p.plan.tiles, p, stream);
}

}  // namespace

void launch_likelihood_forward(const PreparedLikelihood& call, DType dtype, void* stream) {
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
