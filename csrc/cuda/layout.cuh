// Layouts: tiles in shared memory, matrix descriptors, fragments in registers.
//
// These functions are index maths only, for nvcc and any C++17 compiler: the tests call them on the CPU.
// Sources: the PTX ISA on wgmma (fragments, descriptors, 128-byte swizzle) and CUTLASS's description of its canonical
// layouts (include/cute/atom/mma_traits_sm90_gmma.hpp).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HD __host__ __device__ __forceinline__
#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_UNROLL _Pragma("unroll")
#else
#define FASTATTN_HD inline
#define FASTATTN_DEVICE inline
#define FASTATTN_UNROLL
#endif

namespace fastattn {

constexpr int kGroupThreads = 128;  // threads of a warp group
constexpr int kGroupRows = 64;      // query rows of a consumer, a warp group that computes

// The number of consumers of a block; one more warp group loads. At D = 64 exponentials take as long as products: a
// block then needs three consumers so that one multiplies at any time, and has the registers for them.
FASTATTN_HD constexpr int consumers(int head_dim) { return head_dim == 64 ? 3 : 2; }
FASTATTN_HD constexpr int block_rows(int head_dim) { return consumers(head_dim) * kGroupRows; }

// The 128-byte swizzle: in each 1024 bytes, 16-byte chunk c of row r has the place of chunk c ^ r.
FASTATTN_HD constexpr uint32_t swizzle(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// A tile of `rows` rows consists of panels, each 64 elements (128 bytes) wide, one after the other.
FASTATTN_HD constexpr uint32_t panel_bytes(int rows) { return uint32_t(rows) * 128; }

// What a head dim determines for a block: keys of a tile, the number of tiles in shared memory, and their places.
template <int D>
struct Shape {
  static constexpr int kDim = D;
  static constexpr int kPanels = D / 64;
  static constexpr int kConsumers = consumers(D);
  static constexpr int kThreads = kGroupThreads * (1 + kConsumers);
  static constexpr int kRows = block_rows(D);
  static constexpr int kKeys = D == 256 ? 64 : 128;  // as many as registers hold, with a softcap too
  static constexpr int kStages = 2;
  // Registers of a thread. A block starts with 168 each, or 128 with three consumers, and the loader gives up some of
  // its own.
  static constexpr int kLoaderRegisters = kConsumers == 3 ? 32 : 24, kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static constexpr uint32_t kQueryBytes = panel_bytes(kRows) * kPanels;
  static constexpr uint32_t kTileBytes = panel_bytes(kKeys) * kPanels;
  static constexpr uint32_t kTiles = kQueryBytes + 2 * kStages * kTileBytes;

  // Bytes from the first tile, which starts at a multiple of 1024, as the swizzle requires.
  static FASTATTN_HD constexpr uint32_t queries() { return 0; }
  static FASTATTN_HD constexpr uint32_t keys(int stage) { return kQueryBytes + stage * kTileBytes; }
  static FASTATTN_HD constexpr uint32_t values(int stage) { return kQueryBytes + (kStages + stage) * kTileBytes; }

  // Numbers of the barriers, 8 bytes each, which follow the tiles. They say that a tile is full, or free again.
  static constexpr int kFullQueries = 0, kFreeQueries = 1, kBarriers = 2 + 4 * kStages;
  static FASTATTN_HD constexpr int full_keys(int stage) { return 2 + stage; }
  static FASTATTN_HD constexpr int free_keys(int stage) { return 2 + kStages + stage; }
  static FASTATTN_HD constexpr int full_values(int stage) { return 2 + 2 * kStages + stage; }
  static FASTATTN_HD constexpr int free_values(int stage) { return 2 + 3 * kStages + stage; }

  static constexpr uint32_t kBarrierPlace = kTiles;
  static constexpr uint32_t kSharedBytes = 1024 + kBarrierPlace + 8 * kBarriers;  // 1024 more to align the first tile
};

// The byte offset, in a tile of `rows` rows, of the 8 elements `chunk` of `row`.
FASTATTN_HD constexpr uint32_t tile_offset(int rows, int row, int chunk) {
  return swizzle(uint32_t(chunk / 8) * panel_bytes(rows) + row * 128 + chunk % 8 * 16);
}

// A wgmma descriptor: addresses and offsets in units of 16 bytes; 1 in the top bits is the 128-byte swizzle.
FASTATTN_HD constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

// The descriptor of an address `bytes` further on: one addition, since no address in shared memory overflows the field.
FASTATTN_HD constexpr uint64_t moved(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Rows from `row` on of a tile of Q or K with `rows` rows, elements 16 k to 16 k + 15 of the head dim. The product sums
// along these elements ("K-major"). Groups of eight rows are 1024 bytes apart; the leading offset is not used.
FASTATTN_HD constexpr uint64_t row_descriptor(uint32_t tile, int rows, int row, int k) {
  return moved(descriptor(tile, 16, 1024), k / 4 * panel_bytes(rows) + row * 128 + k % 4 * 32);
}

// Keys 16 k to 16 k + 15 of a tile of V with `keys` keys, the whole head dim. The product sums over keys, so the tile
// is read transposed ("MN-major"). The next 64 elements are one panel further on, the next eight keys 1024 bytes.
FASTATTN_HD constexpr uint64_t value_descriptor(uint32_t tile, int keys, int k) {
  return moved(descriptor(tile, panel_bytes(keys), 1024), k * 2048);
}

// The row and column of element i of an m64nN accumulator in thread t of a warp group. Four threads (a quad) share a
// row; each has rows r and r + 8.
FASTATTN_HD constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
FASTATTN_HD constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// As operand A, 16 columns are four registers of two elements. Elements 8 k + 2 j and 8 k + 2 j + 1 of an accumulator
// are register j for columns 16 k to 16 k + 15, so weights pass from one product to the next without moving between
// threads.
FASTATTN_HD constexpr int operand_row(int t, int j) { return t / 32 * 16 + t % 32 / 4 + j % 2 * 8; }
FASTATTN_HD constexpr int operand_column(int t, int j) { return j / 2 * 8 + t % 4 * 2; }

}  // namespace fastattn
