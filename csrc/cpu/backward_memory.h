// A task of the backward pass, the results that tasks share, and the parts of a task's memory.
#pragma once

#include "bias_gradient.h"
#include "dropout.h"
#include "operand.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// Elements between the rows of a tile: kKeys and one cache line more. Columns are read as well, and cache lines a power
// of two apart would evict each other.
template <class T>
constexpr int64_t kPitch = kKeys + 64 / sizeof(T);

struct Task {
  int64_t entry, kv_head, piece;
};

// Shared by all tasks of a call.
template <class T>
struct Results {
  int64_t pieces;   // of the keys of a head
  T* dq;            // (B, Hq, Lq, padded head dim), the sum over the pieces so far; null if one piece writes the result
  T* dslopes;       // (pieces, B, Hq), sums over rows and keys, or null
  T* dsinks;        // (B, Hq), or null
  int64_t* turns;   // one number for each task (turns.h), or null
};

// The parts of a task's memory. Operands of products that sum over keys or queries ("steps") have a layout of their own
// if a lane holds two elements; else they are the same memory as the rows.
template <class T, class Step>
struct Memory {
  int64_t q_width, v_width, q_lanes, v_lanes;                // padded head dims; lanes of a row of q or k, and of dout or v
  T *key_steps, *key_panels, *value_panels, *dk, *dv;        // for all keys of the task
  T *q, *dout, *q_steps, *dout_steps, *dq, *delta;           // for all queries of one head
  T *p, *ds, *ds_rows, *cap;                                 // a tile: queries x keys; derivatives of the cap in a row
  T* rows;                                                   // keys or values of one block, or a row of out
  T* dbias;                                                  // for one head, if rows or keys share elements
  RowKeys* row_keys;                                         // for all queries of one head, with dropout
  int64_t size;                                              // elements of all parts together

  Memory(const FastattnAttention& a, const BiasSharing& bias, int64_t queries, int64_t keys, T* data)
      : q_width(round_up(a.head_dim, kLanes<T>)), v_width(round_up(a.v_dim, kLanes<T>)),
        q_lanes(round_up(lanes_for<Step>(a.head_dim), kLanes<T>)), v_lanes(round_up(lanes_for<Step>(a.v_dim), kLanes<T>)) {
    int64_t taken = 0;
    const auto take = [&](int64_t count) { return data == nullptr ? (taken += count, data) : data + ((taken += count) - count); };
    const int64_t of_queries = lanes_for<Step>(queries);
    key_steps = take(keys / Step::kParts * q_width);
    key_panels = take(keys * q_lanes);
    value_panels = take(keys * v_lanes);
    dk = take(keys * q_width);
    dv = take(keys * v_width);
    q = take(queries * q_lanes);
    dout = take(queries * v_lanes);
    q_steps = Step::kParts == 1 ? q : take(of_queries * q_width);
    dout_steps = Step::kParts == 1 ? dout : take(of_queries * v_width);
    dq = take(queries * q_width);
    p = take(kQueries * kPitch<T>);
    ds = take(kQueries * kPitch<T>);
    ds_rows = take(Step::kParts == 1 ? 0 : kTileRows * kPitch<T>);
    cap = take(kKeys);
    rows = take(kKeys * most(q_width, v_width));
    row_keys = reinterpret_cast<RowKeys*>(take(queries * int64_t(sizeof(RowKeys) / sizeof(T))));
    delta = take(queries);
    dbias = take(bias.reduced ? bias.elements_of_head : 0);
    size = taken;
  }
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
