// Sums in a fixed order: lanes of a team, threads of a block, blocks of a row, rows of a batch. No float atomics.
//
// Results that several blocks share are written to the workspace; a ticket (an integer atomic) tells the block that arrives last, and
// that block adds them up in their order. Tickets start at 0: the launcher clears them with one memset node on the same stream. (Tickets
// that reset themselves would have to outlive the call, and two graph replays on two streams could then share them.)
#pragma once

#include "place.cuh"
#include "plan.h"
#include "types.cuh"

namespace fused_elbo {
namespace cuda {

// Sum over the `lanes` neighbouring lanes (a power of two) that the calling lane belongs to. All 32 lanes take part.
template <typename Acc>
__device__ inline Acc team_sum(Acc value, int lanes) {
#pragma unroll 1
  for (int step = lanes >> 1; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Sum over the block, in every thread.
template <typename Acc>
__device__ inline Acc block_sum(Acc value) {
  __shared__ Acc warp_sums[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  Acc total = warp_sums[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) total += warp_sums[i];
  return total;
}

// Whether this block is the last of `count` to come here. What the others wrote before is visible to the whole block then.
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

// Sum of values[0..count) by the whole block, in double: the number of blocks must not cost accuracy.
__device__ inline double sum_of_partials(const double* values, int64_t count) {
  double sum = 0;
  // volatile: written by other blocks of this launch, so no load may go through the non-coherent path.
  const volatile double* v = values;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += v[i];
  return block_sum(sum);
}

// What the threads of a block know after its rows were added up. `finished` is the same in the whole block; where it is set, `writer`
// marks one thread for each row that the block finished, and that thread has the row's number and value.
template <typename Acc>
struct RowValue {
  bool finished, writer;
  int64_t outer;
  Acc value;
};

// Where the blocks that share a row leave their parts; unused when a row has one block.
struct RowParts {
  double* parts = nullptr;      // one per tile
  uint32_t* tickets = nullptr;  // one per row
};

template <typename Acc>
__device__ inline RowValue<Acc> row_values(const Plan& plan, const Place& place, uint32_t tile, Acc value, const RowParts& parts) {
  RowValue<Acc> row{true, threadIdx.x == 0, place.outer, value};
  if (plan.tiles_per_row > 1) {
    const Acc part = block_sum(value);
    if (threadIdx.x == 0) parts.parts[tile] = static_cast<double>(part);
    row.finished = last_to_arrive(parts.tickets + place.outer, static_cast<uint32_t>(plan.tiles_per_row));
    if (row.finished) {
      row.value = static_cast<Acc>(sum_of_partials(parts.parts + place.outer * plan.tiles_per_row, plan.tiles_per_row));
    }
    row.writer = row.writer && row.finished;
  } else if (plan.lanes == 0) {
    row.value = block_sum(value);
  } else {
    row.value = team_sum(value, plan.lanes);
    row.writer = place.active && place.lane == 0;
    if (plan.segments > 1) {
      __shared__ Acc segment_values[kThreads];
      const uint32_t segments = static_cast<uint32_t>(plan.segments);
      if (place.lane == 0) segment_values[threadIdx.x / plan.lanes] = row.value;
      __syncthreads();
      row.outer = static_cast<int64_t>(tile) * plan.rows_per_tile + threadIdx.x;
      row.writer = threadIdx.x < plan.rows_per_tile && row.outer < plan.outer_rows();
      row.value = 0;
      if (row.writer) {
#pragma unroll 1
        for (uint32_t s = 0; s < segments; ++s) row.value += segment_values[threadIdx.x * segments + s];
      }
    }
  }
  return row;
}

// The way from items (one per block, or one per row that several blocks share) to one number, in groups of kItemsPerGroup.
struct ScalarTree {
  uint32_t* group_tickets = nullptr;
  uint32_t* final_ticket = nullptr;
  double* items = nullptr;
  double* groups = nullptr;
  int64_t count = 0;  // items
};

FUSED_ELBO_HD inline int64_t item_count(const Plan& plan) {
  return plan.tiles_per_row == 1 ? plan.tiles : plan.outer_rows();
}

// Called by the whole block that finished `item`, each writer with its row's contribution. True in the block that has the total.
__device__ inline bool add_to_scalar(const ScalarTree& tree, int64_t item, double contribution, double& total) {
  const double value = block_sum(contribution);
  if (threadIdx.x == 0) tree.items[item] = value;
  const int64_t group = item / kItemsPerGroup;
  const int64_t first = group * kItemsPerGroup;
  const int64_t size = tree.count - first < kItemsPerGroup ? tree.count - first : kItemsPerGroup;
  if (!last_to_arrive(tree.group_tickets + group, static_cast<uint32_t>(size))) return false;
  total = sum_of_partials(tree.items + first, size);
  const int64_t groups = (tree.count + kItemsPerGroup - 1) / kItemsPerGroup;
  if (groups == 1) return true;
  if (threadIdx.x == 0) tree.groups[group] = total;
  if (!last_to_arrive(tree.final_ticket, static_cast<uint32_t>(groups))) return false;
  total = sum_of_partials(tree.groups, groups);
  return true;
}

// A per-row result or its sum over rows.
struct Result {
  View out;
  Reduction reduction = Reduction::kOff;
  double scale = 1;
  RowParts rows;
  ScalarTree tree;
};

template <typename Acc>
__device__ inline void finish(const Plan& plan, const Place& place, uint32_t tile, Acc value, const Result& result) {
  const RowValue<Acc> row = row_values(plan, place, tile, value, result.rows);
  if (!row.finished) return;
  Acc* out = static_cast<Acc*>(result.out.data);
  if (result.reduction == Reduction::kSample) {
    if (row.writer) {
      const int64_t sample = plan.samples > 1 ? row.outer / plan.rows : 0;
      out[sample * result.out.sample + (row.outer - sample * plan.rows) * result.out.row] = row.value;
    }
    return;
  }
  double total;
  const int64_t item = plan.tiles_per_row == 1 ? static_cast<int64_t>(tile) : row.outer;
  if (add_to_scalar(result.tree, item, row.writer ? static_cast<double>(row.value) : 0.0, total) && threadIdx.x == 0) {
    *out = static_cast<Acc>(total * result.scale);
  }
}

// Host: pieces of the workspace: tickets in front, so that one memset clears them, values behind. Two passes over the same requests:
// the first, without memory, only counts.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* base, const Workspace& counted)
      : tickets_(reinterpret_cast<uintptr_t>(base)), values_(tickets_ + counted.ticket_bytes_) {}

  uint32_t* tickets(int64_t count) {
    return reinterpret_cast<uint32_t*>(tickets_ + take(ticket_bytes_, count * static_cast<int64_t>(sizeof(uint32_t))));
  }
  double* values(int64_t count) {
    return reinterpret_cast<double*>(values_ + take(value_bytes_, count * static_cast<int64_t>(sizeof(double))));
  }
  RowParts row_parts(const Plan& plan) {
    if (plan.tiles_per_row <= 1) return {};
    RowParts parts;
    parts.tickets = tickets(plan.outer_rows());
    parts.parts = values(plan.tiles);
    return parts;
  }
  ScalarTree scalar_tree(int64_t items) {
    ScalarTree tree;
    const int64_t groups = ceil_div(items, kItemsPerGroup);
    tree.count = items;
    tree.group_tickets = tickets(groups);
    tree.final_ticket = tickets(1);
    tree.items = values(items);
    tree.groups = values(groups);
    return tree;
  }
  Result result(const Plan& plan, const View& out, Reduction reduction, double scale) {
    Result r;
    r.out = out;
    r.reduction = reduction;
    r.scale = scale;
    if (reduction == Reduction::kOff || reduction == Reduction::kNone) return r;
    r.rows = row_parts(plan);
    if (reduction != Reduction::kSample) r.tree = scalar_tree(item_count(plan));
    return r;
  }
  int64_t ticket_bytes() const { return ticket_bytes_; }
  int64_t bytes() const { return ticket_bytes_ + value_bytes_; }

 private:
  static int64_t take(int64_t& used, int64_t bytes) {
    const int64_t at = used;
    used += ceil_div(bytes, 16) * 16;
    return at;
  }
  uintptr_t tickets_ = 0, values_ = 0;
  int64_t ticket_bytes_ = 0, value_bytes_ = 0;
};

}  // namespace cuda
}  // namespace fused_elbo
