// An order in which tasks add to memory that they share, so that sums do not depend on threads.
#pragma once

#include <cstdint>

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// Tasks go through the same positions, upwards; some they leave out. At each, a task comes after the one before it. Since
// tasks start in their order, the one waited for is running or done.
class Turns {
 public:
  // `done` holds one number for each task, or is null: nothing is shared, nobody waits.
  Turns(int64_t* done, int64_t task) : done_(done), task_(task) {}
  ~Turns() {
    wait(INT64_MAX);  // who comes after this task must not overtake the one before
    pass(INT64_MAX);
  }
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;

  void wait(int64_t position) const {
    if (done_ == nullptr || task_ == 0) return;
    while (__atomic_load_n(done_ + task_ - 1, __ATOMIC_ACQUIRE) < position) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  void pass(int64_t position) const {
    if (done_ != nullptr) __atomic_store_n(done_ + task_, position, __ATOMIC_RELEASE);
  }

 private:
  int64_t* done_;
  int64_t task_;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
