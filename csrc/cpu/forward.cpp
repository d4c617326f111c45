// Forward attention: one pass over the keys with an online softmax (FlashAttention-2, Dao, 2023).
//
// A task packs the keys and values that it needs once: keys as panels of columns, values as rows. Then it takes 64 rows
// of q at a time over blocks of 128 keys. Within a block it takes as many rows as a tile of registers has, so that
// their scores (rows x 128) never leave the first level of cache.
#include "softmax.h"
#include "upcoming.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// The tiles `first .. last`, of `tile` queries each, of every head that shares a key head.
struct Task {
  int64_t entry, kv_head, first, last, tile;
};

// The parts of a task's memory.
template <class T, class Step>
struct Memory {
  int64_t q_width, v_width;          // lanes of a row of q or k, and of v
  T *rows, *panels, *values;         // keys as rows (one block), keys, values
  T *q, *out, *scores;               // a tile of queries, its output, the scores of some rows

  int64_t size;                      // elements of all parts together

  Memory(const FastattnAttention& a, int64_t keys, int64_t tile, T* data)
      : q_width(round_up(lanes_for<Step>(a.head_dim), kLanes<T>)), v_width(round_up(a.v_dim, kLanes<T>)) {
    int64_t taken = 0;
    const auto take = [&](int64_t count) { return data == nullptr ? (taken += count, data) : data + ((taken += count) - count); };
    rows = take(kKeys * q_width);
    panels = take(keys * q_width);
    values = take(keys / Step::kParts * v_width);
    q = take(tile * q_width);
    out = take(tile * v_width);
    scores = take(kTileRows * kKeys);
    size = taken;
  }
};

template <class T, class Step>
class Forward {
 public:
  // `next`: the task that this thread probably takes after this one, or null.
  Forward(const Problem<T>& problem, const Task& task, const Task* next)
      : problem_(problem), a_(problem.a), task_(task), next_(next), entry_(problem.entry(task.entry)),
        short_(problem.is_short(entry_)), q_steps_(lanes_for<Step>(problem.a.head_dim)) {}

  // Returns false if memory runs out.
  bool run() {
    const int64_t row = task_.first * task_.tile, row_end = least(task_.last * task_.tile, entry_.q_len);
    Range keys = problem_.visible(entry_, row, row_end);
    keys.begin = keys.begin / kKeys * kKeys;
    keys.end = round_up(keys.end, kKeys);
    if (problem_.o.table != nullptr) keys = {0, round_up(entry_.kv_len, kKeys)};
    T* data = scratch<T>(Memory<T, Step>(a_, keys.end - keys.begin, task_.tile, nullptr).size);
    if (data == nullptr) return false;
    Memory<T, Step> memory(a_, keys.end - keys.begin, task_.tile, data);
    memory_ = &memory;
    first_key_ = keys.begin;
    pack(keys);
    for (int64_t member = 0; member < problem_.group(); member++) {
      const int64_t head = task_.kv_head * problem_.group() + member;
      const Scores<T> scores(problem_, entry_, head);
      upcoming_ = upcoming(member);
      for (int64_t tile = task_.first; tile < task_.last; tile++) query_tile(scores, head, tile * task_.tile);
    }
    return true;
  }

 private:
  // What is read and written after a member of the group.
  Upcoming<T> upcoming(int64_t member) const {
    Upcoming<T> rows;
    const auto then = following(problem_, task_, entry_, member, next_);
    if (!then) return rows;
    const Entry& e = then->entry;
    if (then->other_keys) {
      rows.add(problem_.k_rows(a_.k, e, then->kv_head, a_.head_dim), e.kv_len);
      rows.add(problem_.k_rows(a_.v, e, then->kv_head, a_.v_dim), e.kv_len);
    }
    rows.add(problem_.q_rows(a_.q, e, then->head, a_.head_dim), e.q_len);
    rows.add(problem_.q_rows(a_.out, e, then->head, a_.v_dim), e.q_len);
    rows.divide(3 * ((entry_.q_len + kTileRows - 1) / kTileRows));
    return rows;
  }

