// dbias = dS, summed over the batch entries, heads, rows or keys that share an element of the bias.
#pragma once

#include "scores.h"
#include "turns.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class T>
inline void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; i++) x[i] = value;
}

constexpr int64_t kStreamed = 1 << 20;  // elements: a larger dbias leaves the caches before it is read again

// How a bias is shared; its sizes alone determine this.
struct BiasSharing {
  bool wanted = false;
  // Every element belongs to one pair of one head, so its tile writes it without reading it. Never with a block mask,
  // since some of its tiles are not visited.
  bool own = false;
  // Rows or keys share elements: a head first sums its own, then adds them to those of others.
  bool reduced = false;
  // Several tasks add to the same elements.
  bool tasks = false;
  int64_t elements = 0, elements_of_head = 0;

  BiasSharing(const FastattnAttention& a, const FastattnOperands& o, const FastattnGradients& g)
      : wanted(g.dbias != nullptr) {
    if (!wanted) return;
    const int64_t* size = o.bias_size;
    const bool pairs = size[2] == a.q_len && size[3] == a.kv_len, heads = size[0] == a.batch && size[1] == a.q_heads;
    own = o.table == nullptr && pairs && heads;
    reduced = !own && (size[2] == 1 || size[3] == 1);
    tasks = (size[0] == 1 && a.batch > 1) || (size[1] == 1 && a.kv_heads > 1);
    elements_of_head = size[2] * size[3];
    elements = size[0] * size[1] * elements_of_head;
  }
};

// The gradient of the bias for the heads of one task.
template <class T>
class BiasGradient {
 public:
  BiasGradient(const Problem<T>& problem, const FastattnGradients& g, const Entry& entry, const Turns& turns)
      : sharing_(problem.a, problem.o, g), problem_(problem), o_(problem.o), g_(g), entry_(entry), turns_(turns) {}

  const BiasSharing& sharing() const { return sharing_; }

  // Begins the next head of the task, number `member` of its group. `room` holds the sums of a head if they are
  // `reduced`.
  void begin(int64_t member, int64_t head, T* room) {
    member_ = member;
    if (!sharing_.wanted) return;
    const int64_t* size = o_.bias_size;
    const int64_t index = (size[0] > 1 ? entry_.batch : 0) * size[1] + (size[1] > 1 ? head : 0);
    result_ = static_cast<T*>(g_.dbias) + index * sharing_.elements_of_head;
    sums_ = sharing_.reduced ? room : result_;
    if (sharing_.reduced) fill(sums_, sharing_.elements_of_head, T(0));
  }

  // Ends a head: adds its own sums to the elements that it shares with others.
  void end() {
    if (streamed_) end_streams();
    if (!sharing_.reduced) return;
    wait(entry_.q_len - 1, entry_.kv_len - 1);
    for (int64_t i = 0; i < sharing_.elements_of_head; i++) result_[i] += sums_[i];
    pass(entry_.q_len - 1, entry_.kv_len - 1);
  }

  // These two enclose the tiles up to that of a row and a key. They keep order if tiles add to elements of other tasks.
  void begin_tiles(int64_t row, int64_t key) const {
    if (adds_to_others()) wait(row, key);
  }
  void end_tiles(int64_t row, int64_t key) const {
    if (adds_to_others()) pass(row, key);
  }

  // Adds dS of a row for keys `key ..`: places `first .. last` are computed, and the row sees places `seen`.
  void take(int64_t row, int64_t key, int64_t first, int64_t last, Range seen, const T* ds) const {
    if (sharing_.own) {
      write(row, key, first, last, [ds](int64_t i) { return load(ds + i); });
    } else if (sharing_.wanted && o_.bias_size[3] > 1) {
      T* to = line(row) + key;
      for (int64_t i = seen.begin; i < seen.end; i++) to[i] += ds[i];
    } else if (sharing_.wanted) {
      T sum = T(0);
      for (int64_t i = seen.begin; i < seen.end; i++) sum += ds[i];
      *line(row) += sum;
    }
  }

  // Writes 0 for pairs that no tile computes.
  void take_nothing(int64_t row, int64_t key, int64_t first, int64_t last) const {
    if (sharing_.own) write(row, key, first, last, [](int64_t) { return Vec<T>{}; });
  }

  // Starts loading what `take` will add to. `seen`: the places of a block that the row sees.
  void prefetch(int64_t row, int64_t key, Range seen) const {
    if (!sharing_.wanted || sharing_.own || o_.bias_size[3] == 1) return;
    prefetch_line(line(row) + key, seen.begin, seen.end);
  }

 private:
  // Writes places `first .. last` of a block; `first` is a multiple of a vector's lanes.
  template <class Values>
  void write(int64_t row, int64_t key, int64_t first, int64_t last, Values values) const {
    T* to = line(row) + key;
    last = least(last, entry_.kv_len - key);
    int64_t i = first;
    if (streamed_ && reinterpret_cast<uintptr_t>(to + i) % sizeof(Vec<T>) == 0) {
      for (; i + kLanes<T> <= last; i += kLanes<T>) stream(to + i, values(i));
    }
    for (; i + kLanes<T> <= last; i += kLanes<T>) store(to + i, values(i));
    for (; i < last; i++) to[i] = values(i)[0];
  }

  bool adds_to_others() const { return sharing_.wanted && !sharing_.own && !sharing_.reduced; }

  T* line(int64_t row) const { return sums_ + (o_.bias_size[2] > 1 ? row : 0) * o_.bias_size[3]; }

  // Waits until the previous task has added this tile: of the same member of its group, or of the last one if heads
  // share dbias.
  void wait(int64_t row, int64_t key) const {
    turns_.wait(position(o_.bias_size[1] > 1 ? member_ : problem_.group() - 1, row, key));
  }
  void pass(int64_t row, int64_t key) const { turns_.pass(position(member_, row, key)); }

  // The position of a tile of one head of the group in the order of all tiles of a task.
  int64_t position(int64_t member, int64_t row, int64_t key) const {
    const int64_t blocks = (entry_.kv_len + kKeys - 1) / kKeys, tiles = (entry_.q_len + kQueries - 1) / kQueries;
    return (member * blocks + key / kKeys) * tiles + row / kQueries;
  }

  const BiasSharing sharing_;
  const bool streamed_ = sharing_.own && sharing_.elements > kStreamed;
  const Problem<T>& problem_;
  const FastattnOperands& o_;
  const FastattnGradients& g_;
  const Entry entry_;
  const Turns& turns_;
  int64_t member_ = 0;
  T *result_ = nullptr, *sums_ = nullptr;  // of a head
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
