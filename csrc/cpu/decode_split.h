// One split of the keys of a batch entry, for some heads: attention to a KV cache up to the merge of the splits.
#pragma once

#include <cmath>
#include <cstring>

#include "bias.h"
#include "decode_problem.h"
#include "exponential.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kFarthest = int64_t(1) << 30;  // the largest distance of a mask's or bias's first column from key 0
constexpr int64_t kFetched = 8192;  // how many bytes ahead of reading to prefetch

// The running softmax of each query row: maximum and sum in base 2, and the weighted values before normalisation.
template <class Compute>
struct Partial {
  Compute *maximum, *sum, *acc;
  int64_t stride;  // of a row of `acc`

  static int64_t size(int64_t rows, int64_t stride) { return rows * (stride + 2); }

  Partial(Compute* data, int64_t rows, int64_t stride)
      : maximum(data + rows * stride), sum(maximum + rows), acc(data), stride(stride) {}
};

// A width rounded up to whole vectors of lanes.
template <class Step, class Compute>
int64_t padded(int64_t width) {
  return round_up(width, kElements<Step, Compute>);
}

// Reads `count` numbers, `step` apart.
template <class Element, class Compute>
void widen_row(const void* data, int64_t first, int64_t step, int64_t count, Compute* to) {
  const Element* from = static_cast<const Element*>(data) + first;
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes<Compute> <= count; i += kLanes<Compute>) store(to + i, load<Compute>(from + i));
  }
  for (; i < count; i++) to[i] = widen<Compute>(from[i * step]);
}

// The part of a mask's or bias's row that is about keys `key ..`: it has places `begin .. end`, from element `first`
// on.
struct Columns {
  int64_t first;
  int begin, end;

  Columns(const FastattnView& view, int64_t columns, int64_t start, int64_t row, int64_t key, int low, int high)
      : begin(int(clamp(start - key, low, high))), end(int(clamp(start + columns - key, begin, high))) {
    first = row + (key + begin - start) * view.stride[3];
  }
};

// Row r of a key head is query r / group of query head r % group in its group. Rows of several heads follow one
// another. `Element` is the type of the caches. `Step` says what a lane of q, of keys and of weights holds (operand.h).
template <class Element, class Compute, class Step>
class Split {
 public:
  Split(const FastattnDecode& d, const Entry& entry)
      : d_(d), entry_(entry), group_(d.q_heads / d.kv_heads), rows_(group_ * entry.q_len), 
        k_width_(padded<Step, Compute>(d.head_dim)), k_lanes_(k_width_ / Step::kParts),
        v_width_(padded<Step, Compute>(d.v_dim)) {
    const bool bias = d.terms != nullptr && d.terms->bias.data != nullptr;
    plain_ = d.softcap == 0.0 && d.alibi_slopes == nullptr && !bias && d.scale > 0.0;
    exponent_scale_ = plain_ ? Compute(d.scale * kLog2E) : Compute(1);
    if (d.terms == nullptr) return;
    add_bias_row_ = add_bias_row_of<Compute>(d.terms->bias_dtype);
    if (d.terms->mask_start != nullptr) mask_start_ = clamp(d.terms->mask_start[entry.number], -kFarthest, kFarthest);
  }

  // The memory that `run` needs for `heads` key heads, in elements of type Compute.
  static int64_t scratch_size(const FastattnDecode& d, const Entry& entry, int64_t heads) {
    const int64_t rows = heads * (d.q_heads / d.kv_heads) * entry.q_len;
    const int64_t k_width = padded<Step, Compute>(d.head_dim), v_width = padded<Step, Compute>(d.v_dim);
    return rows * (k_width / Step::kParts + kBlock) + kBlock + k_width + (kKeyTile + heads) * most(k_width, v_width);
  }

