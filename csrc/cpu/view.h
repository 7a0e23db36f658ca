// An operand in the order in which a kernel walks through the event, and the copies between it and a unit's buffers.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// Which part of [samples, rows, event] is meant: some rows, and of each the same range of event elements.
struct Range {
  int64_t sample, row, rows;
  int64_t first, count;  // in the kernel's order
};

struct View {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  bool contiguous = false;  // event elements lie one behind the other, in the kernel's order
  bool stream = false;      // an output too large for the caches: stores go past them
  int dims = 1;             // after merging what this operand alone steps through evenly
  int64_t sample_stride = 0, row_stride = 0, event = 0;
  int64_t size[kMaxEventDims] = {1, 1, 1, 1};
  int64_t stride[kMaxEventDims] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }

  // One value for every element of the range.
  bool is_constant(const Range& range) const {
    return dims == 1 && (stride[0] == 0 || range.count == 1) && (range.rows == 1 || row_stride == 0);
  }
};

// order[i]: the event dimension of the shape that is walked through at level i, outermost first.
View make_view(const Operand& operand, const Shape& shape, const int* order);

// To and from range.rows * range.count consecutive elements, with conversion.
void load(const View& view, const Range& range, float* to);
void load(const View& view, const Range& range, double* to);
void store(const View& view, const Range& range, const float* from);
void store(const View& view, const Range& range, const double* from);

// One value.
double read(const View& view, int64_t sample, int64_t row, int64_t element);
void write(const View& view, int64_t sample, int64_t row, int64_t element, double value);

// One value of each row, at the range's first element.
void read_rows(const View& view, const Range& range, double* values);
void write_rows(const View& view, const Range& range, const double* values);

// Streaming stores are not ordered with others: before the end of the task that made them.
FUSED_ELBO_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};

// Whether kernels can work on the operand's own memory as on a unit's buffer.
template <typename T>
FUSED_ELBO_INLINE bool is_direct(const View& view, const Range& range) {
  return view.dtype == DTypeOf<T>::value && view.contiguous && (range.rows == 1 || view.row_stride == range.count) &&
         range.rows * range.count % kLanes == 0;
}

template <typename T>
FUSED_ELBO_INLINE T* direct(const View& view, const Range& range) {
  return reinterpret_cast<T*>(view.data) + range.sample * view.sample_stride + range.row * view.row_stride +
         range.first;
}

// An input as an array of whole groups of kLanes elements; what is past the end of a ragged range is zero.
template <typename T>
FUSED_ELBO_INLINE const T* input(const View& view, const Range& range, T* buffer) {
  if (is_direct<T>(view, range)) return direct<T>(view, range);
  load(view, range, buffer);
  const int64_t total = range.rows * range.count;
  for (int64_t i = total; i % kLanes != 0; ++i) buffer[i] = 0;
  return buffer;
}

// Where a kernel writes an output; store_output then brings it home.
template <typename T>
FUSED_ELBO_INLINE T* output(const View& view, const Range& range, T* buffer) {
  return view && !view.stream && is_direct<T>(view, range) ? direct<T>(view, range) : buffer;
}
template <typename T>
FUSED_ELBO_INLINE void store_output(const View& view, const Range& range, const T* at, const T* buffer) {
  if (view && at == buffer) store(view, range, buffer);
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
