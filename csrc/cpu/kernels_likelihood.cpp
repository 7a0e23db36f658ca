// log N(x; mean, e^logvar) and its gradients.
//
// Memory: reads x and mean, and logvar where it has one value per element; backward writes the gradient of mean, and of
// such a logvar. Everything else is small: these kernels run at the speed of memory. Here is how the work is cut and
// its sums are put together; the units themselves are in kernels_likelihood_constant.cpp and _elementwise.cpp.
#include <algorithm>

#include "../math/gaussian.h"
#include "level.h"
#include "likelihood.h"
#include "likelihood_buffers.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Shorter runs of one logvar are treated element by element: each would be a unit of its own.
constexpr int64_t kMinRun = 256;

// Smaller than the latent's units: those of a unit's inputs that lie in place, the next unit's, which are fetched
// meanwhile, and the outputs fit into the nearest cache together.
constexpr int64_t kLikelihoodUnit = 1024;

bool is_constant_per_event(const LikelihoodArgs& args) {
  if (args.scale.kind != ScaleKind::kPlain) return false;  // parameters are read element by element
  if (!args.logvar.data || args.shape.event <= 1) return true;
  for (int d = 0; d < args.shape.event_dims; ++d) {
    if (args.logvar.stride[d] != 0 && args.shape.size[d] != 1) return false;
  }
  return true;
}

// Bytes of everything that has an element for each of the shape, one gradient among it.
int64_t bytes_with_gradient(const LikelihoodArgs& args) {
  const int64_t tensors = args.grad_logvar.data != nullptr && args.logvar_inner == 1 ? 5 : 3;
  return tensors * item_size(args.dtype) * args.shape.samples * args.shape.rows * args.shape.event;
}

// Gradients are stored past the caches where that saves reading what their memory held before. In place it wins, a
// later reader of the gradients included, from about 32 MB of tensors on, also under a larger last-level cache: other
// cores and other programs share it. From a buffer it wins beyond that cache.
constexpr int64_t kStreamed = int64_t{32} << 20;

// The cache's size is read from a file: not for small calls.
bool exceeds_caches(int64_t bytes) { return bytes > kStreamed / 8 && bytes > last_level_cache_bytes(); }

// Backward takes blocks of units from the last to the first: it starts with what forward has just read, which is still
// in the caches. Within a block the order of memory suits the processor's own fetching. Nothing is gained where the
// tensors are many times the caches.
constexpr int64_t kBlock = 64;
constexpr int64_t kReversed = 4 * kStreamed;

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// The order of memory rather than that of indices, unless a gradient of logvar is laid out by index.
struct Order {
  int dim[kMaxEventDims] = {0, 1, 2, 3};
  bool logical = true;
  Order(const LikelihoodArgs& args, bool grad_logvar) {
    if (grad_logvar && !is_constant_per_event(args)) return;
    for (int i = 1; i < args.shape.event_dims; ++i) {
      for (int j = i; j > 0 && args.mean.stride[dim[j - 1]] < args.mean.stride[dim[j]]; --j) {
        const int swapped = dim[j];
        dim[j] = dim[j - 1];
        dim[j - 1] = swapped;
        logical = false;
      }
    }
  }
};

}  // namespace

template <typename T>
bool LikelihoodWork<T>::wants_value(const LikelihoodArgs& args, Pass pass) {
  return pass != Pass::kBackward && args.ll.data != nullptr;
}

template <typename T>
bool LikelihoodWork<T>::wants_grad_logvar(const LikelihoodArgs& args, Pass pass) {
  return pass != Pass::kForward && args.grad_logvar.data != nullptr;
}

// Whether the run of elements that share a logvar, and its gradient, is longer than a unit.
template <typename T>
bool LikelihoodWork<T>::splits_grad_logvar(const LikelihoodArgs& args, const Cut& cut) {
  return cut.units.segments > 1 && args.logvar_inner > cut.units.segment;
}

template <typename T>
typename LikelihoodWork<T>::Cut LikelihoodWork<T>::Cut::of(const LikelihoodArgs& args, Pass pass) {
  const Shape& shape = args.shape;
  const bool grad_logvar = wants_grad_logvar(args, pass);
  const int64_t inner = args.logvar.data ? args.logvar_inner : shape.event;
  const bool by_runs =
      inner >= kMinRun && inner < shape.event && shape.event % inner == 0 && Order(args, grad_logvar).logical;
  if (by_runs) {
    const int64_t runs = shape.event / inner;
    return {runs, Units(shape.samples, shape.rows * runs, inner, kLikelihoodUnit, 1, true)};
  }
  int64_t quantum = 1;
  if (grad_logvar && inner < kLikelihoodUnit && inner > 1) {
    quantum = inner / gcd(inner, kLanes) * kLanes;
    if (quantum > kLikelihoodUnit) quantum = inner;
  }
  return {1, Units(shape.samples, shape.rows, shape.event, kLikelihoodUnit, quantum)};
}

