// Tiles of attention to a KV cache: products of a few query rows with a few keys, and of weights with their values.
#pragma once

#include <cstring>

#include "cache.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int kBlock = 128;  // keys whose scores are held at once
constexpr int kKeyTile = 8;  // keys that are read before the next head's

template <class T>
T least(T a, T b) {
  return b < a ? b : a;
}

template <class T>
T most(T a, T b) {
  return a < b ? b : a;
}

// Positions of the cache, at head 0.
template <class Element>
struct Positions {
  const Element* at[kBlock];

  void find(const FastattnDecode& d, const FastattnView& cache, int64_t b, int64_t first, int count) {
    for (int j = 0; j < count; j++) {
      const Place place = locate(d, b, first + j);
      at[j] = static_cast<const Element*>(cache.data) + place.page * cache.stride[0] + place.slot * cache.stride[1];
    }
  }
};

// Rows of one head: in the cache, or copied, with zeros behind them, where they are not whole vectors.
template <class Element>
struct Rows {
  const Element* row[kKeyTile];

  // `copy` has room for kKeyTile rows of `padded` elements.
  Rows(const Positions<Element>& positions, int first, int count, const FastattnView& cache, int64_t head, int64_t width,
       int64_t padded, Element* copy) {
    const bool in_place = cache.stride[3] == 1 && width == padded;
    for (int j = 0; j < count; j++) {
      row[j] = positions.at[first + j] + head * cache.stride[2];
      if (in_place) continue;
      for (int64_t c = 0; c < width; c++) copy[c] = row[j][c * cache.stride[3]];
      for (int64_t c = width; c < padded; c++) copy[c] = Element{};
      row[j] = copy;
      copy += padded;
    }
  }
};

// Fetches what is read after a tile, line by line in the order of memory: a processor fetches ahead by itself where
// addresses rise, but a tile reads the rows of its keys head by head. Into the second level of cache, since more lines
// are on their way there than into the first.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* at;
  int64_t step;  // kLine, or 0 to fetch nothing more

  void line() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }

  // Whether a vector is the first one of a line, of rows that begin with one.
  template <int lanes, class Element>
  static constexpr bool begins_line(int64_t column) {
    constexpr int64_t elements = kLine / int64_t(sizeof(Element));
    return lanes >= elements || column % elements == 0;
  }
};

// s[r][j] = <q_r, k_j> for kRows rows and kKeys keys of `width` elements, whole times kChains vectors.
template <int kRows, int kKeys, int kChains, class Compute, class Element>
void products(Compute* s, const Compute* q, const Element* const* k, int64_t width, Ahead& ahead) {
  constexpr int kL = kLanes<Compute>, kSums = kRows * kKeys;
  Vec<Compute> sum[kChains][kRows][kKeys];
#pragma GCC unroll 2
  for (int i = 0; i < kChains; i++) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j++) sum[i][r][j] = Vec<Compute>{};
    }
  }
  Ahead next = ahead;
  for (int64_t c = 0; c < width; c += kChains * kL) {
#pragma GCC unroll 2
    for (int i = 0; i < kChains; i++) {
      Vec<Compute> key[kKeys];
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j++) {
        const Element* from = k[j] + c + i * kL;
        if (Ahead::begins_line<kL, Element>(c + i * kL)) next.line();
        key[j] = load<Compute>(from);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const Vec<Compute> query = load<Compute>(q + r * width + c + i * kL);
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; j++) sum[i][r][j] += query * key[j];
      }
    }
  }
  ahead = next;
  Vec<Compute> all[kSums];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; j++) all[r * kKeys + j] = kChains == 2 ? sum[0][r][j] + sum[1][r][j] : sum[0][r][j];
  }
  Compute sums[kSums];
  sums_of_lanes<kSums>(sums, all);
  for (int r = 0; r < kRows; r++) std::memcpy(s + r * kBlock, sums + r * kKeys, kKeys * sizeof(Compute));
}

// How much a tile takes at once: as many sums as the registers hold, and enough that none waits for itself.
constexpr int kSumsHeld = FASTATTN_VECTOR_BYTES == 64 ? 16 : 8;

