// An order in which tasks add to memory that they share, so that sums do not depend on threads.
#pragma once

#include <sched.h>

#include <cstdint>

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// Tasks go through the same positions, upwards; some they leave out. At each, a task comes after another one. Since tasks start
// in their order, the one waited for is running or done.
class Turns {
 public:
  // `done` holds one number for each task, or is null: nothing is shared, nobody waits.
  // `before`: how many tasks earlier the one that comes first has started.
  Turns(int64_t* done, int64_t task, int64_t before) : done_(done), task_(task), before_(before) {}
  ~Turns() {
    wait(INT64_MAX);  // who comes after this task must not overtake the one before
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
  static constexpr int kPatience = 4096;  // looks, until another thread may have the processor

  int64_t* done_;
  int64_t task_, before_;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
