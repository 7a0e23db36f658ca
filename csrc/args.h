// What a kernel is asked to do: plain pointers, sizes and strides, shared by the CPU and the CUDA kernels.
// No torch header is included here or in any kernel file; torch_ops.cpp fills these structs in.
#pragma once

#include <cstdint>

namespace fused_elbo {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// How nats leave a kernel. kOff: that output is not wanted.
enum class Reduction : int32_t { kOff = -1, kNone = 0, kSample = 1, kSum = 2, kBatchMean = 3 };

// Which half of the work is done. kBoth: value and gradient in one reading of the inputs.
enum class Pass : int32_t { kForward, kBackward, kBoth };

constexpr int kMaxEventDims = 4;

// The index space [samples, rows, event]. Event dimensions are collapsed jointly over all operands, in logical
// (row-major) order, so nearly every call has event_dims == 1; channels_last has 2: (C, H*W).
struct Shape {
  int64_t samples = 1;  // K: latent samples per row, or the leading dimension of a likelihood
  int64_t rows = 0;     // B
  int64_t event = 0;    // N, the product of size[0..event_dims)
  int32_t event_dims = 1;
  int64_t size[kMaxEventDims] = {0, 1, 1, 1};
};

// One tensor as a kernel sees it. Strides count elements and may be 0 (expanded). data == nullptr: absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t sample_stride = 0;
  int64_t row_stride = 0;
  int64_t stride[kMaxEventDims] = {0, 0, 0, 0};
};

// The noise contract's key: Philox key words come from the seed, counter words from position, sample and stream.
struct NoiseKey {
  const int64_t* seed = nullptr;  // on the kernel's device; nullptr: seed_value holds it
  int64_t seed_value = 0;
  uint32_t stream = 0;
  int64_t row_offset = 0;
};

// What a scale argument stands for, as parametrization.py numbers it. kPlain: logvar itself; any other is turned into a
// logvar, and its gradient back, by csrc/math/scale.h.
enum class ScaleKind : int32_t { kPlain = 0, kLogVar = 1, kLogStd = 2, kSoftplusStd = 3, kVar = 4 };

struct Scale {
  ScaleKind kind = ScaleKind::kPlain;
  bool soft_clamp = false;
  double floor = 0;
  double clamp_min = 0, clamp_max = 0;  // infinite: no clamp
};

// z = mean + exp(logvar/2) * eps and KL(q || p), or their gradients.
//   shape.samples is K (1 when z has no sample dimension); mean, logvar and the priors have sample_stride 0.
//   prior_mean and prior_logvar are both present or both absent (absent: N(0, I)).
//   kl, grad_kl: always float32 (float64 for float64 inputs).
//     kNone: one value per element; kSample: one per row (row_stride); kSum, kBatchMean: one value, all strides 0.
//   kl_scale multiplies kSum/kBatchMean results: 1 or 1/rows.
//   scale.kind other than kPlain: logvar and prior_logvar hold a parameter each, and so do their gradients; clamp is
//   then not set. kPlain: clamp, if set, is that of logvar. mask: one byte per element, 0 where z, nats and gradients
//   are 0 whatever the element's inputs hold. Absent: all count. The KL's gradient coefficient of an element is
//   grad_kl[...] * grad_kl_scale; grad_kl absent stands for 1.
struct LatentArgs {
  Shape shape;
  DType dtype = DType::kFloat32;  // of every operand but kl and grad_kl
  Operand mean, logvar, prior_mean, prior_logvar;
  NoiseKey key;
  double clamp_min = 0, clamp_max = 0;  // used when clamp is set
  bool clamp = false;
  Scale scale;
  Operand mask;
  Reduction reduction = Reduction::kOff;

  Operand z;  // absent: no samples wanted
  Operand kl;
  double kl_scale = 1;

