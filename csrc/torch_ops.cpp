// The operations as torch sees them: schemas, tensors in and out, and the choice of the device's kernels.
// The only file that includes torch headers (the stable ABI alone). Arguments are checked in Python; what is checked here
// guards direct callers of torch.ops against reading out of bounds.
//
// FUSED_ELBO_EMULATED builds the same operations over the CUDA kernels compiled for the CPU, in a namespace of their own.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "args.h"
#include "layout.h"

#if defined(FUSED_ELBO_EMULATED)
#define FUSED_ELBO_NAMESPACE fused_elbo_emulated
#else
#define FUSED_ELBO_NAMESPACE fused_elbo
#endif

// Weak: CPU-only builds of torch do not define it, and a strong reference would keep the extension from loading there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fused_elbo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ------------------------------------------------------------------------------------------------------- devices

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* user) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { body(user, from, to); });
}

struct HostGuard {
  explicit HostGuard(const Tensor&) {}
};

struct CpuDevice {
  using Guard = HostGuard;
  static Context context(const Tensor&) {
    Context context;
    context.parallel_for = parallel_for;
    return context;
  }
  static constexpr auto latent_workspace = cpu::latent_workspace_bytes;
  static constexpr auto likelihood_workspace = cpu::likelihood_workspace_bytes;
  static constexpr auto elbo_workspace = cpu::elbo_workspace_bytes;
  static constexpr auto latent = cpu::latent;
  static constexpr auto likelihood = cpu::likelihood;
  static constexpr auto elbo = cpu::elbo;
  static constexpr auto fold_seed = cpu::fold_seed;
  static constexpr auto noise_words = cpu::noise_words;
};

#if defined(FUSED_ELBO_WITH_CUDA) || defined(FUSED_ELBO_EMULATED)
struct CudaDevice {
#if defined(FUSED_ELBO_EMULATED)
  using Guard = HostGuard;
  static Context context(const Tensor&) { return {}; }
#else
  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };
  static Context context(const Tensor& t) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fused_elbo: this torch is built without CUDA");
    Context context;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &context.stream));
    return context;
  }
#endif
  static constexpr auto latent_workspace = cuda::latent_workspace_bytes;
  static constexpr auto likelihood_workspace = cuda::likelihood_workspace_bytes;
  static constexpr auto elbo_workspace = cuda::elbo_workspace_bytes;
  static constexpr auto latent = cuda::latent;
  static constexpr auto likelihood = cuda::likelihood;
  static constexpr auto elbo = cuda::elbo;
  static constexpr auto fold_seed = cuda::fold_seed;
  static constexpr auto noise_words = cuda::noise_words;
};
#endif

// ------------------------------------------------------------------------------------------------------- tensors

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "fused_elbo: expected float32, float64, bfloat16 or float16");
  }
}

// What arithmetic, sums and everything in nats are done in.
ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

Tensor empty_dense(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, device_type, like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

Tensor nothing(const Tensor& like) { return empty_dense(like, {0}, like.scalar_type()); }

// torch.empty_like: dense tensors keep their layout, others the order of their strides.
Tensor empty_preserving(const Tensor& like) {
  if (like.is_contiguous()) return empty_dense(like, sizes_of(like), like.scalar_type());
  return torch::stable::empty_like(like);
}

Tensor nats_like(const Tensor& like, const std::vector<int64_t>& full, int batch_dims, Reduction reduction) {
  std::vector<int64_t> sizes;
  if (reduction == Reduction::kOff) sizes = {0};
  if (reduction == Reduction::kNone) sizes = full;
  if (reduction == Reduction::kSample) sizes.assign(full.begin(), full.begin() + batch_dims);
  return empty_dense(like, sizes, accumulate_type(like));
}

// Memory for partial results on the device of a tensor. What little a small call needs lies on the stack where kernels
// can read it: an allocation costs as much as such a call.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    if (bytes <= static_cast<int64_t>(sizeof(local_)) && like.is_cpu()) {
      data_ = local_;
    } else {
      tensor_ = empty_dense(like, {bytes}, ScalarType::Byte);
      data_ = tensor_->data_ptr();
    }
  }
  Workspace(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  alignas(64) char local_[2048];
  OptionalTensor tensor_;
  void* data_ = nullptr;
};

