// Sums in a fixed order: lanes of a team, threads of a block, blocks of a row, rows of a batch. No float atomics.
//
// Results that several blocks share are written to the workspace; a ticket (an integer atomic) tells the block that
// arrives last, and that block adds them up in their order. Tickets start at 0: the launcher clears them with one
// memset node on the same stream. (Tickets that reset themselves would have to outlive the call, and two graph replays
// on two streams could then share them.)
#pragma once

#include "place.cuh"
#include "types.cuh"
#include "workspace.h"

namespace fused_elbo {
namespace cuda {

// Sum over the `lanes` neighbouring lanes (a power of two) that the calling lane belongs to. All 32 lanes take part.
template <typename Acc>
__device__ inline Acc team_sum(Acc value, int lanes) {
#pragma unroll 1
  for (int step = lanes >> 1; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Sum over the block, in every thread. In double whatever the dtype: it is a handful of additions, and the number of
// threads and blocks then costs no accuracy.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  value = team_sum(value, 32);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = warp_sums[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) total += warp_sums[i];
  return total;
}

// Whether this block is the last of `count` to come here. What the others wrote before is visible to the whole block
// then.
__device__ inline bool last_to_arrive(uint32_t* ticket, uint32_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The thread's share of parts[0..count).
__device__ inline double share_of_parts(const double* parts, int64_t count) {
  double sum = 0;
  // volatile: written by other blocks of this launch, so no load may go through the non-coherent path.
  const volatile double* v = parts;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += v[i];
  return sum;
}

// Adds up what the threads of a tile hold. on_row(outer row, value) is called by one thread for each row, when it is
// complete, and gives the row's contribution to the total. Returns true in the block that completed the total, which
// then is in `total`; never where `scalar` is false. Items are numbered from first_item on, of `items`.
template <typename Acc, typename OnRow>
__device__ inline bool climb(const Plan& plan, uint32_t tile, Acc value, const Tree& tree, bool scalar,
                             int64_t first_item, int64_t items, double& total, const OnRow& on_row) {
  enum Level { kTile, kRow, kGroup, kTotal };
  int level = plan.tiles_per_row > 1 ? kTile : kRow;
  int64_t index = tile;
  double share = static_cast<double>(value);
  bool rows_done = false;
  uint64_t outer_row = 0, part;

  if (plan.lanes != 0 && plan.tiles_per_row == 1) {  // whole rows in teams of the block
    Acc row = team_sum(value, plan.lanes);
    const OuterRow own = team_row(plan, keep(tile));
    bool writer = own.exists && leads_team(plan);
    int64_t outer = own.index;
    if (plan.segments > 1) {
      __shared__ Acc segment_values[kThreads];
      const uint32_t segments = static_cast<uint32_t>(plan.segments);
      if (leads_team(plan)) segment_values[threadIdx.x >> plan.lane_bits] = row;
      __syncthreads();
      outer = static_cast<int64_t>(tile) * plan.rows_per_tile + threadIdx.x;
      writer = threadIdx.x < plan.rows_per_tile && outer < plan.outer_rows();
      row = 0;
#pragma unroll 1
      for (uint32_t s = 0; writer && s < segments; ++s) row += segment_values[threadIdx.x * segments + s];
    }
    share = writer ? on_row(outer, row) : 0.0;
    if (!scalar) return false;
    rows_done = true;
  } else {
    divide(keep(tile), plan.tiles_per_row, outer_row, part);
  }

#pragma unroll 1
  for (;;) {
    double sum = block_sum(share);  // of node `index` of this level
    int64_t siblings, first;
    Parts parts;
    uint32_t* ticket;
    if (level == kRow && !rows_done) {
      __shared__ double contribution;
      if (threadIdx.x == 0) contribution = on_row(outer_row, static_cast<Acc>(sum));
      if (!scalar) return false;
      __syncthreads();
      sum = contribution;
    }
    if (level == kTile) {
      first = outer_row * plan.tiles_per_row;
      siblings = plan.tiles_per_row;
      parts = tree.rows;
      ticket = parts.tickets + outer_row;
    } else if (level == kRow) {
      index = first_item + (plan.tiles_per_row > 1 ? outer_row : static_cast<int64_t>(tile));
      const int64_t group = index / kItemsPerGroup;
      first = group * kItemsPerGroup;
      siblings = items - first < kItemsPerGroup ? items - first : kItemsPerGroup;
      parts = tree.items;
      ticket = parts.tickets + group;
    } else if (level == kGroup) {
      first = 0;
      index = index / kItemsPerGroup;
      siblings = (items + kItemsPerGroup - 1) / kItemsPerGroup;
      parts = tree.groups;
      ticket = parts.tickets;
    } else {
      total = sum;
      return true;
    }
    if (threadIdx.x == 0) parts.values[index] = sum;
    if (!last_to_arrive(ticket, static_cast<uint32_t>(siblings))) return false;
    share = share_of_parts(parts.values + first, siblings);
    ++level;
  }
}

template <typename Acc>
__device__ inline void finish(const Plan& plan, uint32_t tile, Acc value, const Result& result) {
  Acc* out = static_cast<Acc*>(result.out.data);
  const bool scalar = result.reduction != Reduction::kSample;
  double total;
  const bool complete =
      climb(plan, tile, value, result.tree, scalar, 0, item_count(plan), total, [&](int64_t outer, Acc row) {
        if (!scalar) {
          const int64_t sample = plan.samples > 1 ? outer / plan.rows : 0;
          out[sample * result.out.sample + (outer - sample * plan.rows) * result.out.row] = row;
        }
        return static_cast<double>(row);
      });
  if (complete && threadIdx.x == 0) *out = static_cast<Acc>(total * result.scale);
}

}  // namespace cuda
}  // namespace fused_elbo
