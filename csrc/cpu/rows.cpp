// Operations on single rows: RMS norm, rotary positions, dropout, quantising.
#include <type_traits>

#include "cache.h"
#include "dropout.h"
#include "simd.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class Element>
void normalise_row(Element* y, const Element* x, const Element* weight, int64_t width, float eps) {
  constexpr int kL = kLanes<float>;
  Vec<float> squares{};
  int64_t k = 0;
  for (; k + kL <= width; k += kL) {
    const Vec<float> some = load<float>(x + k);
    squares += some * some;
  }
  const int64_t whole = k;
  float sum = sum_lanes(squares);
  for (; k < width; k++) sum += widen<float>(x[k]) * widen<float>(x[k]);
  const float inverse = 1.0f / __builtin_sqrtf(sum / float(width) + eps);
  for (k = 0; k < whole; k += kL) {
    const Vec<float> scaled = load<float>(x + k) * inverse;
    store_narrow(y + k, weight == nullptr ? scaled : scaled * load<float>(weight + k));
  }
  for (; k < width; k++) {
    y[k] = narrow<Element>(widen<float>(x[k]) * inverse * (weight == nullptr ? 1.0f : widen<float>(weight[k])));
  }
}

template <class Element>
void normalise_as(const FastattnNorm& n) {
  for (int64_t r = 0; r < n.rows; r++) {
    for (int64_t head = 0; head < n.heads; head++) {
      normalise_row(static_cast<Element*>(n.y) + r * n.y_stride + head * n.width,
                    static_cast<const Element*>(n.x) + r * n.x_stride + head * n.width,
                    static_cast<const Element*>(n.weight), n.width, float(n.eps));
    }
  }
}

// Rotates number i of a head with number i + step: one vector, or one number, of each.
template <class Number, class Load, class Store>
[[gnu::always_inline]] inline void turn(int64_t i, int64_t step, Number cos, Number sin, const Load& get, const Store& put) {
  const Number first = get(i), second = get(i + step);
  put(i, first * cos - second * sin);
  put(i + step, second * cos + first * sin);
}

template <class Element>
void rotate_row(const FastattnRotate& o, int64_t r) {
  constexpr int kL = kLanes<float>;
  const int64_t half = o.rotated / 2, last = o.positions - 1;
  const int64_t spread = o.interleaved ? 2 : 1, step = o.interleaved ? 1 : half;
  const int64_t given = o.position == nullptr ? r % o.positions : o.position[r];
  const int64_t position = given < 0 ? 0 : given < last ? given : last;
  const float *cos = o.cos + position * half, *sin = o.sin + position * half, sign = o.back ? -1.0f : 1.0f;
  const Element* x = static_cast<const Element*>(o.x) + r * o.x_stride;
  Element* y = static_cast<Element*>(o.y) + r * o.y_stride;
  for (int64_t head = 0; head < o.heads; head++, x += o.head_dim, y += o.head_dim) {
    int64_t i = 0;
    for (; !o.interleaved && i + kL <= half; i += kL) {
      turn(i, half, load(cos + i), load(sin + i) * sign, [&](int64_t at) { return load<float>(x + at); },
           [&](int64_t at, Vec<float> value) { store_narrow(y + at, value); });
    }
    for (; i < half; i++) {
      turn(i * spread, step, cos[i], sin[i] * sign, [&](int64_t at) { return widen<float>(x[at]); },
           [&](int64_t at, float value) { y[at] = narrow<Element>(value); });
    }
    for (i = o.rotated; i < o.head_dim; i++) y[i] = x[i];
  }
}

constexpr int64_t kTaskElements = 1 << 14;

template <class Element>
bool rotate_as(const FastattnRotate& o, const Team& team) {
  const int64_t width = o.heads * o.head_dim, rows = width < kTaskElements ? kTaskElements / (width < 1 ? 1 : width) : 1;
  return team.run((o.rows + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = (task + 1) * rows < o.rows ? (task + 1) * rows : o.rows;
    for (int64_t r = task * rows; r < end; r++) rotate_row<Element>(o, r);
    return true;
  });
}

// A number in the dtype of a quantised cache.
template <class Cached>
inline Cached quantised(float y) {
  constexpr bool kInteger = std::is_same_v<Cached, int8_t>;
  constexpr float kLargest = kInteger ? 127.0f : 448.0f;
  const float cut = y > kLargest ? kLargest : y < -kLargest ? -kLargest : y;
  if constexpr (kInteger) return cut == cut ? int8_t((cut + 0x1.8p23f) - 0x1.8p23f) : int8_t(0);
  else return narrow<float8>(cut);
}