// A tensor and its strides against the full index space.
struct View {
  View() = default;
  View(const Tensor& tensor, const std::vector<int64_t>& full) : data(tensor.data_ptr()) {
    dtype = dtype_of(tensor.scalar_type());
    strides = broadcast_strides(tensor.sizes().data(), tensor.strides().data(), tensor.dim(), full);
  }
  View(const OptionalTensor& tensor, const std::vector<int64_t>& full) {
    if (tensor) *this = View(*tensor, full);
  }

  Operand operand(const EventLayout& layout) const {
    Operand result;
    if (data == nullptr) return result;
    result.data = data;
    result.dtype = dtype;
    layout.describe(result, strides);
    return result;
  }

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Strides strides{};
};

// mean and logvar (or their gradients), given as two tensors or as one tensor of moments.
struct Halves {
  Halves(const Tensor& first, const OptionalTensor& second, int64_t chunk_dim, const std::vector<int64_t>& full) {
    if (second) {
      mean = View(first, full);
      logvar = View(*second, full);
      return;
    }
    // The halves have the strides of the whole; only their sizes differ, and those are in full.
    mean.data = first.data_ptr();
    mean.dtype = dtype_of(first.scalar_type());
    for (int64_t d = 0; d < first.dim(); ++d) mean.strides[d] = full[d] == 1 ? 0 : first.stride(d);
    logvar = mean;
    const auto item = static_cast<int64_t>(first.element_size());
    logvar.data = static_cast<char*>(mean.data) + full[chunk_dim] * first.stride(chunk_dim) * item;
  }
  View mean, logvar;
};

// An upstream gradient or an output in nats: one value per element, per row, or one for all.
Operand nats_operand(const OptionalTensor& nats, Reduction reduction, const EventLayout& layout,
                     const std::vector<int64_t>& full, int batch_dims) {
  Operand result;
  if (!nats || reduction == Reduction::kOff) return result;
  if (reduction == Reduction::kNone) return View(*nats, full).operand(layout);
  result.data = nats->data_ptr();
  result.dtype = dtype_of(nats->scalar_type());
  if (reduction == Reduction::kSample) {
    result.row_stride = full[batch_dims - 1] == 1 ? 0 : nats->stride(batch_dims - 1);
    if (batch_dims == 2) result.sample_stride = full[0] == 1 ? 0 : nats->stride(0);
  }
  return result;
}

