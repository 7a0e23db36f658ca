// Likelihood units in which every element has a logvar of its own, or is asked for its own value.
#include <type_traits>

#include "../math/gaussian.h"
#include "elements.h"
#include "groups.h"
#include "likelihood.h"
#include "likelihood_buffers.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// (Part of) one row, under one upstream gradient.
template <typename T, typename Stored>
struct RowArrays {
  const Stored *x, *mean, *logvar;
  const Stored *next_x = nullptr, *next_mean = nullptr, *next_logvar = nullptr;  // of the next unit, to be fetched
  T upstream;
  Stored *grad_mean, *grad_logvar;
};

// Sum of the values, and the gradients.
template <typename T, typename Stored, bool kSum, bool kGradMean, bool kGradLogvar, bool kStream>
__attribute__((noinline)) double row_loop(const RowArrays<T, Stored>& arrays, int64_t count) {
  const Stored *const x = arrays.x, *const mean = arrays.mean, *const logvar = arrays.logvar;
  const Stored *const next_x = arrays.next_x, *const next_mean = arrays.next_mean;
  const Stored* const next_logvar = arrays.next_logvar;
  Stored *const grad_mean = arrays.grad_mean, *const grad_logvar = arrays.grad_logvar;
  const T upstream = arrays.upstream;
  const auto fetch = [=](int64_t i) __attribute__((always_inline)) {
    if (next_x == nullptr) return;
    fetch_step(next_x + i);
    fetch_step(next_mean + i);
    fetch_step(next_logvar + i);
  };
  const auto group = [=](int64_t i, T* value) __attribute__((always_inline)) {
    alignas(64) T x_lanes[kLanes], mean_lanes[kLanes], logvar_lanes[kLanes], grads_lanes[2][kLanes];
    const T* const from_x = read_group(x + i, x_lanes);
    const T* const from_mean = read_group(mean + i, mean_lanes);
    const T* const from_logvar = read_group(logvar + i, logvar_lanes);
    T *by_mean = nullptr, *by_logvar = nullptr;
    if constexpr (kGradMean) by_mean = group_at<kStream>(grad_mean + i, grads_lanes[0]);
    if constexpr (kGradLogvar) by_logvar = group_at<kStream>(grad_logvar + i, grads_lanes[1]);
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const math::LikelihoodTerms<T> terms =
          math::likelihood_terms(from_x[lane], from_mean[lane], from_logvar[lane], math::exp(-from_logvar[lane]));
      value[lane] = terms.value;
      if constexpr (kGradMean) by_mean[lane] = upstream * terms.by_mean;
      if constexpr (kGradLogvar) by_logvar[lane] = upstream * terms.by_logvar;
    }
    if constexpr (kGradMean) write_group<kStream>(by_mean, grad_mean + i);
    if constexpr (kGradLogvar) write_group<kStream>(by_logvar, grad_logvar + i);
  };
  const int64_t whole = count / kLanes * kLanes;
  alignas(64) T value[kLanes];
  double total = 0;
  if constexpr (kSum) {
    total = sum_groups<Values, T>(whole, fetch, group);
  } else {
    for_groups(whole, fetch, [=](int64_t i) __attribute__((always_inline)) {
      alignas(64) T ignored[kLanes];
      group(i, ignored);
    });
  }
  if (whole == count) return total;
  // What is past the end of a ragged range must not be summed.
  group(whole, value);
  for (int64_t i = whole; kSum && i < count; ++i) total += static_cast<double>(value[i - whole]);
  return total;
}

// Only both gradients together have code of their own for streaming, and for half precision in place.
template <typename T, typename Stored>
constexpr bool has_single_gradients = std::is_same_v<T, Stored>;

template <bool kSum, typename T, typename Stored>
double pick_row_loop(const RowArrays<T, Stored>& arrays, int64_t count, bool grad_mean, bool grad_logvar, bool stream) {
  if (grad_mean && grad_logvar) {
    return stream ? row_loop<T, Stored, kSum, true, true, true>(arrays, count)
                  : row_loop<T, Stored, kSum, true, true, false>(arrays, count);
  }
  if (!grad_mean && !grad_logvar) return kSum ? row_loop<T, Stored, kSum, false, false, false>(arrays, count) : 0;
  if constexpr (has_single_gradients<T, Stored>) {
    return grad_mean ? row_loop<T, Stored, kSum, true, false, false>(arrays, count)
                     : row_loop<T, Stored, kSum, false, true, false>(arrays, count);
  }
  __builtin_unreachable();
}

template <typename T, typename Stored>
double run_row_loop(const RowArrays<T, Stored>& arrays, int64_t count, bool sum, bool grad_mean, bool grad_logvar,
                    bool stream) {
  return sum ? pick_row_loop<true>(arrays, count, grad_mean, grad_logvar, stream)
             : pick_row_loop<false>(arrays, count, grad_mean, grad_logvar, stream);
}

