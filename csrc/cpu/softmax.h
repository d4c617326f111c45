// The softmax of a row, block by block.
#pragma once

#include "scores.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// What a row has seen: the maximum of its scores in base 2, and the sum of 2^(score - maximum).
template <class T>
struct RowState {
  T maximum = -kInfinity<T>, sum = T(0);
};

template <class T>
inline T largest_of(const T* s, int begin, int end) {
  Vec<T> most = load(s + begin);
  for (int i = begin + kLanes<T>; i < end; i += kLanes<T>) {
    const Vec<T> x = load(s + i);
    most = x > most ? x : most;
  }
  T result = most[0];
  for (int lane = 1; lane < kLanes<T>; lane++) result = most[lane] > result ? most[lane] : result;
  return result;
}

// Turns the scores at `begin .. end`, whole vectors, into unnormalised probabilities and merges them into `state`.
// Returns what earlier sums are to be multiplied by. `scale` is positive. NaN among the scores becomes NaN in the sum.
template <class T>
inline T online_softmax(T* s, int begin, int end, T scale, RowState<T>& state) {
  const T found = largest_of(s, begin, end) * scale;
  const T maximum = found > state.maximum ? found : state.maximum;
  const T pivot = maximum == -kInfinity<T> ? T(0) : maximum;
  Vec<T> sum{};
  for (int i = begin; i < end; i += kLanes<T>) {
    const Vec<T> p = exp2_of_difference(load(s + i) * scale - pivot);
    store(s + i, p);
    sum += p;
  }
  const T alpha = state.maximum == maximum ? T(1) : exp2_of_difference(Vec<T>{} + (state.maximum - pivot))[0];
  state.maximum = maximum;
  state.sum = state.sum * alpha + sum_lanes(sum);
  return alpha;
}

// The logarithm in base 2 of a positive number.
inline double log2_of(double x) { return __builtin_log2(x); }

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
