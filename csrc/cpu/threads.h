// Tasks on threads, and memory for each thread. threads.cpp defines them for all engines.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::cpu {

// Runs task 0, 1, ... on up to `threads` threads. Each takes the next task when it is done, so callers put the longest
// first. A task's result depends on its number alone, not on the thread that runs it.
class Team {
 public:
  // `parallel` is a GOMP_parallel, or null.
  Team(int64_t threads, void* parallel) : threads_(threads), parallel_(parallel) {}

  int64_t threads() const { return threads_; }

  // `body(task)` returns false if memory runs out; then this does too.
  template <class Body>
  bool run(int64_t tasks, const Body& body) const {
    return run(tasks, [](const void* context, int64_t task) { return (*static_cast<const Body*>(context))(task); }, &body);
  }

 private:
  bool run(int64_t tasks, bool (*body)(const void*, int64_t), const void* context) const;

  int64_t threads_;
  void* parallel_;
};

// Uninitialised memory of this thread, at a multiple of 64 bytes, or null if there is none left. The next call on the
// same thread returns the same memory, so a task asks once, for all that it needs. Threads keep small arenas for later
// calls.
void* scratch_bytes(size_t bytes);

template <class T>
T* scratch(int64_t count) {
  return static_cast<T*>(scratch_bytes(size_t(count) * sizeof(T)));
}

// Asks for large pages if `bytes` is large: a new tensor has no pages yet, and each small page would be a page fault.
void ask_for_large_pages(void* data, size_t bytes);

// Memory that the threads of one call share.
class Shared {
 public:
  explicit Shared(size_t bytes);
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  // Null if there was no memory left.
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace fastattn::cpu
