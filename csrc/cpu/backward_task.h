// One task of the backward pass: one key head of one batch entry, or a piece of its keys.
#pragma once

#include "backward_memory.h"
#include "softmax.h"
#include "upcoming.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class T, class Step>
class Backward {
 public:
  // `next`: the task that this thread probably takes after this one, or null.
  Backward(const Problem<T>& problem, const FastattnGradients& g, const Results<T>& results, const Task& task,
           const Task* next, const Turns& turns)
      : problem_(problem), a_(problem.a), o_(problem.o), g_(g), results_(results), task_(task), next_(next),
        entry_(problem.entry(task.entry)), keep_scale_(problem.keep_scale()),
        threshold_(dropout_threshold(problem.a.dropout_p)), turns_(turns), bias_(problem, g, entry_, turns),
        q_steps_(lanes_for<Step>(problem.a.head_dim)), v_steps_(lanes_for<Step>(problem.a.v_dim)) {
    keys_ = {first_key(task.piece), first_key(task.piece + 1)};
  }

  // Returns false if memory runs out.
  bool run() {
    const int64_t keys = keys_.end - keys_.begin;
    T* data = scratch<T>(Memory<T, Step>(a_, bias_.sharing(), entry_.q_len, keys, nullptr).size);
    if (data == nullptr) return false;
    Memory<T, Step> memory(a_, bias_.sharing(), entry_.q_len, keys, data);
    memory_ = &memory;
    pack_keys();
    const int64_t used = least(keys, entry_.kv_len - keys_.begin);
    fill(memory.dk, used * memory.q_width, T(0));
    fill(memory.dv, used * memory.v_width, T(0));
    for (member_ = 0; member_ < problem_.group(); member_++) query_head(task_.kv_head * problem_.group() + member_);
    write_keys();
    return true;
  }

 private:
  // What is read and written after a member of the group.
  Upcoming<T> upcoming() const {
    Upcoming<T> rows;
    const auto then = following(problem_, task_, entry_, member_, next_);
    if (!then) return rows;
    const Entry& e = then->entry;
    if (then->other_keys) {
      rows.add(problem_.k_rows(a_.k, e, then->kv_head, a_.head_dim), e.kv_len);
      rows.add(problem_.k_rows(a_.v, e, then->kv_head, a_.v_dim), e.kv_len);
    }
    rows.add(problem_.q_rows(a_.q, e, then->head, a_.head_dim), e.q_len);
    rows.add(problem_.q_rows(g_.dout, e, then->head, a_.v_dim), e.q_len);
    rows.add(problem_.q_rows(a_.out, e, then->head, a_.v_dim), e.q_len);
    rows.add(problem_.q_rows(g_.dq, e, then->head, a_.head_dim), e.q_len);
    if (then->other_keys) {
      rows.add(problem_.k_rows(g_.dk, e, then->kv_head, a_.head_dim), e.kv_len);
      rows.add(problem_.k_rows(g_.dv, e, then->kv_head, a_.v_dim), e.kv_len);
    }
    rows.divide(4 * ((entry_.q_len + kTileRows - 1) / kTileRows));
    return rows;
  }

  void pack_keys() {
    const Rows<T> k = problem_.k_rows(a_.k, entry_, task_.kv_head, a_.head_dim);
    const Rows<T> v = problem_.k_rows(a_.v, entry_, task_.kv_head, a_.v_dim);
    keys_poisoned_ = false;
    for (int64_t key = keys_.begin; key < keys_.end; key += kKeys) {
      const int64_t count = least(kKeys, entry_.kv_len - key), place = key - keys_.begin;
      T* rows = key_steps(place);
      keys_poisoned_ |= Step::read_steps(k, key, count, rows, memory_->q_width);
      if constexpr (Step::kParts == 2) Step::read(k, key, count, rows = memory_->rows, memory_->q_lanes);
      pack_panels(rows, count, q_steps_, memory_->q_lanes, memory_->key_panels + place * q_steps_);
      keys_poisoned_ |= Step::read(v, key, count, memory_->rows, memory_->v_lanes);
      pack_panels(memory_->rows, count, v_steps_, memory_->v_lanes, memory_->value_panels + place * v_steps_);
    }
  }

  // The steps from the key at `place` on, which is the first one of a lane.
  T* key_steps(int64_t place) const { return memory_->key_steps + place / Step::kParts * memory_->q_width; }

  void write_keys() {
    const Rows<T> dk = problem_.k_rows(g_.dk, entry_, task_.kv_head, a_.head_dim);
    const Rows<T> dv = problem_.k_rows(g_.dv, entry_, task_.kv_head, a_.v_dim);
    const T scale = T(a_.scale);
    for (int64_t key = keys_.begin; key < least(keys_.end, entry_.kv_len); key++) {
      const int64_t place = key - keys_.begin;
      dk.write(key, memory_->dk + place * memory_->q_width, scale);
      dv.write(key, memory_->dv + place * memory_->v_width, T(1));
    }
  }

  void query_head(int64_t head) {
    const Scores<T> scores(problem_, entry_, head);
    head_ = head;
    pack_queries();
    upcoming_ = upcoming();
    fill(memory_->dq, entry_.q_len * memory_->q_width, T(0));
    dslope_ = 0.0;
    bias_.begin(member_, head, memory_->dbias);
    for (int64_t key = keys_.begin; key < keys_.end; key += kKeys) key_block(scores, key);
    bias_.end();
    if (results_.dslopes != nullptr) {
      results_.dslopes[(task_.piece * problem_.entries() + entry_.number) * a_.q_heads + head] = T(-dslope_);
    }
    write_queries();
  }

  // Packs q and dout of the head, and computes delta and the gradient of the sink.
  void pack_queries() {
    const Rows<T> dout = problem_.q_rows(g_.dout, entry_, head_, a_.v_dim);
    const Rows<T> out = problem_.q_rows(a_.out, entry_, head_, a_.v_dim);
    const Rows<T> q = problem_.q_rows(a_.q, entry_, head_, a_.head_dim);
    queries_poisoned_ = Step::read(q, 0, entry_.q_len, memory_->q, memory_->q_lanes);
    queries_poisoned_ |= Step::read(dout, 0, entry_.q_len, memory_->dout, memory_->v_lanes);
    if constexpr (Step::kParts == 2) {
      Step::read_steps(q, 0, entry_.q_len, memory_->q_steps, memory_->q_width);
      Step::read_steps(dout, 0, entry_.q_len, memory_->dout_steps, memory_->v_width);
    }
    double dsink = 0.0;
    T delta_poison = T(0);
    for (int64_t row = 0; row < entry_.q_len; row++) {
      const T* out_row = memory_->rows;
      if (out.plain()) {
        out_row = out.fetch(row, 1).data;
      } else {
        out.read(row, 1, memory_->rows, memory_->v_width);
      }
      const T* dout_row = memory_->dout + row * memory_->v_lanes;
      if constexpr (Step::kParts == 2) {
        dout.read(row, 1, memory_->rows + memory_->v_width, memory_->v_width);
        dout_row = memory_->rows + memory_->v_width;
      }
      Vec<T> sum{};
      for (int64_t i = 0; i < memory_->v_width; i += kLanes<T>) sum += load(out_row + i) * load(dout_row + i);
      const int64_t at = problem_.row_index(entry_, head_, row);
      T delta = sum_lanes(sum);
      if (g_.dlse != nullptr) delta -= static_cast<const T*>(g_.dlse)[at];
      memory_->delta[row] = delta;
      delta_poison += delta * T(0);  // 0, or NaN
      if (o_.seed != nullptr) memory_->row_keys[row] = dropout_row_keys(o_, entry_.number, head_, row);
      if (results_.dsinks != nullptr) {  // one more score, whose value vector is 0
        const T sink = static_cast<const T*>(o_.sinks)[head_] * T(kLog2E);
        dsink -= double(exp2_of_difference(Vec<T>{} + (sink - maximum(at) - log_total(at)))[0] * delta);
      }
    }
    queries_poisoned_ |= delta_poison != delta_poison;
    if (results_.dsinks != nullptr && task_.piece == 0) {
      results_.dsinks[entry_.number * a_.q_heads + head_] = T(dsink);
    }
  }

  // The first key of a piece. Pieces have equal numbers of pairs, as nearly as whole blocks allow.
  int64_t first_key(int64_t piece) const {
    const int64_t blocks = (entry_.kv_len + kKeys - 1) / kKeys;
    if (results_.pieces == 1) return piece * blocks * kKeys;
    int64_t all = 0, before = 0, block = 0;
    for (int64_t i = 0; i < blocks; i++) all += work(i * kKeys);
    for (; block < blocks && before * results_.pieces < all * piece; block++) before += work(block * kKeys);
    return block * kKeys;
  }

  // The work for keys `key .. key + kKeys`: the rows that see some of them by causal order and window, and the packing.
  int64_t work(int64_t key) const {
    const int64_t first = a_.right == FASTATTN_OPEN ? 0 : most(0, key - entry_.offset - a_.right);
    const int64_t end = a_.left == FASTATTN_OPEN ? entry_.q_len : least(entry_.q_len, key + kKeys + a_.left - entry_.offset);
    return most(0, end - first) + kQueries;
  }

  // Writes dQ of the head. Pieces add their shares to a common sum in their order, tile by tile; the last one writes
  // dQ.
  void write_queries() {
    const Rows<T> dq = problem_.q_rows(g_.dq, entry_, head_, a_.head_dim);
    const int64_t width = memory_->q_width, tiles = (entry_.q_len + kQueries - 1) / kQueries;
    const T scale = T(a_.scale);
    T* shared = results_.dq == nullptr ? nullptr : results_.dq + (entry_.batch * a_.q_heads + head_) * a_.q_len * width;
    for (int64_t tile = 0; tile < tiles; tile++) {
      if (shared != nullptr) turns_.wait(member_ * tiles + tile);
      for (int64_t row = tile * kQueries; row < least((tile + 1) * kQueries, entry_.q_len); row++) {
        T* own = memory_->dq + row * width;
        if (task_.piece > 0) {
          for (int64_t i = 0; i < width; i++) own[i] += shared[row * width + i];
        }
        if (task_.piece == results_.pieces - 1) {
          dq.write(row, own, scale);
        } else {
          for (int64_t i = 0; i < width; i++) shared[row * width + i] = own[i];
        }
      }
      if (shared != nullptr) turns_.pass(member_ * tiles + tile);
    }
  }

  // Computes every tile of queries that sees keys `key .. key + kKeys`.
  void key_block(const Scores<T>& scores, int64_t key) {
    if (o_.table == nullptr) {
      for (int64_t row = 0; row < entry_.q_len; row += kQueries) tile(scores, row, key, nullptr);
      return;
    }
    // A block mask lists partial tiles before full ones, so rows do not rise: one turn covers all rows.
    bias_.begin_tiles(entry_.q_len - 1, key);
    const int64_t lines = (a_.kv_len + kKeys - 1) / kKeys;
    const int64_t line = ((o_.block_batch > 1 ? entry_.batch : 0) * o_.block_heads +
                          (o_.block_heads > 1 ? head_ : 0)) * lines + key / kKeys;
    const int32_t* offsets = o_.key_offsets + line * 3;
    for (int32_t n = offsets[0]; n < offsets[2]; n++) {
      const int32_t* entry = o_.key_entries + int64_t(n) * 2;
      const uint8_t* block = n < offsets[1] ? o_.pool + int64_t(entry[1]) * kKeys * kKeys : nullptr;
      const int64_t row = int64_t(entry[0]) * kKeys;
      for (int64_t half = row; half < least(row + kKeys, entry_.q_len); half += kQueries) {
        tile(scores, half, key, block);
      }
    }
    bias_.end_tiles(entry_.q_len - 1, key);
  }

  void tile(const Scores<T>& scores, int64_t row, int64_t key, const uint8_t* block) {
    const int64_t count = least(kQueries, entry_.q_len - row);
    Range visible[kQueries];
    Range seen{kKeys, 0};
    for (int64_t r = 0; r < count; r++) {
      visible[r] = problem_.visible(entry_, row + r);
      const Range own = within(visible[r], key);
      if (!own.empty()) seen = {least(seen.begin, own.begin), most(seen.end, own.end)};
    }
    if (seen.empty()) {
      for (int64_t r = 0; r < count; r++) bias_.take_nothing(row + r, key, 0, kKeys);
      return;
    }
    const int begin = int(seen.begin / kTileColumns<T> * kTileColumns<T>), end = int(round_up(seen.end, kLanes<T>));
    if (o_.table == nullptr) bias_.begin_tiles(row, key);
    for (int64_t r = 0; r < count; r += kTileRows) {
      const int rows = int(least(kTileRows, count - r));
      row_group(scores, row, r, rows, key, block, visible, begin, end);
      if constexpr (Step::kParts == 2) {
        for (T* tile : {memory_->p, memory_->ds}) round_steps(tile, r, rows, begin, end);
      }
    }
    if (o_.table == nullptr) bias_.end_tiles(row, key);
    add_to_keys(row, count, key, visible, begin, int(seen.end));
  }

  static Range within(Range visible, int64_t key) {
    return common({visible.begin - key, visible.end - key}, {0, kKeys});
  }

  // Computes P and dS of some rows of a tile and adds their share of dQ. Keys between `begin` and `end` that no row of
  // the group sees get 0.
  void row_group(
      const Scores<T>& scores, int64_t row, int64_t at, int rows, int64_t key, const uint8_t* block,
      const Range* visible, int begin, int end) {
    Range seen{kKeys, 0};
    for (int r = 0; r < rows; r++) {
      const Range own = within(visible[at + r], key);
      if (!own.empty()) seen = {least(seen.begin, own.begin), most(seen.end, own.end)};
    }
    T *p = memory_->p + at * kPitch<T>, *ds = memory_->ds + at * kPitch<T>;
    const int first = seen.empty() ? end : int(seen.begin / kTileColumns<T> * kTileColumns<T>);
    const int last = seen.empty() ? end : int(round_up(seen.end, kLanes<T>));
    for (int r = 0; r < rows; r++) {
      for (T* x : {p + r * kPitch<T>, ds + r * kPitch<T>}) {
        fill(x + begin, first - begin, T(0));
        fill(x + last, end - last, T(0));
      }
      bias_.take_nothing(row + at + r, key, 0, seen.empty() ? 0 : first);
      bias_.take_nothing(row + at + r, key, seen.empty() ? 0 : last, kKeys);
    }
    if (seen.empty()) return;
    const int64_t place = key - keys_.begin;
    prefetch_ahead<0>(scores, row + at, key);
    product<Step, Layout::kRows>(
        rows, memory_->q + (row + at) * memory_->q_lanes, memory_->q_lanes,
        memory_->key_panels + (place + first) * q_steps_, kTileColumns<T> * q_steps_, kTileColumns<T>, p + first,
        kPitch<T>, last - first, q_steps_, false);
    prefetch_ahead<1>(scores, row + at, key);
    product<Step, Layout::kRows>(
        rows, memory_->dout + (row + at) * memory_->v_lanes, memory_->v_lanes,
        memory_->value_panels + (place + first) * v_steps_, kTileColumns<T> * v_steps_, kTileColumns<T>, ds + first,
        kPitch<T>, last - first, v_steps_, false);
    for (int r = 0; r < rows; r++) {
      finish_row(scores, row + at + r, key, visible[at + r], block, first, last, p + r * kPitch<T>,
                 ds + r * kPitch<T>);
    }
    prefetch_ahead<2>(scores, row + at, key);
    const T *keys = key_steps(place + first), *weights = ds + first;
    if constexpr (Step::kParts == 2) {
      for (int r = 0; r < rows; r++) Step::round_row(ds + r * kPitch<T>, first, last, memory_->ds_rows + r * kPitch<T>);
      weights = memory_->ds_rows + first / Step::kParts;
    }
    T* dq = memory_->dq + (row + at) * memory_->q_width;
    const int64_t width = memory_->q_width;
    if (keys_poisoned_) {
      const int64_t steps = lanes_for<Step>(seen.end - first);
      careful_product<Step, Layout::kRows>(rows, weights, kPitch<T>, keys, width, dq, width, width, steps);
    } else {
      for_parts(visible + at, rows, key + seen.end, [&](int r, int some, int64_t seen_end) {
        product<Step, Layout::kRows>(
            some, weights + r * kPitch<T>, kPitch<T>, keys, kTileColumns<T>, width, dq + r * width, width, width,
            lanes_for<Step>(seen_end - key - first), true);
      });
    }
  }

  // Rounds rows `at .. at + rows` of a tile in pairs and moves them forward, next to the rows that were rounded before.
  static void round_steps(T* tile, int64_t at, int rows, int begin, int end) {
    for (int64_t r = at; r < at + rows; r += 2) {
      const T* second = r + 1 < at + rows ? tile + (r + 1) * kPitch<T> : nullptr;
      Step::round_rows(tile + r * kPitch<T>, second, begin, end, tile + r / 2 * kPitch<T>);
    }
  }

  // Prefetches a third of what a later group of rows will read, as in forward.cpp.
  template <int third>
  void prefetch_ahead(const Scores<T>& scores, int64_t row, int64_t key) {
    upcoming_.fetch();
    if (!scores.may_forbid()) return;
    const int64_t next = row + kTermsAhead;
    for (int64_t r = next + kTileRows * third / 3; r < least(next + kTileRows * (third + 1) / 3, entry_.q_len); r++) {
      const Range seen = problem_.seen(entry_, r, key);
      scores.prefetch(r, key, seen);
      bias_.prefetch(r, key, seen);
    }
  }

  // Turns the products q k^T and dout v^T of a row into P after dropout and dS, at places `first .. last`.
  void finish_row(
      const Scores<T>& scores, int64_t row, int64_t key, Range visible, const uint8_t* block, int first, int last, T* p,
      T* ds) {
    T* cap = scores.has_cap() ? memory_->cap : nullptr;
    scores.finish_scores(p, row, key, first, last, visible, block, cap);
    const int64_t at = problem_.row_index(entry_, head_, row);
    const T scale = scores.exponent_scale(), top = maximum(at), rest = log_total(at), delta = memory_->delta[row];
    if (o_.seed == nullptr) {
      for (int i = first; i < last; i += kLanes<T>) {
        const Vec<T> weight = exp2_of_difference(load(p + i) * scale - top - rest);
        store(p + i, weight);
        store(ds + i, weight * (load(ds + i) - delta));
      }
    } else {
      const RowKeys keys = memory_->row_keys[row];
      T kept[kKeys];
      dropout_keep(o_, keys, key, first, last, threshold_, keep_scale_, kept);
      for (int i = first; i < last; i += kLanes<T>) {
        const Vec<T> weight = exp2_of_difference(load(p + i) * scale - top - rest), keep = load(kept + i);
        store(p + i, weight * keep);
        store(ds + i, weight * (load(ds + i) * keep - delta));
      }
    }
    if (keys_poisoned_ || queries_poisoned_) forget_forbidden(scores, row, key, visible, block, first, last, p, ds, cap);
    bias_.take(row, key, first, last, within(visible, key), ds);
    if (results_.dslopes != nullptr) add_dslope(scores, row, key, within(visible, key), ds);
    if (cap != nullptr) {
      for (int i = first; i < last; i += kLanes<T>) store(ds + i, load(ds + i) * load(cap + i));
    }
  }

