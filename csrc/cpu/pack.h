// Rows of q, k, v and dout in the compute type, in the layout that products read.
#pragma once

#include "interface.h"
#include "product.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

// Rows of elements in memory: each has `width` elements, `step` apart, and rows are `stride` apart.
struct Placement {
  int64_t stride, width, step;
};

// How rows of an element type are read to and written from the compute type.
template <class T>
struct Format {
  bool (*read_rows)(const void* from, int64_t first, Placement place, int64_t rows, T* to, int64_t padded);
  void (*write_row)(void* to, int64_t first, Placement place, const T* from, T factor);
  int64_t bytes;  // per element
};

// Rows of lanes in memory, `stride` apart.
template <class T>
struct Lanes {
  const T* data;
  int64_t stride;
};

template <class T, class Element>
inline void read_elements(const Element* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load<T>(from + i));
  for (; i < count; i++) to[i] = widen<T>(from[i]);
}

// Looks for NaN and infinities: their exponents are the largest.
template <class T>
class PoisonCheck {
 public:
  void add(Vec<T> x) {
    const VecInt<T> magnitude = (VecInt<T>)x & ~kSign;
    largest_ = magnitude > largest_ ? magnitude : largest_;
  }

  bool found() const {
    for (int lane = 0; lane < kLanes<T>; lane++) {
      if (largest_[lane] >= kInfinite) return true;
    }
    return false;
  }

 private:
  static constexpr IntOf<T> kSign = IntOf<T>(uint64_t(1) << (8 * sizeof(T) - 1));
  static constexpr IntOf<T> kInfinite = sizeof(T) == 4 ? IntOf<T>(0x7f800000) : IntOf<T>(uint64_t(0x7ff) << 52);

  VecInt<T> largest_{};
};

// Rows of a head may be far apart, as in packed sequences: the processor then does not prefetch them itself.
constexpr int64_t kRowsAhead = 8;

// Starts loading rows that are read after this one.
template <class Element>
inline void prefetch_after(const Element* row, Placement place) {
  for (int64_t i = 0; i < place.width; i += 64 / int64_t(sizeof(Element))) {
    __builtin_prefetch(row + kRowsAhead * place.stride + i);
  }
}

template <class T, class Element>
bool read_rows(const void* from, int64_t first, Placement place, int64_t rows, T* to, int64_t padded) {
  PoisonCheck<T> poison;
  const Element* source = static_cast<const Element*>(from) + first;
  for (int64_t row = 0; row < rows; row++, source += place.stride, to += padded) {
    if (place.step == 1) {
      prefetch_after(source, place);
      read_elements(source, to, place.width);
    } else {
      for (int64_t i = 0; i < place.width; i++) to[i] = widen<T>(source[i * place.step]);
    }
    for (int64_t i = place.width; i < padded; i++) to[i] = T(0);
    for (int64_t i = 0; i < padded; i += kLanes<T>) poison.add(load(to + i));
  }
  return poison.found();
}

// Writes one row; `from` is padded to a whole vector.
template <class T, class Element>
void write_row(void* to, int64_t first, Placement place, const T* from, T factor) {
  Element* target = static_cast<Element*>(to) + first;
  int64_t i = 0;
  if (place.step == 1) {
    for (; i + kLanes<T> <= place.width; i += kLanes<T>) store_narrow(target + i, load(from + i) * factor);
  }
  for (; i < place.width; i += kLanes<T>) {
    Element elements[kLanes<T>];
    store_narrow(elements, load(from + i) * factor);
    for (int64_t n = 0; n < kLanes<T> && i + n < place.width; n++) target[(i + n) * place.step] = elements[n];
  }
}

template <class T>
Format<T> format_of(int64_t dtype) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return {read_rows<double, double>, write_row<double, double>, 8};
  } else {
    if (dtype == FASTATTN_FLOAT16) return {read_rows<float, float16>, write_row<float, float16>, 2};
    if (dtype == FASTATTN_BFLOAT16) return {read_rows<float, bfloat16>, write_row<float, bfloat16>, 2};
    return {read_rows<float, float>, write_row<float, float>, 4};
  }
}

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The pages of a KV cache that hold the rows of a batch entry, `size` rows in each, `stride` apart. A page that does
// not exist is clamped to one that does.
struct Pages {
  const int32_t* table;
  int64_t count, size, stride;

