// Which rows a block computes, in what order, which keys they see, and their tensor maps for TMA.
#pragma once

#include "interface.cuh"
#include "layout.cuh"

namespace fastattn {

enum Operand { kQueries, kKeys, kValues, kOut, kOutGradient, kQueryGradient, kKeyGradient, kValueGradient, kOperands };
constexpr int kForwardOperands = kOut + 1;

FASTATTN_HD constexpr bool of_query(Operand operand) {
  return operand == kQueries || operand == kOut || operand == kOutGradient || operand == kQueryGradient;
}

// A call, and what the host derives from it. A work is a block's rows of one tile of heads of one batch entry.
//
// The 64 rows of a consumer are `rows` query rows of `heads` heads, which share a key head: row i of head h is its row
// i * heads + h. If these are fewer than 64, the last rows of the consumer are unused.
struct Plan {
  FastattnForward f;
  int32_t heads, rows;
  int32_t group, head_tiles, pairs;  // query heads that share a key head; tiles of heads; the same in all batch entries
  int32_t row_tiles;                 // works of a tile of heads, in all packed sequences together
  int32_t works;
  int32_t section;  // tiles of heads, of all batch entries, whose keys and values stay in the L2 cache together
  int32_t apart[kForwardOperands][2];  // 0 if all heads, or batch entries, of an operand are one (stride 0), else 1
};

// Keys `begin` to `end` - 1; none if end <= begin.
struct Range {
  int begin, end;
};

// A batch entry, or a packed sequence and its first rows.
struct Extent {
  int q_start, q_len, k_start, kv_len;
  int64_t q_offset;
};

FASTATTN_HD constexpr int clamp(int64_t position, int length) {
  return int(position < 0 ? 0 : position < length ? position : length);
}

FASTATTN_HD constexpr bool packed(const FastattnForward& f) { return f.q_starts != nullptr; }

// The host cannot check that starts rise; where they do not, the sequence is empty.
FASTATTN_HD constexpr Extent extent_of(const FastattnForward& f, int entry) {
  const int64_t q_offset = f.q_offsets == nullptr ? f.q_offset : f.q_offsets[entry];
  if (!packed(f)) return {0, f.q_len, 0, f.kv_len, q_offset};
  const int q_start = clamp(f.q_starts[entry], f.q_len), q_len = clamp(f.q_starts[entry + 1], f.q_len) - q_start;
  const int k_start = clamp(f.k_starts[entry], f.kv_len), room = clamp(f.k_starts[entry + 1], f.kv_len) - k_start;
  const int kv_len = f.k_used == nullptr ? room : clamp(f.k_used[entry], room);
  return {q_start, q_len, k_start, kv_len, q_offset == FASTATTN_ENDS ? kv_len - q_len : q_offset};
}

// The keys that a query row sees.
FASTATTN_HD constexpr Range visible_keys(const FastattnForward& f, const Extent& e, int row) {
  return {clamp(row + e.q_offset - f.left, e.kv_len), clamp(row + e.q_offset + f.right + 1, e.kv_len)};
}

// The number of entries that have heads of their own.
FASTATTN_HD constexpr int entries(const FastattnForward& f) { return packed(f) ? 1 : f.batch; }

// The distance between the two statistics of a row.
FASTATTN_HD constexpr int64_t statistics_plane(const FastattnForward& f) {
  return int64_t(entries(f)) * f.q_heads * f.q_len;
}

FASTATTN_HD constexpr int divide_up(int length, int size) { return (length + size - 1) / size; }

// The tiles of keys that some of `rows` query rows from `first` on see.
template <class Shape>
FASTATTN_HD constexpr Range key_tiles(const FastattnForward& f, const Extent& e, int first, int rows) {
  const int last = first + rows < e.q_len ? first + rows - 1 : e.q_len - 1;
  return {visible_keys(f, e, first).begin / Shape::kKeys, divide_up(visible_keys(f, e, last).end, Shape::kKeys)};
}

struct Work {
  int entry;  // batch entry or sequence
  Extent extent;
  int head, kv_head;     // the first head of its tile
  int first;             // query row; past the last one if there is nothing to do
  int first_key, tiles;  // tiles of keys, and where the first of them begins