double batch_scale(Reduction reduction, const Shape& shape) {
  if (reduction != Reduction::kBatchMean) return 1.0;
  return 1.0 / static_cast<double>(shape.samples * shape.rows);  // infinite for an empty batch: 0 * inf, as torch's mean
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

// Gives a dense result the layout that empty_like gives: the way out for layouts that kernels do not read in place.
Tensor with_layout_of(const Tensor& like, const Tensor& dense) {
  Tensor result = torch::stable::empty_like(like);
  torch::stable::copy_(result, dense);
  return result;
}

// ------------------------------------------------------------------------------------------------ sampling and KL

struct LatentCall {
  std::vector<int64_t> full;  // [B, *event]
  OptionalTensor seed;
  int64_t seed_value, stream, row_offset, num_samples, chunk_dim;
  double clamp_min, clamp_max;
  Reduction reduction;

  LatentCall(const Tensor& mean, const OptionalTensor& logvar, const OptionalTensor& seed, int64_t seed_value,
             int64_t stream, int64_t row_offset, int64_t num_samples, int64_t chunk_dim, double clamp_min,
             double clamp_max, int64_t reduction)
      : full(sizes_of(mean)),
        seed(seed),
        seed_value(seed_value),
        stream(stream),
        row_offset(row_offset),
        num_samples(num_samples),
        chunk_dim(chunk_dim),
        clamp_min(clamp_min),
        clamp_max(clamp_max),
        reduction(static_cast<Reduction>(reduction)) {
    STD_TORCH_CHECK(!full.empty() && full.size() <= kMaxDims, "fused_elbo: mean must have 1 to 25 dimensions");
    if (logvar) {
      STD_TORCH_CHECK(sizes_of(*logvar) == full, "fused_elbo: mean and logvar must have one shape");
    } else {
      STD_TORCH_CHECK(chunk_dim > 0 && chunk_dim < mean.dim() && full[chunk_dim] % 2 == 0,
                      "fused_elbo: chunk_dim must be an event dimension of even size");
      full[chunk_dim] /= 2;
    }
  }

  void fill(LatentArgs& args, const Tensor& mean, const EventLayout& layout) const {
    layout.describe(args.shape);
    args.shape.samples = std::max<int64_t>(num_samples, 1);
    args.dtype = dtype_of(mean.scalar_type());
    if (seed) args.key.seed = static_cast<const int64_t*>(seed->data_ptr());
    args.key.seed_value = seed_value;
    args.key.stream = static_cast<uint32_t>(stream);
    args.key.row_offset = row_offset;
    args.clamp = clamp_min != -std::numeric_limits<double>::infinity() ||
                 clamp_max != std::numeric_limits<double>::infinity();
    args.clamp_min = clamp_min;
    args.clamp_max = clamp_max;
    args.reduction = reduction;
  }
};

// z or its gradient: [B, *event] like the other operands, or with a leading sample dimension.
Operand sample_operand(const Tensor& z, const LatentCall& call, const View& view, const EventLayout& layout) {
  Operand result = view.operand(layout);
  if (call.num_samples > 0) result.sample_stride = z.stride(0);
  return result;
}

View sample_view(const Tensor& z, const LatentCall& call) {
  if (call.num_samples == 0) return View(z, call.full);
  View view;
  view.data = z.data_ptr();
  view.dtype = dtype_of(z.scalar_type());
  for (size_t d = 0; d < call.full.size(); ++d) view.strides[d] = call.full[d] == 1 ? 0 : z.stride(d + 1);
  return view;
}

template <class Device>
std::tuple<Tensor, Tensor> latent_forward(Tensor mean, OptionalTensor logvar, OptionalTensor prior_mean,
                                          OptionalTensor prior_logvar, OptionalTensor seed, int64_t seed_value,
                                          int64_t stream, int64_t row_offset, int64_t num_samples, int64_t chunk_dim,
                                          double clamp_min, double clamp_max, bool want_z, int64_t reduction) {
  typename Device::Guard guard(mean);
  const LatentCall call(mean, logvar, seed, seed_value, stream, row_offset, num_samples, chunk_dim, clamp_min,
                        clamp_max, reduction);
  const Halves in(mean, logvar, chunk_dim, call.full);
  const View prior_m(prior_mean, call.full), prior_l(prior_logvar, call.full);

  const auto half = [&] { return logvar ? mean : torch::stable::narrow(mean, chunk_dim, 0, call.full[chunk_dim]); };
  Tensor z = nothing(mean);
  if (want_z && num_samples > 0) {
    std::vector<int64_t> sizes = call.full;
    sizes.insert(sizes.begin(), num_samples);
    z = empty_dense(mean, sizes, mean.scalar_type());
  } else if (want_z) {
    z = mean.is_contiguous() ? empty_dense(mean, call.full, mean.scalar_type()) : torch::stable::empty_like(half());
  }
  Tensor kl = nats_like(mean, call.full, 1, call.reduction);
  const View z_view = want_z ? sample_view(z, call) : View();
  const View kl_view = call.reduction == Reduction::kNone ? View(kl, call.full) : View();

  const EventLayout layout(call.full, 1,
                           {&in.mean.strides, &in.logvar.strides, prior_m.data ? &prior_m.strides : &in.mean.strides,
                            prior_l.data ? &prior_l.strides : &in.mean.strides,
                            want_z ? &z_view.strides : &in.mean.strides,
                            call.reduction == Reduction::kNone ? &kl_view.strides : &in.mean.strides});
  if (!layout.fits()) {
    auto [dense_z, dense_kl] = latent_forward<Device>(
        torch::stable::contiguous(mean), contiguous(logvar), contiguous(prior_mean), contiguous(prior_logvar), seed,
        seed_value, stream, row_offset, num_samples, chunk_dim, clamp_min, clamp_max, want_z, reduction);
    if (want_z && num_samples == 0) dense_z = with_layout_of(half(), dense_z);
    return {dense_z, dense_kl};
  }

  LatentArgs args;
  call.fill(args, mean, layout);
  args.mean = in.mean.operand(layout);
  args.logvar = in.logvar.operand(layout);
  args.prior_mean = prior_m.operand(layout);
  args.prior_logvar = prior_l.operand(layout);
  if (want_z) args.z = sample_operand(z, call, z_view, layout);
  args.kl = nats_operand(kl, call.reduction, layout, call.full, 1);
  args.kl_scale = batch_scale(call.reduction, args.shape);
  const Workspace scratch(mean, Device::latent_workspace(args, Pass::kForward));
  Device::latent(args, Pass::kForward, scratch.data(), Device::context(mean));
  return {z, kl};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> latent_backward(
    Tensor mean, OptionalTensor logvar, OptionalTensor prior_mean, OptionalTensor prior_logvar, OptionalTensor grad_z,
    OptionalTensor grad_kl, OptionalTensor seed, int64_t seed_value, int64_t stream, int64_t row_offset,
    int64_t num_samples, int64_t chunk_dim, double clamp_min, double clamp_max, int64_t reduction, bool want_prior) {
  typename Device::Guard guard(mean);
  const LatentCall call(mean, logvar, seed, seed_value, stream, row_offset, num_samples, chunk_dim, clamp_min,
                        clamp_max, reduction);
  want_prior = want_prior && prior_mean;
  const Halves in(mean, logvar, chunk_dim, call.full);
  const View prior_m(prior_mean, call.full), prior_l(prior_logvar, call.full);
  const View grad_z_view = grad_z ? sample_view(*grad_z, call) : View();
  const bool elementwise = grad_kl && call.reduction == Reduction::kNone;
  const View grad_kl_view = elementwise ? View(*grad_kl, call.full) : View();

  Tensor grad_mean = empty_preserving(mean);
  Tensor grad_logvar = logvar ? empty_preserving(*logvar) : nothing(mean);
  Tensor grad_prior_mean = want_prior ? empty_dense(mean, call.full, mean.scalar_type()) : nothing(mean);
  Tensor grad_prior_logvar = want_prior ? empty_dense(mean, call.full, mean.scalar_type()) : nothing(mean);
  const Halves out(grad_mean, logvar ? OptionalTensor(grad_logvar) : std::nullopt, chunk_dim, call.full);
  const View out_prior = want_prior ? View(grad_prior_mean, call.full) : View();
  const View out_prior_logvar = want_prior ? View(grad_prior_logvar, call.full) : View();

  const Strides* any = &in.mean.strides;
  const EventLayout layout(call.full, 1,
                           {any, &in.logvar.strides, &out.mean.strides, &out.logvar.strides,
                            prior_m.data ? &prior_m.strides : any, prior_l.data ? &prior_l.strides : any,
                            grad_z ? &grad_z_view.strides : any, elementwise ? &grad_kl_view.strides : any,
                            want_prior ? &out_prior.strides : any});
  if (!layout.fits()) {
    auto [dm, dl, dpm, dpl] = latent_backward<Device>(
        torch::stable::contiguous(mean), contiguous(logvar), contiguous(prior_mean), contiguous(prior_logvar),
        contiguous(grad_z), elementwise ? contiguous(grad_kl) : grad_kl, seed, seed_value, stream, row_offset,
        num_samples, chunk_dim, clamp_min, clamp_max, reduction, want_prior);
    dm = with_layout_of(mean, dm);
    if (logvar) dl = with_layout_of(*logvar, dl);
    return {dm, dl, dpm, dpl};
  }

  LatentArgs args;
  call.fill(args, mean, layout);
  args.mean = in.mean.operand(layout);
  args.logvar = in.logvar.operand(layout);
  args.prior_mean = prior_m.operand(layout);
  args.prior_logvar = prior_l.operand(layout);
  if (grad_z) args.grad_z = sample_operand(*grad_z, call, grad_z_view, layout);
  args.has_grad_kl = grad_kl.has_value();
  args.grad_kl = nats_operand(grad_kl, call.reduction, layout, call.full, 1);
  args.grad_kl_scale = batch_scale(call.reduction, args.shape);
  args.grad_mean = out.mean.operand(layout);
  args.grad_logvar = out.logvar.operand(layout);
  if (want_prior) {
    args.grad_prior_mean = out_prior.operand(layout);
    args.grad_prior_logvar = out_prior_logvar.operand(layout);
  }
  const Workspace scratch(mean, Device::latent_workspace(args, Pass::kBackward));
  Device::latent(args, Pass::kBackward, scratch.data(), Device::context(mean));
  return {grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar};
}

// ---------------------------------------------------------------------------------------------------- likelihood

// Sums the partial gradients of a broadcast logvar, [*batch, *event] with the constant trailing dimensions of size 1, to
// the shape of logvar.
Tensor reduce_to_logvar(const Tensor& partial, const Tensor& logvar) {
  const int64_t shift = partial.dim() - logvar.dim();
  std::vector<int64_t> summed;
  for (int64_t d = 0; d < partial.dim(); ++d) {
    if (partial.size(d) != 1 && (d < shift || logvar.size(d - shift) == 1)) summed.push_back(d);
  }
  Tensor result = partial;
  if (logvar.numel() == 1 && partial.is_cpu()) {
    // One value: torch's own full reduction would depend on the number of threads.
    result = empty_dense(partial, {1}, partial.scalar_type());
    const auto total = [&](auto* values, auto* out) {
      double sum = 0;
      for (int64_t i = 0; i < partial.numel(); ++i) sum += values[i];
      *out = static_cast<std::remove_reference_t<decltype(*out)>>(sum);
    };
    if (partial.scalar_type() == ScalarType::Double) {
      total(static_cast<const double*>(partial.data_ptr()), static_cast<double*>(result.data_ptr()));
    } else {
      total(static_cast<const float*>(partial.data_ptr()), static_cast<float*>(result.data_ptr()));
    }
  } else if (!summed.empty()) {
    result = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(summed.data(), summed.size()), true);
  }
  result = torch::stable::reshape(result, logvar.sizes());
  return result.scalar_type() == logvar.scalar_type() ? result : torch::stable::to(result, logvar.scalar_type());
}

// The likelihood half of a call, shared by gaussian_log_likelihood and the ELBO.
template <class Device>
class Likelihood {
 public:
  Likelihood(const Tensor& x, const Tensor& mean, const OptionalTensor& logvar, double logvar_value, int batch_dims,
             Reduction reduction)
      : full_(sizes_of(mean)), logvar_(logvar), batch_dims_(batch_dims), reduction_(reduction), x_(x), mean_(mean) {
    STD_TORCH_CHECK(batch_dims == 1 || batch_dims == 2, "fused_elbo: batch_dims must be 1 or 2");
    STD_TORCH_CHECK(full_.size() >= static_cast<size_t>(batch_dims) && full_.size() <= kMaxDims && sizes_of(x) == full_,
                    "fused_elbo: x and mean must have one shape, with up to 25 dimensions");
    STD_TORCH_CHECK(!logvar || logvar->dim() <= mean.dim(), "fused_elbo: logvar must broadcast to mean");
    args.logvar_value = logvar_value;
    args.reduction = reduction;
    args.dtype = dtype_of(mean.scalar_type());
  }

  // Fills in args for the given outputs; false if no kernel reads these layouts in place.
  bool prepare(const OptionalTensor& nats, const OptionalTensor& upstream, bool want_mean, bool want_logvar) {
    const View x(x_, full_), mean(mean_, full_), logvar(logvar_, full_);
    const bool elementwise = reduction_ == Reduction::kNone;
    const View nats_view = elementwise && nats ? View(*nats, full_) : View();
    const View upstream_view = elementwise && upstream ? View(*upstream, full_) : View();
    grad_mean = want_mean ? empty_preserving(mean_) : nothing(mean_);
    const View grad_mean_view = want_mean ? View(grad_mean, full_) : View();

    const Strides* any = &mean.strides;
    Strides dense{};
    int64_t stride = 1;
    for (size_t d = full_.size(); d-- > 0;) {
      dense[d] = full_[d] == 1 ? 0 : stride;
      stride *= full_[d];
    }
    want_logvar = want_logvar && logvar_;
    const EventLayout layout(full_, batch_dims_,
                             {any, &x.strides, logvar_ ? &logvar.strides : any, nats_view.data ? &nats_view.strides : any,
                              upstream_view.data ? &upstream_view.strides : any,
                              grad_mean_view.data ? &grad_mean_view.strides : any, want_logvar ? &dense : any});
    if (!layout.fits()) return false;
    layout.describe(args.shape);
    args.x = x.operand(layout);
    args.mean = mean.operand(layout);
    args.logvar = logvar.operand(layout);
    args.ll = nats_operand(nats, reduction_, layout, full_, batch_dims_);
    args.ll_scale = batch_scale(reduction_, args.shape);
    args.grad_ll = nats_operand(upstream, reduction_, layout, full_, batch_dims_);
    args.grad_ll_scale = args.ll_scale;
    args.grad_mean = grad_mean_view.operand(layout);
    if (logvar_) args.logvar_inner = std::max<int64_t>(layout.constant_run(logvar.strides), 1);
    if (want_logvar) allocate_grad_logvar();
    return true;
  }

  Tensor finish_grad_logvar() const {
    return grad_logvar_ ? reduce_to_logvar(*grad_logvar_, *logvar_) : nothing(mean_);
  }

  LikelihoodArgs args;
  Tensor grad_mean = Tensor(nullptr);

 private:
  void allocate_grad_logvar() {
    std::vector<int64_t> sizes = full_;
    int64_t run = 1;
    for (size_t d = sizes.size(); d-- > static_cast<size_t>(batch_dims_) && run < args.logvar_inner;) {
      run *= sizes[d];
      sizes[d] = 1;
    }
    const bool final = sizes_of(*logvar_) == sizes;  // nothing left to sum: written in logvar's own dtype
    grad_logvar_ = empty_dense(mean_, sizes, final ? logvar_->scalar_type() : accumulate_type(mean_));
    args.grad_logvar.data = grad_logvar_->data_ptr();
    args.grad_logvar.dtype = dtype_of(grad_logvar_->scalar_type());
    const int64_t per_row = args.shape.event / args.logvar_inner;
    args.grad_logvar.row_stride = per_row;
    args.grad_logvar.sample_stride = per_row * args.shape.rows;
    int64_t stride = 1;
    for (int d = args.shape.event_dims; d-- > 0;) {
      args.grad_logvar.stride[d] = stride;
      stride *= args.shape.size[d];
    }
  }

  std::vector<int64_t> full_;
  OptionalTensor logvar_, grad_logvar_;
  int batch_dims_;
  Reduction reduction_;
  Tensor x_, mean_;
};

template <class Device>
Tensor likelihood_forward(Tensor x, Tensor mean, OptionalTensor logvar, double logvar_value, int64_t batch_dims,
                          int64_t reduction) {
  typename Device::Guard guard(mean);
  Likelihood<Device> call(x, mean, logvar, logvar_value, static_cast<int>(batch_dims),
                          static_cast<Reduction>(reduction));
  Tensor ll = nats_like(mean, sizes_of(mean), static_cast<int>(batch_dims), static_cast<Reduction>(reduction));
  if (!call.prepare(ll, std::nullopt, false, false)) {
    return likelihood_forward<Device>(torch::stable::contiguous(x), torch::stable::contiguous(mean), contiguous(logvar),
                                      logvar_value, batch_dims, reduction);
  }
  const Workspace scratch(mean, Device::likelihood_workspace(call.args, Pass::kForward));
  Device::likelihood(call.args, Pass::kForward, scratch.data(), Device::context(mean));
  return ll;
}

template <class Device>
std::tuple<Tensor, Tensor> likelihood_backward(Tensor x, Tensor mean, OptionalTensor logvar, double logvar_value,
                                               int64_t batch_dims, int64_t reduction, Tensor grad, bool want_mean,
                                               bool want_logvar) {
  typename Device::Guard guard(mean);
  Likelihood<Device> call(x, mean, logvar, logvar_value, static_cast<int>(batch_dims),
                          static_cast<Reduction>(reduction));
  if (!call.prepare(std::nullopt, grad, want_mean, want_logvar)) {
    const bool elementwise = static_cast<Reduction>(reduction) == Reduction::kNone;
    auto [grad_mean, grad_logvar] = likelihood_backward<Device>(
        torch::stable::contiguous(x), torch::stable::contiguous(mean), contiguous(logvar), logvar_value, batch_dims,
        reduction, elementwise ? torch::stable::contiguous(grad) : grad, want_mean, want_logvar);
    if (want_mean) grad_mean = with_layout_of(mean, grad_mean);
    return {grad_mean, grad_logvar};
  }
  const Workspace scratch(mean, Device::likelihood_workspace(call.args, Pass::kBackward));
  Device::likelihood(call.args, Pass::kBackward, scratch.data(), Device::context(mean));
  return {call.grad_mean, call.finish_grad_logvar()};
}

// ---------------------------------------------------------------------------------------------------------- ELBO

using ElboOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
ElboOutput elbo_forward(Tensor recon_x, Tensor x, OptionalTensor recon_logvar, double recon_logvar_value,
                        OptionalTensor mean, OptionalTensor logvar, OptionalTensor kl, OptionalTensor beta,
                        double beta_value, int64_t reduction_code, bool want_grads) {
  typename Device::Guard guard(recon_x);
  const auto reduction = static_cast<Reduction>(reduction_code);
  STD_TORCH_CHECK(kl.has_value() != (mean && logvar), "fused_elbo: give mean and logvar, or kl");
  Likelihood<Device> call(x, recon_x, recon_logvar, recon_logvar_value, 1, Reduction::kSample);
  const std::vector<int64_t> batch = {recon_x.size(0)};
  const ScalarType nats = accumulate_type(recon_x);
  Tensor ll = empty_dense(recon_x, batch, nats), kl_out = empty_dense(recon_x, batch, nats);
  Tensor loss = empty_dense(recon_x, reduction == Reduction::kSample ? batch : std::vector<int64_t>{}, nats);

  bool fits = call.prepare(ll, std::nullopt, want_grads, want_grads);
  ElboArgs args;
  args.beta = beta ? beta->data_ptr() : nullptr;
  args.beta_value = beta_value;
  args.loss_per_row = reduction == Reduction::kSample;
  args.loss.data = loss.data_ptr();
  args.loss.dtype = dtype_of(nats);
  args.loss.row_stride = args.loss_per_row ? 1 : 0;

  Tensor grad_mean = nothing(recon_x), grad_logvar = nothing(recon_x);
  if (mean) {
    const std::vector<int64_t> full = sizes_of(*mean);
    const Halves in(*mean, logvar, -1, full);
    if (want_grads) {
      grad_mean = empty_preserving(*mean);
      grad_logvar = empty_preserving(*logvar);
    }
    const Halves out = want_grads ? Halves(grad_mean, grad_logvar, -1, full) : in;
    const EventLayout layout(full, 1, {&in.mean.strides, &in.logvar.strides, &out.mean.strides, &out.logvar.strides});
    fits = fits && layout.fits();
    if (fits) {
      LatentArgs& latent = args.latent;
      layout.describe(latent.shape);
      STD_TORCH_CHECK(latent.shape.rows == batch[0], "fused_elbo: recon_x and mean must have one batch size");
      latent.dtype = dtype_of(mean->scalar_type());
      latent.reduction = Reduction::kSample;
      latent.mean = in.mean.operand(layout);
      latent.logvar = in.logvar.operand(layout);
      latent.kl = nats_operand(kl_out, Reduction::kSample, layout, full, 1);
      latent.has_grad_kl = want_grads;
      if (want_grads) {
        latent.grad_mean = out.mean.operand(layout);
        latent.grad_logvar = out.logvar.operand(layout);
      }
    }
  } else {
    args.kl_given.data = kl->data_ptr();
    args.kl_given.dtype = dtype_of(kl->scalar_type());
    args.kl_given.row_stride = batch[0] == 1 ? 0 : kl->stride(0);
    args.latent.kl.data = kl_out.data_ptr();
    args.latent.kl.dtype = dtype_of(nats);
    args.latent.kl.row_stride = 1;
  }
  if (!fits) {
    auto [loss_, ll_, kl_, grad_recon, grad_recon_logvar, dm, dl] = elbo_forward<Device>(
        torch::stable::contiguous(recon_x), torch::stable::contiguous(x), contiguous(recon_logvar), recon_logvar_value,
        contiguous(mean), contiguous(logvar), kl, beta, beta_value, reduction_code, want_grads);
    if (want_grads) grad_recon = with_layout_of(recon_x, grad_recon);
    if (want_grads && mean) {
      dm = with_layout_of(*mean, dm);
      dl = with_layout_of(*logvar, dl);
    }
    return {loss_, ll_, kl_, grad_recon, grad_recon_logvar, dm, dl};
  }

  args.loss_scale = batch_scale(reduction, call.args.shape);
  args.reconstruction = call.args;
  args.reconstruction.ll_scale = 1;
  args.reconstruction.grad_ll_scale = -args.loss_scale;
  args.latent.grad_kl_scale = args.loss_scale * (beta ? 1.0 : beta_value);
  if (beta) {
    args.latent.grad_kl.data = beta->data_ptr();
    args.latent.grad_kl.dtype = dtype_of(beta->scalar_type());
  }
  const Pass pass = want_grads ? Pass::kBoth : Pass::kForward;
  const Workspace scratch(recon_x, Device::elbo_workspace(args, pass));
  Device::elbo(args, pass, scratch.data(), Device::context(recon_x));
  return {loss, ll, kl_out, call.grad_mean, want_grads ? call.finish_grad_logvar() : nothing(recon_x), grad_mean, grad_logvar};
}

// --------------------------------------------------------------------------------------------------------- noise

template <class Device>
Tensor fold_seed(Tensor seed, int64_t data) {
  typename Device::Guard guard(seed);
  Tensor out = empty_dense(seed, {}, ScalarType::Long);
  Device::fold_seed(static_cast<const int64_t*>(seed.data_ptr()), data, static_cast<int64_t*>(out.data_ptr()),
                    Device::context(seed));
  return out;
}

template <class Device>
Tensor noise_words(Tensor seed, int64_t stream, int64_t sample, int64_t first, int64_t count) {
  typename Device::Guard guard(seed);
  Tensor out = empty_dense(seed, {count, 4}, ScalarType::Long);
  NoiseKey key;
  key.seed = static_cast<const int64_t*>(seed.data_ptr());
  key.stream = static_cast<uint32_t>(stream);
  Device::noise_words(key, sample, first, count, static_cast<int64_t*>(out.data_ptr()), Device::context(seed));
  return out;
}

template <class Device, class Library>
void implement(Library& m) {
  m.impl("latent_forward", TORCH_BOX(&latent_forward<Device>));
  m.impl("latent_backward", TORCH_BOX(&latent_backward<Device>));
  m.impl("likelihood_forward", TORCH_BOX(&likelihood_forward<Device>));
  m.impl("likelihood_backward", TORCH_BOX(&likelihood_backward<Device>));
  m.impl("elbo_forward", TORCH_BOX(&elbo_forward<Device>));
  m.impl("fold_seed", TORCH_BOX(&fold_seed<Device>));
  m.impl("noise_words", TORCH_BOX(&noise_words<Device>));
}

}  // namespace
}  // namespace fused_elbo