  int64_t offset(int64_t row) const {
    const int64_t page = table[row / size];
    return (page < 0 ? 0 : page < count ? page : count - 1) * stride;
  }
};

// The rows of one head, in memory that begins at `data`.
template <class T>
struct Rows {
  Format<T> format;
  void* data;
  int64_t base;
  Placement place;
  Pages pages{};  // no table: the rows follow one another

  // Where a row begins, in elements.
  int64_t offset(int64_t row) const {
    return pages.table == nullptr ? base + row * place.stride : base + pages.offset(row) + row % pages.size * place.stride;
  }

  // Reads rows into (count, padded) elements. Returns whether there is a NaN or an infinity.
  bool read(int64_t row, int64_t count, T* to, int64_t padded) const {
    if (pages.table == nullptr) return format.read_rows(data, offset(row), place, count, to, padded);
    bool poisoned = false;
    for (int64_t end = row + count; row < end;) {
      const int64_t left = pages.size - row % pages.size, some = left < end - row ? left : end - row;
      poisoned |= format.read_rows(data, offset(row), place, some, to, padded);
      row += some, to += some * padded;
    }
    return poisoned;
  }

  // Whether the rows can be read where they are: elements of the compute type, in whole vectors.
  bool plain() const {
    return format.bytes == sizeof(T) && place.step == 1 && place.width % kLanes<T> == 0 && pages.table == nullptr;
  }

  // Rows where they are, if they are plain. Starts loading them and the rows that are read after them.
  Lanes<T> fetch(int64_t row, int64_t count) const {
    const T* from = static_cast<const T*>(data) + offset(row);
    for (int64_t r = 0; r < count; r++) prefetch_after(from + (r - kRowsAhead) * place.stride, place);
    return {from, place.stride};
  }

  // Starts loading rows that will be written.
  void expect(int64_t row, int64_t count) const {
    if (place.step != 1) return;
    const char* to = static_cast<const char*>(data) + offset(row) * format.bytes;
    for (int64_t r = 0; r < count; r++, to += place.stride * format.bytes) {
      for (int64_t i = 0; i < place.width * format.bytes; i += 64) __builtin_prefetch(to + i, 1);
    }
  }

  void write(int64_t row, const T* from, T factor) const {
    format.write_row(data, base + row * place.stride, place, from, factor);
  }
};

// Swaps blocks of `size` lanes between the rows of a square of lanes. Done for all sizes, this transposes the square.
template <int size, class T, int... I>
[[gnu::always_inline]] inline void swap_blocks(Vec<T>& low, Vec<T>& high, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  const Vec<T> a = low, b = high;
  low = __builtin_shufflevector(a, b, ((I & size) ? lanes + I - size : I)...);
  high = __builtin_shufflevector(a, b, ((I & size) ? lanes + I : I + size)...);
}

template <class T, int size>
[[gnu::always_inline]] inline void transpose_steps(Vec<T> (&x)[kLanes<T>]) {
  if constexpr (size < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i++) {
      if ((i & size) == 0) {
        swap_blocks<size, T>(x[i], x[i + size], std::make_integer_sequence<int, kLanes<T>>{});
      }
    }
    transpose_steps<T, size * 2>(x);
  }
}

// Packs panels of kTileColumns keys, (panel, width, kTileColumns): the transposed rows, as operand B of a product.
// `rows` holds `count` packed rows; keys after them, up to a whole vector, are 0.
template <class T>
void pack_panels(const T* rows, int64_t count, int64_t width, int64_t padded, T* to) {
  constexpr int lanes = kLanes<T>;
  for (int64_t key = 0; key < count; key += lanes) {
    T* target = to + key / kTileColumns<T> * kTileColumns<T> * width + key % kTileColumns<T>;
    for (int64_t column = 0; column < width; column += lanes) {
      Vec<T> square[lanes];
      for (int i = 0; i < lanes; i++) {
        square[i] = key + i < count ? load(rows + (key + i) * padded + column) : Vec<T>{};
      }
      transpose_steps<T, 1>(square);
      const int64_t columns = width - column < lanes ? width - column : lanes;
      for (int64_t i = 0; i < columns; i++) store(target + (column + i) * kTileColumns<T>, square[i]);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