  FASTATTN_HD bool empty() const { return first >= extent.q_len; }
};

// The rows of packed sequences, and where each sequence begins.
struct Starts {
  const int32_t* at;
  int length, sequences;
};
FASTATTN_HD constexpr Starts query_starts(const FastattnForward& f) { return {f.q_starts, f.q_len, f.batch}; }
FASTATTN_HD constexpr Starts key_starts(const FastattnForward& f) { return {f.k_starts, f.kv_len, f.batch}; }

// The first tile of rows reserved for packed sequence s. Up to the first one of the next sequence there are enough
// tiles for any length, so that no sum over the sequences is needed.
FASTATTN_HD constexpr int first_tile(const Starts& starts, int sequence, int rows) {
  return clamp(starts.at[sequence], starts.length) / rows + sequence;
}

// The sequence of a tile of rows: the last one whose first tile is not later.
FASTATTN_HD constexpr int sequence_of(const Starts& starts, int tile, int rows) {
  int sequence = 0, after = starts.sequences;
  while (after - sequence > 1) {
    const int middle = sequence + (after - sequence) / 2;
    if (first_tile(starts, middle, rows) <= tile) sequence = middle;
    else after = middle;
  }
  return sequence;
}

// The number of tiles of `rows` rows in an entry, or in all packed sequences.
FASTATTN_HD constexpr int64_t count_tiles(const FastattnForward& f, int length, int rows) {
  return packed(f) ? length / rows + int64_t(f.batch) : (int64_t(length) + rows - 1) / rows;
}

// Works in the order in which blocks take them: block b has b, b + blocks, b + 2 blocks, ...
//
// They come section by section, so that blocks that read the same keys find them in the cache; heads of one group are
// neighbours. Inside a section the last rows come first: under causal order they see the most keys, and long works must
// not start last.
template <class Shape>
FASTATTN_HD Work work_at(const Plan& plan, int index) {
  const FastattnForward& f = plan.f;
  const int start = index / (plan.section * plan.row_tiles) * plan.section;
  const int heads = start + plan.section < plan.pairs ? plan.section : plan.pairs - start;
  const int inside = index - start * plan.row_tiles, rows = Shape::kConsumers * plan.rows;
  const int pair = start + inside % heads;
  int tile = plan.row_tiles - 1 - inside / heads;
  Work work;
  work.entry = pair / plan.head_tiles;
  work.head = pair % plan.head_tiles * plan.heads;
  work.kv_head = work.head / plan.group;
  if (packed(f)) {
    work.entry = sequence_of(query_starts(f), tile, rows);
    tile -= first_tile(query_starts(f), work.entry, rows);
  }
  work.extent = extent_of(f, work.entry);
  work.first = tile * rows;
  const Range tiles = key_tiles<Shape>(f, work.extent, work.first, rows);
  work.first_key = tiles.begin * Shape::kKeys;
  work.tiles = tiles.end > tiles.begin ? tiles.end - tiles.begin : 0;
  return work;
}

// The first element of a box in the coordinates of operand_map: row, head or tile of heads, batch entry.
struct Place {
  int row, head, batch;
};
// `apart`: of the operand, as in Plan.
FASTATTN_HD Place place_of(const FastattnForward& f, bool query, const int32_t (&apart)[2], int entry, int head,
                           const Extent& e, int row) {
  if (!packed(f)) return {row, head * apart[0], entry * apart[1]};
  const int length = query ? e.q_len : e.kv_len;
  return {(query ? f.q_len : f.kv_len) - length + row, head * apart[0], (query ? e.q_start : e.k_start) + length};
}
FASTATTN_HD Place place_of(const Plan& plan, Operand operand, const Work& work, const Extent& e, int row) {
  const bool query = of_query(operand);
  const int head = query ? work.head / plan.heads : work.kv_head;
  return place_of(plan.f, query, plan.apart[operand], work.entry, head, e, row);
}

// The query heads whose keys and values fit into most of an H100's L2 cache of 50 MB; whole groups of heads.
inline int section_heads(const FastattnForward& f) {
  constexpr int64_t cache = 32 << 20;
  const int64_t bytes = 4 * int64_t(f.kv_len > 0 ? f.kv_len : 1) * f.head_dim;
  const int64_t group = f.q_heads / f.kv_heads, pairs = int64_t(entries(f)) * f.q_heads;
  const int64_t heads = (cache / bytes > 0 ? cache / bytes : 1) * group;
  return int(heads < pairs ? heads : pairs);
}

// The tensor map of an operand: sizes and strides of (D, heads of a tile, rows, tiles of heads, batch entries), and the
// heads and rows of a box.
//
// A box of a batch entry ends with the tensor. A box of a packed sequence must end with its sequence, so that nothing
// else is read or written. The map therefore has one batch entry for every row at which a sequence can end, with the N
// rows before that row. Row i of a sequence of n rows is row N - n + i of the entry of its end. The entries overlap:
// that of end 0 begins N rows before the tensor, and nothing is ever requested there.
struct OperandMap {
  const void* base;
  int64_t size[5];
  int64_t stride[4];  // bytes, of all but the elements of a row
  int box_heads, box_rows;
};

inline OperandMap operand_map(const FastattnForward& f, const void* base, const int64_t* stride, bool query, int heads,
                              int box_rows) {
  const int64_t rows = query ? f.q_len : f.kv_len, tiles = (query ? f.q_heads : f.kv_heads) / heads;
  OperandMap map = {base, {f.head_dim, heads, rows, tiles, f.batch}, {}, heads, box_rows};
  for (int i = 0; i < 2; ++i) {
    if (stride[1 - i] == 0) map.size[3 + i] = 1;
  }
  const int64_t all[] = {stride[1], stride[2], stride[1] * heads, stride[0]};
  for (int i = 0; i < 4; ++i) {  // a dimension of size 1 gets any stride, since TMA refuses 0
    map.stride[i] = map.size[i + 1] <= 1 ? 2 * f.head_dim : 2 * all[i];
  }
  if (packed(f)) {
    map.size[4] = rows + 1;
    map.stride[3] = map.stride[1];
    map.base = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(map.base) - uintptr_t(rows * map.stride[1]));
  }
  return map;
}

