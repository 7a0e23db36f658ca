// fibers.h with an OS thread per CUDA thread, for ThreadSanitizer: a barrier or shuffle orders what it should and
// nothing else.
#include <barrier_wait.h>

#include <mutex>
#include <thread>
#include <vector>

#include "fibers.h"

namespace emulation {
namespace {

struct Warp {
  BarrierWait before, after;
  uint64_t bits[kWarp] = {};
};

struct Block {
  explicit Block(uint32_t threads) : barrier(threads), warps((threads + kWarp - 1) / kWarp) {
    for (uint32_t w = 0; w < warps.size(); ++w) {
      const uint32_t lanes = threads - w * kWarp < kWarp ? threads - w * kWarp : kWarp;
      warps[w].before.expect(lanes);
      warps[w].after.expect(lanes);
    }
  }
  BarrierWait barrier;
  std::vector<Warp> warps;
};

thread_local Position t_position;
thread_local Block* t_block = nullptr;

}  // namespace

const Position& current() { return t_position; }
void block_barrier() { t_block->barrier.wait(); }

uint64_t shuffle_xor(uint32_t mask, uint64_t bits, uint32_t lane_mask) {
  if (mask != 0xffffffffu) fail("only whole warps shuffle here", t_position);
  Warp& warp = t_block->warps[t_position.thread / kWarp];
  const uint32_t lane = t_position.thread % kWarp;
  warp.bits[lane] = bits;
  warp.before.wait();
  const uint64_t result = warp.bits[lane ^ lane_mask];
  warp.after.wait();
  return result;
}

void set_order(Order, uint32_t) {}  // the operating system's

void run_grid(uint32_t blocks, uint32_t threads, void (*body)(const void*), const void* user) {
  for (uint32_t block = 0; block < blocks; ++block) {
    Block shared(threads);
    std::vector<std::thread> running;
    for (uint32_t i = 0; i < threads; ++i) {
      running.emplace_back([&, i] {
        t_position = Position{i, threads, block, blocks};
        t_block = &shared;
        body(user);
        shared.barrier.leave();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulation
