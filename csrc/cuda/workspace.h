// What blocks of one launch tell each other: parts of sums and the tickets that say who is last, laid out in the call's
// workspace.
#pragma once

#include "plan.h"

namespace fused_elbo {
namespace cuda {

// Where blocks leave their parts of one sum, and the tickets that find the last of them.
struct Parts {
  double* values = nullptr;
  uint32_t* tickets = nullptr;
};

// The way from blocks to rows to one number: parts of a row, one per tile; then items (tiles with whole rows, or else
// rows) in groups of kItemsPerGroup; then groups.
struct Tree {
  Parts rows;    // unused where a row has one block
  Parts items;   // these two unused where every row has its own result
  Parts groups;  // one ticket
};

FUSED_ELBO_HD inline int64_t item_count(const Plan& plan) {
  return plan.tiles_per_row == 1 ? plan.tiles : plan.outer_rows();
}

// A per-row result or its sum over rows.
struct Result {
  View out;
  Reduction reduction = Reduction::kOff;
  double scale = 1;
  Tree tree;
};

// Host: pieces of the workspace: tickets in front, so that one memset clears them, values behind. Two passes over the
// same requests: the first, without memory, only counts.
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
  Parts parts(int64_t count, int64_t sums) {
    Parts p;
    p.tickets = tickets(sums);
    p.values = values(count);
    return p;
  }
  Parts row_parts(const Plan& plan) { return plan.tiles_per_row > 1 ? parts(plan.tiles, plan.outer_rows()) : Parts(); }
  void scalar_parts(Tree& tree, int64_t items) {
    const int64_t groups = ceil_div(items, kItemsPerGroup);
    tree.items = parts(items, groups);
    tree.groups = parts(groups, 1);
  }
  Result result(const Plan& plan, const View& out, Reduction reduction, double scale) {
    Result r;
    r.out = out;
    r.reduction = reduction;
    r.scale = scale;
    if (reduction == Reduction::kOff || reduction == Reduction::kNone) return r;
    r.tree.rows = row_parts(plan);
    if (reduction != Reduction::kSample) scalar_parts(r.tree, item_count(plan));
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

// On the stream: zeros; or the sum of nothing times a scale, which is 0, or NaN where the scale is 1 / 0 (a mean over
// no rows).
void clear(void* data, int64_t bytes, void* stream);
void write_empty_sum(void* data, int64_t bytes, double scale, void* stream);

}  // namespace cuda
}  // namespace fused_elbo