  void pack(Range keys) {
    const Rows<T> k = problem_.k_rows(a_.k, entry_, task_.kv_head, a_.head_dim);
    const Rows<T> v = problem_.k_rows(a_.v, entry_, task_.kv_head, a_.v_dim);
    poisoned_ = false;
    for (int64_t key = keys.begin; key < keys.end; key += kKeys) {
      const int64_t count = least(kKeys, entry_.kv_len - key), place = key - keys.begin;
      const Lanes<T> rows = Step::place(k, key, count, memory_->rows, memory_->q_width);
      pack_panels(rows.data, count, q_steps_, rows.stride, memory_->panels + place * q_steps_);
      poisoned_ |= Step::read_steps(v, key, count, values(place), memory_->v_width);
    }
  }

  void query_tile(const Scores<T>& scores, int64_t head, int64_t row) {
    const int64_t count = least(task_.tile, entry_.q_len - row);
    RowStates<T> states(count);
    Range visible[kMostQueries];
    RowKeys keys[kMostQueries];
    const Rows<T> q = problem_.q_rows(a_.q, entry_, head, a_.head_dim);
    if (entry_.kv_len <= kKeys) {
      q_ = Step::place(q, row, count, memory_->q, memory_->q_width);
    } else {
      Step::read(q, row, count, memory_->q, memory_->q_width);
      q_ = {memory_->q, memory_->q_width};
    }
    if (!short_) problem_.q_rows(a_.out, entry_, head, a_.v_dim).expect(row, count);
    bool begun[kMostQueries / kTileRows + 1] = {};  // whether `out` holds something for a group of rows
    for (int64_t i = 0; i < count; i++) visible[i] = problem_.visible(entry_, row + i);
    if (problem_.o.seed != nullptr) {
      for (int64_t i = 0; i < count; i++) keys[i] = dropout_row_keys(problem_.o, entry_.number, head, row + i);
    }
    const Range all = problem_.visible(entry_, row, row + count);
    for_key_blocks(problem_, entry_, head, row, all, [&](int64_t key, const uint8_t* block) {
      for (int64_t i = 0; i < count; i += kTileRows) {
        const int rows = int(least(kTileRows, count - i));
        key_block(scores, row + i, rows, key, block, visible + i, states, keys + i, i, count, begun[i / kTileRows]);
      }
    });
    for (int64_t i = 0; i < count; i += kTileRows) {
      if (!begun[i / kTileRows]) clear(i, least(kTileRows, count - i));
    }
    finish(scores, head, row, count, states);
  }

  // Computes `rows` rows, from place `at` in the tile on, for one block of keys.
  void key_block(
      const Scores<T>& scores, int64_t row, int rows, int64_t key, const uint8_t* block, const Range* visible,
      RowStates<T>& states, const RowKeys* keys, int64_t at, int64_t count, bool& begun) {
    Range seen{kKeys, 0};
    for (int r = 0; r < rows; r++) {
      const Range own = common({visible[r].begin - key, visible[r].end - key}, {0, kKeys});
      if (!own.empty()) seen = {least(seen.begin, own.begin), most(seen.end, own.end)};
    }
    if (seen.empty()) return;
    const int begin = int(seen.begin / kTileColumns<T> * kTileColumns<T>);
    const int last = int(seen.end), end = int(round_up(last, kLanes<T>));  // whole vectors of scores, seen values alone
    const int64_t place = key - first_key_;
    T* s = memory_->scores;
    prefetch_ahead<0>(scores, row - at, at, count, key);
    product<Step, Layout::kRows>(
        rows, q_.data + at * q_.stride, q_.stride, memory_->panels + (place + begin) * q_steps_,
        kTileColumns<T> * q_steps_, kTileColumns<T>, s + begin, kKeys, end - begin, q_steps_, false);
    T* out = memory_->out + at * memory_->v_width;
    for (int r = 0; r < rows; r++) scores.finish_scores(s + r * kKeys, row + r, key, begin, end, visible[r], block, nullptr);
    prefetch_ahead<1>(scores, row - at, at, count, key);
    T alpha[kTileRows + kLanes<T>];
    online_softmax(s, rows, begin, end, scores.exponent_scale(), states, at, alpha);
    for (int r = 0; begun && r < rows; r++) {
      if (alpha[r] == T(1)) continue;
      T* sums = out + r * memory_->v_width;
      for (int64_t i = 0; i < memory_->v_width; i += kLanes<T>) store(sums + i, load(sums + i) * alpha[r]);
    }
    if (problem_.o.seed != nullptr) {
      for (int r = 0; r < rows; r++) drop(s + r * kKeys, key, begin, end, keys[r]);
    }
    prefetch_ahead<2>(scores, row - at, at, count, key);
    if constexpr (Step::kParts == 2) {
      for (int r = 0; r < rows; r++) Step::round_row(s + r * kKeys, begin, end, s + r * kKeys);
    }
    const T* weights = s + begin / Step::kParts;
    if (poisoned_) {
      if (!begun) clear(at, rows);
      careful_product<Step, Layout::kRows>(
          rows, weights, kKeys, values(place + begin), memory_->v_width, out, memory_->v_width, memory_->v_width,
          lanes_for<Step>(last - begin));
    } else {
      for_parts(visible, rows, key + last, [&](int r, int some, int64_t seen_end) {
        product<Step, Layout::kRows>(
            some, weights + r * kKeys, kKeys, values(place + begin), kTileColumns<T>, memory_->v_width,
            out + r * memory_->v_width, memory_->v_width, memory_->v_width,
            lanes_for<Step>(most(seen_end - key - begin, 0)), begun);
      });
    }
    begun = true;
  }

