// Tensors made and described: outputs, workspaces, and operands with their strides.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "args.h"
#include "layout.h"

namespace fused_elbo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(ScalarType type) {
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
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "fused_elbo: a tensor must have at most 25 dimensions");
  return {sizes.data(), sizes.data() + sizes.size()};
}

inline Tensor empty_dense(const Tensor& like, const Sizes& sizes, ScalarType type) {
  std::array<int64_t, kMaxDims + 1> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor nothing(const Tensor& like) { return empty_dense(like, {0}, like.scalar_type()); }

// torch.empty_like: dense tensors keep their layout, others the order of their strides.
inline Tensor empty_preserving(const Tensor& like) {
  if (like.is_contiguous()) return empty_dense(like, sizes_of(like), like.scalar_type());
  return torch::stable::empty_like(like);
}

inline Tensor nats_like(const Tensor& like, const Sizes& full, int batch_dims, Reduction reduction) {
  Sizes sizes;
  if (reduction == Reduction::kOff) sizes = {0};
  if (reduction == Reduction::kNone) sizes = full;
  if (reduction == Reduction::kSample) sizes = Sizes(full.begin(), full.begin() + batch_dims);
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
  View(const Tensor& tensor, const Sizes& full) : data(tensor.data_ptr()) {
    dtype = dtype_of(tensor.scalar_type());
    strides = broadcast_strides(tensor.sizes().data(), tensor.strides().data(), tensor.dim(), full);
  }
  View(const OptionalTensor& tensor, const Sizes& full) {
    if (tensor) *this = View(*tensor, full);
  }
  // A mask: its dtype is none that kernels compute in.
  static View of_mask(const OptionalTensor& mask, const Sizes& full) {
    View view;
    if (!mask) return view;
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "fused_elbo: mask must be a bool tensor");
    view.data = mask->data_ptr();
    view.strides = broadcast_strides(mask->sizes().data(), mask->strides().data(), mask->dim(), full);
    return view;
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
  Halves(const Tensor& first, const OptionalTensor& second, int64_t chunk_dim, const Sizes& full) {
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
inline Operand nats_operand(const OptionalTensor& nats, Reduction reduction, const EventLayout& layout,
                            const Sizes& full, int batch_dims) {
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

// A bound of the clamp from which on there is none: schemas have no literal for infinity.
constexpr double kNoClamp = 1e300;

// The scale arguments of a call as kernels take them.
inline Scale make_scale(int64_t code, double floor, double clamp_min, double clamp_max) {
  constexpr int64_t kSoft = 8;
  STD_TORCH_CHECK(code == 0 || ((code & ~kSoft) >= 1 && (code & ~kSoft) <= 4), "fused_elbo: no such scale");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Scale scale;
  scale.kind = static_cast<ScaleKind>(code & ~kSoft);
  scale.soft_clamp = (code & kSoft) != 0;
  scale.floor = floor;
  scale.clamp_min = clamp_min > -kNoClamp ? clamp_min : -kInfinity;
  scale.clamp_max = clamp_max < kNoClamp ? clamp_max : kInfinity;
  return scale;
}

// What a mean over the batch multiplies the sum with. Infinite for an empty batch: 0 * inf is NaN, as torch's mean.
inline double batch_scale(Reduction reduction, int64_t batch) {
  return reduction == Reduction::kBatchMean ? 1.0 / static_cast<double>(batch) : 1.0;
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

// Gives a dense result the layout that empty_like gives: the way out for layouts that kernels do not read in place.
inline Tensor with_layout_of(const Tensor& like, const Tensor& dense) {
  Tensor result = torch::stable::empty_like(like);
  torch::stable::copy_(result, dense);
  return result;
}

}  // namespace fused_elbo
