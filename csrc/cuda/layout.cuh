// Where things are: tiles in shared memory, matrix descriptors, fragments in registers, tile bounds.
//
// Index maths alone, for nvcc and for any C++17 compiler: the tests call these functions on the CPU.
// Sources: the PTX ISA on wgmma (fragments, descriptors, 128-byte swizzle) and CUTLASS's description of its canonical
// layouts (include/cute/atom/mma_traits_sm90_gmma.hpp).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HD __host__ __device__ __forceinline__
#define FASTATTN_UNROLL _Pragma("unroll")
#else
#define FASTATTN_HD inline
#define FASTATTN_UNROLL
#endif

namespace fastattn {

constexpr int kGroups = 2;               // warp groups of 128 threads; each has 64 of the block's query rows
constexpr int kThreads = 128 * kGroups;  // per block
constexpr int kRows = 128;               // query rows of a block, and keys of a tile
constexpr int kStages = 2;               // tiles of keys and values in shared memory
constexpr int kPanelBytes = kRows * 128;  // 128 rows of 64 elements

// The 128-byte swizzle: in each 1024 bytes, 16-byte chunk c of row r stands where chunk c ^ r would.
FASTATTN_HD constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Byte in a tile of the 8 elements `chunk` of `row`. A tile is one panel after the other, 64 elements wide each.
FASTATTN_HD constexpr uint32_t tile_offset(int row, int chunk) {
  return swizzle(uint32_t(chunk / 8 * kPanelBytes + row * 128 + chunk % 8 * 16));
}

// A wgmma descriptor: addresses and offsets in units of 16 bytes; 1 in the top bits is the 128-byte swizzle.
FASTATTN_HD constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

// Rows from `row` of Q or K, elements 16 k to 16 k + 15 of the head dim, along which the product sums ("K-major").
// Eight rows are 1024 bytes apart from the next eight; the leading offset is not used.
FASTATTN_HD constexpr uint64_t row_descriptor(uint32_t tile, int row, int k) {
  return descriptor(tile + k / 4 * kPanelBytes + row * 128 + k % 4 * 32, 16, 1024);
}

// Keys 16 k to 16 k + 15 of V, all of the head dim: the product sums over keys, so it is read transposed
// ("MN-major"). The next 64 elements are a panel away, the next eight keys 1024 bytes.
FASTATTN_HD constexpr uint64_t value_descriptor(uint32_t tile, int k) {
  return descriptor(tile + k * 2048, kPanelBytes, 1024);
}

// Element i of an m64nN accumulator in thread t of a warp group stands at this row and column. Four threads (a quad)
// share a row; each has rows r and r + 8.
FASTATTN_HD constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
FASTATTN_HD constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// As operand A, 16 columns are four registers of two elements: elements 8 k + 2 j and 8 k + 2 j + 1 of an accumulator
// are those of register j of columns 16 k to 16 k + 15, so the weights move from one product into the next in place.
FASTATTN_HD constexpr int operand_row(int t, int j) { return t / 32 * 16 + t % 32 / 4 + j % 2 * 8; }
FASTATTN_HD constexpr int operand_column(int t, int j) { return j / 2 * 8 + t % 4 * 2; }

// How many keys, from the first, a query row sees: all, or those up to its own position.
FASTATTN_HD constexpr int visible_keys(int row, int kv_len, bool causal, int64_t q_offset) {
  const int64_t end = causal ? row + q_offset + 1 : kv_len;
  return int(end < 0 ? 0 : end < kv_len ? end : kv_len);
}

FASTATTN_HD constexpr int tiles(int length) { return (length + kRows - 1) / kRows; }

// First query row of a block among those of one head. Late rows see most where order is causal: they start first.
FASTATTN_HD constexpr int first_row(int64_t block, int q_len) {
  return (tiles(q_len) - 1 - int(block % tiles(q_len))) * kRows;
}

// Tiles of keys that some row of the block sees.
FASTATTN_HD constexpr int key_tiles(int first, int q_len, int kv_len, bool causal, int64_t q_offset) {
  const int last = first + kRows < q_len ? first + kRows - 1 : q_len - 1;
  return tiles(visible_keys(last, kv_len, causal, q_offset));
}

}  // namespace fastattn