// Quantises one row, and measures its scale if asked to: see `quantise` of the reference.
template <class Cached, class Element>
void quantise_row(Cached* to, int64_t to_step, const Element* from, int64_t from_step, int64_t width, float* scale,
                  bool measured) {
  if (measured) {
    float largest = 0.0f, poison = 0.0f;
    for (int64_t i = 0; i < width; i++) {
      const float x = widen<float>(from[i * from_step]), size = x < 0.0f ? -x : x;
      largest = size > largest ? size : largest;
      poison += x * 0.0f;  // NaN if one is NaN or infinite
    }
    *scale = (largest + poison) / (std::is_same_v<Cached, int8_t> ? 127.0f : 448.0f);
  }
  const float divisor = *scale == 0.0f ? 1.0f : *scale;
  for (int64_t i = 0; i < width; i++) to[i * to_step] = quantised<Cached>(widen<float>(from[i * from_step]) / divisor);
}

template <class Cached, class Element>
void quantise_heads(const FastattnAppend& a, const FastattnView& cache, const FastattnView& scales, bool measured,
                    const FastattnView& rows, int64_t width, int64_t b, int64_t row, Place place) {
  Cached* to = static_cast<Cached*>(cache.data) + place.page * cache.stride[0] + place.slot * cache.stride[1];
  float* scale = static_cast<float*>(scales.data) + place.page * scales.stride[0] + place.slot * scales.stride[1];
  const Element* from = static_cast<const Element*>(rows.data) + b * rows.stride[0] + row * rows.stride[2];
  for (int64_t head = 0; head < a.kv_heads; head++) {
    quantise_row(to + head * cache.stride[2], cache.stride[3], from + head * rows.stride[1], rows.stride[3], width,
                 scale + head * scales.stride[2], measured);
  }
}

template <class Cached, class Element>
void append_quantised_as(const FastattnAppend& a) {
  const FastattnQuantised& q = *a.quantised;
  for_new_rows(a, [&](int64_t b, int64_t row, Place place) {
    quantise_heads<Cached, Element>(a, a.k_cache, q.k_scale, q.k_measured != 0, a.k, a.head_dim, b, row, place);
    quantise_heads<Cached, Element>(a, a.v_cache, q.v_scale, q.v_measured != 0, a.v, a.v_dim, b, row, place);
  });
}

template <class Cached>
void append_quantised_from(const FastattnAppend& a) {
  switch (a.quantised->dtype) {
    case FASTATTN_FLOAT32: return append_quantised_as<Cached, float>(a);
    case FASTATTN_FLOAT16: return append_quantised_as<Cached, float16>(a);
    default: return append_quantised_as<Cached, bfloat16>(a);
  }
}

template <class Element>
bool dropout_as(const FastattnDropout& d, const Team& team) {
  constexpr int kL = kLanes<float>;
  const int64_t rows = d.width < kTaskElements ? kTaskElements / d.width : 1, whole = d.width / kL * kL;
  const uint32_t threshold = dropout_threshold(d.p);
  const float kept = float(1.0 / (1.0 - d.p));
  FastattnOperands o{};
  o.seed = &d.seed;
  return team.run((d.rows + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = (task + 1) * rows < d.rows ? (task + 1) * rows : d.rows;
    for (int64_t r = task * rows; r < end; r++) {
      const RowKeys keys = dropout_row_keys(o, 0, 0, r);
      const Element* x = static_cast<const Element*>(d.x) + r * d.width;
      Element* y = static_cast<Element*>(d.y) + r * d.width;
      VecBits scaled;
      for (int n = 0; n < kL; n++) scaled[n] = uint32_t(n) * kColumnFactor;
      int64_t i = 0;
      for (; i < whole; i += kL, scaled += kL * kColumnFactor) {
        const VecInt<float> bits = (VecInt<float>)dropout_bits(keys, scaled);
        store_narrow(y + i, load<float>(x + i) * (bits >= int32_t(threshold) ? Vec<float>{} + kept : Vec<float>{}));
      }
      for (; i < d.width; i++) {
        const bool keep = dropout_bits(keys, uint32_t(i) * kColumnFactor) >= threshold;
        y[i] = narrow<Element>(widen<float>(x[i]) * (keep ? kept : 0.0f));
      }
    }
    return true;
  });
}

}  // namespace

void normalise(const FastattnNorm& n) {
  switch (n.dtype) {
    case FASTATTN_FLOAT32: return normalise_as<float>(n);
    case FASTATTN_FLOAT16: return normalise_as<float16>(n);
    default: return normalise_as<bfloat16>(n);
  }
}

bool rotate(const FastattnRotate& o, const Team& team) {
  switch (o.dtype) {
    case FASTATTN_FLOAT32: return rotate_as<float>(o, team);
    case FASTATTN_FLOAT16: return rotate_as<float16>(o, team);
    default: return rotate_as<bfloat16>(o, team);
  }
}

void append_quantised(const FastattnAppend& a) {
  if (a.quantised->cache_dtype == FASTATTN_INT8) append_quantised_from<int8_t>(a);
  else append_quantised_from<float8>(a);
}

bool dropout(const FastattnDropout& d, const Team& team) {
  switch (d.dtype) {
    case FASTATTN_FLOAT32: return dropout_as<float>(d, team);
    case FASTATTN_FLOAT16: return dropout_as<float16>(d, team);
    default: return dropout_as<bfloat16>(d, team);
  }
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
