// One split of the keys of a batch entry, for some heads: what attention to a KV cache does between reading and merging.
#pragma once

#include <cmath>
#include <cstring>

#include "bias.h"
#include "decode_tiles.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kSplitBytes = 1 << 19;  // of the cache, at least, for each split
constexpr int64_t kFarthest = int64_t(1) << 30;  // of a column from the keys
constexpr int64_t kFewestKeys = 64, kMostKeys = 2048, kLongCache = 1024;

int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }

// -- What there is to do ---------------------------------------------------------------------------------------------

struct Range {
  int64_t start, end;
};

// A batch entry: its number, where its queries are in memory and how many, and its keys.
struct Entry {
  int64_t number, batch, first, q_len, length;

  Entry(const FastattnDecode& d, int64_t b)
      : number(b), batch(b), first(0), q_len(d.q_len), length(cached_length(d.lens, b, d.added, d.capacity, d.pages)) {
    if (d.cu_seqlens_q == nullptr) return;
    batch = 0, first = d.cu_seqlens_q[b], q_len = d.cu_seqlens_q[b + 1] - first;
    if (q_len > d.most_queries) q_len = 0;
  }
};

// The keys that one row of a batch entry sees.
Range visible(const FastattnDecode& d, const Entry& e, int64_t query) {
  const int64_t position = e.length - e.q_len + query;
  Range range{0, e.length};
  if (d.right != FASTATTN_OPEN) range.end = clamp(position + d.right + 1, 0, e.length);
  if (d.left != FASTATTN_OPEN) range.start = clamp(position - d.left, 0, e.length);
  return range;
}

// The same for all its rows.
Range visible(const FastattnDecode& d, const Entry& e) {
  return {visible(d, e, 0).start, visible(d, e, e.q_len - 1).end};
}

int64_t split_keys(const FastattnDecode& d, int64_t element_size) {
  const int64_t key_bytes = d.kv_heads * (d.head_dim + d.v_dim) * element_size;
  const int64_t fewest = d.capacity < kLongCache ? kFewestKeys : 2 * kBlock;  // a short cache is to serve every thread
  return clamp(kSplitBytes / key_bytes, fewest, kMostKeys) / kFewestKeys * kFewestKeys;
}

int64_t split_count(const FastattnDecode& d, const Entry& e, int64_t keys) {
  if (e.q_len == 0) return 0;
  const Range range = visible(d, e);
  return most<int64_t>((range.end - range.start + keys - 1) / keys, 1);
}

// -- One split -------------------------------------------------------------------------------------------------------

// The running softmax of each query row: maximum and sum in base 2, and the weighted values, not normalised.
template <class Compute>
struct Partial {
  Compute *maximum, *sum, *acc;
  int64_t stride;  // of a row of `acc`

  static int64_t size(int64_t rows, int64_t stride) { return rows * (stride + 2); }

  Partial(Compute* data, int64_t rows, int64_t stride)
      : maximum(data + rows * stride), sum(maximum + rows), acc(data), stride(stride) {}
};

template <class Compute>
int64_t padded(int64_t width) {
  return (width + kLanes<Compute> - 1) / kLanes<Compute> * kLanes<Compute>;
}

// `count` numbers, `step` apart.
template <class Element, class Compute>
void widen_row(const void* data, int64_t first, int64_t step, int64_t count, Compute* to) {
  const Element* from = static_cast<const Element*>(data) + first;
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes<Compute> <= count; i += kLanes<Compute>) store(to + i, load<Compute>(from + i));
  }
  for (; i < count; i++) to[i] = widen<Compute>(from[i * step]);
}

// What a mask or a bias says of the keys `key ..` of one row: of those at places `begin .. end`, from element `first` on.
struct Columns {
  int64_t first;
  int begin, end;

  Columns(const FastattnView& view, int64_t columns, int64_t start, int64_t row, int64_t key, int low, int high)
      : begin(int(clamp(start - key, low, high))), end(int(clamp(start + columns - key, begin, high))) {
    first = row + (key + begin - start) * view.stride[3];
  }
};