template <typename T>
struct RowsArrays {
  const T *x, *mean, *logvar, *upstream;
  T *value, *grad_mean, *grad_logvar;
};

// Whatever the rows: one upstream gradient and one value per element.
template <typename T, bool kValue, bool kGradMean, bool kGradLogvar>
__attribute__((noinline)) void rows_loop(const RowsArrays<T>& arrays, int64_t count) {
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

template <bool kValue, typename T>
void pick_rows_loop(const RowsArrays<T>& arrays, int64_t count, bool grad_mean, bool grad_logvar) {
  if (grad_mean && grad_logvar) return rows_loop<T, kValue, true, true>(arrays, count);
  if (grad_mean) return rows_loop<T, kValue, true, false>(arrays, count);
  if (grad_logvar) return rows_loop<T, kValue, false, true>(arrays, count);
  if constexpr (kValue) rows_loop<T, kValue, false, false>(arrays, count);
}

}  // namespace

// On the operands' own memory; where that is not possible nothing is done.
template <typename T>
template <typename Stored>
bool LikelihoodWork<T>::elementwise_in_place(const Range& range, const Range& next, T upstream, double* total) const {
  if (!logvar_ || args_.scale.kind != ScaleKind::kPlain || !is_direct<Stored>(logvar_, range) ||
      !is_direct<Stored>(x_, range) || !is_direct<Stored>(mean_, range)) {
    return false;
  }
  if (grad_mean_wanted_ != grad_logvar_wanted_ && !has_single_gradients<T, Stored>) return false;
  if (grad_mean_wanted_ && (grad_x_ || !is_direct<Stored>(grad_mean_, range))) return false;
  if (grad_logvar_wanted_ && (args_.logvar_inner != 1 || !is_direct<Stored>(grad_logvar_, range))) return false;
  RowArrays<T, Stored> arrays;
  arrays.x = direct<Stored>(x_, range);
  arrays.mean = direct<Stored>(mean_, range);
  arrays.logvar = direct<Stored>(logvar_, range);
  arrays.next_x = direct<Stored>(x_, next);
  arrays.next_mean = direct<Stored>(mean_, next);
  arrays.next_logvar = direct<Stored>(logvar_, next);
  arrays.upstream = upstream;
  arrays.grad_mean = grad_mean_wanted_ ? direct<Stored>(grad_mean_, range) : nullptr;
  arrays.grad_logvar = grad_logvar_wanted_ ? direct<Stored>(grad_logvar_, range) : nullptr;
  const bool stream = streams_ && is_line(arrays.grad_mean) && is_line(arrays.grad_logvar);
  *total = run_row_loop(arrays, range.count, value_, grad_mean_wanted_, grad_logvar_wanted_, stream);
  return true;
}

// The logvar of every element.
template <typename T>
const T* LikelihoodWork<T>::logvars(const Range& range, LikelihoodBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  if (!logvar_) {
    for (int64_t i = 0; i < count; ++i) buffers.logvar[i] = static_cast<T>(args_.logvar_value);
    return buffers.logvar;
  }
  const T* const parameter = input(logvar_, range, buffers.logvar);
  if (args_.scale.kind == ScaleKind::kPlain) return parameter;
  to_logvar(args_.scale, parameter, count, buffers.logvar, buffers.slope);
  return buffers.logvar;
}

// (Part of) one row: its sum of values if wanted, and the gradients. Returns the gradient of logvar per element where
// that is still to be summed.
template <typename T>
const T* LikelihoodWork<T>::elementwise_row(const Range& range, const Range& next, double* total,
                                            LikelihoodBuffers<T>& buffers) const {
  T upstream = 0;
  if (grad_mean_wanted_ || grad_logvar_wanted_) {
    read_upstream(range, buffers);
    upstream = static_cast<T>(buffers.row_upstream[0]);
  }
  if (elementwise_in_place<T>(range, next, upstream, total)) return nullptr;
  // In narrow registers the conversions are most of the work: not worth the code.
  if constexpr (sizeof(T) == sizeof(float) && kWidth > 4) {
    if (elementwise_in_place<BFloat16>(range, next, upstream, total)) return nullptr;
    if (elementwise_in_place<Float16>(range, next, upstream, total)) return nullptr;
  }
  const int64_t count = whole_groups(range.count);
  const bool grad_logvar_each = grad_logvar_wanted_ && args_.logvar_inner == 1;
  RowArrays<T, T> arrays;
  arrays.x = input(x_, range, buffers.x);
  arrays.mean = input(mean_, range, buffers.mean);
  arrays.logvar = logvars(range, buffers);
  arrays.upstream = upstream;
  arrays.grad_mean = output(grad_mean_, range, buffers.grad_mean);
  arrays.grad_logvar = grad_logvar_each ? output(grad_logvar_, range, buffers.grad_logvar) : buffers.grad_logvar;
  *total = run_row_loop(arrays, range.count, value_, grad_mean_wanted_, grad_logvar_wanted_, false);
  if (args_.scale.kind != ScaleKind::kPlain && grad_logvar_wanted_) {
    through_slope(buffers.slope, count, arrays.grad_logvar);
  }
  store_grad_mean(range, arrays.grad_mean, buffers);
  if (grad_logvar_each) store_output(grad_logvar_, range, arrays.grad_logvar, buffers.grad_logvar);
  return arrays.grad_logvar;
}