  // Sets some rows of the tile's output to 0.
  void clear(int64_t at, int64_t rows) {
    for (int64_t i = at * memory_->v_width; i < (at + rows) * memory_->v_width; i++) memory_->out[i] = T(0);
  }

  // The values from the key at `place` on, which is the first one of a lane.
  T* values(int64_t place) const { return memory_->values + place / Step::kParts * memory_->v_width; }

  // Prefetches a third of what a later group of rows of the tile at `tile` will read, or one of the first groups for
  // the next block. Thirds, since more lines than a processor can wait for at once would delay the loads of a product.
  template <int third>
  void prefetch_ahead(const Scores<T>& scores, int64_t tile, int64_t at, int64_t count, int64_t key) {
    upcoming_.fetch();
    if (!scores.may_forbid()) return;
    for (int64_t r = at + kTileRows * third / 3; r < at + kTileRows * (third + 1) / 3; r++) {
      const int64_t next = r + kTermsAhead;
      if (next < count) {
        scores.prefetch(tile + next, key, problem_.seen(entry_, tile + next, key));
      } else if (next - count < least(kTermsAhead, count)) {
        const int64_t row = tile + next - count;
        scores.prefetch(row, key + kKeys, problem_.seen(entry_, row, key + kKeys));
      }
    }
  }

  void drop(T* p, int64_t key, int begin, int end, RowKeys keys) const {
    T kept[kKeys];
    dropout_keep(problem_.o, keys, key, begin, end, dropout_threshold(a_.dropout_p), T(1), kept);
    for (int i = begin; i < end; i += kLanes<T>) store(p + i, load(p + i) * load(kept + i));
  }

  // Normalises the rows of a tile and writes out, lse and statistics.
  void finish(const Scores<T>& scores, int64_t head, int64_t row, int64_t count, const RowStates<T>& states) {
    // Separate loops, so that slow steps of one row, such as its logarithm, overlap with those of others.
    T maximum[kMostQueries], total[kMostQueries], factor[kMostQueries];
    for (int64_t i = 0; i < count; i++) {
      maximum[i] = states.maximum[i];
      total[i] = sum_lanes(states.sum[i]);
      factor[i] = problem_.keep_scale();
    }
    if (problem_.o.sinks != nullptr) {  // one more score, whose value vector is 0
      const T sink = static_cast<const T*>(problem_.o.sinks)[head] * T(kLog2E);
      for (int64_t i = 0; i < count; i++) factor[i] *= online_softmax_of_one(sink, maximum[i], total[i]);
    }
    const int64_t at = problem_.row_index(entry_, head, row);
    T *lse = static_cast<T*>(a_.lse) + at, *maxima = static_cast<T*>(a_.statistics) + at, *logs = maxima + problem_.all_rows();
    for (int64_t i = 0; i < count; i++) {
      const bool empty = total[i] == T(0);
      const T whole = empty ? T(1) : total[i], log_total = log2_of(whole), shift = scores.shift(row + i);
      factor[i] /= whole;
      maxima[i] = empty ? T(0) : maximum[i];
      logs[i] = log_total;
      lse[i] = empty ? -kInfinity<T> : T((double(maximum[i]) - double(shift) + double(log_total)) * (1.0 / kLog2E));
    }
    const Rows<T> out = problem_.q_rows(a_.out, entry_, head, a_.v_dim);
    for (int64_t i = 0; i < count; i++) out.write(row + i, memory_->out + i * memory_->v_width, factor[i]);
  }