  // Zeroes the pairs that do not take part: NaN or infinity may have reached them.
  void forget_forbidden(
      const Scores<T>& scores, int64_t row, int64_t key, Range visible, const uint8_t* block, int first, int last, T* p,
      T* ds, T* cap) {
    T allowed[kKeys];
    fill(allowed, kKeys, T(0));
    scores.finish_scores(allowed, row, key, first, last, visible, block, nullptr);
    for (int i = first; i < last; i++) {
      if (allowed[i] != -kInfinity<T>) continue;
      p[i] = ds[i] = T(0);
      if (cap != nullptr) cap[i] = T(0);
    }
  }

  void add_dslope(const Scores<T>& scores, int64_t row, int64_t key, Range seen, const T* ds) {
    T sum = T(0);
    for (int64_t i = seen.begin; i < seen.end; i++) sum += ds[i] * T(scores.distance(row, key + i));
    dslope_ += double(sum);
  }

  // dV += P^T dO, then dK += dS^T Q, for the keys of a tile. In this order only one of dO and Q needs the cache at a
  // time.
  void add_to_keys(int64_t row, int64_t count, int64_t key, const Range* visible, int begin, int end) {
    const int64_t place = key - keys_.begin, q_width = memory_->q_width, v_width = memory_->v_width;
    add_to_keys(memory_->p, memory_->dout_steps + row / Step::kParts * v_width, memory_->dv + place * v_width, v_width,
                count, key, visible, begin, end);
    add_to_keys(memory_->ds, memory_->q_steps + row / Step::kParts * q_width, memory_->dk + place * q_width, q_width,
                count, key, visible, begin, end);
  }

  // sums (keys x width) += weights^T (keys x rows) values (rows x width).
  void add_to_keys(const T* weights, const T* values, T* sums, int64_t width, int64_t count, int64_t key,
                   const Range* visible, int begin, int end) {
    int64_t low = 0, high = 0;  // the rows that see some of the keys of this step
    for (int k = begin; k < end; k += kTileRows) {
      const int keys = int(least(kTileRows, end - k));
      upcoming_.fetch();
      while (low < count && visible[low].end <= key + k) low++;
      while (high < count && visible[high].begin < key + k + keys) high++;
      if (low >= high) continue;
      const int64_t first = low / Step::kParts, steps = lanes_for<Step>(high) - first;
      const T *own = weights + first * kPitch<T> + k, *from = values + first * width;
      if (queries_poisoned_) {
        careful_product<Step, Layout::kColumns>(
            keys, own, kPitch<T>, from, width, sums + k * width, width, width, steps);
      } else {
        product<Step, Layout::kColumns>(
            keys, own, kPitch<T>, from, kTileColumns<T>, width, sums + k * width, width, width, steps, true);
      }
    }
  }

  T maximum(int64_t at) const { return static_cast<const T*>(a_.statistics)[at]; }
  T log_total(int64_t at) const { return static_cast<const T*>(a_.statistics)[problem_.all_rows() + at]; }

  const Problem<T>& problem_;
  const FastattnAttention& a_;
  const FastattnOperands& o_;
  const FastattnGradients& g_;
  const Results<T>& results_;
  Task task_;
  const Task* next_;
  Entry entry_;
  Upcoming<T> upcoming_;
  T keep_scale_;
  uint32_t threshold_;
  const Turns& turns_;
  BiasGradient<T> bias_;
  int64_t q_steps_, v_steps_;  // lanes that are summed for a score, and for its gradient
  Range keys_;
  Memory<T, Step>* memory_ = nullptr;
  int64_t member_ = 0, head_ = 0;
  double dslope_ = 0.0;
  bool keys_poisoned_ = false, queries_poisoned_ = false;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