  // Computes `keys` of the key heads `head .. head_end` into `partials`, one for each head, with memory of
  // `scratch_size`.
  //
  // If the heads of a position are adjacent in memory, a tile takes all heads of a few positions, then the next
  // positions. Head by head, the rows would be a power of two apart, and the caches would evict them before they are
  // read.
  void run(Range keys, int64_t head, int64_t head_end, Compute* partials, int64_t step, Compute* memory) {
    if (d_.k_cache.stride[2] > d_.k_cache.stride[1] && head + 1 < head_end) {  // a head's positions are adjacent
      for (int64_t h = head; h < head_end; h++) run(keys, h, h + 1, partials + (h - head) * step, step, memory);
      return;
    }
    q_ = memory;
    scores_ = q_ + (head_end - head) * rows_ * k_lanes_;
    scales_ = scores_ + (head_end - head) * rows_ * kBlock;
    Compute* row = scales_ + kBlock;
    zeros_ = reinterpret_cast<Element*>(row + k_width_);
    const int64_t zeros = (head_end - head) * most(k_width_, v_width_);
    std::memset(static_cast<void*>(zeros_), 0, size_t(zeros) * sizeof(Element));
    copy_ = zeros_ + zeros;
    for (int64_t h = head; h < head_end; h++) start(h, h - head, partials + (h - head) * step, row);
    // With a query row for each head, positions are read one by one, in the order of memory.
    const bool k_in_order = rows_ == 1 && side_by_side(d_.k_cache, d_.head_dim, k_width_);
    const bool v_in_order = rows_ == 1 && side_by_side(d_.v_cache, d_.v_dim, v_width_);
    Positions<Element> k, v;
    Positions<float> k_scales, v_scales;
    for (int64_t key = keys.start; key < keys.end; key += kBlock) {
      const int count = int(least<int64_t>(kBlock, keys.end - key));
      k.find(d_, d_.k_cache, entry_.number, key, count);
      v.find(d_, d_.v_cache, entry_.number, key, count);
      if constexpr (kQuantised) {
        k_scales.find(d_, d_.quantised->k_scale, entry_.number, key, count);
        v_scales.find(d_, d_.quantised->v_scale, entry_.number, key, count);
      }
      if (key == keys.start && !k_in_order) fetch(tile(d_.k_cache, k.at[0], 0, head, head_end, d_.head_dim), head_end - head);
      if (k_in_order) {
        for (int j = 0; j < count; j++) {
          const Element* first = k.at[j] + head * k_width_;
          Ahead ahead = further(k, v, j, count, d_.k_cache, head, (head_end - head) * k_width_);
          all_products_of_heads<Step>(scores_ + j, kBlock, q_, first, k_width_, head_end - head, ahead);
        }
      } else {
        for (int j = 0; j < count; j += kKeyTile) {
          const int some = least(kKeyTile, count - j);
          Ahead ahead = j + kKeyTile < count ? tile(d_.k_cache, k.at[j], kKeyTile, head, head_end, d_.head_dim)
                                             : tile(d_.v_cache, v.at[0], 0, head, head_end, d_.v_dim);
          for (int64_t h = head; h < head_end; h++) {
            const TileRows<Element> rows(k, j, some, d_.k_cache, h, d_.head_dim, k_width_, copy_, zeros_);
            multiply_keys(h - head, rows, j, some, ahead);
          }
        }
      }
      bool forbidden = false;
      for (int64_t h = head; h < head_end; h++) {
        const Partial<Compute> partial(partials + (h - head) * step, rows_, v_width_);
        Compute* s = scores_ + (h - head) * rows_ * kBlock;
        if constexpr (kQuantised) scale_keys(s, k_scales, d_.quantised->k_scale, h, count);
        for (int64_t r = 0; r < rows_; r++) {
          const Seen seen = seen_by(r, key, count);
          finish_scores(s + r * kBlock, h, r, key, count);
          if (d_.terms != nullptr) forbidden |= add_terms(s + r * kBlock, h, r, key, seen);
          online_softmax(s + r * kBlock, seen, r, partial);
        }
        if constexpr (kQuantised) scale_keys(s, v_scales, d_.quantised->v_scale, h, count);
        for (int64_t r = 0; r < rows_; r++) Step::round_row(s + r * kBlock, 0, kBlock, s + r * kBlock);
      }
      if (v_in_order && !forbidden) {
        add_values_in_order(v, k, count, head, head_end, seen_by(0, key, count), partials, step);
        continue;
      }
      const bool whole = !forbidden && all_see(key, count);
      for (int j = 0; j < count; j += kKeyTile) {
        const int some = least(kKeyTile, count - j);
        Ahead ahead = j + kKeyTile < count ? tile(d_.v_cache, v.at[j], kKeyTile, head, head_end, d_.v_dim)
                                           : tile(d_.k_cache, k.at[j], some, head, head_end, d_.head_dim);
        for (int64_t h = head; h < head_end; h++) {
          const TileRows<Element> rows(v, j, some, d_.v_cache, h, d_.v_dim, v_width_, copy_, zeros_);
          const Partial<Compute> partial(partials + (h - head) * step, rows_, v_width_);
          add_values(h - head, rows, j, some, whole, partial.acc, ahead);
        }
      }
    }
  }

