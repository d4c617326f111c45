// Which probabilities dropout keeps: the bits of fastattn's reference and of its Triton kernels.
#pragma once

#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

struct RowKeys {
  uint32_t first, second;
};

// Two words of Philox-4x32-7 (Salmon et al., 2011) at counter (row, head, batch, 0).
inline RowKeys dropout_row_keys(int64_t seed, int64_t batch, int64_t head, int64_t row) {
  uint32_t c[4] = {uint32_t(row), uint32_t(head), uint32_t(batch), 0};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(uint64_t(seed) >> 32);
  for (int round = 0; round < 7; round++) {
    const uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u, product1 = uint64_t(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {uint32_t(product1 >> 32) ^ c[1] ^ key0, uint32_t(product1),
                              uint32_t(product0 >> 32) ^ c[3] ^ key1, uint32_t(product0)};
    for (int i = 0; i < 4; i++) c[i] = next[i];
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c[0], c[1]};
}

// A full-avalanche mix of the key index, so that tile sizes do not matter.
inline bool dropout_keep(RowKeys keys, uint32_t column, uint32_t threshold) {
  uint32_t x = (column * 0x9E3779B1u) ^ keys.first;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15 ^ keys.second) * 0x846CA68Bu;
  x ^= x >> 16;
  return x >> 8 >= threshold;
}

// The upper 24 bits, as a fraction, are compared with dropout_p as a float.
inline uint32_t dropout_threshold(double dropout_p) {
  const double scaled = double(float(dropout_p)) * double(1 << 24);
  const uint32_t whole = uint32_t(scaled);
  return whole + (double(whole) < scaled ? 1 : 0);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
