// log N(x; mean, e^logvar) and its gradients.
//
// Memory: reads x and mean, and logvar where it has one value per element; backward writes the gradient of mean, and of such
// a logvar. Everything else is small: these kernels run at the speed of memory.
#include "likelihood.h"

#include "../math/gaussian.h"
#include "level.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

template <typename T>
struct LikelihoodBuffers {
  alignas(64) T x[kBuffer];
  alignas(64) T mean[kBuffer];
  alignas(64) T logvar[kBuffer];
  alignas(64) T upstream[kBuffer];
  alignas(64) T value[kBuffer];
  alignas(64) T grad_mean[kBuffer];
  alignas(64) T grad_x[kBuffer];
  alignas(64) T grad_logvar[kBuffer];
};

namespace {

// Shorter runs of one logvar are treated element by element: each would be a unit of its own.
constexpr int64_t kMinRun = 256;

bool is_constant_per_event(const LikelihoodArgs& args) {
  if (!args.logvar.data || args.shape.event <= 1) return true;
  for (int d = 0; d < args.shape.event_dims; ++d) {
    if (args.logvar.stride[d] != 0 && args.shape.size[d] != 1) return false;
  }
  return true;
}

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

template <typename T>
struct ConstantArrays {
  const T *x, *mean, *factor;  // factor: upstream times precision, per element
  T scalar;                    // or one for all
  T *squares, *grad_mean;
};

template <typename T, bool kSquares, bool kGradMean, bool kScalar>
void constant_loop(const ConstantArrays<T>& arrays, int64_t count) {
  const T *const x = arrays.x, *const mean = arrays.mean, *const factor = arrays.factor;
  T *const squares = arrays.squares, *const grad_mean = arrays.grad_mean;
  const T scalar = arrays.scalar;
  for (int64_t group = 0; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      const T difference = x[i] - mean[i];
      if constexpr (kSquares) squares[i] = difference * difference;
      if constexpr (kGradMean) grad_mean[i] = (kScalar ? scalar : factor[i]) * difference;
    }
  }
}

template <typename T>
void run_constant_loop(const ConstantArrays<T>& arrays, int64_t count, bool squares, bool grad_mean) {
  if (!grad_mean) {
    constant_loop<T, true, false, false>(arrays, count);
  } else if (squares) {
    arrays.factor ? constant_loop<T, true, true, false>(arrays, count) : constant_loop<T, true, true, true>(arrays, count);
  } else {
    arrays.factor ? constant_loop<T, false, true, false>(arrays, count)
                  : constant_loop<T, false, true, true>(arrays, count);
  }
}

template <typename T>
struct ElementwiseArrays {
  const T *x, *mean, *logvar, *upstream;
  T *value, *grad_mean, *grad_logvar;
};

template <typename T, bool kValue, bool kGradMean, bool kGradLogvar>
void elementwise_loop(const ElementwiseArrays<T>& arrays, int64_t count) {
  const T *const x = arrays.x, *const mean = arrays.mean, *const logvar = arrays.logvar;
  const T* const upstream = arrays.upstream;
  T *const value = arrays.value, *const grad_mean = arrays.grad_mean, *const grad_logvar = arrays.grad_logvar;
  for (int64_t group = 0; group < count; group += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = group + lane;
      const math::LikelihoodTerms<T> terms = math::likelihood_terms(x[i], mean[i], logvar[i], math::exp(-logvar[i]));
      if constexpr (kValue) value[i] = terms.value;
      if constexpr (kGradMean) grad_mean[i] = upstream[i] * terms.by_mean;
      if constexpr (kGradLogvar) grad_logvar[i] = upstream[i] * terms.by_logvar;
    }
  }
}

