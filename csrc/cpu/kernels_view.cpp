// Copies between operands of any strides and dtype and the kernels' buffers.
#include "convert.h"
#include "unit.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

FUSED_ELBO_INLINE int64_t item_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

FUSED_ELBO_INLINE int64_t offset_of(const View& view, int64_t sample, int64_t row, int64_t element) {
  int64_t offset = sample * view.sample_stride + row * view.row_stride;
  for (int d = view.dims - 1; d > 0; --d) {
    offset += element % view.size[d] * view.stride[d];
    element /= view.size[d];
  }
  return offset + element * view.stride[0];
}

// Calls run(offset, step, length, position) for each stretch along the innermost dimension, in order; offset in elements.
template <class Run>
FUSED_ELBO_INLINE void for_each_run(const View& view, const Range& range, Run run) {
  const int inner = view.dims - 1;
  const int64_t step = view.stride[inner];
  int64_t position = 0;
  for (int64_t r = 0; r < range.rows; ++r) {
    const int64_t base = range.sample * view.sample_stride + (range.row + r) * view.row_stride;
    if (inner == 0) {
      run(base + range.first * step, step, range.count, position);
      position += range.count;
      continue;
    }
    int64_t index = range.first;
    for (int64_t left = range.count; left > 0;) {
      const int64_t within = index % view.size[inner];
      const int64_t offset = offset_of(view, range.sample, range.row + r, index);
      const int64_t length = left < view.size[inner] - within ? left : view.size[inner] - within;
      run(offset, step, length, position);
      position += length;
      index += length;
      left -= length;
    }
  }
}

template <typename From, typename To>
FUSED_ELBO_INLINE void load_from(const View& view, const Range& range, To* to) {
  const From* const data = reinterpret_cast<const From*>(view.data);
  for_each_run(view, range, [=](int64_t offset, int64_t step, int64_t length, int64_t position) __attribute__((always_inline)) {
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

// memcpy whose stores bypass the caches: reading the old contents first would cost a third of the traffic.
void stream_bytes(const char* from, int64_t bytes, char* to) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  const int64_t misaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t head = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    for (int64_t j = i; j < i + kLine; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
#endif
  }
  __builtin_memcpy(to + i, from + i, bytes - i);
#else
  __builtin_memcpy(to, from, bytes);
#endif
}

template <typename To, typename From>
FUSED_ELBO_INLINE void store_to(const View& view, const Range& range, const From* from) {
  To* const data = reinterpret_cast<To*>(view.data);
  for_each_run(view, range, [=, &view](int64_t offset, int64_t step, int64_t length, int64_t position) __attribute__((always_inline)) {
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

// kLanes partial sums in double, then a tree.
template <typename T>
FUSED_ELBO_INLINE void add_group(const T* values, double* lanes) {
  FUSED_ELBO_INDEPENDENT
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[lane];
}

template <typename T>
FUSED_ELBO_INLINE double sum_lanes(const T* values, int64_t count) {
  alignas(64) double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = 0;
  int64_t i = 0;
  if (sizeof(T) == 4) {
    // Four floats are added as floats first: three roundings, a quarter of the conversions.
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      FUSED_ELBO_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) {
        const T* const v = values + i + lane;
        lanes[lane] += static_cast<double>((v[0] + v[kLanes]) + (v[2 * kLanes] + v[3 * kLanes]));
      }
    }
  }
  // Between loops over one array: merged, g++ keeps its elements in scalar registers.
  asm volatile("" : "+m"(lanes));
  for (; i + kLanes <= count; i += kLanes) add_group(values + i, lanes);
  if (i < count) {
    alignas(64) T tail[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) tail[lane] = i + lane < count ? values[i + lane] : T(0);
    asm volatile("" : "+m"(tail), "+m"(lanes));
    add_group(tail, lanes);
  }
  asm volatile("" : "+m"(lanes));
  double half[kLanes / 2], quarter[kLanes / 4];
  for (int lane = 0; lane < kLanes / 2; ++lane) half[lane] = lanes[lane] + lanes[lane + kLanes / 2];
  for (int lane = 0; lane < kLanes / 4; ++lane) quarter[lane] = half[lane] + half[lane + kLanes / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
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

double read(const View& view, int64_t sample, int64_t row, int64_t element) {
  const char* const at = view.data + offset_of(view, sample, row, element) * item_bytes(view.dtype);
  switch (view.dtype) {
    case DType::kFloat32:
      return widen(*reinterpret_cast<const float*>(at));
    case DType::kFloat64:
      return widen(*reinterpret_cast<const double*>(at));
    case DType::kBFloat16:
      return widen(*reinterpret_cast<const BFloat16*>(at));
    case DType::kFloat16:
      return widen(*reinterpret_cast<const Float16*>(at));
  }
  __builtin_unreachable();
}

void write(const View& view, int64_t sample, int64_t row, int64_t element, double value) {
  char* const at = view.data + offset_of(view, sample, row, element) * item_bytes(view.dtype);
  switch (view.dtype) {
    case DType::kFloat32:
      return narrow(value, *reinterpret_cast<float*>(at));
    case DType::kFloat64:
      return narrow(value, *reinterpret_cast<double*>(at));
    case DType::kBFloat16:
      return narrow(value, *reinterpret_cast<BFloat16*>(at));
    case DType::kFloat16:
      return narrow(value, *reinterpret_cast<Float16*>(at));
  }
}

double sum(const float* values, int64_t count) { return sum_lanes(values, count); }
double sum(const double* values, int64_t count) { return sum_lanes(values, count); }

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
