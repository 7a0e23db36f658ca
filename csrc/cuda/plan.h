// How an index space is cut into tiles, units and accesses: host arithmetic on shapes and strides, the same for every
// kernel.
//
// A segment is what one thread team reads in a run: a row, or the part of a row that shares one learned scale. A unit
// is what a thread takes at once (Traits::kUnit elements along the last dimension). Two plans, chosen by the length of
// a segment alone, so that a row's sums have one order whatever the batch:
//   teams: up to 32 lanes per segment, 256 threads serve 256 / lanes segments (B = 10^6, N = 8: two lanes a row)
//   chunks: a block per chunk of a segment (B = 1, N = 10^8: 6 000 blocks), partial sums finished by the last block to
//   arrive
#pragma once

#include <cstdint>
#include <cstdlib>

#include "../args.h"
#include "../math/scalar.h"

namespace fused_elbo {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kMaxDims = kMaxEventDims + 1;  // an event dimension may be cut in two by the end of a segment
constexpr int kItemsPerGroup = 1024;         // partial results that one block adds up on the way to a scalar

// An operand with its strides in the order of the plan's dimensions. All counts are elements.
struct View {
  void* data = nullptr;
  int64_t sample = 0, row = 0;
  int64_t step[kMaxDims] = {0, 0, 0, 0, 0};  // per step of dimension i; a unit for the dimension that units lie along
  int64_t element = 0;                       // within a unit
  DType dtype = DType::kFloat32;
  FUSED_ELBO_HD bool present() const { return data != nullptr; }
};

// Whether something stands between an operand and the formulas: see elements.cuh.
inline bool changes_elements(const Scale& scale, const Operand& mask) {
  return scale.kind != ScaleKind::kPlain || mask.data != nullptr;
}

struct Plan {
  int64_t samples = 1, rows = 0;  // samples only where they have results of their own (likelihood)
  int64_t segments = 1;           // per row
  int64_t event = 0;

  // Dimensions [0, unit_dims) span the units of a segment, [unit_dims, dims) the segments of a row; fastest first in
  // each.
  int unit_dims = 1, dims = 1;
  int64_t count[kMaxDims] = {0, 1, 1, 1, 1};
  int unit_dim = 0;         // the dimension that units lie along
  int64_t unit_extent = 0;  // its length in elements
  int64_t units = 0;        // per segment

  int lanes = 0;              // per segment; 0: chunks
  int lane_bits = 0;          // log2 lanes
  uint32_t stride = 1;        // between two units of a thread: the threads that share a segment or chunk
  int64_t chunk_units = 0;    // of one block; chunks only
  int64_t chunks = 1;         // per segment
  int64_t tiles_per_row = 1;  // blocks that share a row
  int64_t rows_per_tile = 1;  // rows that share a block
  int64_t tiles = 0;