  int64_t rows() const { return rows_; }
  int64_t q_head(int64_t head, int64_t r) const { return head * group_ + r % group_; }
  int64_t query(int64_t r) const { return r / group_; }

 private:
  // Whether the rows of a position's heads are whole vectors without gaps between them.
  static bool side_by_side(const FastattnView& cache, int64_t width, int64_t padded) {
    return cache.stride[3] == 1 && cache.stride[2] == width && width == padded;
  }

  // The tile that begins `keys` positions after this one. Nothing to fetch if other heads are between its rows.
  static Ahead tile(const FastattnView& cache, const Element* position, int keys, int64_t head, int64_t head_end,
                    int64_t width) {
    const Element* first = position + head * cache.stride[2] + keys * cache.stride[1];
    const bool gapless = cache.stride[1] == (head_end - head) * width;
    return {reinterpret_cast<const char*>(first), gapless ? Ahead::kLine : 0};
  }

  // Fetches the first tile of a split at once: there is no earlier tile during which to fetch it.
  void fetch(Ahead ahead, int64_t heads) const {
    const int64_t bytes = ahead.step == 0 ? 0 : kKeyTile * heads * d_.head_dim * int64_t(sizeof(Element));
    for (int64_t i = 0; i < bytes; i += Ahead::kLine) ahead.line();
  }

  // What to fetch while position `j` of `count` is read: a later position of this block, or of what is read after it.
  static Ahead further(const Positions<Element>& now, const Positions<Element>& next, int j, int count,
                       const FastattnView& cache, int64_t head, int64_t elements) {
    const int64_t bytes = elements * int64_t(sizeof(Element));
    const int far = j + int(clamp(kFetched / most<int64_t>(bytes, 1), 1, kBlock / 2));
    const Element* from = far < count ? now.at[far] : next.at[least(far - count, count - 1)];
    return {reinterpret_cast<const char*>(from + head * cache.stride[2]), Ahead::kLine};
  }

  // Visits rows in fours, twos and ones. The first visit fetches ahead; the others read the same tile again.
  struct ForRows {
    int64_t rows, at = 0;
    Ahead& ahead;

    ForRows(int64_t rows, Ahead& ahead) : rows(rows), ahead(ahead) {}

    template <int kRows, class Visit>
    void each(Visit visit) {
      for (; at + kRows <= rows; at += kRows) {
        Ahead none{ahead.at, 0};
        visit(at, at == 0 ? ahead : none);
      }
    }
  };

  // The places of a block of keys that a row sees.
  struct Seen {
    int first, end;
  };

  Seen seen_by(int64_t r, int64_t key, int count) const {
    const Range range = visible(d_, entry_, query(r));
    return {int(clamp(range.start - key, 0, count)), int(clamp(range.end - key, 0, count))};
  }

  bool all_see(int64_t key, int count) const {
    const Seen first = seen_by(0, key, count), last = seen_by(rows_ - 1, key, count);
    return first.end == count && last.first == 0 && first.first == 0 && last.end == count;
  }

