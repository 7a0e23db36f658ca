// How the work is cut up. A unit is what one task does at a time: some whole rows, or one segment of one row, small enough
// that its buffers stay in the nearest cache. The cut depends on the event alone, never on rows or threads, so that a
// row's result is the same alone and in a batch.
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

  // A segment is a multiple of quantum elements. single: no unit has more than one row.
  Units(int64_t samples, int64_t rows, int64_t event, int64_t quantum, bool single = false)
      : samples(samples), rows(rows), event(event) {
    if (event > kUnit) {
      segment = kUnit / quantum * quantum;
      segments = (event + segment - 1) / segment;
      return;
    }
    segment = event;
    if (event == 0 || single) return;
    rows_per_unit = kUnit / event;
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

FUSED_ELBO_INLINE int64_t whole_groups(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Sum in a fixed order that depends on count alone.
double sum(const float* values, int64_t count);
double sum(const double* values, int64_t count);

// Runs body(user, begin, end) over the units; a small call stays on its thread.
FUSED_ELBO_INLINE void for_units(const Context& context, int64_t units, void (*body)(void*, int64_t, int64_t), void* user) {
  if (units <= kGrain || context.parallel_for == nullptr) {
    if (units > 0) body(user, 0, units);
  } else {
    context.parallel_for(0, units, kGrain, body, user);
  }
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
