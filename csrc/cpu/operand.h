// The operands of products: elements in the compute type, or pairs of bfloat16 if the processor multiplies those.
//
// `Multiply` has one element in a lane. `Dot` has the elements of two neighbouring steps in a lane, in half of the
// memory, and one instruction adds both products to a sum in float. If a product sums along rows, these are neighbours
// in a row (`read`, `round_row`). If it sums over rows, they are the elements of a column in two rows (`read_steps`,
// `round_rows`).
#pragma once

#include "pack.h"

#if defined(__AVX512BF16__) || defined(FASTATTN_EMULATE_DOTS)
#define FASTATTN_DOTS 1
#else
#define FASTATTN_DOTS 0
#endif

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

template <class T>
struct Multiply {
  static constexpr int kParts = 1;

  static Vec<T> add(Vec<T> sum, T weight, Vec<T> row) { return sum + weight * row; }

  static Vec<T> add(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }

  static T part(T lane, int) { return lane; }

  // A vector of elements side by side in a row.
  template <class Element>
  static Vec<T> neighbours(const Element* from) {
    return load<T>(from);
  }

  // Loads `vectors` vectors of the elements of kParts rows, from a column on.
  template <int vectors, class Element>
  static void columns(const Element* const* rows, int64_t column, Vec<T>* to) {
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n++) to[n] = load<T>(rows[0] + column + n * kLanes<T>);
  }

  // Rounds elements of a row to lanes: here nothing changes.
  static void round_row(const T*, int, int, T*) {}

  static bool read(const Rows<T>& rows, int64_t row, int64_t count, T* to, int64_t padded) {
    return rows.read(row, count, to, padded);
  }

  static bool read_steps(const Rows<T>& rows, int64_t row, int64_t count, T* to, int64_t padded) {
    return rows.read(row, count, to, padded);
  }

  // Rows in lanes: where they are, or as a copy at `to`.
  static Lanes<T> place(const Rows<T>& rows, int64_t row, int64_t count, T* to, int64_t padded) {
    if (rows.plain()) return rows.fetch(row, count);
    rows.read(row, count, to, padded);
    return {to, padded};
  }
};

#if FASTATTN_DOTS
struct Dot {
  static constexpr int kParts = 2;

  static Vec<float> add(Vec<float> sum, float weight, Vec<float> row) {
    return add(sum, (Vec<float>)(VecBits{} + bits_of(weight)), row);
  }

  static Vec<float> add(Vec<float> sum, Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const VecBits x = (VecBits)a, y = (VecBits)b;
    sum += (Vec<float>)(x << 16) * (Vec<float>)(y << 16);
    return sum + (Vec<float>)(x & kHigh) * (Vec<float>)(y & kHigh);
#endif
  }