template <class Shape>
OperandMap operand_map(const Plan& plan, Operand operand) {
  const FastattnForward& f = plan.f;
  const void* const bases[] = {f.q, f.k, f.v, f.out};
  const int64_t* const strides[] = {f.q_stride, f.k_stride, f.v_stride, f.out_stride};
  const bool query = of_query(operand);
  return operand_map(f, bases[operand], strides[operand], query, query ? plan.heads : 1,
                     query ? plan.rows : Shape::kKeys);
}

// The number of works if a tile has this many heads; 0 without queries.
inline int64_t count_works(const FastattnForward& f, int heads) {
  if (f.q_len == 0 || f.batch == 0) return 0;
  const int64_t rows = block_rows(f.head_dim) / kGroupRows * (kGroupRows / heads);
  return count_tiles(f, f.q_len, rows) * entries(f) * (f.q_heads / heads);
}

// The heads of a tile: all that share a key head if this makes fewer works, as for short or packed sequences, else 1. A
// box of several heads needs a stride from one to the next.
inline int heads_of_tile(const FastattnForward& f) {
  const int group = f.q_heads / f.kv_heads;
  const bool possible = group <= kGroupRows && f.q_stride[1] != 0 && f.out_stride[1] != 0;
  return possible && count_works(f, group) < count_works(f, 1) ? group : 1;
}

inline Plan make_plan(const FastattnForward& f) {
  Plan plan = {};
  plan.f = f;
  plan.heads = heads_of_tile(f);
  plan.rows = kGroupRows / plan.heads;
  plan.group = f.q_heads / f.kv_heads;
  plan.head_tiles = f.q_heads / plan.heads;
  plan.pairs = entries(f) * plan.head_tiles;
  plan.works = int32_t(count_works(f, plan.heads));
  plan.row_tiles = plan.works / plan.pairs;
  plan.section = section_heads(f) / plan.heads;
  const int64_t* const strides[] = {f.q_stride, f.k_stride, f.v_stride, f.out_stride};
  for (int operand = 0; operand < kForwardOperands; ++operand) {
    for (int i = 0; i < 2; ++i) plan.apart[operand][i] = strides[operand][1 - i] != 0;
  }
  return plan;
}

}  // namespace fastattn