template <typename T, bool kValue>
void run_elementwise_loop(const ElementwiseArrays<T>& arrays, int64_t count, bool grad_mean, bool grad_logvar) {
  if (grad_mean && grad_logvar) {
    elementwise_loop<T, kValue, true, true>(arrays, count);
  } else if (grad_mean) {
    elementwise_loop<T, kValue, true, false>(arrays, count);
  } else if (grad_logvar) {
    elementwise_loop<T, kValue, false, true>(arrays, count);
  } else {
    elementwise_loop<T, kValue, false, false>(arrays, count);
  }
}

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
  const bool by_runs = inner >= kMinRun && inner < shape.event &&
                       shape.event % inner == 0 && Order(args, grad_logvar).logical;
  if (by_runs) {
    const int64_t runs = shape.event / inner;
    return {runs, Units(shape.samples, shape.rows * runs, inner, 1, true)};
  }
  int64_t quantum = 1;
  if (grad_logvar && inner < kUnit && inner > 1) {
    quantum = inner / gcd(inner, kLanes) * kLanes;
    if (quantum > kUnit) quantum = inner;
  }
  return {1, Units(shape.samples, shape.rows, shape.event, quantum)};
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
  constant_ = args.reduction != Reduction::kNone && (cut_.runs > 1 || is_constant_per_event(args));
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
  if (value_) ll_ = view(args.ll);
  if (pass != Pass::kForward) {
    grad_ll_ = view(args.grad_ll);
    grad_mean_ = view(args.grad_mean);
    grad_x_ = view(args.grad_x);
    const int64_t bytes = args.shape.samples * args.shape.rows * args.shape.event * (args.dtype == DType::kFloat64 ? 8 : 4);
    grad_mean_.stream = grad_x_.stream = bytes > (int64_t{1} << 22) && bytes > last_level_cache_bytes();
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
  if (one_logvar_) {
    logvar_value_ = logvar_ ? read(logvar_, 0, 0, 0) : args.logvar_value;
    precision_ = __builtin_exp(-logvar_value_);
  }
}

// The upstream gradient of a row's sum; the same for all of a range's elements.
template <typename T>
double LikelihoodWork<T>::upstream_of_row(const Range& range, int64_t row) const {
  return grad_ll_ ? args_.grad_ll_scale * read(grad_ll_, range.sample, range.row + row, range.first)
                  : args_.grad_ll_scale;
}

template <typename T>
const T* LikelihoodWork<T>::upstream(const Range& range, LikelihoodBuffers<T>& buffers) const {
  if (args_.reduction == Reduction::kNone && grad_ll_ && args_.grad_ll_scale == 1) {
    return input(grad_ll_, range, buffers.upstream);
  }
  if (args_.reduction == Reduction::kNone && grad_ll_) {
    const T* const values = input(grad_ll_, range, buffers.upstream);
    const T scale = static_cast<T>(args_.grad_ll_scale);
    for (int64_t i = 0; i < whole_groups(range.rows * range.count); ++i) buffers.upstream[i] = scale * values[i];
    return buffers.upstream;
  }
  for (int64_t row = 0; row < range.rows; ++row) {
    const T value = static_cast<T>(upstream_of_row(range, row));
    T* const to = buffers.upstream + row * range.count;
    // Past the end of the row: the next row overwrites it, and the last group is made whole.
    for (int64_t i = 0; i < whole_groups(range.count); ++i) to[i] = value;
  }
  return buffers.upstream;
}

template <typename T>
void LikelihoodWork<T>::reduce_value(const Piece& piece, int64_t row, double value) const {
  if (partials_ == nullptr) {
    write(ll_, piece.range.sample, piece.range.row + row, 0, value);
  } else {
    partials_[piece.partial + row * cut_.per_row()] = value;
  }
}

