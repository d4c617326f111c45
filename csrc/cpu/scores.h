// Scores from products of q and k, in the base-2 units of the exponential.
#pragma once

#include "exponential.h"
#include "problem.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// How many rows ahead of its use a mask or bias is prefetched into the second level of cache: three groups.
constexpr int64_t kTermsAhead = 3 * kTileRows;

// Starts loading elements `begin .. end`.
template <class E>
inline void prefetch_line(const E* from, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(E))) fetch_line<2>(from + i);
}

// The score terms of one query head. A term that is absent costs a branch per row and block.
template <class T>
class Scores {
 public:
  Scores(const Problem<T>& problem, const Entry& entry, int64_t head)
      : o_(problem.o),
        entry_(entry),
        head_(head),
        softcap_(T(problem.a.softcap)),
        scale_(T(problem.a.scale)),
        slope_(problem.slope(entry, head) * T(kLog2E)),
        has_slope_(problem.o.alibi_slopes != nullptr),
        add_bias_row_(add_bias_row_of<T>(problem.o.bias_dtype)),
        bias_bytes_(element_bytes(problem.o.bias_dtype)) {
    plain_ = softcap_ == T(0) && !has_slope_ && o_.bias.data == nullptr && scale_ > T(0);
  }

  // The factor that the exponential applies to finished scores, in one multiply-add.
  T exponent_scale() const { return plain_ ? scale_ * T(kLog2E) : T(1); }

  // The distance from a row to its nearest key. ALiBi counts from that key, which keeps small differences between large
  // distances. With a sink it counts from the row, since the sink does not move. Keys so far that they round then have
  // no weight beside the sink.
  int64_t nearest(int64_t row) const {
    if (o_.sinks != nullptr) return 0;
    const int64_t position = row + entry_.offset;
    return most(most(-position, position - most(entry_.kv_len - 1, 0)), 0);
  }
  // By how much this makes the scores of a row too large.
  T shift(int64_t row) const { return has_slope_ ? slope_ * T(nearest(row)) : T(0); }

  // Turns the products `s` of a row with keys `column ..` into scores, at places `begin .. end`, whole vectors. Keys
  // outside `visible` and masked keys get -inf. `block` is the tile of a block mask or null. With a softcap,
  // `cap_gradient` gets its derivative, unless null.
  void finish_scores(
      T* s, int64_t row, int64_t column, int begin, int end, Range visible, const uint8_t* block,
      T* cap_gradient) const {
    const int low = int(least(most(visible.begin - column, begin), end));
    const int high = int(most(least(visible.end - column, end), low));
    if (!plain_) {
      T factor = scale_ * T(kLog2E);
      if (softcap_ != T(0)) {
        cap(s, begin, end, cap_gradient);
        factor = T(1);
      }
      if (o_.bias.data != nullptr) {  // whole vectors, as far as there are keys: `forbid_outside` sets the others
        const int last = int(least(round_up(high, kLanes<T>), entry_.kv_len - column));
        add_bias(s, row, column, low / kLanes<T> * kLanes<T>, last, factor);
      } else if (factor != T(1)) {
        for (int i = begin; i < end; i++) s[i] *= factor;
      }
      if (has_slope_) subtract_distance(s, row, column, begin, end);
    }
    if (o_.mask.data != nullptr) apply_mask(s, row, column, low, high);
    if (block != nullptr) {
      const uint8_t* keep = block + row % kKeys * kKeys;
      for (int i = low; i < high; i++) s[i] = keep[i] ? s[i] : -kInfinity<T>;
    }
    forbid_outside(s, begin, low, high, end);
  }

  // Starts loading what `finish_scores` will read for a block of keys; `seen` are the places that the row sees. Rows of
  // a bias or mask are too far apart for the processor to prefetch them itself.
  void prefetch(int64_t row, int64_t column, Range seen) const {
    if (o_.bias.data != nullptr && o_.bias.stride[3] == 1) {
      prefetch_line(static_cast<const char*>(o_.bias.data) + (bias_row(row) + column) * bias_bytes_,
                    seen.begin * bias_bytes_, seen.end * bias_bytes_);
    }
    if (o_.mask.data != nullptr && o_.mask.stride[3] == 1) prefetch_line(mask_row(row) + column, seen.begin, seen.end);
  }

