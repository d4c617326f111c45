// POSIX threads, not those of C++: the library then needs no C++ library and runs on older systems.
#include "threads.h"

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace fastattn::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = 4 << 20;  // bytes that a thread keeps between calls
constexpr int64_t kMostOwn = 255;  // threads of its own that one call starts

// Under sanitizers memory has the exact size, so that they see an access to the first byte after it.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

void* allocate(size_t bytes) {
  void* data = nullptr;
  const size_t spare = kExact && bytes > 0 ? 0 : kAlignment;  // never 0 bytes
  return posix_memalign(&data, kAlignment, bytes + spare) == 0 ? data : nullptr;
}

// The memory of one thread, freed when the thread ends.
struct Arena {
  void* data;
  size_t size;

  void resize(size_t bytes) {
    std::free(data);
    data = bytes == 0 ? nullptr : allocate(bytes);
    size = data == nullptr ? 0 : bytes;
  }
};

thread_local Arena arena{nullptr, 0};

pthread_key_t at_exit;
const bool has_at_exit = pthread_key_create(&at_exit, [](void* own) { static_cast<Arena*>(own)->resize(0); }) == 0;

void trim_arena() {
  if (arena.size > kKept) arena.resize(0);
}

struct Work {
  bool (*body)(const void*, int64_t);
  const void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};

  void operator()() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (!body(context, task)) {
        good.store(false, std::memory_order_relaxed);
        break;
      }
    }
    trim_arena();
  }
};

void* enter(void* work) {
  (*static_cast<Work*>(work))();
  return nullptr;
}

void run_on_own_threads(Work& work, int64_t threads) {
  pthread_t others[kMostOwn];
  int64_t started = 0;
  while (started < kMostOwn && started < threads - 1 && pthread_create(&others[started], nullptr, enter, &work) == 0) {
    started++;
  }
  work();  // this thread works too, alone if no other could be started
  for (int64_t i = 0; i < started; i++) pthread_join(others[i], nullptr);
}

using Parallel = void(void (*)(void*), void*, unsigned, unsigned);

}  // namespace

bool Team::run(int64_t tasks, bool (*body)(const void*, int64_t), const void* context) const {
  if (tasks <= 0) return true;
  Work work{body, context, tasks};
  const int64_t threads = threads_ < tasks ? threads_ : tasks;
  if (threads <= 1) {
    work();
  } else if (parallel_ != nullptr) {
    // These are PyTorch's own threads: a second pool would compete for the cores while either pool spins.
    reinterpret_cast<Parallel*>(parallel_)([](void* work) { enter(work); }, &work, unsigned(threads), 0);
  } else {
    run_on_own_threads(work, threads);
  }
  return work.good.load(std::memory_order_relaxed);
}

void* scratch_bytes(size_t bytes) {
  if (arena.data == nullptr || arena.size < bytes || kExact) {
    arena.resize(bytes);
    if (has_at_exit) pthread_setspecific(at_exit, &arena);
  }
  return arena.data;
}

void ask_for_large_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t first = (uintptr_t(data) + kLarge - 1) / kLarge * kLarge, end = (uintptr_t(data) + bytes) / kLarge * kLarge;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // may be refused
#else
  (void)data, (void)bytes;
#endif
}

Shared::Shared(size_t bytes) : data_(allocate(bytes)) {}
Shared::~Shared() { std::free(data_); }

}  // namespace fastattn::cpu
