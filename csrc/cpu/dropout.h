// Which probabilities dropout keeps, with the bits of fastattn's reference and of its Triton kernels.
#pragma once

#include "interface.h"
#include "simd.h"

namespace fastattn::cpu::FASTATTN_VARIANT {
namespace {

struct RowKeys {
  uint32_t first, second;
};

// Two words of Philox-4x32-7 (Salmon et al., 2011) at counter (row, head, batch, 0).
inline RowKeys dropout_row_keys(const FastattnOperands& o, int64_t batch, int64_t head, int64_t row) {
  const int64_t seed = *o.seed;
  if (const int64_t* origin = o.dropout_origin) {
    batch += origin[0];
    head += origin[1];
    row = origin[2] + row * origin[3];
  }
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

constexpr uint32_t kColumnFactor = 0x9E3779B1u;

// 24 bits from a full-avalanche mix of the key index, so that tile sizes do not matter. `scaled_column` is the column
// times kColumnFactor.
template <class Bits>
[[gnu::always_inline]] inline Bits dropout_bits(RowKeys keys, Bits scaled_column) {
  Bits x = scaled_column ^ keys.first;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15 ^ keys.second) * 0x846CA68Bu;
  x ^= x >> 16;
  return x >> 8;
}

// The least 24 bits that keep a probability: as a fraction, they are not less than dropout_p as a float.
inline uint32_t dropout_threshold(double dropout_p) {
  const double scaled = double(float(dropout_p)) * double(1 << 24);
  const uint32_t whole = uint32_t(scaled);
  return whole + (double(whole) < scaled ? 1 : 0);
}

// factors[i] = `kept` for the keys key + i that a row keeps, else 0, for i in begin .. end, whole vectors.
template <class T>
inline void dropout_keep(
    const FastattnOperands& o, RowKeys keys, int64_t key, int begin, int end, uint32_t threshold, T kept, T* factors) {
  const int64_t* origin = o.dropout_origin;
  const uint32_t step = (origin == nullptr ? 1 : uint32_t(origin[5])) * kColumnFactor;
  const uint32_t first = (origin == nullptr ? 0 : uint32_t(origin[4])) * kColumnFactor + uint32_t(key) * step;
  if constexpr (sizeof(T) == sizeof(float)) {
    constexpr int lanes = kLanes<float>;
    VecBits scaled;
    for (int n = 0; n < lanes; n++) scaled[n] = first + uint32_t(begin + n) * step;
    for (int i = begin; i < end; i += lanes, scaled += lanes * step) {
      const VecInt<float> bits = (VecInt<float>)dropout_bits(keys, scaled);
      store(factors + i, bits >= int32_t(threshold) ? Vec<float>{} + kept : Vec<float>{});
    }
  } else {
    for (int i = begin; i < end; i++) {
      factors[i] = dropout_bits(keys, first + uint32_t(i) * step) >= threshold ? kept : T(0);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_VARIANT
