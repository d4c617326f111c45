// The places of positions in a KV cache.
#pragma once

#include "interface.h"

namespace fastattn::cpu {
namespace {

// The number of keys of batch entry `b`, clamped to what the cache can hold.
inline int64_t cached_length(const int64_t* lens, int64_t b, int64_t added, int64_t capacity, int64_t pages) {
  if (pages == 0) return 0;
  const int64_t length = lens[b] < 0 ? (lens[b] + added < 0 ? 0 : lens[b] + added)
                                     : (lens[b] > capacity - added ? capacity : lens[b] + added);
  return length;
}

// The page and slot of one position. A contiguous cache has one page per batch entry. A page that does not exist is
// clamped to one that does.
struct Place {
  int64_t page, slot;
};

template <class Cache>
inline Place locate(const Cache& c, int64_t b, int64_t position) {
  if (c.page_size == 0) return {b, position};
  const int64_t page = c.block_table[b * c.table_stride + position / c.page_size];
  return {page < 0 ? 0 : page < c.pages ? page : c.pages - 1, position % c.page_size};
}

// Whether the page of a position exists.
template <class Cache>
inline bool has_page(const Cache& c, int64_t b, int64_t position) {
  if (c.page_size == 0) return true;
  const int64_t page = c.block_table[b * c.table_stride + position / c.page_size];
  return page >= 0 && page < c.pages;
}

// Calls `visit(batch entry of k and v, row in them, place in the caches)` for every new row that has a place.
//
// One thread does this: a step appends a few kilobytes, and appending a prompt is one pass over its rows.
template <class Visit>
void for_new_rows(const FastattnAppend& a, const Visit& visit) {
  for (int64_t b = 0; b < a.batch; b++) {
    const bool packed = a.cu_seqlens_q != nullptr;
    const int64_t begin = packed ? a.cu_seqlens_q[b] : 0, new_len = packed ? a.cu_seqlens_q[b + 1] - begin : a.new_len;
    for (int64_t row = 0; row < new_len; row++) {
      const int64_t first = a.lens[b];
      if (first < -new_len || first >= a.capacity) break;  // before the sum below, which could overflow
      const int64_t position = first + row;
      if (position < 0) continue;
      if (position >= a.capacity || a.pages == 0) break;
      if (!has_page(a, b, position)) continue;  // clamped to a page that exists, it would overwrite another row
      visit(packed ? 0 : b, begin + row, locate(a, b, position));
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu
