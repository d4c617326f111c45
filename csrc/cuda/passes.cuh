// The passes of the backward computation: the own rows of a block, the passing rows, and their tensor maps for TMA.
//
// A block holds its own rows of a pair of operands X, Y in shared memory; tiles of another pair U, W pass by. If the
// own rows are keys, X, Y = K, V and U, W = Q, dO, of all query heads that share the key head. If they are queries, the
// pairs are exchanged. P are the weights and dS the gradients of the scores, both (own rows x passing rows). A pass
// adds up dS U, which is dK or dQ, and P W, which is dV.
#pragma once

#include "schedule.cuh"

namespace fastattn {

// From D = 128 on a thread has registers for one sum only.
enum Pass { kKeysAndValues, kKeysAlone, kValuesAlone, kQueriesAlone };

template <int D, Pass kPass>
struct PassShape {
  static constexpr int kDim = D;
  static constexpr int kPanels = D / 64;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kGroupThreads * (1 + kConsumers);
  static constexpr int kRows = kConsumers * kGroupRows;  // own rows
  static constexpr int kPassing = D == 256 ? 32 : 64;    // passing rows of a tile
  static constexpr int kStages = 3;                      // products read two while the third is filled
  static constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;

  static constexpr bool kOfKeys = kPass != kQueriesAlone;
  static constexpr bool kFirst = kPass != kValuesAlone;                           // adds up dS U
  static constexpr bool kSecond = kPass == kKeysAndValues || kPass == kValuesAlone;  // adds up P W
  static constexpr Operand kX = kOfKeys ? kKeys : kQueries, kY = kOfKeys ? kValues : kOutGradient;
  static constexpr Operand kU = kOfKeys ? kQueries : kKeys, kW = kOfKeys ? kOutGradient : kValues;
  static constexpr Operand kFirstSum = kOfKeys ? kKeyGradient : kQueryGradient, kSecondSum = kValueGradient;

  static constexpr uint32_t kOwnBytes = panel_bytes(kRows) * kPanels;          // of X, and of Y
  static constexpr uint32_t kPassingBytes = panel_bytes(kPassing) * kPanels;   // of a tile of U, and of W
  static constexpr uint32_t kTiles = 2 * kOwnBytes + 2 * kStages * kPassingBytes;
  static constexpr uint32_t kColumnBytes = kOfKeys ? 8 * kPassing : 0;         // lse and delta of passing queries

  // Bytes from the first tile.
  static FASTATTN_HD constexpr uint32_t own(int second) { return second * kOwnBytes; }
  static FASTATTN_HD constexpr uint32_t passing(int stage, int second) {
    return 2 * kOwnBytes + (2 * stage + second) * kPassingBytes;
  }
  static FASTATTN_HD constexpr uint32_t columns(int stage) { return kTiles + stage * kColumnBytes; }
  static constexpr uint32_t kBarrierPlace = kTiles + kStages * kColumnBytes;

  // Numbers of the barriers. They say that the own rows, or a stage of passing rows, are full, or free again.
  static constexpr int kFullOwn = 0, kFreeOwn = 1, kBarriers = 2 + 2 * kStages;
  static FASTATTN_HD constexpr int full(int stage) { return 2 + stage; }
  static FASTATTN_HD constexpr int free(int stage) { return 2 + kStages + stage; }

