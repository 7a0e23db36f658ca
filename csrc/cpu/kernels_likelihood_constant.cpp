// Likelihood units whose rows have one logvar each. Only squared differences are summed per element; the rest is done
// once per row, in double: sum_n log N = -1/2 [e^-logvar sum_n (x - mean)^2 + n (logvar + ln 2 pi)].
#include "../math/gaussian.h"
#include "groups.h"
#include "likelihood.h"
#include "likelihood_buffers.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

template <typename T, typename Stored>
struct ConstantArrays {
  const Stored *x, *mean;
  const Stored *next_x = nullptr, *next_mean = nullptr;  // of the next unit, to be fetched
  T factor;                                              // of one row: upstream times precision
  const T* factors;                                      // of several, per element
  T* squares;                                            // of several
  Stored* grad_mean;
};

// The gradient of mean, and squared differences: their sum for (part of) one row, or one by one for several rows.
template <typename T, typename Stored, bool kOneRow, bool kSquares, bool kGradMean, bool kStream>
__attribute__((noinline)) double constant_loop(const ConstantArrays<T, Stored>& arrays, int64_t count) {
  const Stored *const x = arrays.x, *const mean = arrays.mean;
  const Stored *const next_x = arrays.next_x, *const next_mean = arrays.next_mean;
  const T* const factors = arrays.factors;
  T* const squares = arrays.squares;
  Stored* const grad_mean = arrays.grad_mean;
  const T factor = arrays.factor;
  const auto fetch = [=](int64_t i) __attribute__((always_inline)) {
    if (next_x == nullptr) return;
    fetch_step(next_x + i);
    fetch_step(next_mean + i);
  };
  const auto group = [=](int64_t i, T* difference) __attribute__((always_inline)) {
    alignas(64) T x_lanes[kLanes], mean_lanes[kLanes], grad_lanes[kLanes];
    const T* const from_x = read_group(x + i, x_lanes);
    const T* const from_mean = read_group(mean + i, mean_lanes);
    T* gradient = nullptr;
    if constexpr (kGradMean) gradient = group_at<kStream>(grad_mean + i, grad_lanes);
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      difference[lane] = from_x[lane] - from_mean[lane];
      if constexpr (kGradMean) gradient[lane] = (kOneRow ? factor : factors[i + lane]) * difference[lane];
      if constexpr (kSquares && !kOneRow) squares[i + lane] = difference[lane] * difference[lane];
    }
    if constexpr (kGradMean) write_group<kStream>(gradient, grad_mean + i);
  };
  if constexpr (kSquares && kOneRow) {
    return sum_groups<Squares, T>(count, fetch, group);
  } else {
    for_groups(count, fetch, [=](int64_t i) __attribute__((always_inline)) {
      alignas(64) T difference[kLanes];
      group(i, difference);
    });
    return 0;
  }
}

template <bool kOneRow, bool kStream, typename T, typename Stored>
double pick_constant_loop(const ConstantArrays<T, Stored>& arrays, int64_t count, bool squares, bool grad_mean) {
  if (!grad_mean) return squares ? constant_loop<T, Stored, kOneRow, true, false, false>(arrays, count) : 0;
  return squares ? constant_loop<T, Stored, kOneRow, true, true, kStream>(arrays, count)
                 : constant_loop<T, Stored, kOneRow, false, true, kStream>(arrays, count);
}

template <bool kStream, typename T, typename Stored>
double run_constant_loop(const ConstantArrays<T, Stored>& arrays, int64_t count, bool one_row, bool squares,
                         bool grad_mean) {
  return one_row ? pick_constant_loop<true, kStream>(arrays, count, squares, grad_mean)
                 : pick_constant_loop<false, kStream>(arrays, count, squares, grad_mean);
}

}  // namespace

