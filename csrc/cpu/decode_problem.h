// The parts of a call over a KV cache: batch entries, what their rows see, and how their keys are divided.
#pragma once

#include "decode_tiles.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kSplitBytes = 1 << 19;  // of the cache that a split reads, where the bounds below allow it
constexpr int64_t kFewestKeys = 64, kMostKeys = 2048, kLongCache = 1024;

int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }

struct Range {
  int64_t start, end;
};

// A batch entry: its number, the batch entry and row where its queries begin, and how many queries and keys it has.
struct Entry {
  int64_t number, batch, first, q_len, length;

  Entry(const FastattnDecode& d, int64_t b)
      : number(b), batch(b), first(0), q_len(d.q_len), length(cached_length(d.lens, b, d.added, d.capacity, d.pages)) {
    if (d.cu_seqlens_q == nullptr) return;
    batch = 0, first = d.cu_seqlens_q[b], q_len = d.cu_seqlens_q[b + 1] - first;
    if (q_len > d.most_queries) q_len = 0;
  }
};

// The keys that one row of a batch entry sees.
Range visible(const FastattnDecode& d, const Entry& e, int64_t query) {
  const int64_t position = e.length - e.q_len + query;
  Range range{0, e.length};
  if (d.right != FASTATTN_OPEN) range.end = clamp(position + d.right + 1, 0, e.length);
  if (d.left != FASTATTN_OPEN) range.start = clamp(position - d.left, 0, e.length);
  if (d.kv_start != nullptr) range.start = clamp(d.kv_start[e.number], range.start, e.length);
  return range;
}

// The keys that some row of a batch entry sees.
Range visible(const FastattnDecode& d, const Entry& e) {
  return {visible(d, e, 0).start, visible(d, e, e.q_len - 1).end};
}

int64_t split_keys(const FastattnDecode& d, int64_t element_size) {
  const int64_t key_bytes = d.kv_heads * (d.head_dim + d.v_dim) * element_size;
  const int64_t fewest = d.capacity < kLongCache ? kFewestKeys : 2 * kBlock;  // a short cache keeps every thread busy
  return clamp(kSplitBytes / key_bytes, fewest, kMostKeys) / kFewestKeys * kFewestKeys;
}

int64_t split_count(const FastattnDecode& d, const Entry& e, int64_t keys) {
  if (e.q_len == 0) return 0;
  const Range range = visible(d, e);
  return most<int64_t>((range.end - range.start + keys - 1) / keys, 1);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
