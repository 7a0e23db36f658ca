// How the work is cut up. A unit is what one task does at a time: some whole rows, or one segment of one row, small
// enough that its buffers stay in the nearest cache. The cut depends on the event alone, never on rows or threads, so
// that a row's result is the same alone and in a batch.
#pragma once

#include <cstdint>

#include "simd.h"
#include "view.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

constexpr int64_t kUnit = 2048;
// Buffers start at different places of a 4096-byte page: loads and stores at equal places would wait for each other.
constexpr int64_t kBuffer = kUnit + 80;
// A task of fewer units is not worth another thread.
constexpr int64_t kGrain = 6;

struct Units {
  int64_t samples, rows, event;
  int64_t rows_per_unit = 1, segments = 1, segment = 0;

  // A unit has at most limit elements, a segment is a multiple of quantum elements. single: no unit has more than one
  // row.
  Units(int64_t samples, int64_t rows, int64_t event, int64_t limit, int64_t quantum, bool single = false)
      : samples(samples), rows(rows), event(event) {
    if (event > limit) {
      segment = limit / quantum * quantum;
      segments = (event + segment - 1) / segment;
      return;
    }
    segment = event;
    if (event == 0 || single) return;
    rows_per_unit = limit / event;
    // Whole groups of kLanes let kernels work on the operands in place.
    int64_t whole = kLanes;
    while (whole > 1 && event * (whole / 2) % kLanes == 0) whole /= 2;
    if (rows_per_unit >= whole) rows_per_unit -= rows_per_unit % whole;
  }

  int64_t per_sample() const { return (rows + rows_per_unit - 1) / rows_per_unit * segments; }
  int64_t count() const { return event == 0 ? 0 : samples * per_sample(); }

  Range range(int64_t unit) const {
    const int64_t sample = unit / per_sample();
    const int64_t within = unit % per_sample();
    const int64_t row = within / segments * rows_per_unit;
    const int64_t first = within % segments * segment;
    return {sample, row, rows - row < rows_per_unit ? rows - row : rows_per_unit, first,
            event - first < segment ? event - first : segment};
  }
};

// Loops that sum or fetch take four groups per step.
constexpr int kStep = 4 * kLanes;

FUSED_ELBO_INLINE int64_t whole_groups(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Sums in a fixed order that depends on count alone: of one array, and of each of several rows that lie one behind the
// other.
double sum(const double* values, int64_t count);
void sum_rows(const float* values, int64_t rows, int64_t count, double* totals);
void sum_rows(const double* values, int64_t rows, int64_t count, double* totals);

// A sum of kLanes partial sums in double: a fixed tree.
FUSED_ELBO_INLINE double sum_tree(const double* lanes) {
  double half[kLanes / 2], quarter[kLanes / 4];
  for (int lane = 0; lane < kLanes / 2; ++lane) half[lane] = lanes[lane] + lanes[lane + kLanes / 2];
  for (int lane = 0; lane < kLanes / 4; ++lane) quarter[lane] = half[lane] + half[lane + kLanes / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// kLanes sums in double, kept in registers: stored and loaded again by every step they would fill the queue of stores
// that wait for memory.
class Sums {
 public:
  template <typename T>
  FUSED_ELBO_INLINE void add(const T* lanes) {
    alignas(64) double wide[kLanes];
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<double>(lanes[lane]);
    for (int p = 0; p < kParts; ++p) {
      Part part;
      __builtin_memcpy(&part, wide + p * kPart, sizeof(part));
      parts_[p] += part;
    }
  }
  FUSED_ELBO_INLINE double total() const {
    alignas(64) double lanes[kLanes];
    __builtin_memcpy(lanes, parts_, sizeof(lanes));
    return sum_tree(lanes);
  }

 private:
  static constexpr int kPart = kWidth / 2, kParts = kLanes / kPart;
  typedef double Part __attribute__((vector_size(8 * kPart)));
  Part parts_[kParts] = {};
};

// Each row's value for every element of a range.
template <typename T>
FUSED_ELBO_INLINE void fill_rows(const double* values, const Range& range, T* to) {
  // Past the end of a row: the next row overwrites it, and the last group is made whole.
  for (int64_t row = 0; row < range.rows; ++row) {
    const T value = static_cast<T>(values[row]);
    T* const at = to + row * range.count;
    for (int64_t i = 0; i < range.count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) at[i + lane] = value;
    }
  }
}

// Runs body(user, begin, end) over the units; a small call stays on its thread.
FUSED_ELBO_INLINE void for_units(const Context& context, int64_t units, void (*body)(void*, int64_t, int64_t),
                                 void* user) {
  if (units <= kGrain || context.parallel_for == nullptr) {
    if (units > 0) body(user, 0, units);
  } else {
    context.parallel_for(0, units, kGrain, body, user);
  }
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
