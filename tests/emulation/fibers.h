// Runs the threads of a CUDA block on one CPU thread: each has a stack of its own and gives way where it must wait for
// others.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace emulation {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxThreads = 1024;

struct Position {
  uint32_t thread = 0, threads = 0, block = 0, blocks = 0;
};

[[noreturn]] inline void fail(const char* what, const Position& at) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, at.block, at.thread);
  std::fflush(stderr);
  std::abort();
}

// Position of the running thread.
const Position& current();

// Waits until every thread of the block that has not returned is here.
void block_barrier();

// The bits that lane (own ^ lane_mask) gave. Fails where a lane of the mask has returned or the read one is not of the
// mask.
uint64_t shuffle_xor(uint32_t mask, uint64_t bits, uint32_t lane_mask);

// The order in which blocks, and threads that can run, are resumed.
enum class Order : int32_t { kForward, kReversed, kShuffled };
void set_order(Order order, uint32_t seed);

// body(user) in each thread of each block.
void run_grid(uint32_t blocks, uint32_t threads, void (*body)(const void* user), const void* user);

template <typename Params>
void launch(void (*kernel)(Params), uint32_t blocks, uint32_t threads, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  };
  const Call call{kernel, &params};
  run_grid(
      blocks, threads,
      [](const void* user) {
        const Call& c = *static_cast<const Call*>(user);
        c.kernel(*c.params);
      },
      &call);
}

}  // namespace emulation