  FUSED_ELBO_HD int64_t outer_rows() const { return samples * rows; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements in a thread's unit where 16-byte accesses serve every operand, and where not.
inline int unit_elements(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat64 ? 4 : 8; }
constexpr int kStridedUnit = 4;

// The event dimensions of a call, cut so that the last `segment` elements are whole dimensions.
struct EventDims {
  int dims = 0;
  int leading = 0;  // dimensions before the segment
  int64_t size[kMaxDims];
  int from[kMaxDims];        // event dimension it came from
  int64_t factor[kMaxDims];  // its stride as a multiple of that dimension's
};

inline EventDims split_event(const Shape& shape, int64_t segment) {
  EventDims e;
  int64_t inner = shape.event;
  for (int d = 0; d < shape.event_dims; ++d) {
    const int64_t size = shape.size[d];
    const int64_t below = size == 0 ? 0 : inner / size;
    inner = below;
    if (below != 0 && segment > below && segment < size * below) {
      const int64_t low = segment / below;
      e.size[e.dims] = size / low;
      e.from[e.dims] = d;
      e.factor[e.dims++] = low;
      e.leading = e.dims;
      e.size[e.dims] = low;
      e.from[e.dims] = d;
      e.factor[e.dims++] = 1;
      continue;
    }
    e.size[e.dims] = size;
    e.from[e.dims] = d;
    e.factor[e.dims++] = 1;
    if (below >= segment && segment > 0) e.leading = e.dims;
  }
  if (e.leading == e.dims) {  // segments of one element
    e.size[e.dims] = 1;
    e.from[e.dims] = 0;
    e.factor[e.dims++] = 0;
  }
  return e;
}

// The memory layout of one call: dimensions, their order and whether 16-byte accesses serve every operand.
class Layout {
 public:
  // `guide`: the operand whose memory order neighbouring threads follow.
  Layout(const Shape& shape, int64_t segment, int unit, const Operand& guide) : shape_(shape), unit_(unit) {
    event_ = split_event(shape, segment);
    inner_ = event_.dims - event_.leading;
    // Dimensions of one element have no say in the layout.
    last_ = event_.dims - 1;
    order_[0] = last_;
    int n = 1;
    for (int d = event_.dims - 2; d >= event_.leading; --d) order_[n++] = d;
    if (inner_ > 1) {
      int fastest = 0;
      for (int i = 1; i < n; ++i) {
        if (event_.size[order_[i]] > 1 && closer(guide, order_[i], order_[fastest])) fastest = i;
      }
      const int d = order_[fastest];
      for (int i = fastest; i > 0; --i) order_[i] = order_[i - 1];
      order_[0] = d;
    }
    for (int d = event_.leading - 1; d >= 0; --d) order_[n++] = d;
    vector_ = inner_ == 1 && event_.size[last_] % unit == 0;
  }

  // A view of an operand; the call stays on 16-byte accesses only if this operand can be read so.
  View view(const Operand& operand, bool uniform = false) {
    View v;
    v.data = operand.data;
    v.dtype = operand.dtype;
    if (!v.present()) return v;
    v.sample = operand.sample_stride;
    v.row = operand.row_stride;
    for (int i = 0; i < event_.dims; ++i) {
      const int d = order_[i];
      v.step[i] = operand.stride[event_.from[d]] * event_.factor[d] * (d == last_ ? unit_ : 1);
    }
    v.element = event_.factor[last_] == 0 ? 0 : operand.stride[event_.from[last_]];
    if (uniform) return v;
    const int64_t per_access = 16 / item_size(operand.dtype);
    bool fits = v.element == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    if (shape_.samples > 1) fits = fits && v.sample % per_access == 0;
    if (shape_.rows > 1) fits = fits && v.row % per_access == 0;
    for (int i = inner_; i < event_.dims; ++i) fits = fits && v.step[i] % per_access == 0;
    vector_ = vector_ && fits;
    return v;
  }

  // The logical position n of an element in its row, as a view without data.
  View index() const {
    View v;
    v.row = shape_.event;
    v.element = 1;
    int64_t logical[kMaxDims];
    int64_t below = 1;
    for (int d = event_.dims - 1; d >= 0; --d) {
      logical[d] = below;
      below *= event_.size[d];
    }
    for (int i = 0; i < event_.dims; ++i) v.step[i] = logical[order_[i]] * (order_[i] == last_ ? unit_ : 1);
    return v;
  }

  bool vector() const { return vector_; }
  void forbid_vector() { vector_ = false; }

  Plan plan(bool samples_have_results) const {
    Plan p;
    p.samples = samples_have_results ? shape_.samples : 1;
    p.rows = shape_.rows;
    p.event = shape_.event;
    p.dims = event_.dims;
    p.unit_dims = inner_;
    p.units = 1;
    p.segments = 1;
    for (int i = 0; i < event_.dims; ++i) {
      const int d = order_[i];
      p.count[i] = d == last_ ? ceil_div(event_.size[d], unit_) : event_.size[d];
      if (d == last_) {
        p.unit_dim = i;
        p.unit_extent = event_.size[d];
      }
      (i < inner_ ? p.units : p.segments) *= p.count[i];
    }
    const int64_t outer = p.outer_rows();
    if (p.units <= kTeamUnits) {
      p.lanes = 1;
      while (p.lanes < p.units && p.lanes < 32) p.lanes = 1 << ++p.lane_bits;
      const int64_t teams = kThreads / p.lanes;
      if (p.segments <= teams) {
        p.rows_per_tile = teams / (p.segments > 0 ? p.segments : 1);
        p.tiles = ceil_div(outer, p.rows_per_tile);
      } else {
        p.tiles_per_row = ceil_div(p.segments, teams);
        p.tiles = outer * p.tiles_per_row;
      }
    } else {
      p.chunk_units = kMinChunkUnits;
      while (p.chunk_units < kMaxChunkUnits && p.units > p.chunk_units * 1024) p.chunk_units *= 2;
      p.chunks = ceil_div(p.units, p.chunk_units);
      p.tiles_per_row = p.segments * p.chunks;
      p.tiles = outer * p.tiles_per_row;
    }
    p.stride = p.lanes != 0 ? p.lanes : kThreads;
    return p;
  }

 private:
  static constexpr int64_t kTeamUnits = 128;
  // Four units a thread: enough to hide the start of a block, few enough that 64 rows of 16 384 fill the chip.
  static constexpr int64_t kMinChunkUnits = 4 * kThreads;
  static constexpr int64_t kMaxChunkUnits = 16 * kThreads;

  bool closer(const Operand& guide, int a, int b) const {
    const int64_t sa = std::llabs(guide.stride[event_.from[a]] * event_.factor[a]);
    const int64_t sb = std::llabs(guide.stride[event_.from[b]] * event_.factor[b]);
    return sa != 0 && (sb == 0 || sa < sb);
  }

  Shape shape_;
  int unit_;
  EventDims event_;
  int inner_ = 1, last_ = 0;
  int order_[kMaxDims];
  bool vector_ = true;
};

}  // namespace cuda
}  // namespace fused_elbo
