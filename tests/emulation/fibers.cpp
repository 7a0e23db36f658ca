// The scheduler behind fibers.h.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;

#if defined(__x86_64__)
// Saves what a call must preserve, changes stacks, restores. (swapcontext asks the kernel for the signal mask each
// time.)
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

struct Context {
  void* stack_pointer = nullptr;
};

void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the entry never returns; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}

void switch_context(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
};

void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State : uint8_t { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  Context context;
  State state = State::kReady;
  uint32_t mask = 0, lane_mask = 0;
  uint64_t bits = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
};

Order g_order = Order::kForward;
uint32_t g_seed = 0;

// One block at a time, on the OS thread that launched it.
class Block {
 public:
  ~Block() {
    if (stacks_ != nullptr) munmap(stacks_, kMaxThreads * kStackBytes);
  }

  void run(uint32_t block, uint32_t blocks, uint32_t threads, void (*body)(const void*), const void* user,
           std::mt19937& random) {
    reserve();
    position = Position{0, threads, block, blocks};
    body_ = body;
    user_ = user;
    for (uint32_t i = 0; i < threads; ++i) {
      fibers_[i].state = State::kReady;
      start_context(fibers_[i].context, stack(i), kStackBytes, &Block::entry);
    }
    done_ = waiting_ = 0;
    std::vector<uint32_t> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (g_order == Order::kReversed) std::reverse(order.begin(), order.end());
    while (done_ < threads) {
      if (g_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
      bool moved = false;
      for (const uint32_t i : order) {
        if (fibers_[i].state != State::kReady) continue;
        moved = true;
        resume(i);
      }
      if (!moved) fail("deadlock: a barrier or shuffle that some threads never reach", position);
    }
  }

  void barrier() { wait(State::kAtBarrier); }

  uint64_t shuffle(uint32_t mask, uint64_t bits, uint32_t lane_mask) {
    const uint32_t lane = position.thread % kWarp;
    if ((mask >> lane & 1) == 0) fail("a shuffle whose mask lacks the calling lane", position);
    Fiber& self = fibers_[position.thread];
    self.mask = mask;
    self.lane_mask = lane_mask;
    self.bits = bits;
    wait(State::kAtShuffle);
    return self.bits;
  }

  Position position;

 private:
  void reserve() {
    if (stacks_ != nullptr) return;
    void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for stacks", position);
    stacks_ = static_cast<char*>(p);
    fibers_.resize(kMaxThreads);
  }

  char* stack(uint32_t i) const { return stacks_ + i * kStackBytes; }

  static void entry();

  void resume(uint32_t i) {
    position.thread = i;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack(i), kStackBytes);
#endif
    switch_context(scheduler_, fibers_[i].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // From a fiber back to the scheduler.
  void give_way(bool for_good) {
    Fiber& self = fibers_[position.thread];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, scheduler_stack_, scheduler_bytes_);
#else
    (void)for_good;
#endif
    switch_context(self.context, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

  void wait(State why) {
    fibers_[position.thread].state = why;
    if (why == State::kAtBarrier) ++waiting_;
    release(why);
    if (fibers_[position.thread].state != State::kReady) give_way(false);
  }

  // Lets those go on whose wait has ended with what the running thread just did.
  void release(State what) {
    if (waiting_ > 0 && waiting_ + done_ == position.threads) {
      for (uint32_t i = 0; i < position.threads; ++i) {
        if (fibers_[i].state == State::kAtBarrier) fibers_[i].state = State::kReady;
      }
      waiting_ = 0;
    }
    if (what == State::kAtShuffle) release_shuffle();
  }

  void release_shuffle() {
    const uint32_t warp = position.thread / kWarp * kWarp;
    const uint32_t mask = fibers_[position.thread].mask;
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (warp + lane >= position.threads || fibers_[warp + lane].state == State::kDone) {
        fail("a shuffle whose mask names a lane that has returned", position);
      }
      if (fibers_[warp + lane].state != State::kAtShuffle || fibers_[warp + lane].mask != mask) return;
    }
    uint64_t results[kWarp] = {};
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      const uint32_t source = lane ^ fibers_[warp + lane].lane_mask;
      if (source >= kWarp || (mask >> source & 1) == 0) fail("a shuffle from a lane outside its mask", position);
      results[lane] = fibers_[warp + source].bits;
    }
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      fibers_[warp + lane].bits = results[lane];
      fibers_[warp + lane].state = State::kReady;
    }
  }

  char* stacks_ = nullptr;
  std::vector<Fiber> fibers_;
  Context scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  uint32_t done_ = 0, waiting_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* user_ = nullptr;
};

thread_local std::unique_ptr<Block> t_block;

void Block::entry() {
  Block& block = *t_block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_bytes_);
#endif
  block.body_(block.user_);
  block.fibers_[block.position.thread].state = State::kDone;
  ++block.done_;
  block.release(State::kDone);
  block.give_way(true);
}

}  // namespace

const Position& current() { return t_block->position; }
void block_barrier() { t_block->barrier(); }
uint64_t shuffle_xor(uint32_t mask, uint64_t bits, uint32_t lane_mask) {
  return t_block->shuffle(mask, bits, lane_mask);
}

void set_order(Order order, uint32_t seed) {
  g_order = order;
  g_seed = seed;
}

void run_grid(uint32_t blocks, uint32_t threads, void (*body)(const void*), const void* user) {
  if (threads > kMaxThreads) fail("more than 1024 threads in a block", Position{});
  if (!t_block) t_block = std::make_unique<Block>();
  std::mt19937 random(g_seed);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (g_order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (g_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  for (const uint32_t block : order) t_block->run(block, blocks, threads, body, user, random);
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void fused_elbo_emulation_set_order(int32_t order, uint32_t seed) {
  emulation::set_order(static_cast<emulation::Order>(order), seed);
}
