// Attention of few queries to a KV cache: split-KV (flash-decoding, Dao et al., 2023).
//
// Bound by the bytes of the cache, so each is read once: the query heads that share a key head are rows of one tile. Keys
// are divided into splits by shapes and lengths alone, whatever the number of threads, and merged in their order.
#include <cmath>
#include <cstring>

#include "cache.h"
#include "simd.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int kBlock = 32;              // keys whose scores are held at once
constexpr int64_t kSplitBytes = 1 << 19;  // of the cache, at least, for each split

template <class T>
T least(T a, T b) {
  return b < a ? b : a;
}

template <class T>
T most(T a, T b) {
  return a < b ? b : a;
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return least(most(x, low), high); }

// -- What there is to do ---------------------------------------------------------------------------------------------

struct Range {
  int64_t start, end;
};

// The keys that one row of batch entry `b` sees.
Range visible(const FastattnDecode& d, int64_t length, int64_t query) {
  const int64_t position = length - d.q_len + query;
  Range range{0, length};
  if (d.right != FASTATTN_OPEN) range.end = clamp(position + d.right + 1, 0, length);
  if (d.left != FASTATTN_OPEN) range.start = clamp(position - d.left, 0, length);
  return range;
}

// The same for all its rows.
Range visible(const FastattnDecode& d, int64_t length) {
  return {visible(d, length, 0).start, visible(d, length, d.q_len - 1).end};
}

int64_t split_keys(const FastattnDecode& d, int64_t element_size) {
  const int64_t key_bytes = d.kv_heads * (d.head_dim + d.v_dim) * element_size;
  return clamp(kSplitBytes / key_bytes, 2 * kBlock, 64 * kBlock) / kBlock * kBlock;
}

int64_t split_count(const FastattnDecode& d, int64_t b, int64_t keys) {
  const Range range = visible(d, cached_length(d.lens, b, d.added, d.capacity, d.pages));
  return most<int64_t>((range.end - range.start + keys - 1) / keys, 1);
}

// -- One block of keys -----------------------------------------------------------------------------------------------

// Rows of keys or values: in the cache, or copied, with zeros behind them, where they are not whole vectors.
template <class Element>
struct Rows {
  const Element* row[kBlock];

  // `count` positions from `first` on; `copy` has room for kBlock rows of `padded` elements.
  void find(const FastattnDecode& d, const FastattnView& cache, int64_t b, int64_t head, int64_t first, int count,
            int64_t width, int64_t padded, Element* copy) {
    const Element* data = static_cast<const Element*>(cache.data) + head * cache.stride[2];
    for (int j = 0; j < count; j++) {
      const Place place = locate(d, b, first + j);
      row[j] = data + place.page * cache.stride[0] + place.slot * cache.stride[1];
    }
    if (cache.stride[3] == 1 && width == padded) return;
    for (int j = 0; j < count; j++, copy += padded) {
      for (int64_t c = 0; c < width; c++) copy[c] = row[j][c * cache.stride[3]];
      for (int64_t c = width; c < padded; c++) copy[c] = Element{};
      row[j] = copy;
    }
  }

  void prefetch(int count, int64_t width) const {
    for (int j = 0; j < count; j++) {
      const char* line = reinterpret_cast<const char*>(row[j]);
      for (int64_t byte = 0; byte < width * int64_t(sizeof(Element)); byte += 64) __builtin_prefetch(line + byte);
    }
  }
};

// s[r][j] = <q_r, k_j> for kRows rows and kKeys keys. `q` is padded with zeros to whole vectors.
template <int kRows, int kKeys, class Compute, class Element>
__attribute__((noinline)) void products(Compute* s, const Compute* q, int64_t q_stride, const Element* const* k,
                                        int64_t width) {
  using V = Vec<Compute>;
  V sum[kRows][kKeys];
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kKeys; j++) sum[r][j] = V{};
  }
  for (int64_t c = 0; c < width; c += kLanes<Compute>) {
    for (int j = 0; j < kKeys; j++) {
      const V key = load<Compute>(k[j] + c);
      for (int r = 0; r < kRows; r++) sum[r][j] += load<Compute>(q + r * q_stride + c) * key;
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int j = 0; j < kKeys; j++) s[r * kBlock + j] = sum_lanes(sum[r][j]);
  }
}

template <int kRows, class Compute, class Element>
void all_products(Compute* s, const Compute* q, int64_t q_stride, const Element* const* k, int count, int64_t width) {
  constexpr int kKeys = 8 / kRows;
  int j = 0;
  for (; j + kKeys <= count; j += kKeys) products<kRows, kKeys>(s + j, q, q_stride, k + j, width);
  for (; j < count; j++) products<kRows, 1>(s + j, q, q_stride, k + j, width);
}

