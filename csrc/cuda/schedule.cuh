// Which rows a block computes, in what order, and which keys they see.
#pragma once

#include "interface.cuh"
#include "layout.cuh"

namespace fastattn {

enum Operand { kQueries, kKeys, kValues, kOut, kOperands };

// A call and what the host derived from it. A work is a block's query rows of one head of one batch entry.
struct Plan {
  FastattnForward f;
  int32_t works;
  int32_t section;  // heads, of all batch entries, whose keys and values stay in the L2 cache together
  int32_t apart[kOperands][2];  // 0 where all heads, or all batch entries, of an operand are one (stride 0), else 1
};

// Keys from `begin`, before `end`; none where end <= begin.
struct Range {
  int begin, end;
};

FASTATTN_HD constexpr int clamp(int64_t position, int length) {
  return int(position < 0 ? 0 : position < length ? position : length);
}

// What a query row sees.
FASTATTN_HD constexpr Range visible_keys(const FastattnForward& f, int row) {
  return {clamp(row + f.q_offset - f.left, f.kv_len), clamp(row + f.q_offset + f.right + 1, f.kv_len)};
}

FASTATTN_HD constexpr int divide_up(int length, int size) { return (length + size - 1) / size; }

// Tiles of keys that some row of the block from row `first` sees.
template <class Shape>
FASTATTN_HD constexpr Range key_tiles(const FastattnForward& f, int first) {
  const int last = first + Shape::kRows < f.q_len ? first + Shape::kRows - 1 : f.q_len - 1;
  return {visible_keys(f, first).begin / Shape::kKeys, divide_up(visible_keys(f, last).end, Shape::kKeys)};
}

struct Work {
  int batch, head, kv_head;
  int first;            // query row
  int first_key, tiles;  // tiles of keys, and where the first of them begins
};

// Works in the order in which blocks take them: block b has b, b + blocks, b + 2 blocks, ...
//
// Section by section, so that the cache serves those who read the same keys; heads of one group are neighbours. Inside
// a section the last rows come first: under causal order they see most, and what is long must not start last.
template <class Shape>
FASTATTN_HD Work work_at(const Plan& plan, int index) {
  const FastattnForward& f = plan.f;
  const int row_tiles = divide_up(f.q_len, Shape::kRows), pairs = f.batch * f.q_heads;
  const int start = index / (plan.section * row_tiles) * plan.section;
  const int heads = start + plan.section < pairs ? plan.section : pairs - start;
  const int inside = index - start * row_tiles;
  const int pair = start + inside % heads;
  Work work;
  work.batch = pair / f.q_heads;
  work.head = pair % f.q_heads;
  work.kv_head = work.head / (f.q_heads / f.kv_heads);
  work.first = (row_tiles - 1 - inside / heads) * Shape::kRows;
  const Range tiles = key_tiles<Shape>(f, work.first);
  work.first_key = tiles.begin * Shape::kKeys;
  work.tiles = tiles.end > tiles.begin ? tiles.end - tiles.begin : 0;
  return work;
}

// Head and batch entry of an operand's box.
struct Place {
  int head, batch;
};
FASTATTN_HD Place place_of(const Plan& plan, Operand operand, const Work& work) {
  const bool of_query = operand == kQueries || operand == kOut;
  return {(of_query ? work.head : work.kv_head) * plan.apart[operand][0], work.batch * plan.apart[operand][1]};
}

// The heads whose keys and values fit into most of an H100's L2 cache of 50 MB; whole groups of heads.
inline int section_heads(const FastattnForward& f) {
  constexpr int64_t cache = 32 << 20;
  const int64_t bytes = 4 * int64_t(f.kv_len > 0 ? f.kv_len : 1) * f.head_dim;
  const int64_t group = f.q_heads / f.kv_heads, pairs = int64_t(f.batch) * f.q_heads;
  const int64_t heads = (cache / bytes > 0 ? cache / bytes : 1) * group;
  return int(heads < pairs ? heads : pairs);
}

// What TMA is told of an operand: (D, rows, heads, batch), sizes and strides, and the rows of a box.
struct OperandMap {
  const void* base;
  int64_t size[4];
  int64_t stride[3];  // bytes, of row, head and batch entry
  int box_rows;
};

template <class Shape>
OperandMap operand_map(const Plan& plan, Operand operand) {
  const FastattnForward& f = plan.f;
  const bool of_query = operand == kQueries || operand == kOut;
  const void* const base[] = {f.q, f.k, f.v, f.out};
  const int64_t* const strides[] = {f.q_stride, f.k_stride, f.v_stride, f.out_stride};
  const int64_t* stride = strides[operand];
  const int64_t sizes[] = {of_query ? f.q_len : f.kv_len, of_query ? f.q_heads : f.kv_heads, f.batch};
  OperandMap map = {base[operand], {Shape::kDim}, {}, 0};
  for (int i = 0; i < 3; ++i) {  // a stride says nothing where there is one place only, and TMA takes none of 0
    const bool one = i > 0 && plan.apart[operand][i - 1] == 0;
    map.size[i + 1] = one ? 1 : sizes[i];
    map.stride[i] = map.size[i + 1] <= 1 ? 2 * Shape::kDim : 2 * stride[2 - i];
  }
  map.box_rows = operand == kQueries ? Shape::kRows : operand == kOut ? kGroupRows : Shape::kKeys;
  return map;
}

inline Plan make_plan(const FastattnForward& f, int32_t works) {
  Plan plan = {f, works, section_heads(f), {}};
  const int64_t* const strides[] = {f.q_stride, f.k_stride, f.v_stride, f.out_stride};
  for (int operand = 0; operand < kOperands; ++operand) {
    for (int i = 0; i < 2; ++i) plan.apart[operand][i] = strides[operand][1 - i] != 0;
  }
  return plan;
}

}  // namespace fastattn
