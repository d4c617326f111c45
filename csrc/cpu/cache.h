// Where the positions of a KV cache lie.
#pragma once

#include "interface.h"

namespace fastattn::cpu {
namespace {

// Keys of batch entry `b`, cut to what the cache can hold.
inline int64_t cached_length(const int64_t* lens, int64_t b, int64_t added, int64_t capacity, int64_t pages) {
  if (pages == 0) return 0;
  const int64_t length = lens[b] < 0 ? (lens[b] + added < 0 ? 0 : lens[b] + added)
                                     : (lens[b] > capacity - added ? capacity : lens[b] + added);
  return length;
}

// (page, slot) of one position; a contiguous cache has one page per batch entry. Pages are cut to those that exist.
struct Place {
  int64_t page, slot;
};

template <class Cache>
inline Place locate(const Cache& c, int64_t b, int64_t position) {
  if (c.page_size == 0) return {b, position};
  const int64_t page = c.block_table[b * c.table_stride + position / c.page_size];
  return {page < 0 ? 0 : page < c.pages ? page : c.pages - 1, position % c.page_size};
}

// Whether the block table gives a position a page that exists.
template <class Cache>
inline bool has_page(const Cache& c, int64_t b, int64_t position) {
  if (c.page_size == 0) return true;
  const int64_t page = c.block_table[b * c.table_stride + position / c.page_size];
  return page >= 0 && page < c.pages;
}

}  // namespace
}  // namespace fastattn::cpu
