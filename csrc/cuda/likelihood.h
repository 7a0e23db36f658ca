// The likelihood kernels' parameters, and how a call is turned into them; the loss kernel uses both.
#pragma once

#include "workspace.h"

namespace fused_elbo {
namespace cuda {

// How the operands are read. kUniform: one logvar per segment (none at all, one number, one per channel); kFull: one
// per element in the dtype of x; both in 16-byte accesses. kStrided: any layout, any dtype of logvar.
enum class Access : int32_t { kUniform, kFull, kStrided };

struct LikelihoodParams {
  Plan plan;
  View x, mean, logvar;
  bool uniform = false;  // one logvar per segment, also when kStrided
  double logvar_value = 0;
  View grad_ll;  // of a row, or elementwise
  double grad_ll_scale = 1;
  bool grad_elementwise = false;
  View grad_mean, grad_x;
  View grad_logvar;              // per element; absent where it is summed over segments
  void* segment_grad = nullptr;  // [samples, rows, segments]
  DType segment_grad_dtype = DType::kFloat32;
  Parts segment_parts;  // where blocks share a segment
  View ll;              // elementwise; otherwise in result
  Result result;

  Scale scale;
  View mask;
};

struct PreparedLikelihood {
  LikelihoodParams params;
  Access access = Access::kStrided;
  bool elements = false;  // a scale parameter or a mask (elements.cuh); always kStrided
};
void launch_likelihood_forward(const PreparedLikelihood&, DType, void* stream);
void launch_likelihood_backward(const PreparedLikelihood&, DType, void* stream);

// strided: not to read 16 bytes at a time, whatever the layout.
PreparedLikelihood prepare_likelihood(const LikelihoodArgs&, Pass, Workspace&, bool strided = false);

}  // namespace cuda
}  // namespace fused_elbo