// On the operands' own memory; where that is not possible nothing is done.
template <typename T>
template <typename Stored>
bool LikelihoodWork<T>::constant_in_place(const Range& range, const Range& next, bool one_row, bool squares,
                                          double* total, LikelihoodBuffers<T>& buffers) const {
  if (!is_direct<Stored>(x_, range) || !is_direct<Stored>(mean_, range)) return false;
  if (grad_mean_wanted_ && (grad_x_ || !is_direct<Stored>(grad_mean_, range))) return false;
  ConstantArrays<T, Stored> arrays;
  arrays.x = direct<Stored>(x_, range);
  arrays.mean = direct<Stored>(mean_, range);
  arrays.next_x = direct<Stored>(x_, next);
  arrays.next_mean = direct<Stored>(mean_, next);
  arrays.factor = static_cast<T>(buffers.row_factor[0]);
  arrays.factors = buffers.upstream;
  arrays.squares = buffers.value;
  arrays.grad_mean = grad_mean_wanted_ ? direct<Stored>(grad_mean_, range) : nullptr;
  const int64_t count = range.rows * range.count;
  *total = streams_ && is_line(arrays.grad_mean)
               ? run_constant_loop<true>(arrays, count, one_row, squares, grad_mean_wanted_)
               : run_constant_loop<false>(arrays, count, one_row, squares, grad_mean_wanted_);
  return true;
}

// The gradient of mean, if wanted, and if wanted squared differences: the sum for one row, for several in
// buffers.value.
template <typename T>
double LikelihoodWork<T>::constant_elements(const Range& range, const Range& next, bool one_row, bool squares,
                                            LikelihoodBuffers<T>& buffers) const {
  double total = 0;
  if (constant_in_place<T>(range, next, one_row, squares, &total, buffers)) return total;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (constant_in_place<BFloat16>(range, next, one_row, squares, &total, buffers)) return total;
    if (constant_in_place<Float16>(range, next, one_row, squares, &total, buffers)) return total;
  }
  ConstantArrays<T, T> arrays;
  arrays.x = input(x_, range, buffers.x);
  arrays.mean = input(mean_, range, buffers.mean);
  arrays.factor = static_cast<T>(buffers.row_factor[0]);
  arrays.factors = buffers.upstream;
  arrays.squares = buffers.value;
  arrays.grad_mean = output(grad_mean_, range, buffers.grad_mean);
  const int64_t count = whole_groups(range.rows * range.count);
  total = run_constant_loop<false>(arrays, count, one_row, squares, grad_mean_wanted_);
  store_grad_mean(range, arrays.grad_mean, buffers);
  return total;
}

template <typename T>
void LikelihoodWork<T>::constant_unit(const Piece& piece, const Piece& next, LikelihoodBuffers<T>& buffers) const {
  const Range& range = piece.range;
  const bool squares = value_ || grad_logvar_wanted_;
  if (!squares && !grad_mean_wanted_) return;
  for (int64_t row = 0; row < range.rows; ++row) {
    buffers.row_logvar[row] = logvar_value_;
    buffers.row_precision[row] = precision_;
  }
  if (!one_logvar_) {
    read_rows(logvar_, range, buffers.row_logvar);
    for (int64_t row = 0; row < range.rows; ++row) buffers.row_precision[row] = __builtin_exp(-buffers.row_logvar[row]);
  }
  double* const factors = buffers.row_factor;
  factors[0] = 0;
  if (grad_mean_wanted_ || grad_logvar_wanted_) {
    read_upstream(range, buffers);
    for (int64_t row = 0; row < range.rows; ++row) {
      factors[row] = buffers.row_upstream[row] * buffers.row_precision[row];
    }
  }
  // By how rows are cut, not by how many this unit has: a row is summed alike in every batch.
  const bool one_row = cut_.units.rows_per_unit == 1;
  if (!one_row && grad_mean_wanted_) fill_rows(factors, range, buffers.upstream);
  const double total = constant_elements(range, next.range, one_row, squares, buffers);
  if (!squares) return;
  double* const values = buffers.row_value;
  if (one_row) {
    values[0] = total;
  } else {
    sum_rows(buffers.value, range.rows, range.count, values);
  }
  const double n = static_cast<double>(range.count);
  for (int64_t row = 0; row < range.rows; ++row) {
    const double quadratic = buffers.row_precision[row] * values[row];
    values[row] = -0.5 * (quadratic + n * (buffers.row_logvar[row] + math::kLog2Pi));
    if (grad_logvar_wanted_) buffers.row_grad_logvar[row] = 0.5 * buffers.row_upstream[row] * (quadratic - n);
  }
  if (value_) reduce_values(piece, values);
  if (grad_logvar_wanted_) reduce_grad_logvar(piece, buffers.row_grad_logvar);
}

template void LikelihoodWork<float>::constant_unit(const Piece&, const Piece&, LikelihoodBuffers<float>&) const;
template void LikelihoodWork<double>::constant_unit(const Piece&, const Piece&, LikelihoodBuffers<double>&) const;

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