  // |position of the row - key|.
  int64_t distance(int64_t row, int64_t key) const {
    const int64_t d = row + entry_.offset - key;
    return d < 0 ? -d : d;
  }

  bool has_cap() const { return softcap_ != T(0); }

  // Whether a mask or a bias may forbid pairs within `visible`.
  bool may_forbid() const { return o_.mask.data != nullptr || o_.bias.data != nullptr; }

 private:
  void cap(T* s, int begin, int end, T* cap_gradient) const {
    const T inner = scale_ / softcap_, outer = softcap_ * T(kLog2E);
    for (int i = begin; i < end; i += kLanes<T>) {
      const Vec<T> t = tanh(load(s + i) * inner);
      store(s + i, t * outer);
      if (cap_gradient != nullptr) store(cap_gradient + i, T(1) - t * t);
    }
  }

  void add_bias(T* s, int64_t row, int64_t column, int low, int high, T factor) const {
    const int64_t step = o_.bias.stride[3];
    add_bias_row_(o_.bias.data, bias_row(row) + (column + low) * step, step, s + low, high - low, factor);
  }

  void subtract_distance(T* s, int64_t row, int64_t column, int begin, int end) const {
    const int32_t first = int32_t(row + entry_.offset - column), near = int32_t(nearest(row));
    for (int i = begin; i < end; i++) {
      const int32_t d = first - i;
      s[i] -= slope_ * T((d < 0 ? -d : d) - near);
    }
  }

  void apply_mask(T* s, int64_t row, int64_t column, int low, int high) const {
    const int64_t step = o_.mask.stride[3];
    const uint8_t* keep = mask_row(row) + column * step;
    if (step == 1) {
      for (int i = low; i < high; i++) s[i] = keep[i] ? s[i] : -kInfinity<T>;
    } else {
      for (int i = low; i < high; i++) s[i] = keep[i * step] ? s[i] : -kInfinity<T>;
    }
  }

  int64_t row_of(const FastattnView& view, int64_t row) const {
    return entry_.batch * view.stride[0] + head_ * view.stride[1] + row * view.stride[2];
  }
  int64_t bias_row(int64_t row) const { return row_of(o_.bias, row); }
  const uint8_t* mask_row(int64_t row) const { return static_cast<const uint8_t*>(o_.mask.data) + row_of(o_.mask, row); }

  const FastattnOperands& o_;
  Entry entry_;
  int64_t head_;
  T softcap_, scale_, slope_;
  bool has_slope_, plain_;
  AddBiasRow<T> add_bias_row_;
  int64_t bias_bytes_;
};

// Visits the blocks of keys that some rows of a tile of queries see: `visit(first key, tile of the block mask or null)`.
template <class T, class Visit>
void for_key_blocks(const Problem<T>& problem, const Entry& e, int64_t head, int64_t row, Range keys, Visit visit) {
  const FastattnOperands& o = problem.o;
  if (o.table == nullptr) {
    for (int64_t key = keys.begin / kKeys * kKeys; key < keys.end; key += kKeys) visit(key, nullptr);
    return;
  }
  const int64_t lines = (problem.a.q_len + kKeys - 1) / kKeys;
  const int64_t line = ((o.block_batch > 1 ? e.batch : 0) * o.block_heads + (o.block_heads > 1 ? head : 0)) * lines;
  const int32_t* offsets = o.query_offsets + (line + row / kKeys) * 3;
  for (int32_t n = offsets[0]; n < offsets[2]; n++) {
    const int32_t* entry = o.query_entries + int64_t(n) * 2;
    const int64_t key = int64_t(entry[0]) * kKeys;
    if (key >= keys.end || key + kKeys <= keys.begin) continue;
    visit(key, n < offsets[1] ? o.pool + int64_t(entry[1]) * kKeys * kKeys : nullptr);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
