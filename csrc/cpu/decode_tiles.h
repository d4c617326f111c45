// Tiles of attention to a KV cache: products of a few query rows with a few keys, and of weights with their values.
#pragma once

#include <cstring>

#include "cache.h"
#include "operand.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

constexpr int kBlock = 128;  // keys whose scores are held at once
constexpr int kKeyTile = 16;  // keys that are read before the next head's

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

// Rows of one head. They are read in the cache, or as copies padded with zeros if they are not whole vectors. A lane
// may hold elements of two rows, so `zeros` may follow the last row.
template <class Element>
struct TileRows {
  const Element* row[kKeyTile];

  // `copy` has room for kKeyTile rows of `padded` elements.
  TileRows(const Positions<Element>& positions, int first, int count, const FastattnView& cache, int64_t head,
           int64_t width, int64_t padded, Element* copy, const Element* zeros) {
    for (int j = 0; j < kKeyTile; j++) {
      row[j] = j < count ? positions.at[first + j] + head * cache.stride[2] : zeros;
    }
    if (cache.stride[3] == 1 && width == padded) return;
    for (int j = 0; j < count; j++, copy += padded) {
      if (cache.stride[3] == 1) {
        std::memcpy(copy, row[j], size_t(width) * sizeof(Element));
      } else {
        for (int64_t c = 0; c < width; c++) copy[c] = row[j][c * cache.stride[3]];
      }
      for (int64_t c = width; c < padded; c++) copy[c] = Element{};
      row[j] = copy;
    }
  }
};

// Prefetches what is read after a tile, line by line in the order of memory. A processor itself prefetches rising
// addresses, but a tile reads the rows of its keys head by head. The target is the second level of cache, which accepts
// more lines at a time than the first.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* at;
  int64_t step;  // kLine, or 0 to fetch nothing more

  void line() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }

  // Whether a vector is the first one of a line, if rows begin at a line.
  template <int lanes, class Element>
  static constexpr bool begins_line(int64_t column) {
    constexpr int64_t elements = kLine / int64_t(sizeof(Element));
    return lanes >= elements || column % elements == 0;
  }
};

// How many elements a vector of lanes holds.
template <class Step, class Compute>
constexpr int kElements = kLanes<Compute>* Step::kParts;

// s[r][j] = <q_r, k_j> for kRows rows and kKeys keys of `width` elements, a multiple of kChains vectors.
template <class Step, int kRows, int kKeys, int kChains, class Compute, class Element>
void products(Compute* s, const Compute* q, const Element* const* k, int64_t width, Ahead& ahead) {
  constexpr int kE = kElements<Step, Compute>, kSums = kRows * kKeys;
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
  for (int64_t c = 0; c < width; c += kChains * kE) {
#pragma GCC unroll 2
    for (int i = 0; i < kChains; i++) {
      Vec<Compute> key[kKeys];
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j++) {
        if (Ahead::begins_line<kE, Element>(c + i * kE)) next.line();
        key[j] = Step::neighbours(k[j] + c + i * kE);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const Vec<Compute> query = load<Compute>(q + (r * width + c + i * kE) / Step::kParts);
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; j++) sum[i][r][j] = Step::add(sum[i][r][j], query, key[j]);
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

// The sums of a tile: as many as the registers hold, and enough that no addition waits for the one before.
constexpr int kSumsHeld = FASTATTN_VECTOR_BYTES == 64 ? 16 : 8;

template <class Step, int kRows, class Compute, class Element>
__attribute__((noinline)) void all_products(Compute* s, const Compute* q, const Element* const* k, int count,
                                            int64_t width, Ahead& ahead) {
  constexpr int kKeys = kRows == 4 ? kSumsHeld / 4 : 4;
  constexpr int kChains = kRows == 1 ? 2 : 1;  // times the keys: enough sums that no addition waits
  int j = 0;
  if (width % (kChains * kElements<Step, Compute>) == 0) {
    for (; j + kKeys <= count; j += kKeys) products<Step, kRows, kKeys, kChains>(s + j, q, k + j, width, ahead);
  }
  for (; j < count; j++) products<Step, kRows, 1, 1>(s + j, q, k + j, width, ahead);
}

// acc[r] += sum_j p[r][j] v_j, over the columns of kVectors vectors. A lane of p holds the weights of Step::kParts
// keys.
template <class Step, int kRows, int kVectors, class Compute, class Element>
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
  for (int j = 0; j < count; j += Step::kParts, p++) {
    V value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors * Step::kParts; i += Step::kParts) {
      if (Ahead::begins_line<kL, Element>(column + i * kL)) next.line();
    }
    Step::template columns<kVectors>(v + j, column, value);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Compute weight = p[r * kBlock];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) sum[r][i] = Step::add(sum[r][i], weight, value[i]);
    }
  }
  ahead = next;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) store(acc + r * width + column + i * kL, sum[r][i]);
  }
}

