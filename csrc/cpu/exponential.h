// Powers of two, the hyperbolic tangent, and the steps of a softmax over one row of scores.
#pragma once

#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// 2^x - 1 = 2^whole * (1 + fraction) - 1: the parts of an exponential, `fraction` exact to float near 0.
template <class T>
struct Exponential {
  Vec<T> power, fraction;
};

// For |x| within the range of the exponent.
inline Exponential<float> exponential(Vec<float> x) {
  const Vec<float> shift = Vec<float>{} + 0x1.8p23f;
  const Vec<float> rounded = x + shift;
  const VecInt<float> exponent = (VecInt<float>)rounded - (VecInt<float>)shift;
  const Vec<float> f = x - (rounded - shift);
  Vec<float> p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return {(Vec<float>)((exponent + 127) << 23), p * f};
}

inline Exponential<double> exponential(Vec<double> x) {
  const Vec<double> shift = Vec<double>{} + 0x1.8p52;
  const Vec<double> rounded = x + shift;
  const VecInt<double> exponent = (VecInt<double>)rounded - (VecInt<double>)shift;
  const Vec<double> f = (x - (rounded - shift)) * 0.69314718055994530941723;
  Vec<double> p = Vec<double>{} + 1.0;  // the Taylor series of (e^f - 1) / f
  for (int k = 14; k > 1; k--) p = p * f * (1.0 / k) + 1.0;
  return {(Vec<double>)((exponent + 1023) << 52), p * f};
}

constexpr float lowest_exponent(float) { return -127.0f; }
constexpr double lowest_exponent(double) { return -1023.0; }

// 2^x for x up to slightly above 0. NaN stays NaN; results that would be denormal are 0.
inline Vec<double> exp2_of_difference(Vec<double> x) {
  const Exponential<double> parts = exponential(larger(Vec<double>{} + lowest_exponent(0.0), x));
  return parts.power * parts.fraction + parts.power;
}

// The exponential of the softmax: a polynomial of the least degree (relative error 9.2e-8), times a power of two whose
// exponent the rounding leaves in the lowest bits.
inline Vec<float> exp2_of_difference(Vec<float> x) {
  x = larger(Vec<float>{} + lowest_exponent(0.0f), x);
  const Vec<float> shift = Vec<float>{} + (0x1.8p23f + 127.0f);
  const Vec<float> rounded = x + shift;
  const Vec<float> f = x - (rounded - shift);
  Vec<float> p = f * 1.326472709417402e-3f + 9.671512682465414e-3f;
  p = p * f + 5.550733743927003e-2f;
  p = p * f + 2.402224208466120e-1f;
  p = p * f + 6.931469775985442e-1f;
  p = p * f + 1.0f;
  return p * (Vec<float>)((VecInt<float>)rounded << 23);
}

// 2^x for any x.
template <class V>
inline V exp2(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  const T highest = 1 - lowest_exponent(T(0));
  return exp2_of_difference(x > highest ? V{} + highest : x);
}

// Accurate to float near 0 too.
template <class V>
inline V tanh(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
  constexpr T two_log2e = T(2.885390081777926815), far = T(60);
  V y = x * two_log2e;
  y = y < -far ? V{} - far : y;
  y = y > far ? V{} + far : y;
  const Exponential<T> parts = exponential(y);
  const V less_one = parts.power * parts.fraction + (parts.power - T(1));  // e^2x - 1
  return less_one / (less_one + T(2));
}

// The largest of whole vectors at `begin .. end`, leaving out NaN.
template <class T>
[[gnu::always_inline]] inline T largest_of(const T* s, int begin, int end) {
  Vec<T> most = Vec<T>{} - T(__builtin_inf()), other = most;  // two, since each waits for its last result
  int i = begin;
  for (; i + kLanes<T> < end; i += 2 * kLanes<T>) {
    most = larger(load(s + i), most);
    other = larger(load(s + i + kLanes<T>), other);
  }
  if (i < end) most = larger(load(s + i), most);
  return largest_lane(larger(most, other));
}

// Sets places `begin .. low` and `high .. end` of a row to -inf; `begin` and `end` bound whole vectors. It stores whole
// vectors: a processor cannot forward smaller stores to the load of a vector.
template <class T>
inline void forbid_outside(T* s, int begin, int low, int high, int end) {
  const Vec<T> numbers = lane_numbers<T>(), forbidden = Vec<T>{} - T(__builtin_inf());
  for (int i = begin; i < low; i += kLanes<T>) store(s + i, numbers + T(i) < T(low) ? forbidden : load(s + i));
  for (int i = high / kLanes<T> * kLanes<T>; i < end; i += kLanes<T>) {
    store(s + i, numbers + T(i) >= T(high) ? forbidden : load(s + i));
  }
}

// Turns the scores at places `begin .. end` of a row, whole vectors, into 2^(score * scale - pivot). Returns them added
// to `sum`, lane by lane.
template <class T>
[[gnu::always_inline]] inline Vec<T> weigh(T* s, int begin, int end, T scale, T pivot, Vec<T> sum) {
  Vec<T> other{};
  int i = begin;
  for (; i + kLanes<T> < end; i += 2 * kLanes<T>) {
    const Vec<T> p = exp2_of_difference(load(s + i) * scale - pivot);
    const Vec<T> next = exp2_of_difference(load(s + i + kLanes<T>) * scale - pivot);
    store(s + i, p);
    store(s + i + kLanes<T>, next);
    sum += p;
    other += next;
  }
  if (i < end) {
    const Vec<T> p = exp2_of_difference(load(s + i) * scale - pivot);
    store(s + i, p);
    sum += p;
  }
  return sum + other;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
