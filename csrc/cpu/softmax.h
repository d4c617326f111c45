// The softmax of some rows, block by block.
#pragma once

#include "scores.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// The running softmax of the rows of a tile: the maximum of their scores in base 2, and the sum of 2^(score - maximum),
// which stays divided into lanes until the end. There is room after the last row for whole vectors of rows.
template <class T>
struct RowStates {
  T maximum[kMostQueries + kLanes<T>];
  Vec<T> sum[kMostQueries];

  explicit RowStates(int64_t rows) {
    for (int64_t r = 0; r < rows + kLanes<T>; r++) maximum[r] = -kInfinity<T>;
    for (int64_t r = 0; r < rows; r++) sum[r] = Vec<T>{};
  }
};

// Turns the scores of `rows` rows, kKeys apart, at places `begin .. end`, whole vectors, into unnormalised
// probabilities and merges them into the states of rows `at ..`. `alpha` gets the factor of each row for its earlier
// sums. `scale` is positive. NaN among the scores becomes NaN in the sum.
template <class T>
[[gnu::always_inline]] inline void online_softmax(
    T* s, int rows, int begin, int end, T scale, RowStates<T>& states, int64_t at, T* alpha) {
  constexpr int kRoom = kTileRows + kLanes<T>;
  T found[kRoom], pivot[kRoom];
  for (int r = 0; r < rows; r++) found[r] = largest_of(s + r * kKeys, begin, end);
  for (int r = rows; r < rows + kLanes<T>; r++) found[r] = -kInfinity<T>;  // rows of the next group stay as they are
  for (int r = 0; r < rows; r += kLanes<T>) {
    T* maximum = states.maximum + at + r;
    const Vec<T> before = load(maximum), after = larger(load(found + r) * scale, before);
    const Vec<T> finite = after == -kInfinity<T> ? Vec<T>{} : after;
    store(maximum, after);
    store(pivot + r, finite);
    store(alpha + r, exp2_of_difference(before - finite));
  }
  for (int r = 0; r < rows; r++) {
    states.sum[at + r] = weigh(s + r * kKeys, begin, end, scale, pivot[r], states.sum[at + r] * alpha[r]);
  }
}

// The logarithm of a positive number.
inline float log2_of(float x) { return __builtin_log2f(x); }
inline double log2_of(double x) { return __builtin_log2(x); }

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