template <class Step, int kRows, class Compute, class Element>
__attribute__((noinline)) void all_weighted_values(Compute* acc, int64_t width, const Compute* p,
                                                   const Element* const* v, int count, Ahead& ahead) {
  constexpr int kVectors = kSumsHeld / kRows > 8 ? 8 : kSumsHeld / kRows, kL = kLanes<Compute>;
  int64_t c = 0;
  for (; c + kVectors * kL <= width; c += kVectors * kL) {
    weighted_values<Step, kRows, kVectors>(acc, width, p, v, count, c, ahead);
  }
  for (; c < width; c += Step::kParts * kL) {
    weighted_values<Step, kRows, Step::kParts>(acc, width, p, v, count, c, ahead);
  }
}

// s[h * step] = <q_h, k_h> for one position, whose heads are adjacent in memory, with one query row each. Heads are
// taken in fours, the last of which may be fewer, so that sums do not depend on how heads are divided among threads.
template <class Step, int kHeads, class Compute, class Element>
void products_of_heads(Compute* s, int64_t step, const Compute* q, const Element* k, int64_t width, Ahead& ahead) {
  Vec<Compute> sum[4] = {};
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; h++) {
    for (int64_t c = h * width; c < (h + 1) * width; c += kElements<Step, Compute>) {
      if (Ahead::begins_line<kElements<Step, Compute>, Element>(c)) ahead.line();
      sum[h] = Step::add(sum[h], load<Compute>(q + c / Step::kParts), Step::neighbours(k + c));
    }
  }
  Compute sums[4];
  sums_of_lanes<4>(sums, sum);
  for (int h = 0; h < kHeads; h++) s[h * step] = sums[h];
}

template <class Step, class Compute, class Element>
__attribute__((noinline)) void all_products_of_heads(Compute* s, int64_t step, const Compute* q, const Element* k,
                                                     int64_t width, int64_t heads, Ahead ahead) {
  const int64_t lanes = width / Step::kParts;
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) products_of_heads<Step, 4>(s + h * step, step, q + h * lanes, k + h * width, width, ahead);
  if (heads % 4 == 1) products_of_heads<Step, 1>(s + h * step, step, q + h * lanes, k + h * width, width, ahead);
  if (heads % 4 == 2) products_of_heads<Step, 2>(s + h * step, step, q + h * lanes, k + h * width, width, ahead);
  if (heads % 4 == 3) products_of_heads<Step, 3>(s + h * step, step, q + h * lanes, k + h * width, width, ahead);
}

// acc[h * acc_step] += sum_j p[h * step][j] v_j,h over kAtOnce lanes of p, for positions whose heads are adjacent.
template <class Step, int kAtOnce, class Compute, class Element>
__attribute__((noinline)) void weighted_values_of_heads(Compute* acc, int64_t acc_step, const Compute* p, int64_t step,
                                                        const Element* const* v, int64_t width, int64_t heads,
                                                        Ahead* ahead) {
  constexpr int kParts = Step::kParts, kVectors = kParts;
  for (int64_t h = 0; h < heads; h++, acc += acc_step, p += step) {
    for (int64_t c = 0; c < width; c += kVectors * kLanes<Compute>) {
      Vec<Compute> sum[kVectors], value[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) sum[n] = load<Compute>(acc + c + n * kLanes<Compute>);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i++) {
#pragma GCC unroll 2
        for (int n = 0; n < kParts; n++) {
          if (Ahead::begins_line<kVectors * kLanes<Compute>, Element>(h * width + c)) ahead[i * kParts + n].line();
        }
        Step::template columns<kVectors>(v + i * kParts, h * width + c, value);
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; n++) sum[n] = Step::add(sum[n], p[i], value[n]);
      }
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) store(acc + c + n * kLanes<Compute>, sum[n]);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
