// One block of the forward pass: 128 query rows of one head against the keys they see (FlashAttention-2's loop; Dao,
// 2023, arXiv:2307.08691).
//
// The steps are written once and run on a Machine: the GPU (attention_forward.cu), where each thread is one, or the
// tests' model of it (tests/support/emulator.cpp), which goes through all threads between two barriers. A Machine has
//   each(f)                       f on every thread's registers, a Registers<D>
//   groups(f)                     f on every warp group's number
//   copy(to, from, inside)        16 bytes into shared memory, zeros where not inside; asynchronous
//   committed(), arrived(n)       a group of copies ends; all but the last n groups are there, for every thread
//   begin(), end()                around products, which are asynchronous
//   scores(group, a, b, add)      s (+)= a b^T, 64 x 128 x 16, both from shared memory
//   values(group, k, b)           o += p b, 64 x D x 16, columns 16 k of p from registers
//   quad_max(), quad_sum()        of `peak` and `sum`, over the four threads that share a row
//   exp2(x), log2(x), pack(a, b), tile(i) (the address of tile i in shared memory)
#pragma once

#include <cmath>
#include <type_traits>

#include "interface.cuh"
#include "layout.cuh"

#ifdef __CUDACC__
#define FASTATTN_DEVICE __device__ __forceinline__
#else
#define FASTATTN_DEVICE inline
#endif

namespace fastattn {

constexpr float kInfinity = __builtin_huge_valf();

template <int D>
struct Registers {
  int index;             // 0 to 255
  float s[kRows / 2];    // scores, then weights: fragment of 64 x 128
  uint32_t p[kRows / 4];  // weights in the inputs' dtype: operand A of eight products
  float o[D / 2];        // fragment of 64 x D
  float peak[2], sum[2];  // of rows r and r + 8: running maximum of the unscaled scores, and sum of the weights
  float maximum[2];
  int limit[2];  // how many keys the row sees
};

// 128 rows from row `first` of a (length, D) matrix; rows past its end are zeros.
template <int D, class Machine>
FASTATTN_DEVICE void load(Machine& machine, uint32_t tile, const uint16_t* matrix, int64_t stride, int first,
                          int length) {
  machine.each([&](auto& t) {
    FASTATTN_UNROLL for (int n = 0; n < kRows * D / 8 / kThreads; ++n) {
      const int row = (t.index + n * kThreads) / (D / 8), chunk = t.index % (D / 8);
      const bool inside = first + row < length;
      const int64_t element = inside ? (first + row) * stride + chunk * 8 : 0;
      machine.copy(tile + tile_offset(row, chunk), matrix + element, inside);
    }
  });
}

template <int D, class Machine>
FASTATTN_DEVICE void attend(Machine& machine, const FastattnForward& f, int64_t block) {
  const int64_t pair = block / tiles(f.q_len);
  const int64_t batch = pair / f.q_heads, head = pair % f.q_heads, kv_head = head / (f.q_heads / f.kv_heads);
  const auto* q = static_cast<const uint16_t*>(f.q) + batch * f.q_stride[0] + head * f.q_stride[1];
  const auto* k = static_cast<const uint16_t*>(f.k) + batch * f.k_stride[0] + kv_head * f.k_stride[1];
  const auto* v = static_cast<const uint16_t*>(f.v) + batch * f.v_stride[0] + kv_head * f.v_stride[1];
  const int first = first_row(block, f.q_len);
  const int count = key_tiles(first, f.q_len, f.kv_len, f.causal, f.q_offset);
  const float scale = f.scale * 1.4426950408889634f;  // log2(e): weights are powers of two

  machine.each([&](auto& t) {
    FASTATTN_UNROLL for (int i = 0; i < kRows / 2; ++i) t.s[i] = 0.0f;
    FASTATTN_UNROLL for (int i = 0; i < kRows / 4; ++i) t.p[i] = 0;
    FASTATTN_UNROLL for (int i = 0; i < D / 2; ++i) t.o[i] = 0.0f;
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = first + t.index / 128 * 64 + fragment_row(t.index % 128, 2 * r);
      t.limit[r] = visible_keys(row, f.kv_len, f.causal, f.q_offset);
      t.maximum[r] = -kInfinity;
      t.sum[r] = 0.0f;
    }
  });

