// dbias = dS, added up over what shares an element of the bias: batch entries, heads, rows or keys.
#pragma once

#include "scores.h"
#include "turns.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class T>
inline void fill(T* x, int64_t count, T value) {
  for (int64_t i = 0; i < count; i++) x[i] = value;
}

constexpr int64_t kStreamed = 1 << 20;  // elements that no cache keeps for who reads them next

// How a bias is shared, as its sizes alone say.
struct BiasSharing {
  bool wanted = false;
  // Every element belongs to one pair of one head: its tile writes it without a look at what is there. Tiles that a block
  // mask leaves out are not visited.
  bool own = false;
  // Rows or keys share elements: a head adds up its own before they join the others.
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

// Of the heads of one task.
template <class T>
class BiasGradient {
 public:
  BiasGradient(const Problem<T>& problem, const FastattnGradients& g, const Entry& entry, const Turns& turns)
      : sharing_(problem.a, problem.o, g), problem_(problem), o_(problem.o), g_(g), entry_(entry), turns_(turns) {}

  const BiasSharing& sharing() const { return sharing_; }

  // The next head of the task, number `member` of its group. `room`: for the sums of a head, where they are `reduced`.
  void begin(int64_t member, int64_t head, T* room) {
    member_ = member;
    if (!sharing_.wanted) return;
    const int64_t* size = o_.bias_size;
    const int64_t index = (size[0] > 1 ? entry_.batch : 0) * size[1] + (size[1] > 1 ? head : 0);
    result_ = static_cast<T*>(g_.dbias) + index * sharing_.elements_of_head;
    sums_ = sharing_.reduced ? room : result_;
    if (sharing_.reduced) fill(sums_, sharing_.elements_of_head, T(0));
  }

  // Adds what the head has added up to what it shares with others.
  void end() {
    if (streamed_) end_streams();
    if (!sharing_.reduced) return;
    wait(entry_.q_len - 1, entry_.kv_len - 1);
    for (int64_t i = 0; i < sharing_.elements_of_head; i++) result_[i] += sums_[i];
    pass(entry_.q_len - 1, entry_.kv_len - 1);
  }

  // Around the tiles up to that of a row and a key, where each adds to elements of others.
  void begin_tiles(int64_t row, int64_t key) const {
    if (adds_to_others()) wait(row, key);
  }
  void end_tiles(int64_t row, int64_t key) const {
    if (adds_to_others()) pass(row, key);
  }

  // dS of a row against keys `key ..`, computed at places `first .. last`, seen at `seen`.
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

  // Of pairs that no tile computes.
  void take_nothing(int64_t row, int64_t key, int64_t first, int64_t last) const {
    if (sharing_.own) write(row, key, first, last, [](int64_t) { return Vec<T>{}; });
  }

  // `seen`: places of a block that the row sees.
  void prefetch(int64_t row, int64_t key, Range seen) const {
    if (!sharing_.wanted || sharing_.own || o_.bias_size[3] == 1) return;
    prefetch_line(line(row) + key, seen.begin, seen.end);
  }

 private:
  // Places `first .. last` of a block, `first` at a whole vector.
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

  // The head whose tile the task before must have added: the last one of the group, if heads share dbias.
  void wait(int64_t row, int64_t key) const {
    turns_.wait(position(o_.bias_size[1] > 1 ? member_ : problem_.group() - 1, row, key));
  }
  void pass(int64_t row, int64_t key) const { turns_.pass(position(member_, row, key)); }

  // Where a tile of a head of the group comes in the order of all tiles of a task.
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