template <typename T>
typename LikelihoodWork<T>::Piece LikelihoodWork<T>::Cut::piece(int64_t unit) const {
  Piece piece{units.range(unit), 0};
  Range& range = piece.range;
  piece.partial = (range.sample * units.rows + range.row) * units.segments + range.first / units.segment;
  if (runs > 1) {
    range.first += range.row % runs * units.event;
    range.row /= runs;
  }
  return piece;
}

// Whether values leave the units as partial sums; otherwise each unit writes its rows' results.
template <typename T>
bool LikelihoodWork<T>::sums_later(const LikelihoodArgs& args, Pass pass, const Cut& cut, bool totals) {
  if (!wants_value(args, pass) || args.reduction == Reduction::kNone) return false;
  return args.reduction != Reduction::kSample || cut.per_row() > 1 || totals;
}

template <typename T>
int64_t LikelihoodWork<T>::partials_needed(const LikelihoodArgs& args, Pass pass, bool totals) {
  const Cut cut = Cut::of(args, pass);
  if (cut.units.event == 0) return 0;
  const bool value = sums_later(args, pass, cut, totals);
  const bool grad_logvar = wants_grad_logvar(args, pass) && splits_grad_logvar(args, cut);
  return cut.partials() * (static_cast<int64_t>(value) + static_cast<int64_t>(grad_logvar));
}

template <typename T>
LikelihoodWork<T>::LikelihoodWork(const LikelihoodArgs& args, Pass pass, double* partials, bool totals)
    : args_(args),
      cut_(Cut::of(args, pass)),
      value_(wants_value(args, pass)),
      grad_mean_wanted_(pass != Pass::kForward && (args.grad_mean.data != nullptr || args.grad_x.data != nullptr)),
      grad_logvar_wanted_(wants_grad_logvar(args, pass)),
      partials_(sums_later(args, pass, cut_, totals) ? partials : nullptr),
      logvar_partials_(nullptr) {
  constant_ =
      args.reduction != Reduction::kNone && args.mask.data == nullptr && (cut_.runs > 1 || is_constant_per_event(args));
  one_logvar_ = !args.logvar.data ||
                (cut_.runs == 1 && constant_ && args.logvar.row_stride == 0 && args.logvar.sample_stride == 0);
  if (grad_logvar_wanted_ && splits_grad_logvar(args, cut_)) {
    logvar_partials_ = partials_ ? partials + cut_.partials() : partials;
  }
  const Order order(args, grad_logvar_wanted_);
  const auto view = [&](const Operand& operand) { return make_view(operand, args.shape, order.dim); };
  x_ = view(args.x);
  mean_ = view(args.mean);
  logvar_ = view(args.logvar);
  mask_ = view(args.mask);
  if (value_) ll_ = view(args.ll);
  if (pass != Pass::kForward) {
    grad_ll_ = view(args.grad_ll);
    grad_mean_ = view(args.grad_mean);
    grad_x_ = view(args.grad_x);
  }
  if (grad_logvar_wanted_) {
    if (args.logvar_inner == 1) {
      grad_logvar_ = view(args.grad_logvar);
    } else {
      Shape per_run;
      per_run.event = per_run.size[0] = args.shape.event / args.logvar_inner;
      Operand operand = args.grad_logvar;
      operand.stride[0] = 1;
      grad_logvar_ = make_view(operand, per_run, order.dim);
    }
  }
  const int64_t bytes = pass == Pass::kForward ? 0 : bytes_with_gradient(args);
  reversed_ = pass == Pass::kBackward && bytes <= kReversed;
  streams_ = bytes > kStreamed || exceeds_caches(bytes);
  grad_mean_.stream = grad_x_.stream = exceeds_caches(bytes);
  if (one_logvar_) {
    logvar_value_ = logvar_ ? read(logvar_, 0, 0, 0) : args.logvar_value;
    precision_ = __builtin_exp(-logvar_value_);
  }
}

// The upstream gradient of each row's sum, the same for all of the range's elements.
template <typename T>
void LikelihoodWork<T>::read_upstream(const Range& range, LikelihoodBuffers<T>& buffers) const {
  for (int64_t row = 0; row < range.rows; ++row) buffers.row_upstream[row] = 1;
  if (grad_ll_) read_rows(grad_ll_, range, buffers.row_upstream);
  for (int64_t row = 0; row < range.rows; ++row) buffers.row_upstream[row] *= args_.grad_ll_scale;
}

template <typename T>
const T* LikelihoodWork<T>::upstream(const Range& range, LikelihoodBuffers<T>& buffers) const {
  if (args_.reduction != Reduction::kNone || !grad_ll_) {
    read_upstream(range, buffers);
    fill_rows(buffers.row_upstream, range, buffers.upstream);
    return buffers.upstream;
  }
  const T* const values = input(grad_ll_, range, buffers.upstream);
  if (args_.grad_ll_scale == 1) return values;
  const T scale = static_cast<T>(args_.grad_ll_scale);
  for (int64_t i = 0; i < whole_groups(range.rows * range.count); ++i) buffers.upstream[i] = scale * values[i];
  return buffers.upstream;
}

