// Copies between operands of any strides and dtype and the kernels' buffers.
#include "convert.h"
#include "elements.h"
#include "unit.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Where an element lies, and the index of each dimension on the way.
struct Place {
  int64_t index[kMaxEventDims], offset;

  Place(const View& view, int64_t sample, int64_t row, int64_t element)
      : offset(sample * view.sample_stride + row * view.row_stride) {
    for (int d = view.dims - 1; d > 0; --d) {
      index[d] = element % view.size[d];
      offset += index[d] * view.stride[d];
      element /= view.size[d];
    }
    index[0] = element;
    offset += element * view.stride[0];
  }

  // From the start of a stretch along dimension d + 1 to that of the next: a step along dimension d.
  void advance(const View& view, int d) {
    offset += view.stride[d];
    while (++index[d] == view.size[d] && d > 0) {
      offset -= index[d] * view.stride[d];
      index[d] = 0;
      offset += view.stride[--d];
    }
  }
};

// Calls run(offset, step, length, position) for each of count stretches of one length, stride apart.
template <class Run>
FUSED_ELBO_INLINE void for_equal_runs(int64_t offset, int64_t step, int64_t length, int64_t position, int64_t count,
                                      int64_t stride, Run run) {
  for (int64_t i = 0; i < count; ++i) run(offset + i * stride, step, length, position + i * length);
}

// Calls run(offset, step, length, position) for each stretch along the innermost dimension, in order; offset in
// elements.
template <class Run>
FUSED_ELBO_INLINE void for_each_run(const View& view, const Range& range, Run run) {
  const int inner = view.dims - 1;
  const int64_t step = view.stride[inner];
  int64_t position = 0;
  for (int64_t r = 0; r < range.rows; ++r) {
    Place place(view, range.sample, range.row + r, range.first);
    if (inner == 0) {
      run(place.offset, step, range.count, position);
      position += range.count;
      continue;
    }
    const int64_t size = view.size[inner];
    int64_t left = range.count;
    const auto take = [&](int64_t length) __attribute__((always_inline)) {
      run(place.offset, step, length, position);
      position += length;
      left -= length;
    };
    if (const int64_t within = place.index[inner]; within > 0) {
      take(left < size - within ? left : size - within);
      place.offset -= within * step;
      place.advance(view, inner - 1);
    }
    while (left >= size) {
      // The pixels of a channels_last latent are many stretches of a few elements: a constant length is one move.
      const int64_t outer = view.size[inner - 1] - place.index[inner - 1];
      const int64_t count = inner > 1 && outer < left / size ? outer : left / size;
      const int64_t stride = view.stride[inner - 1];
      switch (step == 1 ? size : 0) {
        case 4:
          for_equal_runs(place.offset, 1, 4, position, count, stride, run);
          break;
        case 8:
          for_equal_runs(place.offset, 1, 8, position, count, stride, run);
          break;
        case 16:
          for_equal_runs(place.offset, 1, 16, position, count, stride, run);
          break;
        default:
          for_equal_runs(place.offset, step, size, position, count, stride, run);
      }
      position += count * size;
      left -= count * size;
      place.offset += (count - 1) * stride;
      place.index[inner - 1] += count - 1;
      place.advance(view, inner - 1);
    }
    if (left > 0) take(left);
  }
}

template <typename From, typename To>
FUSED_ELBO_INLINE void load_from(const View& view, const Range& range, To* to) {
  const From* const data = reinterpret_cast<const From*>(view.data);
  for_each_run(view, range,
               [=](int64_t offset, int64_t step, int64_t length, int64_t position) __attribute__((always_inline)) {
                 const From* const from = data + offset;
                 To* const out = to + position;
                 if (step == 1) {
                   widen_run(from, length, out);
                 } else if (step == 0) {
                   const To value = static_cast<To>(widen(*from));
                   for (int64_t i = 0; i < length; ++i) out[i] = value;
                 } else {
                   for (int64_t i = 0; i < length; ++i) out[i] = static_cast<To>(widen(from[i * step]));
                 }
               });
}

