// Where a thread works: tile to rows and segments, unit to coordinates, view to address.
#pragma once

#include "plan.h"
#include "types.cuh"

namespace fused_elbo {
namespace cuda {

// The share of one thread in a tile.
struct Place {
  int64_t sample, row;    // of the index space [samples, rows]
  int64_t outer, segment; // sample * rows + row; segment of that row
  int64_t first_unit;     // where the block's or the team's run begins
  uint32_t begin, end;    // the thread's units, counted from first_unit
  uint32_t stride;        // between two units of a thread
  int lane;               // in its team (or block)
  bool active;            // has a segment at all
};

// a / b and a % b for a that nearly always fits 32 bits, where division costs a fifth.
__device__ inline void divide(uint64_t a, uint64_t b, uint64_t& quotient, uint64_t& remainder) {
  if ((a >> 32) == 0 && (b >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    quotient = q;
    remainder = static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b);
  } else {
    quotient = a / b;
    remainder = a - quotient * b;
  }
}

__device__ inline Place find_place(const Plan& plan, uint64_t tile) {
  Place p;
  uint64_t outer, part;
  if (plan.lanes == 0) {
    uint64_t chunk, segment;
    divide(tile, plan.tiles_per_row, outer, part);
    divide(part, plan.chunks, segment, chunk);
    p.segment = segment;
    p.first_unit = chunk * plan.chunk_units;
    const int64_t left = plan.units - p.first_unit;
    p.begin = threadIdx.x;
    p.end = static_cast<uint32_t>(left < plan.chunk_units ? left : plan.chunk_units);
    p.stride = kThreads;
    p.lane = threadIdx.x;
    p.active = true;
  } else {
    const uint32_t team = threadIdx.x / plan.lanes;
    p.lane = threadIdx.x % plan.lanes;
    if (plan.tiles_per_row == 1) {
      const uint32_t segments = static_cast<uint32_t>(plan.segments);
      const uint32_t local_row = segments == 1 ? team : team / segments;
      p.segment = segments == 1 ? 0 : team - local_row * segments;
      outer = tile * plan.rows_per_tile + local_row;
      p.active = static_cast<int64_t>(local_row) < plan.rows_per_tile && static_cast<int64_t>(outer) < plan.outer_rows();
    } else {
      divide(tile, plan.tiles_per_row, outer, part);
      p.segment = part * (kThreads / plan.lanes) + team;
      p.active = p.segment < plan.segments;
    }
    p.first_unit = 0;
    p.begin = p.lane;
    p.end = p.active ? static_cast<uint32_t>(plan.units) : 0;
    p.stride = plan.lanes;
  }
  p.outer = outer;
  uint64_t sample = 0, row = outer;
  if (plan.samples > 1) divide(outer, plan.rows, sample, row);
  p.sample = sample;
  p.row = row;
  return p;
}

// Coordinates along the plan's dimensions [first, last) of a running index.
struct Coordinates {
  int64_t at[kMaxDims];
};

__device__ inline void find_coordinates(const Plan& plan, int first, int last, uint64_t index, Coordinates& c) {
#pragma unroll
  for (int i = 0; i < kMaxDims; ++i) {
    if (i < first || i >= last) continue;
    if (i == last - 1) {
      c.at[i] = index;
    } else {
      uint64_t quotient, remainder;
      divide(index, plan.count[i], quotient, remainder);
      c.at[i] = remainder;
      index = quotient;
    }
  }
}

__device__ inline int64_t offset(const View& view, int first, int last, const Coordinates& c) {
  int64_t total = 0;
#pragma unroll
  for (int i = 0; i < kMaxDims; ++i) {
    if (i >= first && i < last) total += c.at[i] * view.step[i];
  }
  return total;
}

// First element of the place's segment.
__device__ inline int64_t segment_offset(const Plan& plan, const View& view, const Place& p) {
  int64_t total = p.sample * view.sample + p.row * view.row;
  if (plan.segments > 1) {
    Coordinates c;
    find_coordinates(plan, plan.unit_dims, plan.dims, p.segment, c);
    total += offset(view, plan.unit_dims, plan.dims, c);
  }
  return total;
}

// One unit of a segment. kVector: units lie one behind the other, 16-byte accesses.
template <bool kVector>
struct Unit {
  int64_t first;  // kVector: the element
  Coordinates c;
  int unit_dims;
  int valid;

  __device__ Unit(const Plan& plan, int64_t unit, int elements) : unit_dims(plan.unit_dims), valid(elements) {
    if constexpr (kVector) {
      first = unit * elements;
    } else {
      find_coordinates(plan, 0, unit_dims, unit, c);
      int64_t along = c.at[0];
#pragma unroll
      for (int i = 1; i < kMaxDims; ++i) {
        if (i == plan.unit_dim && i < unit_dims) along = c.at[i];
      }
      const int64_t left = plan.unit_extent - along * elements;
      if (left < elements) valid = static_cast<int>(left);
    }
  }

  __device__ int64_t at(const View& view) const {
    if constexpr (kVector) return first;
    return offset(view, 0, unit_dims, c);
  }

  template <typename T, typename Acc, int kUnit>
  __device__ void load(const View& view, int64_t base, Acc (&v)[kUnit]) const {
    const T* p = static_cast<const T*>(view.data) + base + at(view);
    if constexpr (kVector) {
      load_vector(p, v);
    } else {
      load_strided(p, view.element, valid, v);
    }
  }

  template <typename T, typename Acc, int kUnit>
  __device__ void store(const View& view, int64_t base, const Acc (&v)[kUnit]) const {
    T* p = static_cast<T*>(view.data) + base + at(view);
    if constexpr (kVector) {
      store_vector(p, v);
    } else {
      store_strided(p, view.element, valid, v);
    }
  }
};

}  // namespace cuda
}  // namespace fused_elbo