// Row r of a key head: query head r % group of its group, query r / group. Rows of several heads are numbered through.
// `Element` is that of the caches.
template <class Element, class Compute>
class Split {
 public:
  Split(const FastattnDecode& d, const Entry& entry)
      : d_(d), entry_(entry), group_(d.q_heads / d.kv_heads), rows_(group_ * entry.q_len), k_width_(padded<Compute>(d.head_dim)),
        v_width_(padded<Compute>(d.v_dim)) {
    if (d.terms == nullptr) return;
    add_bias_row_ = add_bias_row_of<Compute>(d.terms->bias_dtype);
    if (d.terms->mask_start != nullptr) mask_start_ = clamp(d.terms->mask_start[entry.number], -kFarthest, kFarthest);
  }

  // Elements of type Compute, for `heads` key heads.
  static int64_t scratch_size(const FastattnDecode& d, const Entry& entry, int64_t heads) {
    const int64_t rows = heads * (d.q_heads / d.kv_heads) * entry.q_len;
    const int64_t k_width = padded<Compute>(d.head_dim), v_width = padded<Compute>(d.v_dim);
    return rows * (k_width + kBlock) + kKeyTile * most(k_width, v_width);
  }

  // `keys` of the key heads `head .. head_end` into `partials`, one for each head, with memory of `scratch_size`.
  //
  // Where the heads of a position lie side by side: all heads of a few positions, then the next ones. Head by head, the
  // rows would be a power of two apart and fall out of the cache before their turn.
  void run(Range keys, int64_t head, int64_t head_end, Compute* partials, int64_t step, Compute* memory) {
    if (d_.k_cache.stride[2] > d_.k_cache.stride[1] && head + 1 < head_end) {  // a head's positions lie side by side
      for (int64_t h = head; h < head_end; h++) run(keys, h, h + 1, partials + (h - head) * step, step, memory);
      return;
    }
    q_ = memory;
    scores_ = q_ + (head_end - head) * rows_ * k_width_;
    copy_ = reinterpret_cast<Element*>(scores_ + (head_end - head) * rows_ * kBlock);
    for (int64_t h = head; h < head_end; h++) start(h, h - head, partials + (h - head) * step);
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
      if (k_in_order) {
        for (int j = 0; j < count; j++) {
          const Element* row = k.at[j] + head * k_width_;
          all_products_of_heads(scores_ + j, kBlock, q_, row, k_width_, head_end - head);
        }
      } else {
        for (int j = 0; j < count; j += kKeyTile) {
          const int some = least(kKeyTile, count - j);
          Ahead ahead = after(d_.k_cache, k, j, head, head_end, d_.head_dim);
          for (int64_t h = head; h < head_end; h++) {
            const Rows<Element> rows(k, j, some, d_.k_cache, h, d_.head_dim, k_width_, copy_);
            multiply_keys(h - head, rows, j, some, ahead);
          }
        }
      }
      bool forbidden = false;
      for (int64_t h = head; h < head_end; h++) {
        const Partial<Compute> partial(partials + (h - head) * step, rows_, v_width_);
        for (int64_t r = 0; r < rows_; r++) {
          Compute* s = scores_ + ((h - head) * rows_ + r) * kBlock;
          const Seen seen = seen_by(r, key, count);
          if constexpr (kQuantised) multiply(s, k_scales, d_.quantised->k_scale, h, 0, count);
          finish_scores(s, h, r, key, count);
          if (d_.terms != nullptr) forbidden |= add_terms(s, h, r, key, seen);
          online_softmax(s, seen, r, partial);
          if constexpr (kQuantised) multiply(s, v_scales, d_.quantised->v_scale, h, seen.first, seen.end);
        }
      }
      if (v_in_order && !forbidden) {
        const Seen seen = seen_by(0, key, count);
        Compute* acc = Partial<Compute>(partials, rows_, v_width_).acc;
        for (int j = seen.first; j < seen.end; j++) {
          const Element* row = v.at[j] + head * v_width_;
          weighted_values_of_heads(acc, step, scores_ + j, kBlock, row, v_width_, head_end - head);
        }
        continue;
      }
      const bool whole = !forbidden && all_see(key, count);
      for (int j = 0; j < count; j += kKeyTile) {
        const int some = least(kKeyTile, count - j);
        Ahead ahead = after(d_.v_cache, v, j, head, head_end, d_.v_dim);
        for (int64_t h = head; h < head_end; h++) {
          const Rows<Element> rows(v, j, some, d_.v_cache, h, d_.v_dim, v_width_, copy_);
          const Partial<Compute> partial(partials + (h - head) * step, rows_, v_width_);
          add_values(h - head, rows, key, j, some, count, whole, forbidden, partial.acc, ahead);
        }
      }
    }
  }

  int64_t rows() const { return rows_; }
  int64_t q_head(int64_t head, int64_t r) const { return head * group_ + r % group_; }
  int64_t query(int64_t r) const { return r / group_; }

 private:
  // Whether the rows of a position's heads are whole vectors without gaps.
  static bool side_by_side(const FastattnView& cache, int64_t width, int64_t padded) {
    return cache.stride[3] == 1 && cache.stride[2] == width && width == padded;
  }

  // What is read after the tile of kKeyTile keys from key `j` of a block on; nothing where other heads lie between them.
  static Ahead after(const FastattnView& cache, const Positions<Element>& positions, int j, int64_t head,
                     int64_t head_end, int64_t width) {
    const Element* first = positions.at[j] + head * cache.stride[2];
    const bool gapless = cache.stride[1] == (head_end - head) * width;
    return {reinterpret_cast<const char*>(first + kKeyTile * cache.stride[1]), gapless ? Ahead::kLine : 0};
  }

  // Rows by fours, twos and ones; the first of them fetch ahead, the others read the same tile again.
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

  // Of a block of keys, those that a row sees.
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

  void start(int64_t head, int64_t number, Compute* partial) const {
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t from = entry_.batch * d_.q.stride[0] + q_head(head, r) * d_.q.stride[1] +
                           (entry_.first + query(r)) * d_.q.stride[2];
      Compute* to = q_ + (number * rows_ + r) * k_width_;
      if constexpr (!kQuantised) {
        widen_row<Element>(d_.q.data, from, d_.q.stride[3], d_.head_dim, to);
      } else if (d_.dtype == FASTATTN_FLOAT32) {
        widen_row<float>(d_.q.data, from, d_.q.stride[3], d_.head_dim, to);
      } else if (d_.dtype == FASTATTN_FLOAT16) {
        widen_row<float16>(d_.q.data, from, d_.q.stride[3], d_.head_dim, to);
      } else {
        widen_row<bfloat16>(d_.q.data, from, d_.q.stride[3], d_.head_dim, to);
      }
      for (int64_t c = d_.head_dim; c < k_width_; c++) to[c] = Compute(0);
    }
    const Partial<Compute> own(partial, rows_, v_width_);
    for (int64_t i = 0; i < rows_ * v_width_; i++) own.acc[i] = 0;
    for (int64_t r = 0; r < rows_; r++) own.maximum[r] = -INFINITY, own.sum[r] = 0;
  }

  void multiply_keys(int64_t number, const Rows<Element>& k, int j, int count, Ahead& ahead) const {
    const Compute* q = q_ + number * rows_ * k_width_;
    Compute* s = scores_ + number * rows_ * kBlock + j;
    ForRows rows(rows_, ahead);
    rows.each<4>([&](int64_t r, Ahead& next) { all_products<4>(s + r * kBlock, q + r * k_width_, k.row, count, k_width_, next); });
    rows.each<2>([&](int64_t r, Ahead& next) { all_products<2>(s + r * kBlock, q + r * k_width_, k.row, count, k_width_, next); });
    rows.each<1>([&](int64_t r, Ahead& next) { all_products<1>(s + r * kBlock, q + r * k_width_, k.row, count, k_width_, next); });
  }

  void add_values(int64_t number, const Rows<Element>& v, int64_t key, int j, int some, int count, bool whole,
                  bool forbidden, Compute* acc, Ahead& ahead) const {
    const Compute* p = scores_ + number * rows_ * kBlock;
    ForRows rows(rows_, ahead);
    if (whole) {
      rows.each<4>([&](int64_t r, Ahead& next) {
        all_weighted_values<4>(acc + r * v_width_, v_width_, p + r * kBlock + j, v.row, some, next);
      });
      rows.each<2>([&](int64_t r, Ahead& next) {
        all_weighted_values<2>(acc + r * v_width_, v_width_, p + r * kBlock + j, v.row, some, next);
      });
    }
    rows.each<1>([&](int64_t r, Ahead& next) {  // not even 0 times a value that a row may not see: it could be NaN
      const Seen seen = seen_by(r, key, count);
      const int last = least(seen.end, j + some);
      for (int first = most(seen.first, j), end; first < last; first = end) {
        end = last;
        if (forbidden) {  // those one after another that have a weight
          while (first < last && p[r * kBlock + first] == 0) first++;
          for (end = first; end < last && p[r * kBlock + end] != 0;) end++;
          if (first == end) return;
        }
        all_weighted_values<1>(acc + r * v_width_, v_width_, p + r * kBlock + first, v.row + first - j, end - first, next);
      }
    });
  }

  // Scores in base 2 of one row from products, in place: `count` keys from `key` on.
  void finish_scores(Compute* s, int64_t head, int64_t r, int64_t key, int count) const {
    constexpr Compute kLog2e = Compute(1.4426950408889634073599);
    const Compute scale = Compute(d_.scale);
    if (d_.softcap > 0.0) {
      const Compute cap = Compute(d_.softcap);
      for (int j = 0; j < count; j++) s[j] = std::tanh(s[j] * scale / cap) * cap * kLog2e;
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

  // Adds the bias of one row to finished scores, of the keys that it sees, and forbids what its mask does. Returns whether
  // one of these keys is forbidden.
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

  // Numbers of one row by the scales of their keys.
  void multiply(Compute* s, const Positions<float>& scales, const FastattnView& view, int64_t head, int first, int end) const {
    for (int j = first; j < end; j++) s[j] *= Compute(scales.at[j][head * view.stride[2]]);
  }

  // Turns one row's scores into weights, of the keys that it sees; the others get 0.
  void online_softmax(Compute* s, Seen seen, int64_t r, const Partial<Compute>& partial) const {
    using V = Vec<Compute>;
    const V numbers = lane_numbers<Compute>();
    V highest = V{} - INFINITY;
    for (int j = 0; j < kBlock; j += kLanes<Compute>) {
      const V index = numbers + Compute(j), x = load<Compute>(s + j);
      const V visible = (index >= Compute(seen.first)) & (index < Compute(seen.end)) ? x : V{} - INFINITY;
      store(s + j, visible);
      highest = highest < visible ? visible : highest;
    }
    const Compute new_max = most<Compute>(partial.maximum[r], largest_lane(highest));
    const Compute pivot = new_max == -INFINITY ? Compute(0) : new_max;
    V total{};
    for (int j = 0; j < kBlock; j += kLanes<Compute>) {
      const V p = exp2(load<Compute>(s + j) - pivot);
      store(s + j, p);
      total += p;
    }
    if (new_max != partial.maximum[r]) {
      const Compute alpha = std::exp2(partial.maximum[r] - pivot);
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
  int64_t group_, rows_, k_width_, v_width_;
  Compute *q_ = nullptr, *scores_ = nullptr;
  Element* copy_ = nullptr;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
