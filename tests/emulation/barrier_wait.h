// A barrier of threads that may also leave for good, as CUDA's does.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace emulation {

class BarrierWait {
 public:
  explicit BarrierWait(uint32_t threads = 0) : expected_(threads) {}

  void expect(uint32_t threads) { expected_ = threads; }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t round = round_;
    if (++waiting_ == expected_) {
      open();
    } else {
      condition_.wait(lock, [&] { return round_ != round; });
    }
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --expected_;
    if (waiting_ > 0 && waiting_ == expected_) open();
  }

 private:
  void open() {
    waiting_ = 0;
    ++round_;
    condition_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable condition_;
  uint32_t expected_, waiting_ = 0;
  uint64_t round_ = 0;
};

}  // namespace emulation