template <typename To>
FUSED_ELBO_INLINE void load_any(const View& view, const Range& range, To* to) {
  switch (view.dtype) {
    case DType::kFloat32:
      return load_from<float>(view, range, to);
    case DType::kFloat64:
      return load_from<double>(view, range, to);
    case DType::kBFloat16:
      return load_from<BFloat16>(view, range, to);
    case DType::kFloat16:
      return load_from<Float16>(view, range, to);
  }
}

// memcpy whose whole lines bypass the caches: reading the old contents first would cost a third of the traffic.
void stream_bytes(const char* from, int64_t bytes, char* to) {
  constexpr int kLine = 64;
  const int64_t misaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t head = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) stream<kLine>(from + i, to + i);
  __builtin_memcpy(to + i, from + i, bytes - i);
}

template <typename To, typename From>
FUSED_ELBO_INLINE void store_to(const View& view, const Range& range, const From* from) {
  To* const data = reinterpret_cast<To*>(view.data);
  for_each_run(view, range,
               [=, &view](int64_t offset, int64_t step, int64_t length, int64_t position)
                   __attribute__((always_inline)) {
                     To* const to = data + offset;
                     const From* const in = from + position;
                     if (step == 1 && view.stream) {
                       constexpr int64_t kPiece = 1024;
                       alignas(64) To piece[kPiece];
                       for (int64_t i = 0; i < length; i += kPiece) {
                         const int64_t count = length - i < kPiece ? length - i : kPiece;
                         narrow_run(in + i, count, piece);
                         stream_bytes(reinterpret_cast<const char*>(piece), count * static_cast<int64_t>(sizeof(To)),
                                      reinterpret_cast<char*>(to + i));
                       }
                     } else if (step == 1) {
                       narrow_run(in, length, to);
                     } else {
                       for (int64_t i = 0; i < length; ++i) narrow(in[i], to[i * step]);
                     }
                   });
}

template <typename From>
FUSED_ELBO_INLINE void store_any(const View& view, const Range& range, const From* from) {
  switch (view.dtype) {
    case DType::kFloat32:
      return store_to<float>(view, range, from);
    case DType::kFloat64:
      return store_to<double>(view, range, from);
    case DType::kBFloat16:
      return store_to<BFloat16>(view, range, from);
    case DType::kFloat16:
      return store_to<Float16>(view, range, from);
  }
}

template <typename To>
FUSED_ELBO_INLINE void load_bytes(const View& view, const Range& range, To* to) {
  const uint8_t* const data = reinterpret_cast<const uint8_t*>(view.data);
  for_each_run(view, range,
               [=](int64_t offset, int64_t step, int64_t length, int64_t position) __attribute__((always_inline)) {
                 const uint8_t* const from = data + offset;
                 To* const out = to + position;
                 for (int64_t i = 0; i < length; ++i) out[i] = from[i * step] != 0 ? To(1) : To(0);
               });
  for (int64_t i = range.rows * range.count; i % kLanes != 0; ++i) to[i] = 0;
}

template <typename T>
FUSED_ELBO_INLINE double sum_short(const T* values, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

template <typename T>
FUSED_ELBO_INLINE double sum_long(const T* values, int64_t count) {
  Sums sums;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    alignas(64) T sum[kLanes];
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* const value = values + i + lane;
      sum[lane] = (value[0] + value[kLanes]) + (value[2 * kLanes] + value[3 * kLanes]);
    }
    sums.add(sum);
  }
  for (; i + kLanes <= count; i += kLanes) sums.add(values + i);
  double total = sums.total();
  if (i < count) total += sum_short(values + i, count - i);
  return total;
}

