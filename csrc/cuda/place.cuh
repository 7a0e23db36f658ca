// Where a thread works: tile to rows and segments, unit to coordinates, view to address.
#pragma once

#include "plan.h"
#include "types.cuh"

namespace fused_elbo {
namespace cuda {

// The share of one thread in a tile.
struct Place {
  int64_t sample, row;     // of the index space [samples, rows]
  int64_t outer, segment;  // sample * rows + row; segment of that row
  int64_t first_unit;      // where the block's or the team's run begins
  uint32_t begin, end;     // the thread's units, counted from first_unit
  bool active;             // has a segment at all
};

// Whether the thread is the first of its team. (lanes is a power of two.)
__device__ inline bool leads_team(const Plan& plan) { return (threadIdx.x & (plan.lanes - 1)) == 0; }

// The row of a block or, where a block holds several, of a thread's team; and whether that row exists. Also called at
// the end of a kernel, with a tile that the compiler does not recognize, so that no register holds the answer
// meanwhile.
struct OuterRow {
  int64_t index;
  bool exists;
};
__device__ inline OuterRow team_row(const Plan& plan, uint64_t tile) {
  const uint32_t team = threadIdx.x >> plan.lane_bits;
  const uint32_t segments = static_cast<uint32_t>(plan.segments);
  const uint32_t local = segments == 1 ? team : team / segments;
  const int64_t index = tile * plan.rows_per_tile + local;
  return {index, static_cast<int64_t>(local) < plan.rows_per_tile && index < plan.outer_rows()};
}

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
    p.active = true;
  } else {
    const uint32_t team = threadIdx.x >> plan.lane_bits;
    if (plan.tiles_per_row == 1) {
      const OuterRow row = team_row(plan, tile);
      const uint32_t segments = static_cast<uint32_t>(plan.segments);
      p.segment = segments == 1 ? 0 : team % segments;
      outer = row.index;
      p.active = row.exists;
    } else {
      divide(tile, plan.tiles_per_row, outer, part);
      p.segment = part * (kThreads >> plan.lane_bits) + team;
      p.active = p.segment < plan.segments;
    }
    p.first_unit = 0;
    p.begin = threadIdx.x & (plan.lanes - 1);
    p.end = p.active ? static_cast<uint32_t>(plan.units) : 0;
  }
  p.outer = outer;
  uint64_t sample = 0, row = outer;
  if (plan.samples > 1) divide(outer, plan.rows, sample, row);
  p.sample = sample;
  p.row = row;
  return p;
}

// Offsets of several views at one index along the plan's dimensions [first, last). One pass of divisions serves all
// views.
template <int kViews>
__device__ inline void add_offsets(const Plan& plan, int first, int last, uint64_t index,
                                   const View* const (&views)[kViews], int64_t (&offsets)[kViews]) {
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    uint64_t coordinate = index;
    if (i < last - 1) divide(index, plan.count[i], index, coordinate);
#pragma unroll
    for (int v = 0; v < kViews; ++v) offsets[v] += static_cast<int64_t>(coordinate) * views[v]->step[i];
  }
}

// First elements of the place's segment, without the sample's share.
template <int kViews>
__device__ inline void segment_offsets(const Plan& plan, const Place& p, const View* const (&views)[kViews],
                                       int64_t (&offsets)[kViews]) {
#pragma unroll
  for (int v = 0; v < kViews; ++v) offsets[v] = p.sample * views[v]->sample + p.row * views[v]->row;
  if (plan.segments > 1) add_offsets(plan, plan.unit_dims, plan.dims, p.segment, views, offsets);
}

// Where a unit of a segment lies in each view, and how many of its elements exist. kVector: units lie one behind the
// other.
template <bool kVector, int kViews>
struct Unit {
  int64_t at[kViews];
  int valid;

  __device__ Unit(const Plan& plan, int64_t unit, int elements, const View* const (&views)[kViews],
                  const int64_t (&base)[kViews])
      : valid(elements) {
#pragma unroll
    for (int v = 0; v < kViews; ++v) at[v] = base[v] + (kVector ? unit * elements : 0);
    if constexpr (!kVector) {
      add_offsets(plan, 0, plan.unit_dims, unit, views, at);
      uint64_t along = unit, quotient = unit;
#pragma unroll 1
      for (int i = 0; i < plan.unit_dim; ++i) divide(quotient, plan.count[i], quotient, along);
      along = quotient;
      if (plan.unit_dim < plan.unit_dims - 1) divide(quotient, plan.count[plan.unit_dim], quotient, along);
      const int64_t left = plan.unit_extent - static_cast<int64_t>(along) * elements;
      if (left < elements) valid = static_cast<int>(left);
    }
  }
};

template <typename T, typename Acc, int kUnit>
__device__ inline void load_unit(const View& view, int64_t at, int valid, Acc (&v)[kUnit]) {
  if constexpr (kIsVector<T>) {
    load_vector(static_cast<const T*>(view.data) + at, v);
  } else {
    with_type_of(T(), view.dtype, [&](auto type) {
      load_strided(static_cast<const decltype(type)*>(view.data) + at, view.element, valid, v);
    });
  }
}

template <typename T, typename Acc, int kUnit>
__device__ inline void store_unit(const View& view, int64_t at, int valid, const Acc (&v)[kUnit]) {
  if constexpr (kIsVector<T>) {
    store_vector(static_cast<T*>(view.data) + at, v);
  } else {
    with_type_of(T(), view.dtype, [&](auto type) {
      store_strided(static_cast<decltype(type)*>(view.data) + at, view.element, valid, v);
    });
  }
}

// Units in arithmetic's dtype beside units of T: what is in nats.
template <typename T, typename Acc, int kUnit>
__device__ inline void load_nats(const View& view, int64_t at, int valid, Acc (&v)[kUnit]) {
  if constexpr (kIsVector<T>) {
    load_vector(static_cast<const Acc*>(view.data) + at, v);
  } else {
    load_strided(static_cast<const Acc*>(view.data) + at, view.element, valid, v);
  }
}

template <typename T, typename Acc, int kUnit>
__device__ inline void store_nats(const View& view, int64_t at, int valid, const Acc (&v)[kUnit]) {
  if constexpr (kIsVector<T>) {
    store_vector(static_cast<Acc*>(view.data) + at, v);
  } else {
    store_strided(static_cast<Acc*>(view.data) + at, view.element, valid, v);
  }
}

}  // namespace cuda
}  // namespace fused_elbo
