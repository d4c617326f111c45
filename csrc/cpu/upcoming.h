// The rows that a thread takes up after the present head, prefetched between products.
#pragma once

#include <optional>

#include "problem.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// A head that a thread takes up after the present one.
struct Following {
  Entry entry;
  int64_t kv_head, head;
  bool other_keys;  // than the present head's
};

// After a member of a task's group: the next member, or the first of the task `next`, which may be null. Nothing if one
// of the two heads is long.
template <class T, class Task>
std::optional<Following> following(
    const Problem<T>& problem, const Task& task, const Entry& entry, int64_t member, const Task* next) {
  if (!problem.is_short(entry)) return std::nullopt;
  if (member + 1 < problem.group()) {
    return Following{entry, task.kv_head, task.kv_head * problem.group() + member + 1, false};
  }
  if (next == nullptr) return std::nullopt;
  const Entry e = problem.entry(next->entry);
  if (!problem.is_short(e)) return std::nullopt;
  return Following{e, next->kv_head, next->kv_head * problem.group(), true};
}

// Rows of tensors in the order in which they are needed. All at once they would be more lines than a processor can wait
// for, and its loads would wait for them; a few before each product load while it computes.
template <class T>
class Upcoming {
 public:
  // Adds the rows of a head, unless their elements are apart.
  void add(const Rows<T>& rows, int64_t count) {
    if (rows.place.step != 1 || rows.pages.table != nullptr || count <= 0) return;
    const int64_t bytes = rows.format.bytes;
    parts_[parts_added_++] = {static_cast<const char*>(rows.data) + rows.offset(0) * bytes, rows.place.stride * bytes,
                              rows.place.width * bytes, count};
    rows_ += count;
  }

  // Divides the rows among this many calls of `fetch`.
  void divide(int64_t calls) { share_ = (rows_ + calls - 1) / most(calls, 1); }

  void fetch() {
    for (int64_t left = share_; left > 0 && part_ < parts_added_; left--) {
      Part& part = parts_[part_];
      for (int64_t i = 0; i < part.width; i += 64) fetch_line<2>(part.at + i);
      part.at += part.stride;
      if (--part.rows == 0) part_++;
    }
  }

 private:
  struct Part {
    const char* at;
    int64_t stride, width, rows;
  };

  static constexpr int kMostParts = 8;  // of a backward pass: q, k, v, out, dout and three gradients

  Part parts_[kMostParts];
  int parts_added_ = 0, part_ = 0;
  int64_t rows_ = 0, share_ = 0;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