template <typename T>
void LikelihoodWork<T>::reduce_values(const Piece& piece, const double* values) const {
  if (partials_ == nullptr) {
    write_rows(ll_, piece.range, values);
  } else {
    // A unit has several rows only where a row has one partial result.
    for (int64_t row = 0; row < piece.range.rows; ++row) partials_[piece.partial + row] = values[row];
  }
}

// The gradient of a logvar shared by all of a row's elements in this unit.
template <typename T>
void LikelihoodWork<T>::reduce_grad_logvar(const Piece& piece, const double* values) const {
  if (logvar_partials_ == nullptr) {
    Range range = piece.range;
    range.first /= args_.logvar_inner;
    write_rows(grad_logvar_, range, values);
  } else {
    for (int64_t row = 0; row < piece.range.rows; ++row) logvar_partials_[piece.partial + row] = values[row];
  }
}

template <typename T>
void LikelihoodWork<T>::store_grad_mean(const Range& range, const T* grad_mean, LikelihoodBuffers<T>& buffers) const {
  if (!grad_mean_wanted_) return;
  store_output(grad_mean_, range, grad_mean, buffers.grad_mean);
  if (!grad_x_) return;
  const int64_t count = whole_groups(range.rows * range.count);
  for (int64_t i = 0; i < count; ++i) buffers.grad_x[i] = -grad_mean[i];
  store(grad_x_, range, buffers.grad_x);
}

template <typename T>
void LikelihoodWork<T>::run(int64_t begin, int64_t end) const {
  LikelihoodBuffers<T> buffers;
  const int64_t block = reversed_ ? kBlock : end - begin;
  const auto after = [=](int64_t unit) {
    if ((end - unit - 1) % block != 0) return unit + 1;
    return std::max(begin, unit + 1 - 2 * block);
  };
  int64_t unit = std::max(begin, end - block);
  Piece piece = cut_.piece(unit);
  for (int64_t left = end - begin; left > 0; --left) {
    unit = after(unit);
    const Piece next = left > 1 ? cut_.piece(unit) : piece;
    if (constant_) {
      constant_unit(piece, next, buffers);
    } else {
      elementwise_unit(piece, next, buffers);
    }
    piece = next;
  }
  if (streams_) finish_streaming();
}

template <typename T>
double LikelihoodWork<T>::total(int64_t sample, int64_t row) const {
  if (cut_.units.event == 0) return 0.0;
  const int64_t rows = args_.shape.rows;
  return sum(partials_ + (sample * rows + row) * cut_.per_row(), cut_.per_row());
}

template <typename T>
void LikelihoodWork<T>::finish() const {
  const int64_t samples = args_.shape.samples, rows = args_.shape.rows;
  if (logvar_partials_) {
    const int64_t segments = cut_.units.segments;
    const double* from = logvar_partials_;
    for (int64_t sample = 0; sample < samples; ++sample) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t run = 0; run < cut_.runs; ++run, from += segments) {
          write(grad_logvar_, sample, row, run, sum(from, segments));
        }
      }
    }
  }
  if (!value_ || args_.reduction == Reduction::kNone) return;
  if (args_.reduction == Reduction::kSample) {
    if (!partials_ && cut_.units.event != 0) return;  // the units have written it
    for (int64_t sample = 0; sample < samples; ++sample) {
      for (int64_t row = 0; row < rows; ++row) write(ll_, sample, row, 0, total(sample, row));
    }
    return;
  }
  double all = 0;
  if (cut_.units.event != 0) {
    for (int64_t i = 0; i < samples * rows; ++i) partials_[i] = total(0, i);
    all = sum(partials_, samples * rows);
  }
  write(ll_, 0, 0, 0, args_.ll_scale * all);
}

template class LikelihoodWork<float>;
template class LikelihoodWork<double>;

namespace {

template <typename T>
void run_likelihood(const LikelihoodArgs& args, Pass pass, void* workspace, const Context& context) {
  LikelihoodWork<T> work(args, pass, static_cast<double*>(workspace), false);
  for_units(
      context, work.units(),
      [](void* user, int64_t begin, int64_t end) { static_cast<LikelihoodWork<T>*>(user)->run(begin, end); }, &work);
  work.finish();
}

}  // namespace

void likelihood(const LikelihoodArgs& args, Pass pass, void* workspace, const Context& context) {
  if (args.dtype == DType::kFloat64) {
    run_likelihood<double>(args, pass, workspace, context);
  } else {
    run_likelihood<float>(args, pass, workspace, context);
  }
}

int64_t likelihood_workspace_bytes(const LikelihoodArgs& args, Pass pass) {
  return LikelihoodWork<float>::partials_needed(args, pass, false) * static_cast<int64_t>(sizeof(double));
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