template <typename T>
FUSED_ELBO_INLINE void sum_each_row(const T* values, int64_t rows, int64_t count, double* totals) {
  if (count < kLanes) {
    for (int64_t row = 0; row < rows; ++row) totals[row] = sum_short(values + row * count, count);
  } else {
    for (int64_t row = 0; row < rows; ++row) totals[row] = sum_long(values + row * count, count);
  }
}

// Calls visit(a pointer to the view's value, row) with the pointer's type.
template <class Visit>
FUSED_ELBO_INLINE void visit_rows(const View& view, const Range& range, Visit visit) {
  const int64_t first = Place(view, range.sample, range.row, range.first).offset;
  const auto each = [&](auto* data) __attribute__((always_inline)) {
    for (int64_t row = 0; row < range.rows; ++row) visit(data + first + row * view.row_stride, row);
  };
  switch (view.dtype) {
    case DType::kFloat32:
      return each(reinterpret_cast<float*>(view.data));
    case DType::kFloat64:
      return each(reinterpret_cast<double*>(view.data));
    case DType::kBFloat16:
      return each(reinterpret_cast<BFloat16*>(view.data));
    case DType::kFloat16:
      return each(reinterpret_cast<Float16*>(view.data));
  }
}

}  // namespace

View make_view(const Operand& operand, const Shape& shape, const int* order) {
  View view;
  view.data = static_cast<char*>(operand.data);
  if (!view) return view;
  view.dtype = operand.dtype;
  view.sample_stride = operand.sample_stride;
  view.row_stride = operand.row_stride;
  view.event = shape.event;
  int dims = 0;
  for (int i = 0; i < shape.event_dims; ++i) {
    const int64_t size = shape.size[order[i]];
    const int64_t stride = operand.stride[order[i]];
    if (size == 1) continue;
    if (dims > 0 && view.stride[dims - 1] == stride * size) {
      view.size[dims - 1] *= size;
      view.stride[dims - 1] = stride;
    } else {
      view.size[dims] = size;
      view.stride[dims] = stride;
      ++dims;
    }
  }
  if (dims == 0) {
    view.stride[0] = 1;  // an event of one element: contiguous by any stride
    dims = 1;
  }
  view.dims = dims;
  view.contiguous = dims == 1 && view.stride[0] == 1;
  return view;
}

void load(const View& view, const Range& range, float* to) { load_any(view, range, to); }
void load(const View& view, const Range& range, double* to) { load_any(view, range, to); }
void store(const View& view, const Range& range, const float* from) { store_any(view, range, from); }
void store(const View& view, const Range& range, const double* from) { store_any(view, range, from); }

void load_mask(const View& mask, const Range& range, float* keep) { load_bytes(mask, range, keep); }
void load_mask(const View& mask, const Range& range, double* keep) { load_bytes(mask, range, keep); }

void read_rows(const View& view, const Range& range, double* values) {
  visit_rows(view, range, [=](auto* from, int64_t row) __attribute__((always_inline)) { values[row] = widen(*from); });
}

void write_rows(const View& view, const Range& range, const double* values) {
  visit_rows(view, range, [=](auto* to, int64_t row) __attribute__((always_inline)) { narrow(values[row], *to); });
}

double read(const View& view, int64_t sample, int64_t row, int64_t element) {
  double value;
  read_rows(view, Range{sample, row, 1, element, 1}, &value);
  return value;
}

void write(const View& view, int64_t sample, int64_t row, int64_t element, double value) {
  write_rows(view, Range{sample, row, 1, element, 1}, &value);
}

double sum(const double* values, int64_t count) {
  return count < kLanes ? sum_short(values, count) : sum_long(values, count);
}
void sum_rows(const float* values, int64_t rows, int64_t count, double* totals) {
  sum_each_row(values, rows, count, totals);
}
void sum_rows(const double* values, int64_t rows, int64_t count, double* totals) {
  sum_each_row(values, rows, count, totals);
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