// acc[r] += sum_j p[r][j] v_j, over the columns of kVectors vectors.
template <int kRows, int kVectors, class Compute, class Element>
__attribute__((noinline)) void weighted_values(Compute* acc, int64_t acc_stride, const Compute* p,
                                               const Element* const* v, int first, int end, int64_t column) {
  using V = Vec<Compute>;
  constexpr int kL = kLanes<Compute>;
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < kVectors; i++) sum[r][i] = load<Compute>(acc + r * acc_stride + column + i * kL);
  }
  for (int j = first; j < end; j++) {
    V value[kVectors];
    for (int i = 0; i < kVectors; i++) value[i] = load<Compute>(v[j] + column + i * kL);
    for (int r = 0; r < kRows; r++) {
      for (int i = 0; i < kVectors; i++) sum[r][i] += p[r * kBlock + j] * value[i];
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < kVectors; i++) store(acc + r * acc_stride + column + i * kL, sum[r][i]);
  }
}

template <int kRows, class Compute, class Element>
void all_weighted_values(Compute* acc, int64_t acc_stride, const Compute* p, const Element* const* v, int first, int end,
                         int64_t width) {
  constexpr int kVectors = 8 / kRows, kL = kLanes<Compute>;
  int64_t c = 0;
  for (; c + kVectors * kL <= width; c += kVectors * kL) {
    weighted_values<kRows, kVectors>(acc, acc_stride, p, v, first, end, c);
  }
  for (; c < width; c += kL) weighted_values<kRows, 1>(acc, acc_stride, p, v, first, end, c);
}

// -- One split of one key head ---------------------------------------------------------------------------------------

// The running softmax of each row: maximum and sum in base 2, and the weighted values, not normalised.
template <class Compute>
struct Partial {
  Compute *maximum, *sum, *acc;
  int64_t stride;  // of a row of `acc`

  static int64_t size(int64_t rows, int64_t stride) { return rows * (stride + 2); }

  Partial(Compute* data, int64_t rows, int64_t stride)
      : maximum(data + rows * stride), sum(maximum + rows), acc(data), stride(stride) {}
};

template <class Element, class Compute>
class Split {
 public:
  Split(const FastattnDecode& d, int64_t b, int64_t head)
      : d_(d), b_(b), head_(head), group_(d.q_heads / d.kv_heads), rows_(group_ * d.q_len),
        length_(cached_length(d.lens, b, d.added, d.capacity, d.pages)), q_stride_(padded(d.head_dim)) {}

  static int64_t padded(int64_t width) { return (width + kLanes<Compute> - 1) / kLanes<Compute> * kLanes<Compute>; }

  // Elements of type Compute.
  static int64_t scratch_size(const FastattnDecode& d) {
    const int64_t copies = kBlock * (padded(d.head_dim) + padded(d.v_dim));
    return d.q_heads / d.kv_heads * d.q_len * padded(d.head_dim) + 4 * kBlock + copies;
  }

  // Keys `keys` of the cache into `partial`, with memory of `scratch_size`.
  void run(Range keys, Partial<Compute> partial, Compute* memory) {
    q_ = memory;
    scores_ = q_ + rows_ * q_stride_;
    Element* copies = reinterpret_cast<Element*>(scores_ + 4 * kBlock);
    load_queries();
    for (int64_t r = 0; r < rows_; r++) partial.maximum[r] = -INFINITY, partial.sum[r] = 0;
    std::memset(partial.acc, 0, size_t(rows_ * partial.stride) * sizeof(Compute));
    Rows<Element> k, v;
    for (int64_t key = keys.start; key < keys.end; key += kBlock) {
      const int count = int(least<int64_t>(kBlock, keys.end - key));
      k.find(d_, d_.k_cache, b_, head_, key, count, d_.head_dim, q_stride_, copies);
      v.find(d_, d_.v_cache, b_, head_, key, count, d_.v_dim, partial.stride, copies + kBlock * q_stride_);
      v.prefetch(count, d_.v_dim);
      int64_t r = 0;
      for (; r + 4 <= rows_; r += 4) tile<4>(r, key, count, k, v, partial);
      for (; r + 2 <= rows_; r += 2) tile<2>(r, key, count, k, v, partial);
      for (; r < rows_; r++) tile<1>(r, key, count, k, v, partial);
    }
  }

  int64_t rows() const { return rows_; }
  int64_t q_head(int64_t r) const { return head_ * group_ + r % group_; }
  int64_t query(int64_t r) const { return r / group_; }

 private:
  void load_queries() {
    for (int64_t r = 0; r < rows_; r++) {
      const Element* from = static_cast<const Element*>(d_.q.data) + b_ * d_.q.stride[0] + q_head(r) * d_.q.stride[1] +
                            query(r) * d_.q.stride[2];
      for (int64_t c = 0; c < q_stride_; c++) {
        q_[r * q_stride_ + c] = c < d_.head_dim ? widen<Compute>(from[c * d_.q.stride[3]]) : Compute(0);
      }
    }
  }

