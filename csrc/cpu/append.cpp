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

template <class Element>
void append_as(const FastattnAppend& a) {
  for_new_rows(a, [&](int64_t b, int64_t row, Place place) {
    copy_heads<Element>(a, a.k_cache, a.k, a.head_dim, b, row, place);
    copy_heads<Element>(a, a.v_cache, a.v, a.v_dim, b, row, place);
  });
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