  // Merges one score. Returns the factor for earlier sums.
  static T online_softmax_of_one(T score, T& maximum, T& sum) {
    const T before = maximum;
    maximum = score > before ? score : before;
    const T pivot = maximum == -kInfinity<T> ? T(0) : maximum;
    const T alpha = exp2_of_difference(Vec<T>{} + (before - pivot))[0];
    sum = sum * alpha + exp2_of_difference(Vec<T>{} + (score - pivot))[0];
    return sum == T(0) ? T(1) : alpha;
  }

  const Problem<T>& problem_;
  const FastattnAttention& a_;
  Task task_;
  const Task* next_;
  Entry entry_;
  bool short_;
  Upcoming<T> upcoming_;
  int64_t q_steps_;  // lanes that are summed for a score
  Memory<T, Step>* memory_ = nullptr;
  Lanes<T> q_{};  // the rows of a tile of queries
  int64_t first_key_ = 0;
  bool poisoned_ = false;
};

// The queries of a tile. Each tile reads all keys and values that it sees, so it is taller where the caches do not keep
// them. Rows do not depend on their tile. The tiles of a block mask must end at multiples of kKeys.
template <class T>
int64_t tile_of(const Problem<T>& problem, const Entry& entry, int64_t pieces) {
  const FastattnAttention& a = problem.a;
  const bool kept = a.left != FASTATTN_OPEN || entry.kv_len * (a.head_dim + a.v_dim) * int64_t(sizeof(T)) <= kKept;
  return kept || problem.o.table != nullptr || entry.q_len / pieces < kMostQueries ? kQueries : kMostQueries;
}

// Calls `visit` with every task, those with the most work first. A head is divided into `pieces`.
template <class T, class Visit>
void for_tasks(const Problem<T>& problem, int64_t pieces, Visit visit) {
  for (int64_t piece = pieces - 1; piece >= 0; piece--) {
    for (int64_t number = 0; number < problem.entries(); number++) {
      const Entry entry = problem.entry(number);
      const int64_t queries = entry.q_len, tile = tile_of(problem, entry, pieces), tiles = (queries + tile - 1) / tile;
      if (queries < problem.o.least_queries) continue;
      const int64_t first = tiles * piece / pieces, last = tiles * (piece + 1) / pieces;
      if (first == last) continue;
      for (int64_t head = 0; head < problem.a.kv_heads; head++) visit(Task{number, head, first, last, tile});
    }
  }
}

template <class T, class Step>
bool forward_as(const FastattnAttention& a, const FastattnOperands& o, const Team& team) {
  const Problem<T> problem{a, o};
  // Rows do not depend on each other, so the number of threads may decide how heads are divided.
  const int64_t heads = problem.entries() * a.kv_heads;
  const int64_t pieces = team.threads() == 1 || heads == 0 ? 1 : most(1, (4 * team.threads() + heads - 1) / heads);
  int64_t count = 0;
  for_tasks(problem, pieces, [&](Task) { count++; });
  if (count == 0) return true;
  const Shared list(size_t(count) * sizeof(Task));
  Task* tasks = list.as<Task>();
  if (tasks == nullptr) return false;
  int64_t at = 0;
  for_tasks(problem, pieces, [&](Task task) { tasks[at++] = task; });
  return team.run(count, [&](int64_t task) {
    const int64_t next = task + team.threads();
    return Forward<T, Step>(problem, tasks[task], next < count ? tasks + next : nullptr).run();
  });
}

}  // namespace

bool forward(const FastattnAttention& a, const FastattnOperands& o, const Team& team) {
#if FASTATTN_DOTS
  if (a.dtype == FASTATTN_BFLOAT16) return forward_as<float, Dot>(a, o, team);
#endif
#ifdef FASTATTN_BESIDE
  return FASTATTN_BESIDE::forward(a, o, team);
#else
  if (a.dtype == FASTATTN_FLOAT64) return forward_as<double, Multiply<double>>(a, o, team);
  return forward_as<float, Multiply<float>>(a, o, team);
#endif
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