  // Scores in base 2 of row `r` from products, in place: `count` keys from `key` on.
  void finish_scores(Compute* s, int64_t r, int64_t key, int count) const {
    constexpr Compute kLog2e = Compute(1.4426950408889634073599);
    const Compute scale = Compute(d_.scale);
    if (d_.softcap > 0.0) {
      const Compute cap = Compute(d_.softcap);
      for (int j = 0; j < count; j++) s[j] = std::tanh(s[j] * scale / cap) * cap * kLog2e;
    } else {
      for (int j = 0; j < count; j++) s[j] *= scale * kLog2e;
    }
    if (d_.alibi_slopes != nullptr) {
      const Compute slope = static_cast<const Compute*>(d_.alibi_slopes)[b_ * d_.slopes_stride + q_head(r)] * kLog2e;
      const int64_t distance = length_ - d_.q_len + query(r) - key;
      for (int j = 0; j < count; j++) s[j] -= slope * Compute(distance < j ? j - distance : distance - j);
    }
  }

  // Turns row `r`'s scores into weights, of the keys `first .. end` of the block; the others get 0.
  void online_softmax(Compute* s, int first, int end, int64_t r, Partial<Compute>& partial) const {
    for (int j = 0; j < first; j++) s[j] = 0;
    for (int j = end; j < kBlock; j++) s[j] = 0;
    if (first >= end) return;
    Compute block_max = s[first];
    for (int j = first + 1; j < end; j++) block_max = most(block_max, s[j]);
    const Compute new_max = most(partial.maximum[r], block_max);
    const Compute pivot = new_max == -INFINITY ? Compute(0) : new_max;
    const Compute alpha = std::exp2(partial.maximum[r] - pivot);
    Vec<Compute> total{};
    for (int j = 0; j < kBlock; j += kLanes<Compute>) {
      const auto index = Compute(j) + lane_numbers<Compute>();
      const auto inside = (index >= Compute(first)) & (index < Compute(end));
      const Vec<Compute> p = inside ? exp2(load<Compute>(s + j) - pivot) : Vec<Compute>{};
      store(s + j, p);
      total += p;
    }
    partial.maximum[r] = new_max;
    partial.sum[r] = partial.sum[r] * alpha + sum_lanes(total);
    if (alpha != 1) {
      for (int64_t c = 0; c < partial.stride; c++) partial.acc[r * partial.stride + c] *= alpha;
    }
  }

  template <int kRows>
  void tile(int64_t r, int64_t key, int count, const Rows<Element>& k, const Rows<Element>& v, Partial<Compute>& partial) {
    all_products<kRows>(scores_, q_ + r * q_stride_, q_stride_, k.row, count, d_.head_dim);
    bool whole = true;
    int first[kRows], end[kRows];
    for (int i = 0; i < kRows; i++) {
      const Range seen = visible(d_, length_, query(r + i));
      first[i] = int(clamp(seen.start - key, 0, count));
      end[i] = int(clamp(seen.end - key, 0, count));
      whole = whole && first[i] == 0 && end[i] == count;
      finish_scores(scores_ + i * kBlock, r + i, key, count);
      online_softmax(scores_ + i * kBlock, first[i], end[i], r + i, partial);
    }
    Compute* acc = partial.acc + r * partial.stride;
    if (whole) {
      all_weighted_values<kRows>(acc, partial.stride, scores_, v.row, 0, count, d_.v_dim);
      return;
    }
    for (int i = 0; i < kRows; i++) {  // not even 0 times a value that a row may not see: it could be NaN
      all_weighted_values<1>(acc + i * partial.stride, partial.stride, scores_ + i * kBlock, v.row, first[i], end[i],
                             d_.v_dim);
    }
  }

  const FastattnDecode& d_;
  int64_t b_, head_, group_, rows_, length_, q_stride_;
  Compute *q_ = nullptr, *scores_ = nullptr;
};

// -- The result ------------------------------------------------------------------------------------------------------

