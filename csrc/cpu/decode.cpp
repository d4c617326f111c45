// Attention of few queries to a KV cache: split-KV (flash-decoding, Dao et al., 2023).
//
// The bytes of the cache bound its speed, so each is read once: the query heads that share a key head are rows of one
// tile. Shapes and lengths alone divide keys into splits, not the number of threads, and splits are merged in their
// order.
#include <cmath>

#include "decode_split.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int64_t kMergedByOne = 1 << 16;

// Merges `splits` partial results of each row of a key head, `step` elements apart, and writes out and lse.
template <class Element, class Compute, class Part>
void combine(const FastattnDecode& d, const Part& one, const Entry& e, int64_t kv_head,
             const Compute* partials, int64_t splits, int64_t step, int64_t stride, Compute* total) {
  constexpr Compute kLn2 = Compute(0.69314718055994530941723);
  const int64_t rows = one.rows();
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = one.q_head(kv_head, r);
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
    const int64_t row = e.first + one.query(r);
    Element* out = static_cast<Element*>(d.out.data) + e.batch * d.out.stride[0] + head * d.out.stride[1] +
                   row * d.out.stride[2];
    for (int64_t c = 0; c < d.v_dim; c++) out[c * d.out.stride[3]] = narrow<Element>(total[c] * inverse);
    static_cast<Compute*>(d.lse)[(e.batch * d.q_heads + head) * d.q_len + row] =
        empty ? -INFINITY : maximum * kLn2 + std::log(sum);
  }
}

template <class Element, class Compute, class Step, class Cached = Element>
bool decode_as(const FastattnDecode& d, const Team& team) {
  using Part = Split<Cached, Compute, Step>;
  const int64_t keys = split_keys(d, sizeof(Cached));
  const int64_t stride = padded<Step, Compute>(d.v_dim);
  // Splits are numbered across batch entries: entry b has the splits first[b] .. first[b + 1].
  Shared numbers(size_t(d.batch + 1) * sizeof(int64_t));
  int64_t* first = numbers.as<int64_t>();
  if (first == nullptr) return false;
  first[0] = 0;
  int64_t longest = 0;
  for (int64_t b = 0; b < d.batch; b++) {
    const Entry entry(d, b);
    first[b + 1] = first[b] + split_count(d, entry, keys);
    longest = most(longest, entry.q_len);
  }
  const int64_t step = Partial<Compute>::size(d.q_heads / d.kv_heads * longest, stride);
  const int64_t splits = first[d.batch];
  Shared partials(size_t(splits * d.kv_heads * step) * sizeof(Compute));
  Compute* results = partials.as<Compute>();
  if (results == nullptr) return false;

  // Neighbouring heads are adjacent in memory: one task takes as many of them as leave work for every thread.
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
    const Entry entry(d, b);
    const Range all = visible(d, entry);
    const int64_t start = all.start + (number - first[b]) * keys;
    const Range own{start, most(start, least(start + keys, all.end))};
    const int64_t head = task % parts * heads;
    Compute* memory = scratch<Compute>(Part::scratch_size(d, entry, heads));
    if (memory == nullptr) return false;
    Part(d, entry).run(own, head, least(head + heads, d.kv_heads), results + (number * d.kv_heads + head) * step, step, memory);
    return true;
  });
  if (!good) return false;
  // One thread merges a few elements alone: waking the others takes some microseconds.
  const int64_t elements = splits * d.q_heads * longest * stride;
  return (elements < kMergedByOne ? Team(1, nullptr) : team).run(d.batch * d.kv_heads, [&](int64_t task) {
    const int64_t b = task / d.kv_heads, head = task % d.kv_heads, own = first[b + 1] - first[b];
    if (own == 0) return true;
    const Entry entry(d, b);
    Compute* total = scratch<Compute>(d.v_dim);
    if (total == nullptr) return false;
    combine<Element>(d, Part(d, entry), entry, head, results + (first[b] * d.kv_heads + head) * step, own,
                              d.kv_heads * step, stride, total);
    return true;
  });
}

template <class Element>
bool decode_cached(const FastattnDecode& d, const Team& team) {
  if (d.quantised == nullptr) return decode_as<Element, float, Multiply<float>>(d, team);
  if (d.quantised->cache_dtype == FASTATTN_INT8) return decode_as<Element, float, Multiply<float>, int8_t>(d, team);
  return decode_as<Element, float, Multiply<float>, float8>(d, team);
}

}  // namespace

bool decode(const FastattnDecode& d, const Team& team) {
#if FASTATTN_DOTS
  if (d.dtype == FASTATTN_BFLOAT16 && d.quantised == nullptr) return decode_as<bfloat16, float, Dot>(d, team);
#endif
#ifdef FASTATTN_BESIDE
  return FASTATTN_BESIDE::decode(d, team);
#else
  switch (d.dtype) {
    case FASTATTN_FLOAT32: return decode_cached<float>(d, team);
    case FASTATTN_FLOAT16: return decode_cached<float16>(d, team);
    case FASTATTN_BFLOAT16: return decode_cached<bfloat16>(d, team);
    default: return decode_as<double, double, Multiply<double>>(d, team);
  }
#endif
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
