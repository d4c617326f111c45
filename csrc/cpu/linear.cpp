// Products of few rows, y = x W^T + b, in a step of generation. Reading W bounds their speed, so it is read once.
//
// Every sum runs along a row of W, in the order of memory, and its lanes are added in one order: a row of y does not
// depend on the others. Tasks are blocks of columns of y, whatever the number of threads.
#include <cstring>

#include "exponential.h"
#include "variant.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int kBlock = 64;  // columns of a task
// The rows and columns of a tile: as many sums as registers hold.
constexpr int kRows = 4;
constexpr int kColumns = FASTATTN_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kColumnsOfOneRow = 4;
constexpr int kMatrices = 3;

// Rows of x in float, padded with zeros to whole vectors.
struct Rows {
  const float* data;
  int64_t stride;
};

// The last elements of a row of W, less than a vector, padded with zeros.
template <class Element>
inline Vec<float> load_some(const Element* from, int64_t count) {
  Element lanes[kLanes<float>] = {};
  std::memcpy(lanes, from, size_t(count) * sizeof *from);
  return load<float>(lanes);
}

// A number of sums rounded up to fours: four vectors' lanes are summed together, in an order of their own.
constexpr int in_fours(int sums) { return (sums + 3) / 4 * 4; }

// sums[r * columns + c] = <x_r, w_c>; `sums` has room for `in_fours` of them.
template <int rows, int columns, class Element>
[[gnu::always_inline]] inline void products(float* sums, const Rows& x, const Element* w, int64_t w_stride, int64_t width) {
  constexpr int kL = kLanes<float>;
  Vec<float> sum[in_fours(rows * columns)] = {};
  int64_t k = 0;
  for (; k + kL <= width; k += kL) {
    Vec<float> weight[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
      __builtin_prefetch(w + (columns + c) * w_stride + k);
      weight[c] = load<float>(w + c * w_stride + k);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const Vec<float> row = load(x.data + r * x.stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++) sum[r * columns + c] += row * weight[c];
    }
  }
  if (k < width) {
    for (int c = 0; c < columns; c++) {
      const Vec<float> weight = load_some(w + c * w_stride + k, width - k);
      for (int r = 0; r < rows; r++) sum[r * columns + c] += load(x.data + r * x.stride + k) * weight;
    }
  }
  sums_of_lanes<in_fours(rows * columns)>(sums, sum);
}

template <int rows, int columns, class Element>
__attribute__((noinline)) void tile(
    float* y, int64_t y_stride, const Rows& x, const Element* w, int64_t w_stride, int64_t width) {
  float sums[in_fours(rows * columns)];
  products<rows, columns>(sums, x, w, w_stride, width);
  for (int r = 0; r < rows; r++) std::memcpy(y + r * y_stride, sums + r * columns, columns * sizeof *y);
}

// Computes all rows of x for `columns` rows of W.
template <int columns, class Element>
void all_rows(
    float* y, int64_t y_stride, const Rows& x, int64_t rows, const Element* w, int64_t w_stride, int64_t width) {
  int64_t r = 0;
  const auto from = [&] { return Rows{x.data + r * x.stride, x.stride}; };
  for (; r + kRows <= rows; r += kRows) tile<kRows, columns>(y + r * y_stride, y_stride, from(), w, w_stride, width);
  for (; r + 2 <= rows; r += 2) tile<2, columns>(y + r * y_stride, y_stride, from(), w, w_stride, width);
  for (; r < rows; r++) tile<1, columns>(y + r * y_stride, y_stride, from(), w, w_stride, width);
}

