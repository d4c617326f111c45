// A fixed order in which tasks add to shared memory, so that sums do not depend on threads.
#pragma once

#include <sched.h>

#include <cstdint>

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// All tasks pass through the same rising positions and may skip some. At each position a task waits for an earlier one.
// Tasks start in order, so the one that it waits for is running or done.
class Turns {
 public:
  // `done` holds the last position of each task. If it is null, nothing is shared and no task waits.
  // A task waits for the task whose number is `before` less than its own.
  Turns(int64_t* done, int64_t task, int64_t before) : done_(done), task_(task), before_(before) {}
  ~Turns() {
    wait(INT64_MAX);  // the task after this one must not overtake the one before it
    pass(INT64_MAX);
  }
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;

  void wait(int64_t position) const {
    if (done_ == nullptr || task_ < before_) return;
    for (int tried = 1; __atomic_load_n(done_ + task_ - before_, __ATOMIC_ACQUIRE) < position; tried++) {
      if (tried % kPatience == 0) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  void pass(int64_t position) const {
    if (done_ != nullptr) __atomic_store_n(done_ + task_, position, __ATOMIC_RELEASE);
  }

 private:
  static constexpr int kPatience = 4096;  // tries before another thread may have the processor

  int64_t* done_;
  int64_t task_, before_;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