// Whatever the rows: values and gradients per element, masked ones among them. Returns the gradient of logvar where it
// is still to be summed; values that are summed are left in buffers.value.
template <typename T>
const T* LikelihoodWork<T>::elementwise_rows(const Range& range, LikelihoodBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  const bool value_each = value_ && args_.reduction == Reduction::kNone;
  const bool grad_logvar_each = grad_logvar_wanted_ && args_.logvar_inner == 1;
  const bool gradients = grad_mean_wanted_ || grad_logvar_wanted_;
  RowsArrays<T> arrays;
  arrays.x = input(x_, range, buffers.x);
  arrays.mean = input(mean_, range, buffers.mean);
  arrays.logvar = logvars(range, buffers);
  if (gradients) arrays.upstream = upstream(range, buffers);
  if (mask_) {
    load_mask(mask_, range, buffers.keep);
    read_counted(buffers.keep, arrays.x, count, buffers.x);
    read_counted(buffers.keep, arrays.mean, count, buffers.mean);
    read_counted(buffers.keep, arrays.logvar, count, buffers.logvar);
    if (gradients) read_counted(buffers.keep, arrays.upstream, count, buffers.upstream);
  }
  arrays.value = value_each ? output(ll_, range, buffers.value) : buffers.value;
  arrays.grad_mean = output(grad_mean_, range, buffers.grad_mean);
  arrays.grad_logvar = grad_logvar_each ? output(grad_logvar_, range, buffers.grad_logvar) : buffers.grad_logvar;
  value_ ? pick_rows_loop<true>(arrays, count, grad_mean_wanted_, grad_logvar_wanted_)
         : pick_rows_loop<false>(arrays, count, grad_mean_wanted_, grad_logvar_wanted_);
  if (mask_ && value_) keep_counted(buffers.keep, arrays.value, count, arrays.value);
  if (args_.scale.kind != ScaleKind::kPlain && grad_logvar_wanted_) {
    through_slope(buffers.slope, count, arrays.grad_logvar);
  }
  store_grad_mean(range, arrays.grad_mean, buffers);
  if (value_each) store_output(ll_, range, arrays.value, buffers.value);
  if (grad_logvar_each) store_output(grad_logvar_, range, arrays.grad_logvar, buffers.grad_logvar);
  return arrays.grad_logvar;
}

template <typename T>
void LikelihoodWork<T>::elementwise_unit(const Piece& piece, const Piece& next, LikelihoodBuffers<T>& buffers) const {
  const Range& range = piece.range;
  const int64_t inner = args_.logvar_inner;
  const bool value_summed = value_ && args_.reduction != Reduction::kNone;
  const T* grad_logvar;
  // By how rows are cut, not by how many this unit has: a row is summed alike in every batch.
  if (cut_.units.rows_per_unit == 1 && args_.reduction != Reduction::kNone && !mask_) {
    grad_logvar = elementwise_row(range, next.range, buffers.row_value, buffers);
  } else {
    grad_logvar = elementwise_rows(range, buffers);
    if (value_summed) sum_rows(buffers.value, range.rows, range.count, buffers.row_value);
  }
  if (value_summed) reduce_values(piece, buffers.row_value);
  if (!grad_logvar_wanted_ || inner == 1) return;
  if (logvar_partials_) {
    sum_rows(grad_logvar, range.rows, range.count, buffers.row_grad_logvar);
    reduce_grad_logvar(piece, buffers.row_grad_logvar);
    return;
  }
  const int64_t runs = range.count / inner;
  sum_rows(grad_logvar, range.rows * runs, inner, buffers.row_grad_logvar);
  const Range by_run{range.sample, range.row, range.rows, range.first / inner, runs};
  store(grad_logvar_, by_run, buffers.row_grad_logvar);
}

template void LikelihoodWork<float>::elementwise_unit(const Piece&, const Piece&, LikelihoodBuffers<float>&) const;
template void LikelihoodWork<double>::elementwise_unit(const Piece&, const Piece&, LikelihoodBuffers<double>&) const;

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