template <int kRows, class Compute, class Element>
__attribute__((noinline)) void all_products(Compute* s, const Compute* q, const Element* const* k, int count,
                                            int64_t width, Ahead& ahead) {
  constexpr int kKeys = kRows == 4 ? kSumsHeld / 4 : 4;
  constexpr int kChains = kRows == 1 ? 2 : 1;  // with the keys, enough sums that none waits for itself
  int j = 0;
  if (width % (kChains * kLanes<Compute>) == 0) {
    for (; j + kKeys <= count; j += kKeys) products<kRows, kKeys, kChains>(s + j, q, k + j, width, ahead);
  }
  for (; j < count; j++) products<kRows, 1, 1>(s + j, q, k + j, width, ahead);
}

// acc[r] += sum_j p[r][j] v_j, over the columns of kVectors vectors.
template <int kRows, int kVectors, class Compute, class Element>
void weighted_values(Compute* acc, int64_t width, const Compute* p, const Element* const* v, int count, int64_t column,
                     Ahead& ahead) {
  using V = Vec<Compute>;
  constexpr int kL = kLanes<Compute>;
  V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) sum[r][i] = load<Compute>(acc + r * width + column + i * kL);
  }
  Ahead next = ahead;
  for (int j = 0; j < count; j++) {
    V value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      const Element* from = v[j] + column + i * kL;
      if (Ahead::begins_line<kL, Element>(column + i * kL)) next.line();
      value[i] = load<Compute>(from);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const V weight = V{} + p[r * kBlock + j];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) sum[r][i] += weight * value[i];
    }
  }
  ahead = next;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) store(acc + r * width + column + i * kL, sum[r][i]);
  }
}

template <int kRows, class Compute, class Element>
__attribute__((noinline)) void all_weighted_values(Compute* acc, int64_t width, const Compute* p,
                                                   const Element* const* v, int count, Ahead& ahead) {
  constexpr int kVectors = kSumsHeld / kRows > 8 ? 8 : kSumsHeld / kRows, kL = kLanes<Compute>;
  int64_t c = 0;
  for (; c + kVectors * kL <= width; c += kVectors * kL) {
    weighted_values<kRows, kVectors>(acc, width, p, v, count, c, ahead);
  }
  for (; c < width; c += kL) weighted_values<kRows, 1>(acc, width, p, v, count, c, ahead);
}

// Of one position and heads that lie side by side there, with a query row each: s[h * step] = <q_h, k_h>. By fours, of
// which the last may be fewer: how lanes are added up must not depend on how heads are divided among threads.
template <int kHeads, class Compute, class Element>
void products_of_heads(Compute* s, int64_t step, const Compute* q, const Element* k, int64_t width) {
  constexpr int kL = kLanes<Compute>;
  Vec<Compute> sum[4] = {};
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; h++) {
    for (int64_t c = 0; c < width; c += kL) {
      sum[h] += load<Compute>(q + h * width + c) * load<Compute>(k + h * width + c);
    }
  }
  Compute sums[4];
  sums_of_lanes<4>(sums, sum);
  for (int h = 0; h < kHeads; h++) s[h * step] = sums[h];
}

template <class Compute, class Element>
__attribute__((noinline)) void all_products_of_heads(Compute* s, int64_t step, const Compute* q, const Element* k,
                                                     int64_t width, int64_t heads) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) products_of_heads<4>(s + h * step, step, q + h * width, k + h * width, width);
  if (heads % 4 == 1) products_of_heads<1>(s + h * step, step, q + h * width, k + h * width, width);
  if (heads % 4 == 2) products_of_heads<2>(s + h * step, step, q + h * width, k + h * width, width);
  if (heads % 4 == 3) products_of_heads<3>(s + h * step, step, q + h * width, k + h * width, width);
}

// acc[h * acc_step] += p[h * step] v_h.
template <class Compute, class Element>
__attribute__((noinline)) void weighted_values_of_heads(Compute* acc, int64_t acc_step, const Compute* p, int64_t step,
                                                        const Element* v, int64_t width, int64_t heads) {
  for (int64_t h = 0; h < heads; h++, acc += acc_step, p += step, v += width) {
    const Vec<Compute> weight = Vec<Compute>{} + *p;
    for (int64_t c = 0; c < width; c += kLanes<Compute>) {
      store(acc + c, load<Compute>(acc + c) + weight * load<Compute>(v + c));
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
