// What is done to single rows, beside products and attention: RMS norm, rotary positions, dropout.
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

// Dimension i of a head with dimension i + half: one vector, or one number, of each.
template <class Number, class Load, class Store>
[[gnu::always_inline]] inline void turn(int64_t i, int64_t half, Number cos, Number sin, const Load& get, const Store& put) {
  const Number first = get(i), second = get(i + half);
  put(i, first * cos - second * sin);
  put(i + half, second * cos + first * sin);
}

template <class Element>
void rotate_as(const FastattnRotate& o) {
  constexpr int kL = kLanes<float>;
  const int64_t half = o.head_dim / 2;
  for (int64_t r = 0; r < o.rows; r++) {
    Element* x = static_cast<Element*>(o.x) + r * o.x_stride;
    const int64_t last = o.positions - 1, given = o.position[r], position = given < 0 ? 0 : given < last ? given : last;
    const float *cos = o.cos + position * half, *sin = o.sin + position * half;
    for (int64_t head = 0; head < o.heads; head++, x += o.head_dim) {
      int64_t i = 0;
      for (; i + kL <= half; i += kL) {
        turn(i, half, load(cos + i), load(sin + i), [&](int64_t at) { return load<float>(x + at); },
             [&](int64_t at, Vec<float> y) { store_narrow(x + at, y); });
      }
      for (; i < half; i++) {
        turn(i, half, cos[i], sin[i], [&](int64_t at) { return widen<float>(x[at]); },
             [&](int64_t at, float y) { x[at] = narrow<Element>(y); });
      }
    }
  }
}

constexpr int64_t kTaskElements = 1 << 14;

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

void rotate(const FastattnRotate& o) {
  switch (o.dtype) {
    case FASTATTN_FLOAT32: return rotate_as<float>(o);
    case FASTATTN_FLOAT16: return rotate_as<float16>(o);
    default: return rotate_as<bfloat16>(o);
  }
}

bool dropout(const FastattnDropout& d, const Team& team) {
  switch (d.dtype) {
    case FASTATTN_FLOAT32: return dropout_as<float>(d, team);
    case FASTATTN_FLOAT16: return dropout_as<float16>(d, team);
    default: return dropout_as<bfloat16>(d, team);
  }
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