  static float part(float lane, int number) {
    const uint32_t bits = number == 0 ? bits_of(lane) << 16 : bits_of(lane) & kHigh;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // A vector of elements side by side in a row.
  static Vec<float> neighbours(const bfloat16* from) { return load(reinterpret_cast<const float*>(from)); }

  // Loads `vectors` vectors, an even number, of the elements of two rows, from a column on.
  template <int vectors>
  static void columns(const bfloat16* const* rows, int64_t column, Vec<float>* to) {
#pragma GCC unroll 8
    for (int n = 0; n < vectors; n += 2) {
      const int64_t at = column + n * kLanes<float>;
      interleave(neighbours(rows[0] + at), neighbours(rows[1] + at), to + n);
    }
  }

  // Reads rows into (count, padded) lanes of neighbours. Returns whether there is a NaN or an infinity.
  static bool read(const Rows<float>& rows, int64_t row, int64_t count, float* to, int64_t padded) {
    PoisonCheck<float> poison;
    const Placement place = rows.place;
    for (int64_t r = row; r < row + count; r++, to += padded) {
      const bfloat16* from = source(rows, r);
      bfloat16* elements = reinterpret_cast<bfloat16*>(to);
      if (place.step == 1) {
        prefetch_after(from, place);
        std::memcpy(elements, from, size_t(place.width) * sizeof *from);
      } else {
        for (int64_t i = 0; i < place.width; i++) elements[i] = from[i * place.step];
      }
      std::memset(elements + place.width, 0, size_t(2 * padded - place.width) * sizeof *from);
      for (int64_t i = 0; i < padded; i += kLanes<float>) add_pairs(poison, (VecBits)load(to + i));
    }
    return poison.found();
  }

  static Lanes<float> place(const Rows<float>& rows, int64_t row, int64_t count, float* to, int64_t padded) {
    read(rows, row, count, to, padded);
    return {to, padded};
  }

  // Reads pairs of rows into (count / 2, padded) lanes, each the elements of a column in both rows.
  static bool read_steps(const Rows<float>& rows, int64_t row, int64_t count, float* to, int64_t padded) {
    PoisonCheck<float> poison;
    const Placement place = rows.place;
    for (int64_t r = row; r < row + count; r += 2, to += padded) {
      const bfloat16* low = source(rows, r);
      const bfloat16* high = r + 1 < row + count ? source(rows, r + 1) : nullptr;
      int64_t i = 0;
      if (place.step == 1) {
        prefetch_after(low, place);
        prefetch_after(low + place.stride, place);
        for (; i + kLanes<float> <= place.width; i += kLanes<float>) {
          const VecBits second = high == nullptr ? VecBits{} : load_bits(&high[i].bits);
          store(to + i, (Vec<float>)(load_bits(&low[i].bits) | second << 16));
        }
      }
      for (; i < padded; i++) {
        uint32_t pair = 0;
        if (i < place.width) {
          pair = low[i * place.step].bits | (high == nullptr ? 0 : uint32_t(high[i * place.step].bits) << 16);
        }
        std::memcpy(to + i, &pair, sizeof pair);
      }
      for (i = 0; i < padded; i += kLanes<float>) add_pairs(poison, (VecBits)load(to + i));
    }
    return poison.found();
  }

  // Rounds elements `begin .. end` of a row, whole vectors, to pairs along the row. `to` may be `from`.
  static void round_row(const float* from, int begin, int end, float* to) {
    for (int i = begin; i < end; i += kLanes<float>) {
      bfloat16* rounded = reinterpret_cast<bfloat16*>(to) + i;
#if defined(__AVX512BF16__)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded), (__m256i)_mm512_cvtneps_pbh((__m512)load(from + i)));
#else
      store_narrow(rounded, load(from + i));
#endif
    }
  }

  // Rounds elements `begin .. end` of two rows, whole vectors, to pairs of a column. `second` null means zeros; `to`
  // may be `first`.
  static void round_rows(const float* first, const float* second, int begin, int end, float* to) {
    for (int i = begin; i < end; i += kLanes<float>) {
      store(to + i, pairs(load(first + i), second == nullptr ? Vec<float>{} : load(second + i)));
    }
  }

 private:
  static constexpr uint32_t kHigh = 0xffff0000u;

  static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }

  static const bfloat16* source(const Rows<float>& rows, int64_t row) {
    return static_cast<const bfloat16*>(rows.data) + rows.offset(row);
  }

  static void add_pairs(PoisonCheck<float>& poison, VecBits bits) {
    poison.add((Vec<float>)(bits & kHigh));
    poison.add((Vec<float>)(bits << 16));
  }

  // Turns adjacent elements of two rows into pairs of a column.
  static void interleave(Vec<float> a, Vec<float> b, Vec<float>* to) {
    interleave(a, b, to, std::make_integer_sequence<int, 2 * kLanes<float>>{});
  }

  template <int... I>
  static void interleave(Vec<float> a, Vec<float> b, Vec<float>* to, std::integer_sequence<int, I...>) {
    typedef typename VecOf<uint16_t, int(sizeof...(I))>::type Elements;
    constexpr int count = sizeof...(I);
    to[0] = (Vec<float>)__builtin_shufflevector((Elements)a, (Elements)b, ((I & 1) * count + I / 2)...);
    to[1] = (Vec<float>)__builtin_shufflevector((Elements)a, (Elements)b, ((I & 1) * count + count / 2 + I / 2)...);
  }

  // Pairs: lanes of a in the low halves, of b in the high ones.
  static Vec<float> pairs(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__)
    const __m512i order = (__m512i)(VecBits{0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                            0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f});
    return (Vec<float>)_mm512_maskz_permutexvar_epi16(~0u, order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    bfloat16 low[kLanes<float>], high[kLanes<float>];
    store_narrow(low, a);
    store_narrow(high, b);
    return (Vec<float>)(load_bits(&low->bits) | load_bits(&high->bits) << 16);
#endif
  }
};
#endif

// The number of lanes for this many steps.
template <class Step>
constexpr int64_t lanes_for(int64_t steps) {
  return (steps + Step::kParts - 1) / Step::kParts;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