// Merges `splits` partial results of each row of a key head, `step` elements apart, and writes out and lse.
template <class Element, class Compute>
void combine(const FastattnDecode& d, const Split<Element, Compute>& one, int64_t b, const Compute* partials,
             int64_t splits, int64_t step, int64_t stride, Compute* total) {
  constexpr Compute kLn2 = Compute(0.69314718055994530941723);
  const int64_t rows = one.rows();
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = one.q_head(r);
    Compute maximum = -INFINITY;
    for (int64_t i = 0; i < splits; i++) {
      const Compute own = Partial<Compute>(const_cast<Compute*>(partials) + i * step, rows, stride).maximum[r];
      maximum = own > maximum || own != own ? own : maximum;
    }
    Compute sink = -INFINITY;
    if (d.sinks != nullptr) sink = static_cast<const Compute*>(d.sinks)[head] / kLn2;
    maximum = most(maximum, sink);
    const Compute pivot = maximum == -INFINITY ? Compute(0) : maximum;
    Compute sum = std::exp2(sink - pivot);
    for (int64_t c = 0; c < d.v_dim; c++) total[c] = 0;
    for (int64_t i = 0; i < splits; i++) {
      const Partial<Compute> part(const_cast<Compute*>(partials) + i * step, rows, stride);
      const Compute alpha = std::exp2(part.maximum[r] - pivot);
      sum += part.sum[r] * alpha;
      for (int64_t c = 0; c < d.v_dim; c++) total[c] += part.acc[r * stride + c] * alpha;
    }
    const bool empty = sum == 0;
    const Compute inverse = empty ? Compute(0) : 1 / sum;
    Element* out = static_cast<Element*>(d.out.data) + b * d.out.stride[0] + head * d.out.stride[1] +
                   one.query(r) * d.out.stride[2];
    for (int64_t c = 0; c < d.v_dim; c++) out[c * d.out.stride[3]] = narrow<Element>(total[c] * inverse);
    static_cast<Compute*>(d.lse)[(b * d.q_heads + head) * d.q_len + one.query(r)] =
        empty ? -INFINITY : maximum * kLn2 + std::log(sum);
  }
}

template <class Element, class Compute>
bool decode_as(const FastattnDecode& d, const Team& team) {
  using Part = Split<Element, Compute>;
  const int64_t keys = split_keys(d, sizeof(Element));
  const int64_t rows = d.q_heads / d.kv_heads * d.q_len, stride = Part::padded(d.v_dim);
  const int64_t step = Partial<Compute>::size(rows, stride);
  // Splits of all batch entries, numbered through: entry b has first[b] .. first[b + 1].
  Shared numbers(size_t(d.batch + 1) * sizeof(int64_t));
  int64_t* first = numbers.as<int64_t>();
  if (first == nullptr) return false;
  first[0] = 0;
  for (int64_t b = 0; b < d.batch; b++) first[b + 1] = first[b] + split_count(d, b, keys);
  const int64_t splits = first[d.batch];
  Shared partials(size_t(splits * d.kv_heads * step) * sizeof(Compute));
  Compute* results = partials.as<Compute>();
  if (results == nullptr) return false;

  // Neighbouring heads lie side by side in memory: one task takes as many of them as leave work for every thread.
  int64_t heads = d.kv_heads;
  while (heads > 1 && splits * ((d.kv_heads + heads - 1) / heads) < 4 * team.threads()) heads = (heads + 1) / 2;
  const int64_t parts = (d.kv_heads + heads - 1) / heads;
  const bool good = team.run(splits * parts, [&](int64_t task) {
    const int64_t number = task / parts;
    int64_t b = 0;
    for (int64_t above = d.batch; above - b > 1;) {
      const int64_t middle = (b + above) / 2;
      (first[middle] <= number ? b : above) = middle;
    }
    const Range all = visible(d, cached_length(d.lens, b, d.added, d.capacity, d.pages));
    const int64_t start = all.start + (number - first[b]) * keys;
    const Range own{start, most(start, least(start + keys, all.end))};
    Compute* memory = scratch<Compute>(Part::scratch_size(d));
    if (memory == nullptr) return false;
    for (int64_t head = task % parts * heads; head < least((task % parts + 1) * heads, d.kv_heads); head++) {
      Compute* data = results + (first[b] * d.kv_heads + head * (first[b + 1] - first[b]) + number - first[b]) * step;
      Part(d, b, head).run(own, Partial<Compute>(data, rows, stride), memory);
    }
    return true;
  });
  if (!good) return false;
  return Team(1, nullptr).run(d.batch * d.kv_heads, [&](int64_t task) {
    const int64_t b = task / d.kv_heads, head = task % d.kv_heads, own = first[b + 1] - first[b];
    Compute* total = scratch<Compute>(d.v_dim);
    if (total == nullptr) return false;
    combine<Element, Compute>(d, Part(d, b, head), b, results + (first[b] * d.kv_heads + head * own) * step, own, step,
                              stride, total);
    return true;
  });
}

}  // namespace

bool decode(const FastattnDecode& d, const Team& team) {
  switch (d.dtype) {
    case FASTATTN_FLOAT32: return decode_as<float, float>(d, team);
    case FASTATTN_FLOAT16: return decode_as<float16, float>(d, team);
    case FASTATTN_BFLOAT16: return decode_as<bfloat16, float>(d, team);
    default: return decode_as<double, double>(d, team);
  }
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
