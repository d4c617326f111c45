// The parts of a call: batch entries or packed sequences, heads, and the keys that a row sees.
#pragma once

#include "bias.h"
#include "dropout.h"
#include "operand.h"

#ifndef FASTATTN_KEPT  // a test sets fewer, so that few keys reach the other branch
#define FASTATTN_KEPT (2 << 20)
#endif

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kQueries = 64;          // rows of q that are computed together for a block of keys
constexpr int64_t kMostQueries = 192;     // the same in the forward pass of heads with more keys than the caches keep
constexpr int64_t kKeys = 128;            // a block of keys; the tile size of a block mask
constexpr int64_t kKept = FASTATTN_KEPT;  // bytes of keys and values that stay in the caches from one tile of queries to the next
constexpr int64_t kShort = 256;           // rows of a head that stay in the second level of cache until they are read
template <class T>
constexpr T kInfinity = T(__builtin_inf());

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys `begin .. end`.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline Range common(Range a, Range b) { return {most(a.begin, b.begin), least(a.end, b.end)}; }

// Calls `visit(first row, rows, end of the keys that they see)` for a group of rows, none of which sees a key from
// `end` on. It does so once, or for two parts if the first part sees fewer keys, as at the diagonal.
template <class Visit>
[[gnu::always_inline]] inline void for_parts(const Range* visible, int rows, int64_t end, Visit visit) {
  constexpr int kPart = 6;  // with fewer rows a product would wait for its own sums
  int64_t first = 0;
  for (int r = 0; r < least(kPart, rows); r++) first = most(first, visible[r].end);
  if (rows <= kPart || first >= end) return visit(0, rows, end);
  visit(0, kPart, first);
  visit(kPart, rows - kPart, end);
}

// One batch entry or packed sequence: its number, its place in memory, its lengths, the offset of its queries, and its
// first key that takes part.
struct Entry {
  int64_t number, batch, k_batch, q_first, k_first, q_len, kv_len, offset, kv_start;
};

template <class T>
struct Problem {
  const FastattnAttention& a;
  const FastattnOperands& o;
  Format<T> format = format_of<T>(a.dtype);

  bool packed() const { return o.cu_seqlens_q != nullptr; }
  int64_t entries() const { return packed() ? o.sequences : a.batch; }
  int64_t group() const { return a.q_heads / a.kv_heads; }

  Entry entry(int64_t number) const {
    Entry e{number, number, number, 0, 0, a.q_len, a.kv_len, a.q_offset, 0};
    if (packed()) {
      e.batch = 0;
      e.q_first = o.cu_seqlens_q[number];
      e.q_len = o.cu_seqlens_q[number + 1] - e.q_first;
    }
    if (o.cu_seqlens_k != nullptr) {
      e.k_batch = 0;
      e.k_first = o.cu_seqlens_k[number];
      e.kv_len = o.cu_seqlens_k[number + 1] - e.k_first;
    }
    if (o.seqused_k != nullptr) e.kv_len = most(0, least(o.seqused_k[number], e.kv_len));
    if (o.kv_start != nullptr) e.kv_start = most(0, least(o.kv_start[number], e.kv_len));
    if (o.q_offset != nullptr) {
      e.offset = most(least(o.q_offset[number], int64_t(1) << 30), -(int64_t(1) << 30));
    } else if (e.offset == FASTATTN_OPEN) {
      e.offset = e.kv_len - e.q_len;
    }
    return e;
  }

  // The keys that a row sees by causal order and window.
  Range visible(const Entry& e, int64_t row) const {
    Range keys{e.kv_start, e.kv_len};
    if (a.left != FASTATTN_OPEN) keys.begin = most(e.kv_start, row + e.offset - a.left);
    if (a.right != FASTATTN_OPEN) keys.end = least(e.kv_len, row + e.offset + a.right + 1);
    return keys.empty() ? Range{0, 0} : keys;
  }

  // The keys that some of the rows `first .. last` see.
  Range visible(const Entry& e, int64_t first, int64_t last) const {
    Range keys{e.kv_start, e.kv_len};
    if (a.left != FASTATTN_OPEN) keys.begin = most(e.kv_start, first + e.offset - a.left);
    if (a.right != FASTATTN_OPEN) keys.end = least(e.kv_len, last + e.offset + a.right);
    return keys.empty() ? Range{0, 0} : keys;
  }

  // The places of a block of keys that a row sees.
  Range seen(const Entry& e, int64_t row, int64_t key) const {
    const Range keys = visible(e, row);
    return common({keys.begin - key, keys.end - key}, {0, kKeys});
  }

  Rows<T> rows(const FastattnView& view, int64_t batch, int64_t head, int64_t first, int64_t width) const {
    const int64_t base = batch * view.stride[0] + head * view.stride[1] + first * view.stride[2];
    return {format, view.data, base, {view.stride[2], width, view.stride[3]}};
  }
  Rows<T> q_rows(const FastattnView& view, const Entry& e, int64_t head, int64_t width) const {
    return rows(view, e.batch, head, e.q_first, width);
  }
  Rows<T> k_rows(const FastattnView& view, const Entry& e, int64_t head, int64_t width) const {
    Rows<T> found = rows(view, o.block_table == nullptr ? e.k_batch : 0, head, e.k_first, width);
    if (o.block_table != nullptr) {
      found.pages = {o.block_table + e.number * o.table_stride, o.pages, o.page_size, view.stride[0]};
    }
    return found;
  }

  // Whether the rows of a head stay in the second level of cache until they are used.
  bool is_short(const Entry& e) const { return e.q_len <= kShort && e.kv_len <= kShort; }

  // The index of a head's row in lse, and in each half of the statistics.
  int64_t row_index(const Entry& e, int64_t head, int64_t row) const {
    return (e.batch * a.q_heads + head) * a.q_len + e.q_first + row;
  }
  int64_t all_rows() const { return a.batch * a.q_heads * a.q_len; }

  T slope(const Entry& e, int64_t head) const {
    return o.alibi_slopes == nullptr ? T(0) : static_cast<const T*>(o.alibi_slopes)[e.number * o.slopes_stride + head];
  }

  T keep_scale() const { return a.dropout_p >= 1.0 ? T(0) : T(1.0 / (1.0 - a.dropout_p)); }
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
