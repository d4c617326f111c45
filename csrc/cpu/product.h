// Matrix products from tiles that stay in registers. All products of attention, two forward and five backward, are
// calls of `product`: C (rows x columns) = or += A (rows x steps) B (steps x columns), with rows of B and C along
// vector lanes.
#pragma once

#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// A tile of C is kTileRows x 2 vectors: enough sums to hide the latency of a multiply-add, and as many as the registers
// hold beside two vectors of B and one element of A.
constexpr int kTileRows = FASTATTN_VECTOR_BYTES == 64 ? 12 : 6;
template <class T>
constexpr int kTileColumns = 2 * kLanes<T>;

enum class Layout { kRows, kColumns };  // of A: the steps of a row are adjacent, or the rows of a step

// Keeps a value in a register. Otherwise compilers keep the distances of all rows, which are more than there are
// registers, and load them in each step.
template <class T>
[[gnu::always_inline]] inline void keep_in_register(T& x) {
#if defined(__GNUC__)
  asm("" : "+r"(x));
#endif
}

template <class Step, class T, Layout layout, int rows, int vectors>
[[gnu::always_inline]] inline void product_tile(
    const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t steps, bool add) {
  Vec<T> sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; n++) sums[r][n] = Vec<T>{};
  }
  // One pointer for each four rows: an address can add one register, or twice one.
  constexpr int fours = (rows + 3) / 4;
  int64_t a_thrice = 3 * a_stride;
  keep_in_register(a_thrice);
  const T* weights[fours];
#pragma GCC unroll 4
  for (int i = 0; i < fours; i++) {
    weights[i] = a + (layout == Layout::kRows ? 4 * i * a_stride : 0);
    keep_in_register(weights[i]);
  }
  for (int64_t step = 0; step < steps; step++, b += b_stride) {
    Vec<T> row[vectors];
#pragma GCC unroll 2
    for (int n = 0; n < vectors; n++) row[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const int64_t away = r % 4 == 3 ? a_thrice : r % 4 * a_stride;
      const T weight = layout == Layout::kRows ? weights[r / 4][away] : weights[0][r];
#pragma GCC unroll 2
      for (int n = 0; n < vectors; n++) sums[r][n] = Step::add(sums[r][n], weight, row[n]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < (layout == Layout::kRows ? fours : 1); i++) weights[i] += layout == Layout::kRows ? 1 : a_stride;
  }
  // C is added last: one sum over all blocks would be rounded in each step at its full size.
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; n++) {
      T* to = c + r * c_stride + n * kLanes<T>;
      store(to, add ? sums[r][n] + load(to) : sums[r][n]);
    }
  }
}

// B has panels of two vectors, `b_panel` elements apart; a last panel of one vector may follow.
template <class Step, class T, Layout layout, int rows>
void product_rows(
    const T* a, int64_t a_stride, const T* b, int64_t b_panel, int64_t b_stride, T* c, int64_t c_stride,
    int64_t columns, int64_t steps, bool add) {
  int64_t column = 0;
  for (; column + kTileColumns<T> <= columns; column += kTileColumns<T>, b += b_panel) {
    product_tile<Step, T, layout, rows, 2>(a, a_stride, b, b_stride, c + column, c_stride, steps, add);
  }
  if (column < columns) product_tile<Step, T, layout, rows, 1>(a, a_stride, b, b_stride, c + column, c_stride, steps, add);
}

// `rows` is at most kTileRows; `columns` a multiple of a vector's lanes. `Step` says what a lane of A and of B adds to a sum
// (operand.h); `steps` and all strides count lanes.
template <class Step, Layout layout, int most = kTileRows, class T>
inline void product(
    int rows, const T* a, int64_t a_stride, const T* b, int64_t b_panel, int64_t b_stride, T* c, int64_t c_stride,
    int64_t columns, int64_t steps, bool add) {
  if constexpr (most > 1) {
    if (rows < most) {
      return product<Step, layout, most - 1>(
          rows, a, a_stride, b, b_panel, b_stride, c, c_stride, columns, steps, add);
    }
  }
  product_rows<Step, T, layout, most>(a, a_stride, b, b_panel, b_stride, c, c_stride, columns, steps, add);
}

// `product` for tiles with NaN or infinity, with plain rows of B, added to C: a weight of 0 leaves out the element of
// B. Sums are made in the order of `product`, so that what a row does not see changes none of its bits.
template <class Step, Layout layout, class T>
void careful_product(
    int rows, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t columns,
    int64_t steps) {
  for (int r = 0; r < rows; r++) {
    for (int64_t column = 0; column < columns; column += kLanes<T>) {
      T sums[kLanes<T>] = {};
      for (int64_t step = 0; step < steps; step++) {
        const T weights = layout == Layout::kRows ? a[r * a_stride + step] : a[step * a_stride + r];
        for (int part = 0; part < Step::kParts; part++) {
          const T weight = Step::part(weights, part);
          if (weight == T(0)) continue;
          for (int n = 0; n < kLanes<T>; n++) sums[n] += weight * Step::part(b[step * b_stride + column + n], part);
        }
      }
      for (int n = 0; n < kLanes<T>; n++) c[r * c_stride + column + n] += sums[n];
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
