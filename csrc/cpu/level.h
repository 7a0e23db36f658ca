// What a level offers to the dispatcher, and what the dispatcher knows of the machine.
#pragma once

#include <cstdint>

#include "../args.h"

namespace fused_elbo {
namespace cpu {

// Bytes of the last-level cache; outputs beyond it are stored past the caches.
int64_t last_level_cache_bytes();

#define FUSED_ELBO_DECLARE_LEVEL(level) \
  namespace level {                     \
  FUSED_ELBO_DECLARE_DEVICE             \
  }

#if defined(__x86_64__)
FUSED_ELBO_DECLARE_LEVEL(v2)
FUSED_ELBO_DECLARE_LEVEL(v3)
FUSED_ELBO_DECLARE_LEVEL(v4)
#else
FUSED_ELBO_DECLARE_LEVEL(generic)
#endif

}  // namespace cpu
}  // namespace fused_elbo