// The gradient of a logvar shared by all of a row's elements in this unit.
template <typename T>
void LikelihoodWork<T>::reduce_grad_logvar(const Piece& piece, int64_t row, double value) const {
  if (logvar_partials_ == nullptr) {
    write(grad_logvar_, piece.range.sample, piece.range.row + row, piece.range.first / args_.logvar_inner, value);
  } else {
    logvar_partials_[piece.partial + row * cut_.per_row()] = value;
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

// One logvar per row: sum_n log N = -1/2 [e^-logvar sum_n (x - mean)^2 + n (logvar + ln 2 pi)].
template <typename T>
void LikelihoodWork<T>::constant_unit(const Piece& piece, LikelihoodBuffers<T>& buffers) const {
  const Range& range = piece.range;
  const int64_t count = whole_groups(range.rows * range.count);
  const bool squares = value_ || grad_logvar_wanted_;
  ConstantArrays<T> arrays;
  arrays.x = input(x_, range, buffers.x);
  arrays.mean = input(mean_, range, buffers.mean);
  arrays.squares = buffers.value;
  arrays.grad_mean = output(grad_mean_, range, buffers.grad_mean);
  arrays.factor = nullptr;
  const auto logvar_of = [&](int64_t row) {
    return one_logvar_ ? logvar_value_ : read(logvar_, range.sample, range.row + row, range.first);
  };
  const auto precision_of = [&](double logvar) { return one_logvar_ ? precision_ : __builtin_exp(-logvar); };
  if (grad_mean_wanted_) {
    for (int64_t row = 0; row < range.rows; ++row) {
      const T factor = static_cast<T>(upstream_of_row(range, row) * precision_of(logvar_of(row)));
      if (range.rows == 1) {
        arrays.scalar = factor;
        break;
      }
      T* const to = buffers.upstream + row * range.count;
      for (int64_t i = 0; i < whole_groups(range.count); ++i) to[i] = factor;
      arrays.factor = buffers.upstream;
    }
  }
  if (!squares && !grad_mean_wanted_) return;
  run_constant_loop(arrays, count, squares, grad_mean_wanted_);
  store_grad_mean(range, arrays.grad_mean, buffers);
  if (!squares) return;
  const double n = static_cast<double>(range.count);
  for (int64_t row = 0; row < range.rows; ++row) {
    const double logvar = logvar_of(row);
    const double quadratic = precision_of(logvar) * sum(arrays.squares + row * range.count, range.count);
    if (value_) reduce_value(piece, row, -0.5 * (quadratic + n * (logvar + math::kLog2Pi)));
    if (grad_logvar_wanted_) reduce_grad_logvar(piece, row, 0.5 * upstream_of_row(range, row) * (quadratic - n));
  }
}

template <typename T>
void LikelihoodWork<T>::elementwise_unit(const Piece& piece, LikelihoodBuffers<T>& buffers) const {
  const Range& range = piece.range;
  const int64_t count = whole_groups(range.rows * range.count);
  const bool value_each = value_ && args_.reduction == Reduction::kNone;
  const int64_t inner = args_.logvar_inner;
  const bool grad_logvar_each = grad_logvar_wanted_ && inner == 1;
  ElementwiseArrays<T> arrays;
  arrays.x = input(x_, range, buffers.x);
  arrays.mean = input(mean_, range, buffers.mean);
  if (logvar_) {
    arrays.logvar = input(logvar_, range, buffers.logvar);
  } else {
    for (int64_t i = 0; i < count; ++i) buffers.logvar[i] = static_cast<T>(args_.logvar_value);
    arrays.logvar = buffers.logvar;
  }
  if (grad_mean_wanted_ || grad_logvar_wanted_) arrays.upstream = upstream(range, buffers);
  arrays.value = value_each ? output(ll_, range, buffers.value) : buffers.value;
  arrays.grad_mean = output(grad_mean_, range, buffers.grad_mean);
  arrays.grad_logvar = grad_logvar_each ? output(grad_logvar_, range, buffers.grad_logvar) : buffers.grad_logvar;
  if (value_) {
    run_elementwise_loop<T, true>(arrays, count, grad_mean_wanted_, grad_logvar_wanted_);
  } else {
    run_elementwise_loop<T, false>(arrays, count, grad_mean_wanted_, grad_logvar_wanted_);
  }
  store_grad_mean(range, arrays.grad_mean, buffers);
  if (value_each) store_output(ll_, range, arrays.value, buffers.value);
  if (grad_logvar_each) store_output(grad_logvar_, range, arrays.grad_logvar, buffers.grad_logvar);
  for (int64_t row = 0; row < range.rows; ++row) {
    if (value_ && !value_each) reduce_value(piece, row, sum(arrays.value + row * range.count, range.count));
    if (!grad_logvar_wanted_ || grad_logvar_each) continue;
    const T* const gradients = arrays.grad_logvar + row * range.count;
    if (logvar_partials_) {
      reduce_grad_logvar(piece, row, sum(gradients, range.count));
      continue;
    }
    for (int64_t i = 0; i < range.count; i += inner) {
      write(grad_logvar_, range.sample, range.row + row, (range.first + i) / inner, sum(gradients + i, inner));
    }
  }
}

template <typename T>
void LikelihoodWork<T>::run(int64_t begin, int64_t end) const {
  LikelihoodBuffers<T> buffers;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Piece piece = cut_.piece(unit);
    if (constant_) {
      constant_unit(piece, buffers);
    } else {
      elementwise_unit(piece, buffers);
    }
  }
  if (grad_mean_.stream || grad_x_.stream) finish_streaming();
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