// Computes columns `first .. first + count` of matrix `number`, with its bias, into y (rows, kBlock).
template <class Element>
void block(float* y, const FastattnLinear& l, const Rows& x, int number, int64_t first, int64_t count) {
  const int64_t stride = l.weight_stride[number];
  const Element* w = static_cast<const Element*>(l.weight[number]) + first * stride;
  int64_t c = 0;
  if (l.rows == 1) {
    for (; c + kColumnsOfOneRow <= count; c += kColumnsOfOneRow) {
      tile<1, kColumnsOfOneRow>(y + c, kBlock, x, w + c * stride, stride, l.width);
    }
  }
  for (; c + kColumns <= count; c += kColumns) {
    all_rows<kColumns>(y + c, kBlock, x, l.rows, w + c * stride, stride, l.width);
  }
  for (; c < count; c++) all_rows<1>(y + c, kBlock, x, l.rows, w + c * stride, stride, l.width);
  if (l.bias[number] == nullptr) return;
  const Element* bias = static_cast<const Element*>(l.bias[number]) + first;
  for (int64_t r = 0; r < l.rows; r++) {
    for (int64_t i = 0; i < count; i++) y[r * kBlock + i] += widen<float>(bias[i]);
  }
}

// gate = gate / (1 + e^-gate) * up, for whole blocks.
void multiply_gated(float* gate, const float* up, int64_t rows) {
  constexpr float kLog2e = 1.4426950408889634f;
  for (int64_t i = 0; i < rows * kBlock; i += kLanes<float>) {
    const Vec<float> x = load(gate + i);
    store(gate + i, x / (exp2(x * -kLog2e) + 1.0f) * load(up + i));
  }
}

int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

template <class Element>
bool linear_as(const FastattnLinear& l, const Team& team) {
  constexpr int kL = kLanes<float>;
  const int64_t padded = (l.width + kL - 1) / kL * kL;
  const bool in_place = sizeof(Element) == sizeof(float) && padded == l.width;
  Shared copy(in_place ? 0 : size_t(l.rows * padded) * sizeof(float));
  Rows x{static_cast<const float*>(l.x), l.x_stride};
  if (!in_place) {
    float* to = copy.as<float>();
    if (to == nullptr) return false;
    for (int64_t r = 0; r < l.rows; r++) {
      const Element* from = static_cast<const Element*>(l.x) + r * l.x_stride;
      for (int64_t k = 0; k < padded; k++) to[r * padded + k] = k < l.width ? widen<float>(from[k]) : 0.0f;
    }
    x = {to, padded};
  }
  const int matrices = l.gated ? 1 : kMatrices;
  int64_t tasks = 0;
  for (int i = 0; i < matrices; i++) tasks += blocks_of(l.columns[i]);
  return team.run(tasks, [&](int64_t task) {
    int number = 0;
    int64_t before = 0;  // columns of y
    for (; task >= blocks_of(l.columns[number]); number++) {
      task -= blocks_of(l.columns[number]);
      before += l.columns[number];
    }
    const int64_t first = task * kBlock;
    const int64_t count = l.columns[number] - first < kBlock ? l.columns[number] - first : kBlock;
    float* y = scratch<float>((l.gated ? 2 : 1) * l.rows * kBlock);
    if (y == nullptr) return false;
    if (count < kBlock) std::memset(y, 0, size_t((l.gated ? 2 : 1) * l.rows * kBlock) * sizeof *y);
    block<Element>(y, l, x, number, first, count);
    if (l.gated) {
      block<Element>(y + l.rows * kBlock, l, x, 1, first, count);
      multiply_gated(y, y + l.rows * kBlock, l.rows);
    }
    for (int64_t r = 0; r < l.rows; r++) {
      Element* to = static_cast<Element*>(l.y) + r * l.y_stride + before + first;
      for (int64_t i = 0; i < count; i++) {
        to[i] = narrow<Element>(y[r * kBlock + i] + (l.add ? widen<float>(to[i]) : 0.0f));
      }
    }
    return true;
  });
}

}  // namespace

bool linear(const FastattnLinear& l, const Team& team) {
  switch (l.dtype) {
    case FASTATTN_FLOAT32: return linear_as<float>(l, team);
    case FASTATTN_FLOAT16: return linear_as<float16>(l, team);
    default: return linear_as<bfloat16>(l, team);
  }
}

}  // namespace fastattn::cpu::FASTATTN_VARIANT