  Operand grad_z;  // absent: zero
  Operand grad_kl;
  double grad_kl_scale = 1;
  bool has_grad_kl = false;  // false: the KL takes no part in the backward pass
  Operand grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar;  // absent: not wanted
};

// log N(x; mean, exp(logvar)) or its gradients.
//   logvar absent: the number logvar_value. logvar present: broadcast by strides of 0; its dtype may differ from the
//   others'. ll, grad_ll: as kl, grad_kl above, over [samples, rows]. grad_logvar, when wanted, is float32 (float64 for
//   float64), of shape [samples, rows, event], where the trailing event dimensions over which logvar is constant are
//   summed: size logvar_outer * 1 per row instead of event. See logvar_inner.
//   scale: as in LatentArgs; other than kPlain only where logvar has a value per element. mask: as in LatentArgs.
struct LikelihoodArgs {
  Shape shape;
  DType dtype = DType::kFloat32;  // of x, mean, grad_mean, grad_x
  Operand x, mean, logvar;
  double logvar_value = 0;
  Scale scale;
  Operand mask;
  Reduction reduction = Reduction::kOff;

  Operand ll;
  double ll_scale = 1;

  Operand grad_ll;
  double grad_ll_scale = 1;
  Operand grad_mean, grad_x;
  Operand grad_logvar;       // dense, dtype as written in grad_logvar.dtype
  int64_t logvar_inner = 0;  // 1: grad_logvar is elementwise; m > 1: each run of m consecutive event elements shares
                             // one logvar and one gradient (m divides event; m == event: one per row)
};

// loss = scale * sum_b (beta * kl_b - ll_b), both parts, and with pass kBoth every gradient for an upstream gradient
// of 1.
//   reconstruction.grad_ll_scale and latent.grad_kl_scale already hold -scale and beta * scale; a beta that lives on
//   the device is latent.grad_kl (one value, strides 0), with latent.grad_kl_scale = scale. latent.mean absent:
//   kl_given ([rows], float32 or float64) stands for the KL.
struct ElboArgs {
  LikelihoodArgs reconstruction;  // reduction kSample
  LatentArgs latent;              // reduction kSample, no z
  Operand kl_given;
  const void* beta = nullptr;  // on the kernel's device, of loss.dtype; nullptr: beta_value
  double beta_value = 1;
  Operand loss;           // [rows] (row_stride 1) or one value (row_stride 0), float32 (float64 for float64)
  double loss_scale = 1;  // 1, or 1/rows for batchmean
  bool loss_per_row = false;
};

// How a kernel gets at the device: a CUDA stream, or torch's thread pool.
struct Context {
  void* stream = nullptr;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(void* user, int64_t begin, int64_t end),
                       void* user) = nullptr;
};

// Each device namespace (cpu, cuda) defines these. workspace points to that many bytes, 16-byte aligned, contents
// undefined; a kernel that needs it cleared clears it itself. An empty shape (rows or event 0) is legal everywhere.
#define FUSED_ELBO_DECLARE_DEVICE                                                  \
  int64_t latent_workspace_bytes(const LatentArgs&, Pass);                         \
  int64_t likelihood_workspace_bytes(const LikelihoodArgs&, Pass);                 \
  int64_t elbo_workspace_bytes(const ElboArgs&, Pass);                             \
  void latent(const LatentArgs&, Pass, void* workspace, const Context&);           \
  void likelihood(const LikelihoodArgs&, Pass, void* workspace, const Context&);   \
  void elbo(const ElboArgs&, Pass, void* workspace, const Context&);               \
  void fold_seed(const int64_t* seed, int64_t data, int64_t* out, const Context&); \
  void noise_words(const NoiseKey&, int64_t sample, int64_t first, int64_t count, int64_t* out, const Context&);

namespace cpu {
FUSED_ELBO_DECLARE_DEVICE
}
namespace cuda {
FUSED_ELBO_DECLARE_DEVICE
}

}  // namespace fused_elbo