#define FUSED_ELBO_LATENT_INPUTS "Tensor mean, Tensor? logvar, Tensor? prior_mean, Tensor? prior_logvar"
#define FUSED_ELBO_LATENT_PARAMS                                                                   \
  "SymInt seed_value, int stream, SymInt row_offset, SymInt num_samples, int chunk_dim, float clamp_min, " \
  "float clamp_max"

// The same as SCHEMAS in kernels/fused_elbo/schemas.py, which says what the arguments mean.
STABLE_TORCH_LIBRARY(FUSED_ELBO_NAMESPACE, m) {
  m.def("latent_forward(" FUSED_ELBO_LATENT_INPUTS ", Tensor? seed, " FUSED_ELBO_LATENT_PARAMS
        ", bool want_z, int reduction) -> (Tensor z, Tensor kl)");
  m.def("latent_backward(" FUSED_ELBO_LATENT_INPUTS
        ", Tensor? grad_z, Tensor? grad_kl, Tensor? seed, " FUSED_ELBO_LATENT_PARAMS
        ", int reduction, bool want_prior) -> (Tensor grad_mean, Tensor grad_logvar, Tensor grad_prior_mean, "
        "Tensor grad_prior_logvar)");
  m.def("likelihood_forward(Tensor x, Tensor mean, Tensor? logvar, float logvar_value, int batch_dims, int reduction) "
        "-> Tensor");
  m.def("likelihood_backward(Tensor x, Tensor mean, Tensor? logvar, float logvar_value, int batch_dims, int reduction, "
        "Tensor grad, bool want_mean, bool want_logvar) -> (Tensor grad_mean, Tensor grad_logvar)");
  m.def("elbo_forward(Tensor recon_x, Tensor x, Tensor? recon_logvar, float recon_logvar_value, Tensor? mean, "
        "Tensor? logvar, Tensor? kl, Tensor? beta, float beta_value, int reduction, bool want_grads) -> (Tensor loss, "
        "Tensor log_likelihood, Tensor kl_out, Tensor grad_recon, Tensor grad_recon_logvar, Tensor grad_mean, "
        "Tensor grad_logvar)");
  m.def("fold_seed(Tensor seed, int data) -> Tensor");
  m.def("noise_words(Tensor seed, int stream, int sample, int first, int count) -> Tensor");
}

#if defined(FUSED_ELBO_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(FUSED_ELBO_NAMESPACE, CPU, m) { fused_elbo::implement<fused_elbo::CudaDevice>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(FUSED_ELBO_NAMESPACE, CPU, m) { fused_elbo::implement<fused_elbo::CpuDevice>(m); }
#if defined(FUSED_ELBO_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(FUSED_ELBO_NAMESPACE, CUDA, m) { fused_elbo::implement<fused_elbo::CudaDevice>(m); }
#endif
#endif