  const auto load_keys = [&](int tile) {
    load<D>(machine, machine.tile(1 + tile % kStages), k, f.k_stride[2], tile * kRows, f.kv_len);
  };
  const auto load_values = [&](int tile) {
    load<D>(machine, machine.tile(1 + kStages + tile % kStages), v, f.v_stride[2], tile * kRows, f.kv_len);
  };
  if (count > 0) {
    load<D>(machine, machine.tile(0), q, f.q_stride[2], first, f.q_len);
    load_keys(0);
    machine.committed();
    load_values(0);
    machine.committed();
  }
  for (int tile = 0; tile < count; ++tile) {
    // One group of copies for keys and one for values, in every round: what is awaited is counted from the end.
    // Once all threads have passed the barrier, nobody reads the tiles of the last round any more.
    machine.arrived(std::integral_constant<int, 1>());
    if (tile + 1 < count) load_keys(tile + 1);
    machine.committed();
    if (tile + 1 < count) load_values(tile + 1);
    machine.committed();

    machine.begin();
    machine.groups([&](int group) {
      FASTATTN_UNROLL for (int n = 0; n < D / 16; ++n) {
        machine.scores(group, row_descriptor(machine.tile(0), group * 64, n),
                       row_descriptor(machine.tile(1 + tile % kStages), 0, n), n > 0);
      }
    });
    machine.end();

    machine.each([&](auto& t) {
      const int first_key = tile * kRows;
      if (t.limit[0] < first_key + kRows || t.limit[1] < first_key + kRows) {
        FASTATTN_UNROLL for (int i = 0; i < kRows / 2; ++i) {
          if (first_key + fragment_column(t.index, i) >= t.limit[i / 2 % 2]) t.s[i] = -kInfinity;
        }
      }
      FASTATTN_UNROLL for (int r = 0; r < 2; ++r) t.peak[r] = t.maximum[r];
      FASTATTN_UNROLL for (int i = 0; i < kRows / 2; ++i) {
        t.peak[i / 2 % 2] = fmaxf(t.peak[i / 2 % 2], t.s[i]);
      }
    });
    machine.quad_max();
    machine.each([&](auto& t) {
      float base[2], correction[2];
      FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
        base[r] = t.peak[r] == -kInfinity ? 0.0f : t.peak[r] * scale;  // no key yet: -inf - -inf would be NaN
        correction[r] = machine.exp2(t.maximum[r] * scale - base[r]);
        t.maximum[r] = t.peak[r];
        t.sum[r] *= correction[r];
      }
      FASTATTN_UNROLL for (int i = 0; i < kRows / 2; ++i) {
        t.s[i] = machine.exp2(t.s[i] * scale - base[i / 2 % 2]);
        t.sum[i / 2 % 2] += t.s[i];
      }
      FASTATTN_UNROLL for (int i = 0; i < kRows / 4; ++i) t.p[i] = machine.pack(t.s[2 * i], t.s[2 * i + 1]);
      FASTATTN_UNROLL for (int i = 0; i < D / 2; ++i) t.o[i] *= correction[i / 2 % 2];
    });

    machine.arrived(std::integral_constant<int, 2>());
    machine.begin();
    machine.groups([&](int group) {
      FASTATTN_UNROLL for (int n = 0; n < kRows / 16; ++n) {
        machine.values(group, n, value_descriptor(machine.tile(1 + kStages + tile % kStages), n));
      }
    });
    machine.end();
  }

  machine.quad_sum();
  auto* out = static_cast<uint16_t*>(f.out) + batch * f.out_stride[0] + head * f.out_stride[1];
  machine.each([&](auto& t) {
    FASTATTN_UNROLL for (int r = 0; r < 2; ++r) {
      const int row = first + t.index / 128 * 64 + fragment_row(t.index % 128, 2 * r);
      if (row >= f.q_len) continue;
      const float inverse = t.sum[r] == 0.0f ? 0.0f : 1.0f / t.sum[r];  // nothing allowed: output 0
      auto* line = reinterpret_cast<uint32_t*>(out + row * f.out_stride[2] + t.index % 4 * 2);
      FASTATTN_UNROLL for (int i = 0; i < D / 8; ++i) {
        line[i * 4] = machine.pack(t.o[4 * i + 2 * r] * inverse, t.o[4 * i + 2 * r + 1] * inverse);
      }
      if (t.index % 4 == 0) {
        f.lse[pair * f.q_len + row] = (t.maximum[r] * scale + machine.log2(t.sum[r])) * 0.6931471805599453f;
      }
    }
  });
}

}  // namespace fastattn
