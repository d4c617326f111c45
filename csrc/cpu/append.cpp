#include "append.h"

#include <cstring>

#include "cache.h"

namespace fastattn::cpu {
namespace {

template <class Element>
void copy_row(Element* to, int64_t to_stride, const Element* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, size_t(count) * sizeof(Element));
    return;
  }
  for (int64_t i = 0; i < count; i++) to[i * to_stride] = from[i * from_stride];
}

template <class Element>
void copy_heads(const FastattnAppend& a, const FastattnView& cache, const FastattnView& rows, int64_t width, int64_t b,
                int64_t row, Place place) {
  Element* to = static_cast<Element*>(cache.data) + place.page * cache.stride[0] + place.slot * cache.stride[1];
  const Element* from = static_cast<const Element*>(rows.data) + b * rows.stride[0] + row * rows.stride[2];
  for (int64_t head = 0; head < a.kv_heads; head++) {
    copy_row(to + head * cache.stride[2], cache.stride[3], from + head * rows.stride[1], rows.stride[3], width);
  }
}

// On one thread: a step appends some kilobytes, and a prompt's rows are read once more than they are computed with.
template <class Element>
void append_as(const FastattnAppend& a) {
  for (int64_t b = 0; b < a.batch; b++) {
    const bool packed = a.cu_seqlens_q != nullptr;
    const int64_t begin = packed ? a.cu_seqlens_q[b] : 0, new_len = packed ? a.cu_seqlens_q[b + 1] - begin : a.new_len;
    for (int64_t row = 0; row < new_len; row++) {
      const int64_t first = a.lens[b];
      if (first < -new_len || first >= a.capacity) break;  // first, so that the sum below cannot overflow
      const int64_t position = first + row;
      if (position < 0) continue;
      if (position >= a.capacity || a.pages == 0) break;
      if (!has_page(a, b, position)) continue;  // cut to a page that exists, it would destroy another row
      const Place place = locate(a, b, position);
      copy_heads<Element>(a, a.k_cache, a.k, a.head_dim, packed ? 0 : b, begin + row, place);
      copy_heads<Element>(a, a.v_cache, a.v, a.v_dim, packed ? 0 : b, begin + row, place);
    }
  }
}

}  // namespace

void append_rows(const FastattnAppend& a) {
  switch (a.element_size) {
    case 2: return append_as<uint16_t>(a);
    case 4: return append_as<uint32_t>(a);
    default: return append_as<uint64_t>(a);
  }
}

}  // namespace fastattn::cpu
