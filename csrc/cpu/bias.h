// Rows of a bias, added to scores in base 2.
#pragma once

#include "simd.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

// Converts a bias to base 2 and keeps a finite one finite: a row of the lowest numbers then gives all keys equal
// weight.
template <class T>
inline Vec<T> bias_in_base_2(Vec<T> bias) {
  constexpr T largest = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
  const Vec<T> scaled = bias * T(kLog2E);
  const Vec<T> kept = -larger(Vec<T>{} - largest, -larger(Vec<T>{} - largest, scaled));
  return bias - bias == T(0) ? kept : scaled;
}

// s[i] = s[i] * factor + bias[i], for `count` elements, `step` apart.
template <class T, class Element>
void add_bias_row(const void* bias, int64_t first, int64_t step, T* s, int64_t count, T factor) {
  const Element* from = static_cast<const Element*>(bias) + first;
  constexpr bool same_lanes = sizeof(T) == 4 ? sizeof(Element) <= 4 : sizeof(Element) == 8;
  using Wide = std::conditional_t<sizeof(Element) == 8, double, float>;
  int64_t i = 0;
  if constexpr (same_lanes) {
    // Two sums, since each addition waits for the last one. They are 0, or NaN if an element has to be kept finite.
    Vec<T> beyond{}, other{};
    const auto add = [&](int64_t at, Vec<T>& found) {
      const Vec<T> scaled = load<T>(from + at) * T(kLog2E);
      found += scaled * T(0);
      store(s + at, load(s + at) * factor + scaled);
    };
    for (; step == 1 && i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
      add(i, beyond);
      add(i + kLanes<T>, other);
    }
    if (step == 1 && i + kLanes<T> <= count) {
      add(i, beyond);
      i += kLanes<T>;
    }
    if (sum_lanes(beyond + other) != T(0)) {
      for (int64_t n = 0; n < i; n += kLanes<T>) {
        const Vec<T> x = load<T>(from + n), kept = bias_in_base_2<T>(x);
        store(s + n, x * T(kLog2E) == kept ? load(s + n) : kept);
      }
    }
  }
  for (; i < count; i += kLanes<T>) {
    const int64_t lanes = count - i < kLanes<T> ? count - i : kLanes<T>;
    Vec<T> x{};
    for (int64_t n = 0; n < lanes; n++) x[n] = T(widen<Wide>(from[(i + n) * step]));
    x = bias_in_base_2<T>(x);
    for (int64_t n = 0; n < lanes; n++) s[i + n] = s[i + n] * factor + x[n];
  }
}

template <class T>
using AddBiasRow = void (*)(const void* bias, int64_t first, int64_t step, T* s, int64_t count, T factor);

template <class T>
AddBiasRow<T> add_bias_row_of(int64_t dtype) {
  if (dtype == FASTATTN_FLOAT16) return add_bias_row<T, float16>;
  if (dtype == FASTATTN_BFLOAT16) return add_bias_row<T, bfloat16>;
  return dtype == FASTATTN_FLOAT64 ? add_bias_row<T, double> : add_bias_row<T, float>;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