  // Loads the query rows of a head and clears its `partial`. `row` has room for one query row.
  void start(int64_t head, int64_t number, Compute* partial, Compute* row) const {
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t from = entry_.batch * d_.q.stride[0] + q_head(head, r) * d_.q.stride[1] +
                           (entry_.first + query(r)) * d_.q.stride[2];
      Compute* to = q_ + (number * rows_ + r) * k_lanes_;
      Compute* wide = Step::kParts == 1 ? to : row;
      if constexpr (!kQuantised) {
        widen_row<Element>(d_.q.data, from, d_.q.stride[3], d_.head_dim, wide);
      } else if (d_.dtype == FASTATTN_FLOAT32) {
        widen_row<float>(d_.q.data, from, d_.q.stride[3], d_.head_dim, wide);
      } else if (d_.dtype == FASTATTN_FLOAT16) {
        widen_row<float16>(d_.q.data, from, d_.q.stride[3], d_.head_dim, wide);
      } else {
        widen_row<bfloat16>(d_.q.data, from, d_.q.stride[3], d_.head_dim, wide);
      }
      for (int64_t c = d_.head_dim; c < k_width_; c++) wide[c] = Compute(0);
      Step::round_row(wide, 0, int(k_width_), to);
    }
    const Partial<Compute> own(partial, rows_, v_width_);
    for (int64_t i = 0; i < rows_ * v_width_; i++) own.acc[i] = 0;
    for (int64_t r = 0; r < rows_; r++) own.maximum[r] = -INFINITY, own.sum[r] = 0;
  }

  void multiply_keys(int64_t number, const TileRows<Element>& k, int j, int count, Ahead& ahead) const {
    const Compute* q = q_ + number * rows_ * k_lanes_;
    Compute* s = scores_ + number * rows_ * kBlock + j;
    ForRows rows(rows_, ahead);
    rows.template each<4>([&](int64_t r, Ahead& next) {
      all_products<Step, 4>(s + r * kBlock, q + r * k_lanes_, k.row, count, k_width_, next);
    });
    rows.template each<2>([&](int64_t r, Ahead& next) {
      all_products<Step, 2>(s + r * kBlock, q + r * k_lanes_, k.row, count, k_width_, next);
    });
    rows.template each<1>([&](int64_t r, Ahead& next) {
      all_products<Step, 1>(s + r * kBlock, q + r * k_lanes_, k.row, count, k_width_, next);
    });
  }

  // Adds the values of `some` keys, from key `j` of a block on. `whole`: all rows see all of these keys.
  void add_values(int64_t number, const TileRows<Element>& v, int j, int some, bool whole, Compute* acc, Ahead& ahead) const {
    const Compute* p = scores_ + number * rows_ * kBlock + j / Step::kParts;
    ForRows rows(rows_, ahead);
    if (whole) {
      rows.template each<4>([&](int64_t r, Ahead& next) {
        all_weighted_values<Step, 4>(acc + r * v_width_, v_width_, p + r * kBlock, v.row, some, next);
      });
      rows.template each<2>([&](int64_t r, Ahead& next) {
        all_weighted_values<Step, 2>(acc + r * v_width_, v_width_, p + r * kBlock, v.row, some, next);
      });
    }
    rows.template each<1>([&](int64_t r, Ahead& next) {  // an unseen value may be NaN: 0 times it is NaN
      const Element* row[kKeyTile];
      for (int i = 0; i < kKeyTile; i++) {
        const Compute weight = Step::part(p[r * kBlock + i / Step::kParts], i % Step::kParts);
        row[i] = i < some && (whole || weight != 0) ? v.row[i] : zeros_;
      }
      all_weighted_values<Step, 1>(acc + r * v_width_, v_width_, p + r * kBlock, row, some, next);
    });
  }

  // Adds the values of all keys of a block that are seen, with one row for each head.
  void add_values_in_order(const Positions<Element>& v, const Positions<Element>& k, int count, int64_t head,
                           int64_t head_end, Seen seen, Compute* partials, int64_t step) const {
    constexpr int kLanesAtOnce = 2, kKeysAtOnce = kLanesAtOnce * Step::kParts;
    for (int j = seen.first / kKeysAtOnce * kKeysAtOnce; j < seen.end; j += kKeysAtOnce) {
      const Element* row[kKeysAtOnce];
      Ahead ahead[kKeysAtOnce];
      for (int i = 0; i < kKeysAtOnce; i++) {
        row[i] = j + i >= seen.first && j + i < seen.end ? v.at[j + i] + head * v_width_ : zeros_;
        ahead[i] = further(v, k, j + i, count, d_.v_cache, head, (head_end - head) * v_width_);
      }
      weighted_values_of_heads<Step, kLanesAtOnce>(
          partials, step, scores_ + j / Step::kParts, kBlock, row, v_width_, head_end - head, ahead);
    }
  }

  // Turns products of one row into scores in base 2, in place, for `count` keys from `key` on. The exponential applies
  // `exponent_scale_`.
  void finish_scores(Compute* s, int64_t head, int64_t r, int64_t key, int count) const {
    constexpr Compute kLog2e = Compute(kLog2E);
    const Compute scale = Compute(d_.scale);
    if (plain_) return;
    if (d_.softcap > 0.0) {
      const Compute inner = scale / Compute(d_.softcap), outer = Compute(d_.softcap) * kLog2e;
      for (int j = 0; j < kBlock; j += kLanes<Compute>) store(s + j, tanh(load(s + j) * inner) * outer);
    } else {
      for (int j = 0; j < count; j++) s[j] *= scale * kLog2e;
    }
    if (d_.alibi_slopes != nullptr) {
      const Compute slope =
          static_cast<const Compute*>(d_.alibi_slopes)[entry_.number * d_.slopes_stride + q_head(head, r)] * kLog2e;
      const int64_t distance = entry_.length - entry_.q_len + query(r) - key;
      for (int j = 0; j < count; j++) s[j] -= slope * Compute(distance < j ? j - distance : distance - j);
    }
  }

  // Applies bias and mask to finished scores of one row, for the keys that it sees. Returns whether one of these keys
  // is forbidden.
  bool add_terms(Compute* s, int64_t head, int64_t r, int64_t key, Seen seen) const {
    const FastattnView &mask = d_.terms->mask, &bias = d_.terms->bias;
    if (bias.data != nullptr) {
      const Columns own(bias, d_.terms->bias_columns, mask_start_, row_of(bias, head, r), key, seen.first, seen.end);
      add_bias_row_(bias.data, own.first, bias.stride[3], s + own.begin, own.end - own.begin, Compute(1));
    }
    if (mask.data != nullptr) {
      const Columns own(mask, d_.terms->mask_columns, mask_start_, row_of(mask, head, r), key, seen.first, seen.end);
      const uint8_t* keep = static_cast<const uint8_t*>(mask.data) + own.first;
      for (int j = own.begin; j < own.end; j++) {
        if (!keep[(j - own.begin) * mask.stride[3]]) s[j] = -INFINITY;
      }
    }
    bool forbidden = false;
    for (int j = seen.first; j < seen.end; j++) forbidden |= s[j] == -INFINITY;
    return forbidden;
  }

  int64_t row_of(const FastattnView& view, int64_t head, int64_t r) const {
    return entry_.number * view.stride[0] + q_head(head, r) * view.stride[1] + query(r) * view.stride[2];
  }

  // Multiplies the numbers of all rows of a head by the scales of their keys. 0 stays 0 if the scale of an unseen key
  // is NaN or infinite.
  void scale_keys(Compute* s, const Positions<float>& scales, const FastattnView& view, int64_t head, int count) const {
    for (int j = 0; j < count; j++) scales_[j] = Compute(scales.at[j][head * view.stride[2]]);
    for (int64_t r = 0; r < rows_; r++, s += kBlock) {
      for (int j = 0; j < count; j++) s[j] = s[j] == Compute(0) ? Compute(0) : s[j] * scales_[j];
    }
  }

  // Turns one row's scores into weights for the keys that it sees; the others get 0.
  void online_softmax(Compute* s, Seen seen, int64_t r, const Partial<Compute>& partial) const {
    constexpr int kL = kLanes<Compute>;
    const bool nothing = seen.first >= seen.end;
    const int begin = nothing ? kBlock : seen.first / kL * kL, end = nothing ? kBlock : int(round_up(seen.end, kL));
    for (int j = 0; j < begin; j++) s[j] = 0;
    for (int j = end; j < kBlock; j++) s[j] = 0;
    if (nothing) return;
    forbid_outside(s, begin, seen.first, seen.end, end);
    const Compute new_max = most<Compute>(partial.maximum[r], largest_of(s, begin, end) * exponent_scale_);
    const Compute pivot = new_max == -INFINITY ? Compute(0) : new_max;
    const Vec<Compute> total = weigh(s, begin, end, exponent_scale_, pivot, Vec<Compute>{});
    if (new_max != partial.maximum[r]) {
      const Compute alpha = exp2_of_difference(Vec<Compute>{} + (partial.maximum[r] - pivot))[0];
      partial.maximum[r] = new_max;
      partial.sum[r] *= alpha;
      for (int64_t c = 0; c < v_width_; c++) partial.acc[r * v_width_ + c] *= alpha;
    }
    partial.sum[r] += sum_lanes(total);
  }

  static constexpr bool kQuantised = sizeof(Element) == 1;

  const FastattnDecode& d_;
  Entry entry_;
  int64_t mask_start_ = 0;  // the key of the first column of a mask or bias
  AddBiasRow<Compute> add_bias_row_ = nullptr;
  int64_t group_, rows_, k_width_, k_lanes_, v_width_;
  bool plain_;              // scores are products times a factor, with no other term
  Compute exponent_scale_;  // the exponential multiplies scores by this
  Compute *q_ = nullptr, *scores_ = nullptr, *scales_ = nullptr;
  Element *zeros_ = nullptr, *copy_ = nullptr;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
