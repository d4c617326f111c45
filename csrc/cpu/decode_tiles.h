// Tiles of attention to a KV cache: products of a few query rows with a few keys, and of weights with their values.
#pragma once

#include <cstring>

#include "cache.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int kBlock = 128;  // keys whose scores are held at once
constexpr int kKeyTile = 8;  // keys that are read before the next head's, at most
// Of all heads: these keys and the next ones, which are fetched meanwhile, share the first level of cache.
constexpr int64_t kTileBytes = 1 << 14;

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

// The processor's own prefetching loses its way between the heads of a position and the positions.
template <class Element>
void prefetch(const Element* from, int64_t bytes_on) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes_on);
}

// Whether a vector is the first one of a line of the cache, of rows that begin with one.
template <int lanes, class Element>
constexpr bool begins_line(int64_t column) {
  constexpr int64_t line = 64 / int64_t(sizeof(Element));
  return lanes >= line || column % line == 0;
}

// s[r][j] = <q_r, k_j> for kRows rows and kKeys keys of `width` elements, whole times kChains vectors; `next` is where the
// row lies, in bytes from its k_j, that is read after these.
template <int kRows, int kKeys, int kChains, class Compute, class Element>
void products(Compute* s, const Compute* q, const Element* const* k, int64_t width, int64_t next) {
  constexpr int kL = kLanes<Compute>, kSums = kRows * kKeys;
  Vec<Compute> sum[kChains * kSums];
  for (int i = 0; i < kChains * kSums; i++) sum[i] = Vec<Compute>{};
  for (int64_t c = 0; c < width; c += kChains * kL) {
    for (int i = 0; i < kChains; i++) {
      Vec<Compute> key[kKeys];
      for (int j = 0; j < kKeys; j++) {
        const Element* from = k[j] + c + i * kL;
        if (begins_line<kL, Element>(c + i * kL)) prefetch(from, next);
        key[j] = load<Compute>(from);
      }
      for (int r = 0; r < kRows; r++) {
        const Vec<Compute> query = load<Compute>(q + r * width + c + i * kL);
        for (int j = 0; j < kKeys; j++) sum[i * kSums + r * kKeys + j] += query * key[j];
      }
    }
  }
  for (int i = kSums; i < kChains * kSums; i++) sum[i - kSums] += sum[i];
  Compute sums[kSums];
  sums_of_lanes<kSums>(sums, sum);
  for (int r = 0; r < kRows; r++) std::memcpy(s + r * kBlock, sums + r * kKeys, kKeys * sizeof(Compute));
}

// How much a tile takes at once: as many sums as the registers hold, and enough that none waits for itself.
constexpr int kSumsHeld = FASTATTN_VECTOR_BYTES == 64 ? 16 : 8;

template <int kRows, class Compute, class Element>
__attribute__((noinline)) void all_products(Compute* s, const Compute* q, const Element* const* k, int count,
                                            int64_t width, int64_t next) {
  constexpr int kKeys = kRows == 4 ? kSumsHeld / 4 : 4;
  constexpr int kChains = kRows == 1 ? 2 : 1;  // with the keys, enough sums that none waits for itself
  int j = 0;
  if (width % (kChains * kLanes<Compute>) == 0) {
    for (; j + kKeys <= count; j += kKeys) products<kRows, kKeys, kChains>(s + j, q, k + j, width, next);
  }
  for (; j < count; j++) products<kRows, 1, 1>(s + j, q, k + j, width, next);
}

// acc[r] += sum_j p[r][j] v_j, over the columns of kVectors vectors.
template <int kRows, int kVectors, class Compute, class Element>
void weighted_values(Compute* acc, int64_t width, const Compute* p, const Element* const* v, int count, int64_t column,
                     int64_t next) {
  using V = Vec<Compute>;
  constexpr int kL = kLanes<Compute>;
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < kVectors; i++) sum[r][i] = load<Compute>(acc + r * width + column + i * kL);
  }
  for (int j = 0; j < count; j++) {
    V value[kVectors];
    for (int i = 0; i < kVectors; i++) {
      const Element* from = v[j] + column + i * kL;
      if (begins_line<kL, Element>(column + i * kL)) prefetch(from, next);
      value[i] = load<Compute>(from);
    }
    for (int r = 0; r < kRows; r++) {
      for (int i = 0; i < kVectors; i++) sum[r][i] += p[r * kBlock + j] * value[i];
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < kVectors; i++) store(acc + r * width + column + i * kL, sum[r][i]);
  }
}

template <int kRows, class Compute, class Element>
__attribute__((noinline)) void all_weighted_values(Compute* acc, int64_t width, const Compute* p,
                                                   const Element* const* v, int count, int64_t next) {
  constexpr int kVectors = kSumsHeld / kRows > 8 ? 8 : kSumsHeld / kRows, kL = kLanes<Compute>;
  int64_t c = 0;
  for (; c + kVectors * kL <= width; c += kVectors * kL) {
    weighted_values<kRows, kVectors>(acc, width, p, v, count, c, next);
  }
  for (; c < width; c += kL) weighted_values<kRows, 1>(acc, width, p, v, count, c, next);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