  static constexpr uint32_t kSharedBytes = 1024 + kBarrierPlace + 8 * kBarriers;
};

// A call, and what the host derives from it for one pass. A work is a block's rows of one head of one batch entry.
struct PassPlan : FastattnBackward {
  int32_t group;              // query heads that share a key head
  int32_t pairs, row_tiles;   // own heads of all batch entries; works of each
  int32_t works;
  int32_t section;            // pairs whose passing rows stay in the L2 cache together
  int32_t apart[kOperands][2];  // as in Plan
};

// The queries that see a key.
FASTATTN_HD constexpr Range seeing_queries(const FastattnForward& f, const Extent& e, int key) {
  return {clamp(key - e.q_offset - f.right, e.q_len), clamp(key - e.q_offset + f.left + 1, e.q_len)};
}

// The passing rows that form a visible pair with an own row.
template <class Shape>
FASTATTN_HD constexpr Range passing_rows(const FastattnForward& f, const Extent& e, int row) {
  return Shape::kOfKeys ? seeing_queries(f, e, row) : visible_keys(f, e, row);
}

struct PassWork {
  int entry;  // batch entry or sequence
  Extent extent;
  int head, first;              // own; past the last row if there is nothing to do
  int passing_head, heads;      // the first passing head, and the number of them
  int first_passing, tiles;     // the first row of each one's first passing tile, and the number of tiles
  bool empty;
};

// Works in the order in which blocks take them, as in the forward pass: under causal order the first keys and the last
// queries have the most work.
template <class Shape>
FASTATTN_HD PassWork work_at(const PassPlan& plan, int index) {
  const FastattnForward& f = plan.f;
  const int start = index / (plan.section * plan.row_tiles) * plan.section;
  const int pairs = start + plan.section < plan.pairs ? plan.section : plan.pairs - start;
  const int inside = index - start * plan.row_tiles, own_heads = Shape::kOfKeys ? f.kv_heads : f.q_heads;
  const int pair = start + inside % pairs;
  int tile = Shape::kOfKeys ? inside / pairs : plan.row_tiles - 1 - inside / pairs;
  PassWork work;
  work.entry = pair / own_heads;
  work.head = pair % own_heads;
  work.passing_head = Shape::kOfKeys ? work.head * plan.group : work.head / plan.group;
  work.heads = Shape::kOfKeys ? plan.group : 1;
  if (packed(f)) {
    const Starts starts = Shape::kOfKeys ? key_starts(f) : query_starts(f);
    work.entry = sequence_of(starts, tile, Shape::kRows);
    tile -= first_tile(starts, work.entry, Shape::kRows);
  }
  work.extent = extent_of(f, work.entry);
  work.first = tile * Shape::kRows;
  const int length = Shape::kOfKeys ? work.extent.kv_len : work.extent.q_len;
  work.empty = work.first >= length;
  const int last = (work.first + Shape::kRows < length ? work.first + Shape::kRows : length) - 1;
  const int begin = passing_rows<Shape>(f, work.extent, work.first).begin / Shape::kPassing;
  const int end = divide_up(passing_rows<Shape>(f, work.extent, last).end, Shape::kPassing);
  work.first_passing = begin * Shape::kPassing;
  work.tiles = end > begin ? end - begin : 0;
  return work;
}

FASTATTN_HD Place place_of(const PassPlan& plan, Operand operand, const PassWork& work, int head, int row) {
  return place_of(plan.f, of_query(operand), plan.apart[operand], work.entry, head, work.extent, row);
}

// The rows of a tile of lse and delta, which are adjacent for each row. The last tile is padded with rows whose weights
// are 0.
constexpr int kRowTile = 64;
FASTATTN_HD constexpr int64_t padded_rows(const FastattnForward& f) {
  return count_tiles(f, f.q_len, kRowTile) * kRowTile;
}
FASTATTN_HD constexpr int64_t count_row_works(const FastattnForward& f) {
  return f.q_len == 0 ? 0 : padded_rows(f) / kRowTile * entries(f) * f.q_heads;
}
FASTATTN_HD constexpr int64_t row_place(const FastattnForward& f, int entry, int head, int row) {
  const int64_t line = (int64_t(packed(f) ? 0 : entry) * f.q_heads + head) * padded_rows(f);
  return 2 * (line + (packed(f) ? first_tile(query_starts(f), entry, kRowTile) * kRowTile : 0) + row);
}

struct Tensor {
  const void* base;
  const int64_t* stride;
};
inline Tensor tensor_of(const FastattnBackward& b, Operand operand) {
  const FastattnForward& f = b.f;
  const Tensor all[] = {{f.q, f.q_stride},        {f.k, f.k_stride},   {f.v, f.v_stride},   {f.out, f.out_stride},
                        {b.dout, b.dout_stride}, {b.dq, b.dq_stride}, {b.dk, b.dk_stride}, {b.dv, b.dv_stride}};
  return all[operand];
}

// A box has as many rows as a passing tile; own rows are several boxes.
template <class Shape>
OperandMap operand_map(const PassPlan& plan, Operand operand) {
  const Tensor tensor = tensor_of(plan, operand);
  return operand_map(plan.f, tensor.base, tensor.stride, of_query(operand), 1, Shape::kPassing);
}

template <class Shape>
int64_t count_works(const FastattnForward& f) {
  const int length = Shape::kOfKeys ? f.kv_len : f.q_len, heads = Shape::kOfKeys ? f.kv_heads : f.q_heads;
  return f.batch == 0 || length == 0 ? 0 : count_tiles(f, length, Shape::kRows) * entries(f) * heads;
}

template <class Shape>
PassPlan make_plan(const FastattnBackward& b) {
  constexpr int64_t cache = 32 << 20;
  const FastattnForward& f = b.f;
  PassPlan plan = {};
  static_cast<FastattnBackward&>(plan) = b;
  plan.group = f.q_heads / f.kv_heads;
  plan.pairs = entries(f) * (Shape::kOfKeys ? f.kv_heads : f.q_heads);
  plan.works = int32_t(count_works<Shape>(f));
  plan.row_tiles = plan.pairs > 0 ? plan.works / plan.pairs : 0;
  const int64_t rows = Shape::kOfKeys ? int64_t(f.q_len) * plan.group : f.kv_len;
  const int64_t bytes = 4 * (rows > 0 ? rows : 1) * f.head_dim;
  const int64_t section = (cache / bytes > 0 ? cache / bytes : 1) * (Shape::kOfKeys ? 1 : plan.group);
  plan.section = int32_t(section < plan.pairs ? section : plan.pairs);
  for (int operand = 0; operand < kOperands; ++operand) {
    const int64_t* stride = tensor_of(b, Operand(operand)).stride;
    for (int i = 0; i < 2; ++i) plan.apart[operand][i] = stride[1 - i] != 0;
  }
  return plan;
}

}  // namespace fastattn
