// Tasks on threads, and memory for each thread. Defined in threads.cpp, which every engine shares.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::cpu {

// Runs task 0, 1, ... on up to `threads` threads; each takes the next one when it is done, so the longest come first.
// What a task computes depends on its number alone: results do not depend on who ran it.
class Team {
 public:
  // `parallel` is a GOMP_parallel, or null.
  Team(int64_t threads, void* parallel) : threads_(threads), parallel_(parallel) {}

  int64_t threads() const { return threads_; }

  // `body(task)` returns false where memory ran out; so does this.
  template <class Body>
  bool run(int64_t tasks, const Body& body) const {
    return run(tasks, [](const void* context, int64_t task) { return (*static_cast<const Body*>(context))(task); }, &body);
  }

 private:
  bool run(int64_t tasks, bool (*body)(const void*, int64_t), const void* context) const;

  int64_t threads_;
  void* parallel_;
};

// Uninitialised memory of this thread, at a multiple of 64 bytes, or null where there is none. The next call on the same
// thread gives the same memory again: a task asks once, for all it needs. Small arenas are kept for the next call.
void* scratch_bytes(size_t bytes);

template <class T>
T* scratch(int64_t count) {
  return static_cast<T*>(scratch_bytes(size_t(count) * sizeof(T)));
}

// Asks for large pages, where `bytes` are many: a new tensor has no pages yet, and each small one would be a fault.
void ask_for_large_pages(void* data, size_t bytes);

// Memory that the threads of one call share.
class Shared {
 public:
  explicit Shared(size_t bytes);
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  // Null where there is none.
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace fastattn::cpu
